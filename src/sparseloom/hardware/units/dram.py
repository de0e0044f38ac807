"""DRAM at command level: banks, buses, refresh and an FR-FCFS controller for each channel.

A cycle simulator steps it inside its own compiled loop:

    while running:
        if can_accept(dram, channel):
            push(dram, channel, address, False, tag, now)
        step(dram, now)
        tag = pop(dram, channel, now)       # −1: nothing is ready
        now += 1

`now` counts clocks of the memory and never falls; clocks before `next_event` may be left out.
What a controller does in one clock: of all requests whose column command is legal now it issues
that of the oldest, and of all whose row command (ACT or PRE) is legal now that of the oldest; on a
`shared` command bus only one of the two, the column command first. A request that has opened a row
leaves the queue, waits at its bank, goes before all others, and no PRE closes the row before it is
served (as in Ramulator 2). Rows stay open (open page). Writes wait in a queue of their own.

Not modelled: ranks, single-bank refresh, power-down, forwarding of queued writes to reads (a read
is served from the array, in whichever order the queues give), ECC.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.units.address_mapping import TABLE_BITS, decode
from sparseloom.hardware.units.dram_config import MemoryConfig

READS, WRITES, ACTIVATES, PRECHARGES, ROW_HITS, REFRESHES, BUSY = range(7)
"""Places in `Dram.counters`; BUSY is data-bus clocks, summed over pseudo-channels."""

RD, WR, ACT, PRE, PREA, REF = range(6)
"""Commands in the command log."""

NEVER = 1 << 60

_BANK_BITS = 24  # of a decoded address: bank of the channel below, row above
_MASK = (1 << TABLE_BITS) - 1


class Clocks(NamedTuple):
    """Timing as plain numbers (they are constants of a run, but live in the state)."""

    read_latency: int
    rcd: tuple[int, int]
    rp: int
    ras: int
    rc: int
    rtp: int
    wr_pre: int
    ccd_s: int
    ccd_l: int
    rd_wr: int
    wr_rd_s: int
    wr_rd_l: int
    rrd_s: int
    rrd_l: int
    faw: int
    act: int
    burst: int
    refi: int
    rfc: int


class Shape(NamedTuple):
    """Sizes as plain numbers."""

    channels: int
    pseudo: int
    groups: int
    group_shift: int
    banks: int
    bank_shift: int
    atom_shift: int
    channel_mask: int
    shared_bus: bool
    reads: int
    writes: int
    high: int
    low: int
    outstanding: int


class Dram(NamedTuple):
    """State of a memory; make one with `make_dram`.

    Indices: c channel, p pseudo-channel of the memory, g bank group of the memory, b bank of the
    memory; k 0 for reads, 1 for writes; s slot of a request in its channel.
    """

    t: Clocks
    shape: Shape
    tables: np.ndarray  # (3, 2^TABLE_BITS): decoded address = XOR of three look-ups
    # Requests. slots (c, s, 8): order, row, bank, kind, tag, next, previous, flag of an opener.
    slots: np.ndarray
    free: np.ndarray  # (c, s): stack of free slots
    free_used: np.ndarray  # (c)
    waiting: np.ndarray  # (c, k): requests in the queues
    outstanding: np.ndarray  # (c)
    mode: np.ndarray  # (c): kind that is served
    ends: np.ndarray  # (b, k, 2): first and last request of a bank
    hit: np.ndarray  # (b, k): oldest request to the open row, or −1
    miss: np.ndarray  # (b, k): oldest request to another row, or −1
    hit_banks: np.ndarray  # (p, k, banks): banks with a hit, in no order
    miss_banks: np.ndarray
    listed: np.ndarray  # (p, k, 2): how many
    place: np.ndarray  # (b, k, 2): where a bank stands in the two lists, or −1
    # Banks and buses. Clocks from which on a command is legal.
    row: np.ndarray  # (b): open row, or −1
    opener: np.ndarray  # (b): whether the request that opened the row still waits
    openers: np.ndarray  # (p, k)
    opened: np.ndarray  # (p): open banks
    bank_column: np.ndarray  # (b, k)
    bank_pre: np.ndarray  # (b)
    bank_act: np.ndarray  # (b)
    group_column: np.ndarray  # (g, k)
    group_act: np.ndarray  # (g)
    column: np.ndarray  # (p, k)
    act: np.ndarray  # (p)
    window: np.ndarray  # (p, 5): clocks of the last four ACTs, and which is the oldest
    row_bus: np.ndarray  # (c)
    refresh: np.ndarray  # (p): when the next refresh is due
    # When it is worth looking again.
    next_column: np.ndarray  # (p)
    next_row: np.ndarray  # (p)
    wake: np.ndarray  # (c)
    # Responses: a ring for each channel, (c, r, 2): clock and tag.
    ring: np.ndarray
    ring_ends: np.ndarray  # (c, 2): taken, filled
    # [requests accepted so far, first clock that matters for all]
    clock: np.ndarray
    counters: np.ndarray
    # (capacity, 5): clock, command, pseudo-channel, bank, row. used: commands so far
    log: np.ndarray
    log_used: np.ndarray


_ORDER, _ROW, _BANK, _KIND, _TAG, _NEXT, _PREVIOUS, _OPENER = range(8)


def make_dram(config: MemoryConfig, *, log: int = 0) -> Dram:
    """An idle memory with closed banks.

    Args:
        config: the memory.
        log: how many commands the command log holds (further ones are counted only).
    """
    t, q = config.timing_clocks, config.controller
    late = t.activate_command - 1
    clocks = Clocks(
        read_latency=t.read_latency + t.burst + q.response_clocks,
        rcd=(t.rcd_read + late, t.rcd_write + late),
        rp=t.rp,
        ras=t.ras + late,
        # The ACT that follows is late as well.
        rc=t.rc,
        rtp=t.rtp,
        wr_pre=t.write_latency + t.burst + t.wr,
        ccd_s=max(t.ccd_s, t.burst),
        ccd_l=t.ccd_l,
        rd_wr=max(1, t.read_latency + t.burst + t.read_to_write_gap - t.write_latency),
        wr_rd_s=t.write_latency + t.burst + t.wtr_s,
        wr_rd_l=t.write_latency + t.burst + t.wtr_l,
        rrd_s=t.rrd_s,
        rrd_l=t.rrd_l,
        faw=t.faw,
        act=t.activate_command,
        burst=t.burst,
        refi=config.refresh_clocks.interval,
        rfc=config.refresh_clocks.all_banks,
    )
    channels, pseudo, banks = config.channels, config.pseudo_channels, config.banks
    shape = Shape(
        channels=channels,
        pseudo=pseudo,
        groups=config.bank_groups,
        group_shift=config.banks_per_group.bit_length() - 1,
        banks=banks,
        bank_shift=banks.bit_length() - 1,
        atom_shift=config.atom_bytes.bit_length() - 1,
        channel_mask=channels - 1,
        shared_bus=config.command_bus == "shared",
        reads=q.read_entries,
        writes=q.write_entries,
        high=max(1, int(q.write_high_fraction * q.write_entries)),
        low=int(q.write_low_fraction * q.write_entries),
        outstanding=q.outstanding_reads,
    )
    p, b = channels * pseudo, channels * pseudo * banks
    slots = q.read_entries + q.write_entries + pseudo * banks
    first = config.refresh_clocks.interval or int(NEVER)
    return Dram(
        t=clocks,
        shape=shape,
        tables=_tables(config),
        slots=np.full((channels, slots, 8), -1, np.int64),
        free=np.tile(np.arange(slots, dtype=np.int64), (channels, 1)),
        free_used=np.full(channels, slots, np.int64),
        waiting=np.zeros((channels, 2), np.int64),
        outstanding=np.zeros(channels, np.int64),
        mode=np.zeros(channels, np.int64),
        ends=np.full((b, 2, 2), -1, np.int64),
        hit=np.full((b, 2), -1, np.int64),
        miss=np.full((b, 2), -1, np.int64),
        hit_banks=np.zeros((p, 2, banks), np.int64),
        miss_banks=np.zeros((p, 2, banks), np.int64),
        listed=np.zeros((p, 2, 2), np.int64),
        place=np.full((b, 2, 2), -1, np.int64),
        row=np.full(b, -1, np.int64),
        opener=np.zeros(b, np.int64),
        openers=np.zeros((p, 2), np.int64),
        opened=np.zeros(p, np.int64),
        bank_column=np.zeros((b, 2), np.int64),
        bank_pre=np.zeros(b, np.int64),
        bank_act=np.zeros(b, np.int64),
        group_column=np.zeros((p * config.bank_groups, 2), np.int64),
        group_act=np.zeros(p * config.bank_groups, np.int64),
        column=np.zeros((p, 2), np.int64),
        act=np.zeros(p, np.int64),
        window=np.concatenate(
            [np.full((p, 4), -(1 << 40), np.int64), np.zeros((p, 1), np.int64)], axis=1
        ),
        row_bus=np.zeros(channels, np.int64),
        refresh=np.full(p, first, np.int64),
        next_column=np.full(p, NEVER, np.int64),
        next_row=np.full(p, first, np.int64),
        wake=np.full(channels, first, np.int64),
        ring=np.zeros((channels, _ring_size(q.outstanding_reads), 2), np.int64),
        ring_ends=np.zeros((channels, 2), np.int64),
        clock=np.array([0, first], np.int64),
        counters=np.zeros(7, np.int64),
        log=np.zeros((log, 5), np.int64),
        log_used=np.zeros(1, np.int64),
    )


def _ring_size(outstanding: int) -> int:
    """The power of two that holds the responses not yet taken."""
    return 1 << outstanding.bit_length()


def _tables(config: MemoryConfig) -> np.ndarray:
    """(3, 2^TABLE_BITS): channel and bank of it and row, of each third of an atom's number."""
    bits = config.field_bits
    index = np.arange(1 << TABLE_BITS, dtype=np.int64)
    tables = np.zeros((3, len(index)), np.int64)
    for i in range(3):
        f = decode(config.mapping, bits, index << (TABLE_BITS * i))
        bank = (f["pseudo_channel"] << bits["bank_group"]) | f["bank_group"]
        bank = (bank << bits["bank"]) | f["bank"]
        low = (f["channel"] << (bits["pseudo_channel"] + bits["bank_group"] + bits["bank"])) | bank
        tables[i] = (f["row"] << _BANK_BITS) | low
    return tables


