"""State of a memory: records for its banks, buses and queues, and the constants of a run.

Records and few arrays, because a machine's loop takes the state apart in every call that it
compiles. What a scheduler looks at together lies together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparseloom.hardware.units.address_mapping import TABLE_BITS, decode
from sparseloom.hardware.units.dram_config import MemoryConfig

NEVER = 1 << 60
"""A clock that does not come."""

BANK_BITS = 24
"""Of a decoded address: number of the bank below, row above."""

READS, WRITES, ACTIVATES, PRECHARGES, ROW_HITS, REFRESHES, BUSY = range(7)
"""Places in `Dram.counters`; BUSY is data-bus clocks, summed over pseudo-channels."""

ACCEPTED, TAKEN, NEXT_EVENT, LOGGED = range(7, 11)
"""Further places: requests so far, reads taken, first clock of any event, commands so far."""

OPEN, CLOSE, ACT_FROM, COLUMN, HIT, MISS = range(6)
"""Rows of a pseudo-channel's board; COLUMN, HIT and MISS have a second one for writes at + KIND."""

KIND, BOARD_ROWS = 3, 9

KEY_BITS = 8
"""Of a key: the bank in its pseudo-channel; above, the order of arrival."""


def _record(*, wide: str, narrow: str = "") -> np.dtype[np.void]:
    fields = [(name, np.int64) for name in wide.split()]
    return np.dtype([*fields, *((name, np.int32) for name in narrow.split())], align=True)


# A side is the reads or the writes of a bank, a lane those of a pseudo-channel: side 2b + k and
# lane 2p + k, k = 0 for reads. A clock in a field is the first one in which what it names is legal.
SLOT = _record(wide="order tag", narrow="row next previous unused")
# opener: a request has opened the row and is not served yet.
BANK = _record(wide="close", narrow="row opener pseudo unused")
SIDE = _record(wide="", narrow="hit miss head tail")
PSEUDO = _record(
    wide="refresh next_column after_column next_row after_row open "
    "opened_1 opened_2 opened_3 opened_4 opened"
)
LANE = _record(wide="bus openers")
CHANNEL = _record(wide="wake row_bus taken filled mode free outstanding reads writes")
RESPONSE = _record(wide="clock tag")
COMMAND = _record(wide="clock command pseudo bank row")
CONSTANTS = _record(
    wide="channels channel_shift pseudo banks group_banks atom_shift shared_bus reads writes high "
    "low outstanding ring read_latency rp ras rc rtp wr_pre ccd_s ccd_l rd_wr wr_rd_s wr_rd_l "
    "rrd_s rrd_l faw act burst refi rfc rcd_read rcd_write"
)


Records = Any
"""Arrays of records, whose fields a type checker does not know."""


