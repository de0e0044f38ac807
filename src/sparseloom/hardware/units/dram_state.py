"""State of a memory: few integer arrays, with a name for every column.

Compiled functions take the whole state; each array costs time in every call, so there are few.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparseloom.hardware.units.address_mapping import TABLE_BITS, decode
from sparseloom.hardware.units.dram_config import MemoryConfig

NEVER = 1 << 60
"""A clock that does not come."""

BANK_BITS = 24
"""Of a decoded address: number of the bank below, row above."""

READS, WRITES, ACTIVATES, PRECHARGES, ROW_HITS, REFRESHES, BUSY = range(7)
"""Places in `Dram.counters`; BUSY is data-bus clocks, summed over pseudo-channels."""

ACCEPTED, NEXT_EVENT, LOGGED = range(7, 10)
"""Further places: requests and commands so far, the first clock in which anything can happen."""

# Dram.slots: a request. OPENER: it has opened its row and is not served yet.
S_ORDER, S_ROW, S_BANK, S_KIND, S_TAG, S_NEXT, S_PREVIOUS, S_OPENER = range(8)

# Dram.banks; two columns (reads, writes) where a kind is added, PLACE has four (kind, list).
B_ROW, B_OPENER, B_PRE, B_ACT = range(4)
B_HIT, B_MISS, B_COLUMN, B_HEAD, B_TAIL, B_PLACE = range(4, 16, 2)

# Dram.groups: columns 0 and 1 are the clocks from which a read and a write are legal.
G_ACT = 2

# Dram.pseudo: LISTED has four columns (kind, list), WINDOW the clocks of the last four ACTs.
P_REFRESH, P_NEXT_COLUMN, P_NEXT_ROW, P_OPENED, P_ACT, P_OLDEST = range(6)
P_OPENERS, P_COLUMN, P_LISTED, P_WINDOW = 6, 8, 10, 14

# Dram.channels
C_WAKE, C_MODE, C_ROW_BUS, C_FREE_USED, C_OUTSTANDING, C_TAKEN, C_FILLED, C_WAITING = range(8)

# Dram.numbers: the constants of a run, sizes first.
(
    N_CHANNELS,
    N_PSEUDO,
    N_BANKS,
    N_BANK_SHIFT,
    N_GROUP_SHIFT,
    N_ATOM_SHIFT,
    N_SHARED_BUS,
    N_READS,
    N_WRITES,
    N_HIGH,
    N_LOW,
    N_OUTSTANDING,
    N_READ_LATENCY,
    N_RP,
    N_RAS,
    N_RC,
    N_RTP,
    N_WR_PRE,
    N_CCD_S,
    N_CCD_L,
    N_RD_WR,
    N_WR_RD_S,
    N_WR_RD_L,
    N_RRD_S,
    N_RRD_L,
    N_FAW,
    N_ACT,
    N_BURST,
    N_REFI,
    N_RFC,
    N_RCD,
    N_RCD_WRITE,
) = range(32)


class Dram(NamedTuple):
    """State of a memory; make one with `make_dram`.

    c: channel, p: pseudo-channel of the memory, b: bank of the memory, k: kind (0 read, 1 write).
    A clock in a column is the first one in which what the column names is legal.
    """

    numbers: np.ndarray  # constants, N_*
    tables: np.ndarray  # (3, 2^TABLE_BITS): a decoded address is the XOR of three look-ups
    slots: np.ndarray  # (c, slots, 8): requests, S_*
    free: np.ndarray  # (c, slots): stack of free slots
    banks: np.ndarray  # (b, 18): B_*
    groups: np.ndarray  # (bank groups of the memory, 3)
    pseudo: np.ndarray  # (p, 18): P_*
    lists: np.ndarray  # (p, k, 2, banks): banks with hits and with misses, in no order
    channels: np.ndarray  # (c, 9): C_*
    ring: np.ndarray  # (c, r, 2): clock and tag of responses not yet taken
    counters: np.ndarray  # (10)
    log: np.ndarray  # (capacity, 5): clock, command, pseudo-channel, bank, row


def make_dram(config: MemoryConfig, *, log: int = 0) -> Dram:
    """An idle memory with closed banks.

    Args:
        config: the memory.
        log: how many commands the command log holds (further ones are counted only).
    """
    q = config.controller
    channels, pseudo, banks = config.channels, config.pseudo_channels, config.banks
    p = channels * pseudo
    slots = q.read_entries + q.write_entries + pseudo * banks
    first = config.refresh_clocks.interval or NEVER
    state = Dram(
        numbers=_numbers(config),
        tables=_tables(config),
        slots=np.full((channels, slots, 8), -1, np.int64),
        free=np.tile(np.arange(slots, dtype=np.int64), (channels, 1)),
        banks=np.full((p * banks, 18), -1, np.int64),
        groups=np.zeros((p * config.bank_groups, 3), np.int64),
        pseudo=np.zeros((p, 18), np.int64),
        lists=np.zeros((p, 2, 2, banks), np.int64),
        channels=np.zeros((channels, 9), np.int64),
        # A power of two: a place in the ring is a mask away.
        ring=np.zeros((channels, 1 << q.outstanding_reads.bit_length(), 2), np.int64),
        counters=np.zeros(10, np.int64),
        log=np.zeros((log, 5), np.int64),
    )
    state.banks[:, [B_OPENER, B_PRE, B_ACT, B_COLUMN, B_COLUMN + 1]] = 0
    state.pseudo[:, P_WINDOW : P_WINDOW + 4] = -NEVER
    state.pseudo[:, [P_REFRESH, P_NEXT_ROW]] = first
    state.pseudo[:, P_NEXT_COLUMN] = NEVER
    state.channels[:, C_FREE_USED] = slots
    state.channels[:, C_WAKE] = first
    state.counters[NEXT_EVENT] = first
    return state


def _numbers(config: MemoryConfig) -> np.ndarray:
    t, q = config.timing_clocks, config.controller
    late = t.activate_command - 1
    numbers = {
        N_CHANNELS: config.channels,
        N_PSEUDO: config.pseudo_channels,
        N_BANKS: config.banks,
        N_BANK_SHIFT: config.banks.bit_length() - 1,
        N_GROUP_SHIFT: config.banks_per_group.bit_length() - 1,
        N_ATOM_SHIFT: config.atom_bytes.bit_length() - 1,
        N_SHARED_BUS: int(config.command_bus == "shared"),
        N_READS: q.read_entries,
        N_WRITES: q.write_entries,
        N_HIGH: max(1, int(q.write_high_fraction * q.write_entries)),
        N_LOW: int(q.write_low_fraction * q.write_entries),
        N_OUTSTANDING: q.outstanding_reads,
        N_READ_LATENCY: t.read_latency + t.burst + q.response_clocks,
        N_RP: t.rp,
        N_RAS: t.ras + late,
        N_RC: t.rc,
        N_RTP: t.rtp,
        N_WR_PRE: t.write_latency + t.burst + t.wr,
        N_CCD_S: max(t.ccd_s, t.burst),
        N_CCD_L: t.ccd_l,
        N_RD_WR: max(1, t.read_latency + t.burst + t.read_to_write_gap - t.write_latency),
        N_WR_RD_S: t.write_latency + t.burst + t.wtr_s,
        N_WR_RD_L: t.write_latency + t.burst + t.wtr_l,
        N_RRD_S: t.rrd_s,
        N_RRD_L: t.rrd_l,
        N_FAW: t.faw,
        N_ACT: t.activate_command,
        N_BURST: t.burst,
        N_REFI: config.refresh_clocks.interval,
        N_RFC: config.refresh_clocks.all_banks,
        N_RCD: t.rcd_read + late,
        N_RCD_WRITE: t.rcd_write + late,
    }
    return np.array([numbers[place] for place in range(len(numbers))], np.int64)


def _tables(config: MemoryConfig) -> np.ndarray:
    """(3, 2^TABLE_BITS): bank of the memory and row, of each third of an atom's number."""
    bits = config.field_bits
    index = np.arange(1 << TABLE_BITS, dtype=np.int64)
    tables = np.zeros((3, len(index)), np.int64)
    for i in range(3):
        f = decode(config.mapping, bits, index << (TABLE_BITS * i))
        bank = f["channel"]
        for field in ("pseudo_channel", "bank_group", "bank"):
            bank = (bank << bits[field]) | f[field]
        tables[i] = (f["row"] << BANK_BITS) | bank
    return tables