@inlined
def _decoded(d: Dram, address: int) -> int:
    atom = address >> d.shape.atom_shift
    first = d.tables[0, atom & _MASK] ^ d.tables[1, (atom >> TABLE_BITS) & _MASK]
    return first ^ d.tables[2, (atom >> (2 * TABLE_BITS)) & _MASK]


@inlined
def channel_of(d: Dram, address: int) -> int:
    """Channel of an address in bytes."""
    bank = _decoded(d, address) & ((1 << _BANK_BITS) - 1)
    return (bank >> d.shape.bank_shift) // d.shape.pseudo


@inlined
def can_accept(d: Dram, channel: int, is_write: bool = False) -> bool:
    """Whether the channel has room for a read, or for a write."""
    if is_write:
        return d.waiting[channel, 1] < d.shape.writes
    if d.outstanding[channel] >= d.shape.outstanding:
        return False
    return d.waiting[channel, 0] < d.shape.reads


@inlined
def push(d: Dram, channel: int, address: int, is_write: bool, tag: int, now: int) -> None:
    """Queue a request for one atom; `can_accept` must hold and `channel` be that of the address.

    Args:
        d: the memory.
        channel: the channel.
        address: in bytes in the whole memory; bits above its capacity are dropped.
        is_write: a write is done for the caller once it is queued.
        tag: any number from 0; `pop` gives it back.
        now: a `step` of this clock, if it follows, sees the request.
    """
    found = _decoded(d, address)
    b = found & ((1 << _BANK_BITS) - 1)
    row = found >> _BANK_BITS
    k = 1 if is_write else 0
    p = b >> d.shape.bank_shift
    d.free_used[channel] -= 1
    s = d.free[channel, d.free_used[channel]]
    slot = d.slots[channel, s]
    slot[_ORDER] = d.clock[0]
    slot[_ROW] = row
    slot[_BANK] = b
    slot[_KIND] = k
    slot[_TAG] = tag
    slot[_NEXT] = -1
    slot[_OPENER] = 0
    d.clock[0] += 1
    last = d.ends[b, k, 1]
    slot[_PREVIOUS] = last
    if last < 0:
        d.ends[b, k, 0] = s
    else:
        d.slots[channel, last, _NEXT] = s
    d.ends[b, k, 1] = s
    d.waiting[channel, k] += 1
    if k == 0:
        d.outstanding[channel] += 1
    if d.row[b] == row:
        if d.hit[b, k] < 0:
            d.hit[b, k] = s
            _list(d, p, b, k, 0)
            d.next_column[p] = min(d.next_column[p], now)
    elif d.miss[b, k] < 0:
        d.miss[b, k] = s
        _list(d, p, b, k, 1)
        d.next_row[p] = min(d.next_row[p], now)
    _choose_kind(d, channel, now)
    wake = min(d.next_column[p], d.next_row[p])
    d.wake[channel] = min(d.wake[channel], wake)
    d.clock[1] = min(d.clock[1], wake)