class Dram(NamedTuple):
    """State of a memory; make one with `make_dram`. All arrays have one dimension.

    What a scheduler looks through stands on the board, where the compiler can look at several
    banks at once. OPEN: clock from which an ACT is legal, NEVER for an open bank; CLOSE: that of
    a PRE, NEVER for a closed bank and one whose opener waits; ACT_FROM: as OPEN, for open banks
    too; COLUMN: that of a read or write. HIT and MISS: key of the oldest request to the open row
    and to another one, NEVER without; that of an opener is below 0.
    """

    constants: Records  # (1) CONSTANTS
    tables: np.ndarray  # (3 × 2^TABLE_BITS): a decoded address is the XOR of three look-ups
    slots: Records  # (channels × slots) SLOT: requests; `next` also chains the free ones
    banks: Records  # (banks of the memory) BANK
    sides: Records  # (2 × banks of the memory) SIDE
    pseudo: Records  # (pseudo-channels of the memory) PSEUDO
    lanes: Records  # (2 × pseudo-channels of the memory) LANE
    board: np.ndarray  # (pseudo-channels × BOARD_ROWS × banks): see below
    channels: Records  # (channels) CHANNEL
    ring: Records  # (channels × ring) RESPONSE: data on its way or not taken
    counters: np.ndarray  # (11)
    log: Records  # (capacity) COMMAND


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
    # A power of two: a place in the ring is a mask away.
    ring = 1 << q.outstanding_reads.bit_length()
    state = Dram(
        constants=_constants(config, ring),
        tables=_tables(config),
        slots=np.zeros(channels * slots, SLOT),
        banks=np.zeros(p * banks, BANK),
        sides=np.zeros(2 * p * banks, SIDE),
        pseudo=np.zeros(p, PSEUDO),
        lanes=np.zeros(2 * p, LANE),
        board=np.zeros(p * BOARD_ROWS * banks, np.int64),
        channels=np.zeros(channels, CHANNEL),
        ring=np.zeros(channels * ring, RESPONSE),
        counters=np.zeros(11, np.int64),
        log=np.zeros(log, COMMAND),
    )
    last = np.arange(1, channels * slots + 1) % slots == 0
    state.slots["next"] = np.where(last, -1, np.arange(1, channels * slots + 1))
    state.channels["free"] = np.arange(channels) * slots
    state.banks["row"] = -1
    state.banks["pseudo"] = np.arange(p * banks) // banks
    for field in ("hit", "miss", "head", "tail"):
        state.sides[field] = -1
    for i in range(1, 5):
        state.pseudo[f"opened_{i}"] = -NEVER
    state.pseudo["next_column"] = NEVER
    state.pseudo["refresh"] = first
    state.pseudo["next_row"] = first
    state.channels["wake"] = first
    board = state.board.reshape(p, BOARD_ROWS, banks)
    board[:, [CLOSE, HIT, MISS, HIT + KIND, MISS + KIND]] = NEVER
    state.counters[NEXT_EVENT] = first
    return state


def _constants(config: MemoryConfig, ring: int) -> np.ndarray:
    t, q = config.timing_clocks, config.controller
    late = t.activate_command - 1
    numbers = {
        "channels": config.channels,
        "channel_shift": (config.banks * config.pseudo_channels).bit_length() - 1,
        "pseudo": config.pseudo_channels,
        "banks": config.banks,
        "group_banks": config.banks_per_group,
        "atom_shift": config.atom_bytes.bit_length() - 1,
        "shared_bus": int(config.command_bus == "shared"),
        "reads": q.read_entries,
        "writes": q.write_entries,
        "high": max(1, int(q.write_high_fraction * q.write_entries)),
        "low": int(q.write_low_fraction * q.write_entries),
        "outstanding": q.outstanding_reads,
        "ring": ring,
        "read_latency": t.read_latency + t.burst + q.response_clocks,
        "rp": t.rp,
        "ras": t.ras + late,
        "rc": t.rc,
        "rtp": t.rtp,
        "wr_pre": t.write_latency + t.burst + t.wr,
        "ccd_s": max(t.ccd_s, t.burst),
        "ccd_l": t.ccd_l,
        "rd_wr": max(1, t.read_latency + t.burst + t.read_to_write_gap - t.write_latency),
        "wr_rd_s": t.write_latency + t.burst + t.wtr_s,
        "wr_rd_l": t.write_latency + t.burst + t.wtr_l,
        "rrd_s": t.rrd_s,
        "rrd_l": t.rrd_l,
        "faw": t.faw,
        "act": t.activate_command,
        "burst": t.burst,
        "refi": config.refresh_clocks.interval,
        "rfc": config.refresh_clocks.all_banks,
        "rcd_read": t.rcd_read + late,
        "rcd_write": t.rcd_write + late,
    }
    found = np.zeros(1, CONSTANTS)
    for name, number in numbers.items():
        found[name] = number
    return found


def _tables(config: MemoryConfig) -> np.ndarray:
    """(3 × 2^TABLE_BITS): bank of the memory and row, of each third of an atom's number."""
    bits = config.field_bits
    index = np.arange(1 << TABLE_BITS, dtype=np.int64)
    tables = np.zeros((3, len(index)), np.int64)
    for i in range(3):
        f = decode(config.mapping, bits, index << (TABLE_BITS * i))
        bank = f["channel"]
        for field in ("pseudo_channel", "bank_group", "bank"):
            bank = (bank << bits[field]) | f[field]
        tables[i] = (f["row"] << BANK_BITS) | bank
    return tables.ravel()