@inlined
def _list(d: Dram, p: int, b: int, k: int, which: int) -> None:
    """Put bank b in the list of banks with hits (0) or misses (1)."""
    n = d.listed[p, k, which]
    if which == 0:
        d.hit_banks[p, k, n] = b
    else:
        d.miss_banks[p, k, n] = b
    d.place[b, k, which] = n
    d.listed[p, k, which] = n + 1


@inlined
def _unlist(d: Dram, p: int, b: int, k: int, which: int) -> None:
    """Take bank b from a list: the last one takes its place."""
    n = d.listed[p, k, which] - 1
    place = d.place[b, k, which]
    banks = d.hit_banks if which == 0 else d.miss_banks
    moved = banks[p, k, n]
    banks[p, k, place] = moved
    d.place[moved, k, which] = place
    d.place[b, k, which] = -1
    d.listed[p, k, which] = n


@inlined
def _choose_kind(d: Dram, c: int, now: int) -> None:
    """Reads or writes, by how full the queues are."""
    reads, writes = d.waiting[c, 0], d.waiting[c, 1]
    if d.mode[c] == 0:
        change = writes > 0 and (writes >= d.shape.high or reads == 0)
    else:
        change = reads > 0 and (writes < d.shape.low or writes == 0)
    if change:
        d.mode[c] = 1 - d.mode[c]
        for p in range(c * d.shape.pseudo, (c + 1) * d.shape.pseudo):
            d.next_column[p] = now
            d.next_row[p] = now
        d.wake[c] = min(d.wake[c], now)
        d.clock[1] = min(d.clock[1], now)


@inlined
def _note(d: Dram, now: int, command: int, p: int, b: int, row: int) -> None:
    used = d.log_used[0]
    if used < d.log.shape[0]:
        d.log[used, 0] = now
        d.log[used, 1] = command
        d.log[used, 2] = p
        d.log[used, 3] = b & (d.shape.banks - 1) if b >= 0 else -1
        d.log[used, 4] = row
    d.log_used[0] = used + 1


@inlined
def step(d: Dram, now: int) -> None:
    """One clock of the memory: at most one column and one row command for each channel."""
    if now < d.clock[1]:
        return
    first = NEVER
    for c in range(d.shape.channels):
        if d.wake[c] <= now:
            _step_channel(d, c, now)
        first = min(first, d.wake[c])
    d.clock[1] = first


@inlined
def next_event(d: Dram) -> int:
    """The first clock in which a `step` may do something; no need to step before it."""
    return d.clock[1]


@inlined
def _step_channel(d: Dram, c: int, now: int) -> None:
    start = c * d.shape.pseudo
    end = start + d.shape.pseudo
    done = False
    best = NEVER
    chosen, kind = -1, 0
    bus_free = d.row_bus[c] <= now
    for p in range(start, end):
        if d.next_column[p] > now or (d.shape.shared_bus and not bus_free):
            continue
        order, b, k = _pick_column(d, c, p, now)
        if order < best:
            best, chosen, kind = order, b, k
    if chosen >= 0:
        _issue_column(d, c, chosen, kind, now)
        done = True
    if bus_free and not (done and d.shape.shared_bus):
        best = NEVER
        chosen, kind = -1, 0
        for p in range(start, end):
            if d.next_row[p] > now:
                continue
            if d.refresh[p] <= now:
                if _refreshed(d, p, now):
                    done = True
                    chosen = -1
                    break
                continue
            order, b, k = _pick_row(d, c, p, now)
            if order < best:
                best, chosen, kind = order, b, k
        if chosen >= 0:
            _issue_row(d, c, chosen, kind, now)
    wake = NEVER
    for p in range(start, end):
        wake = min(wake, d.next_column[p])
        wake = min(wake, max(d.next_row[p], d.row_bus[c]))
    d.wake[c] = max(wake, now + 1)


@inlined
def _pick_column(d: Dram, c: int, p: int, now: int) -> tuple[int, int, int]:
    """(order, bank, kind) of the best column command of a pseudo-channel, or order NEVER."""
    best = NEVER
    chosen, kind = -1, 0
    later = NEVER
    refreshing = d.refresh[p] <= now
    for k in range(2):
        only_openers = refreshing or k != d.mode[c]
        n = d.listed[p, k, 0]
        if n == 0 or (only_openers and d.openers[p, k] == 0):
            continue
        bus = d.column[p, k]
        if bus > now:
            later = min(later, bus)
            continue
        for i in range(n):
            b = d.hit_banks[p, k, i]
            slot = d.slots[c, d.hit[b, k]]
            if only_openers and slot[_OPENER] == 0:
                continue
            ready = max(d.bank_column[b, k], d.group_column[b >> d.shape.group_shift, k])
            if ready > now:
                later = min(later, ready)
                continue
            # Who has opened a row goes first.
            order = slot[_ORDER] - (NEVER if slot[_OPENER] else 0)
            if order < best:
                best, chosen, kind = order, b, k
    d.next_column[p] = now if chosen >= 0 else later
    return best, chosen, kind


@inlined
def _issue_column(d: Dram, c: int, b: int, k: int, now: int) -> None:
    p = b >> d.shape.bank_shift
    g = b >> d.shape.group_shift
    s = d.hit[b, k]
    slot = d.slots[c, s]
    t = d.t
    other = 1 - k
    d.column[p, k] = max(d.column[p, k], now + t.ccd_s)
    d.group_column[g, k] = max(d.group_column[g, k], now + t.ccd_l)
    if k == 0:
        d.column[p, other] = max(d.column[p, other], now + t.rd_wr)
        d.bank_pre[b] = max(d.bank_pre[b], now + t.rtp)
        filled = d.ring_ends[c, 1]
        place = filled & (d.ring.shape[1] - 1)
        d.ring[c, place, 0] = now + t.read_latency
        d.ring[c, place, 1] = slot[_TAG]
        d.ring_ends[c, 1] = filled + 1
        d.counters[READS] += 1
    else:
        d.column[p, other] = max(d.column[p, other], now + t.wr_rd_s)
        d.group_column[g, other] = max(d.group_column[g, other], now + t.wr_rd_l)
        d.bank_pre[b] = max(d.bank_pre[b], now + t.wr_pre)
        d.counters[WRITES] += 1
    d.counters[BUSY] += t.burst
    _note(d, now, RD if k == 0 else WR, p, b, slot[_ROW])
    if slot[_OPENER]:
        d.opener[b] = 0
        d.openers[p, k] -= 1
        d.next_row[p] = min(d.next_row[p], now + 1)
    else:
        d.counters[ROW_HITS] += 1
        d.waiting[c, k] -= 1
    _remove(d, c, b, k, s)
    # The next one to the same row, if there is one.
    follow = slot[_NEXT]
    row = d.row[b]
    while follow >= 0 and d.slots[c, follow, _ROW] != row:
        follow = d.slots[c, follow, _NEXT]
    d.hit[b, k] = follow
    if follow < 0:
        _unlist(d, p, b, k, 0)
    d.next_column[p] = min(d.column[p, 0], d.column[p, 1]) if _any_hit(d, p) else NEVER
    _choose_kind(d, c, now + 1)


@inlined
def _any_hit(d: Dram, p: int) -> bool:
    return d.listed[p, 0, 0] + d.listed[p, 1, 0] > 0


@inlined
def _remove(d: Dram, c: int, b: int, k: int, s: int) -> None:
    """Take a request out of its bank's chain; its own links stay readable."""
    slot = d.slots[c, s]
    before, after = slot[_PREVIOUS], slot[_NEXT]
    if before < 0:
        d.ends[b, k, 0] = after
    else:
        d.slots[c, before, _NEXT] = after
    if after < 0:
        d.ends[b, k, 1] = before
    else:
        d.slots[c, after, _PREVIOUS] = before
    d.free[c, d.free_used[c]] = s
    d.free_used[c] += 1


@inlined
def _pick_row(d: Dram, c: int, p: int, now: int) -> tuple[int, int, int]:
    """(order, bank, kind) of the best ACT or PRE of a pseudo-channel, or order NEVER."""
    best = NEVER
    chosen = -1
    later = d.refresh[p]
    k = d.mode[c]
    window = d.window[p, d.window[p, 4]] + d.t.faw
    act = max(d.act[p], window)
    for i in range(d.listed[p, k, 1]):
        b = d.miss_banks[p, k, i]
        if d.row[b] >= 0:
            if d.opener[b]:
                continue
            ready = d.bank_pre[b]
        else:
            ready = max(max(act, d.bank_act[b]), d.group_act[b >> d.shape.group_shift])
        if ready > now:
            later = min(later, ready)
            continue
        order = d.slots[c, d.miss[b, k], _ORDER]
        if order < best:
            best, chosen = order, b
    d.next_row[p] = now if chosen >= 0 else later
    return best, chosen, k


@inlined
def _issue_row(d: Dram, c: int, b: int, k: int, now: int) -> None:
    p = b >> d.shape.bank_shift
    if d.row[b] >= 0:
        _close(d, p, b)
        d.bank_act[b] = max(d.bank_act[b], now + d.t.rp)
        d.row_bus[c] = now + 1
        d.counters[PRECHARGES] += 1
        _note(d, now, PRE, p, b, -1)
        d.next_row[p] = now + 1
        return
    t = d.t
    g = b >> d.shape.group_shift
    s = d.miss[b, k]
    row = d.slots[c, s, _ROW]
    d.slots[c, s, _OPENER] = 1
    d.waiting[c, k] -= 1
    d.opener[b] = 1
    d.openers[p, k] += 1
    d.opened[p] += 1
    d.row[b] = row
    for kind in range(2):
        d.bank_column[b, kind] = now + t.rcd[kind]
        _sort_out(d, c, p, b, kind)
    d.bank_pre[b] = now + t.ras
    d.bank_act[b] = now + t.rc
    d.group_act[g] = now + t.rrd_l
    d.act[p] = now + t.rrd_s
    oldest = d.window[p, 4]
    d.window[p, oldest] = now
    d.window[p, 4] = (oldest + 1) & 3
    d.row_bus[c] = now + t.act
    d.counters[ACTIVATES] += 1
    _note(d, now, ACT, p, b, row)
    d.next_column[p] = min(d.next_column[p], now + min(t.rcd[0], t.rcd[1]))
    d.next_row[p] = now + 1
    _choose_kind(d, c, now + 1)


@inlined
def _sort_out(d: Dram, c: int, p: int, b: int, k: int) -> None:
    """After an ACT: the oldest request to the new row, and the oldest to another one."""
    row = d.row[b]
    hit, miss = -1, -1
    s = d.ends[b, k, 0]
    while s >= 0 and (hit < 0 or miss < 0):
        if d.slots[c, s, _ROW] == row:
            if hit < 0:
                hit = s
        elif miss < 0:
            miss = s
        s = d.slots[c, s, _NEXT]
    if hit >= 0:
        d.hit[b, k] = hit
        _list(d, p, b, k, 0)
    if d.miss[b, k] >= 0 and miss < 0:
        _unlist(d, p, b, k, 1)
    d.miss[b, k] = miss


@inlined
def _close(d: Dram, p: int, b: int) -> None:
    """After a PRE all requests of the bank miss."""
    d.row[b] = -1
    d.opened[p] -= 1
    for k in range(2):
        if d.hit[b, k] >= 0:
            d.hit[b, k] = -1
            _unlist(d, p, b, k, 0)
        head = d.ends[b, k, 0]
        if head >= 0 and d.miss[b, k] < 0:
            _list(d, p, b, k, 1)
        d.miss[b, k] = head


@inlined
def _refreshed(d: Dram, p: int, now: int) -> bool:
    """A refresh is due: close all banks, then refresh. Whether a command was issued."""
    c = p // d.shape.pseudo
    first = p * d.shape.banks
    last = first + d.shape.banks
    if d.opened[p] > 0:
        if d.openers[p, 0] + d.openers[p, 1] > 0:
            d.next_row[p] = NEVER  # the column command of the last opener looks again
            return False
        ready = now
        for b in range(first, last):
            if d.row[b] >= 0:
                ready = max(ready, d.bank_pre[b])
        if ready > now:
            d.next_row[p] = ready
            return False
        for b in range(first, last):
            if d.row[b] >= 0:
                _close(d, p, b)
                d.counters[PRECHARGES] += 1
            d.bank_act[b] = max(d.bank_act[b], now + d.t.rp)
        d.row_bus[c] = now + 1
        d.next_row[p] = now + d.t.rp
        _note(d, now, PREA, p, -1, -1)
        return True
    ready = now
    for b in range(first, last):
        ready = max(ready, d.bank_act[b])
    if ready > now:
        d.next_row[p] = ready
        return False
    for b in range(first, last):
        d.bank_act[b] = now + d.t.rfc
    d.refresh[p] += d.t.refi
    d.row_bus[c] = now + 1
    d.next_row[p] = now + d.t.rfc if d.listed[p, 0, 1] + d.listed[p, 1, 1] else d.refresh[p]
    d.counters[REFRESHES] += 1
    _note(d, now, REF, p, -1, -1)
    return True


@inlined
def pop(d: Dram, channel: int, now: int) -> int:
    """Tag of the oldest read of a channel whose data is there at clock `now`, or −1."""
    taken = d.ring_ends[channel, 0]
    if taken == d.ring_ends[channel, 1]:
        return -1
    place = taken & (d.ring.shape[1] - 1)
    if d.ring[channel, place, 0] > now:
        return -1
    d.ring_ends[channel, 0] = taken + 1
    d.outstanding[channel] -= 1
    return d.ring[channel, place, 1]


@inlined
def in_flight(d: Dram) -> int:
    """Reads whose data was not taken yet, and writes not yet in the memory."""
    found = 0
    for c in range(d.shape.channels):
        found += d.slots.shape[1] - d.free_used[c]
        found += d.ring_ends[c, 1] - d.ring_ends[c, 0]
    return found
