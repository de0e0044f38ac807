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

import numpy as np

from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.units.dram_queue import (
    can_accept,
    channel_of,
    choose_kind,
    close_bank,
    enlist,
    in_flight,
    opened_bank,
    pop,
    push,
    take_out,
    unlist,
)
from sparseloom.hardware.units.dram_state import (
    ACTIVATES,
    BUSY,
    CLOSING,
    END,
    HITS,
    LOGGED,
    NEVER,
    NEXT_EVENT,
    OPENING,
    PRECHARGES,
    READS,
    REFRESHES,
    ROW_HITS,
    WRITES,
    Dram,
    make_dram,
)

__all__ = [
    "ACT",
    "ACTIVATES",
    "BUSY",
    "LOGGED",
    "NEVER",
    "PRE",
    "PREA",
    "PRECHARGES",
    "RD",
    "READS",
    "REF",
    "REFRESHES",
    "ROW_HITS",
    "WR",
    "WRITES",
    "Dram",
    "can_accept",
    "channel_of",
    "in_flight",
    "make_dram",
    "next_event",
    "pop",
    "push",
    "step",
]

RD, WR, ACT, PRE, PREA, REF = range(6)
"""Commands in the command log."""


@inlined
def _note(d: Dram, now: int, command: int, p: int, bank: int, row: int) -> None:
    used = d.counters[LOGGED]
    if used < len(d.log):
        entry = d.log[used]
        entry.clock = now
        entry.command = command
        entry.pseudo = p
        entry.bank = bank & (d.constants[0].banks - 1) if bank >= 0 else -1
        entry.row = row
    d.counters[LOGGED] = used + 1


@inlined
def step(d: Dram, now: int) -> None:
    """One clock of the memory: at most one column and one row command for each channel."""
    if now < d.counters[NEXT_EVENT]:
        return
    first = NEVER
    for i in range(d.constants[0].channels):
        c = d.channels[i]
        if c.wake <= now:
            _step_channel(d, i, now)
        first = min(first, c.wake)
    d.counters[NEXT_EVENT] = first


@inlined
def next_event(d: Dram) -> int:
    """The first clock in which a `step` may do something; no need to step before it."""
    return d.counters[NEXT_EVENT]


@inlined
def _step_channel(d: Dram, i: int, now: int) -> None:
    n, c = d.constants[0], d.channels[i]
    start = i * n.pseudo
    end = start + n.pseudo
    bus_free = c.row_bus <= now
    chosen = -1
    if bus_free or n.shared_bus == 0:
        best = NEVER
        for p in range(start, end):
            if d.pseudo[p].next_column <= now:
                s = _pick_column(d, p, c.mode, now)
                if s >= 0 and d.sides[s].hit_order < best:
                    best, chosen = d.sides[s].hit_order, s
        if chosen >= 0:
            _issue_column(d, i, chosen, now)
    if bus_free and (chosen < 0 or n.shared_bus == 0):
        best = NEVER
        chosen = -1
        for p in range(start, end):
            if d.pseudo[p].next_row > now:
                continue
            if d.pseudo[p].refresh <= now:
                if _refreshed(d, i, p, now):
                    chosen = -1
                    break
                continue
            s = _pick_row(d, p, c.mode, now)
            if s >= 0 and d.sides[s].miss_order < best:
                best, chosen = d.sides[s].miss_order, s
        if chosen >= 0:
            _issue_row(d, i, chosen, now)
    wake = NEVER
    for p in range(start, end):
        wake = min(wake, min(d.pseudo[p].next_column, max(d.pseudo[p].next_row, c.row_bus)))
    c.wake = max(wake, now + 1)


@inlined
def _pick_column(d: Dram, p: int, mode: int, now: int) -> int:
    """The side of a pseudo-channel with the best column command that is legal, or −1."""
    n, x = d.constants[0], d.pseudo[p]
    shift = n.side_shift & 63
    best = NEVER
    chosen = -1
    later = NEVER
    found = 0
    for k in range(2):
        at = (3 * (2 * p + k) + HITS) * (2 * n.banks + 2)
        used = d.lists[at]
        lane = d.lanes[2 * p + k]
        # Of the kind that is not served now, and before a refresh, only what has opened a row.
        limit = 0 if k != mode or x.refresh <= now else NEVER
        if used == 0 or (limit == 0 and lane.openers == 0):
            continue
        if lane.bus > now:
            later = min(later, lane.bus)
            continue
        j = at + 1 + used
        s = d.lists[j]
        while s != END:
            side = d.sides[s]
            order = side.hit_order
            ready = max(side.column, d.groups[4 * (s >> shift) + k])
            wait = ready if order < limit else NEVER
            found += 1 if wait <= now else 0
            later = min(later, wait if wait > now else NEVER)
            chosen = s if wait <= now and order < best else chosen
            best = order if wait <= now and order < best else best
            j -= 1
            s = d.lists[j]
    x.next_column = now if found else later
    x.after_column = now if found > 1 else later
    return chosen


@inlined
def _issue_column(d: Dram, i: int, s: int, now: int) -> None:
    n, c, side, bank = d.constants[0], d.channels[i], d.sides[s], d.banks[s >> 1]
    k = s & 1
    p = bank.pseudo
    x, lane, other = d.pseudo[p], d.lanes[2 * p + k], d.lanes[2 * p + 1 - k]
    g = 4 * (s >> n.side_shift)
    request = side.hit
    slot = d.slots[request]
    lane.bus = max(lane.bus, now + n.ccd_s)
    d.groups[g + k] = max(d.groups[g + k], now + n.ccd_l)
    if k == 0:
        other.bus = max(other.bus, now + n.rd_wr)
        bank.close = max(bank.close, now + n.rtp)
        filled = c.filled
        response = d.ring[i * n.ring + (filled & (n.ring - 1))]
        response.clock = now + n.read_latency
        response.tag = slot.tag
        c.filled = filled + 1
        d.counters[READS] += 1
    else:
        other.bus = max(other.bus, now + n.wr_rd_s)
        d.groups[g] = max(d.groups[g], now + n.wr_rd_l)
        bank.close = max(bank.close, now + n.wr_pre)
        d.counters[WRITES] += 1
    d.counters[BUSY] += n.burst
    _note(d, now, WR if k else RD, p, s >> 1, bank.row)
    if side.hit_order < 0:
        bank.opener = 0
        lane.openers -= 1
        for kind in range(2):
            if d.sides[(s & -2) + kind].miss >= 0:
                enlist(d, 2 * p + kind, CLOSING, (s & -2) + kind)
                x.next_close = min(x.next_close, max(now + 1, bank.close))
        x.next_row = min(x.next_row, max(now + 1, min(x.next_close, x.refresh)))
    else:
        d.counters[ROW_HITS] += 1
        if k == 0:
            c.reads -= 1
        else:
            c.writes -= 1
    # The next one to the same row, if there is one.
    follow = slot.next
    while follow >= 0 and d.slots[follow].row != bank.row:
        follow = d.slots[follow].next
    side.hit = follow
    if follow >= 0:
        side.hit_order = d.slots[follow].order
    else:
        unlist(d, 2 * p + k, HITS, s)
    take_out(d, i, s, request)
    x.next_column = max(now if follow >= 0 else x.after_column, min(lane.bus, other.bus))
    if c.writes > 0 or c.mode == 1:
        choose_kind(d, i, now + 1)


@inlined
def _pick_row(d: Dram, p: int, mode: int, now: int) -> int:
    """The side of a pseudo-channel with the best ACT or PRE that is legal, or −1."""
    n, x = d.constants[0], d.pseudo[p]
    shift = n.side_shift & 63
    best = NEVER
    chosen = -1
    later = NEVER
    found = 0
    if x.next_close <= now:
        at = (3 * (2 * p + mode) + CLOSING) * (2 * n.banks + 2)
        j = at + 1 + d.lists[at]
        s = d.lists[j]
        while s != END:
            ready = d.banks[s >> 1].close
            order = d.sides[s].miss_order
            found += 1 if ready <= now else 0
            later = min(later, ready if ready > now else NEVER)
            chosen = s if ready <= now and order < best else chosen
            best = order if ready <= now and order < best else best
            j -= 1
            s = d.lists[j]
        x.next_close = now if found else later
        x.after_close = now + 1 if found > 1 else later
    if x.next_open <= now:
        later = max(x.open, x.opened_4 + n.faw)
        if later <= now:
            at = (3 * (2 * p + mode) + OPENING) * (2 * n.banks + 2)
            later = NEVER
            j = at + 1 + d.lists[at]
            s = d.lists[j]
            while s != END:
                ready = max(d.banks[s >> 1].open, d.groups[4 * (s >> shift) + 2])
                order = d.sides[s].miss_order
                later = min(later, max(ready, now))
                chosen = s if ready <= now and order < best else chosen
                best = order if ready <= now and order < best else best
                j -= 1
                s = d.lists[j]
        x.next_open = later
    x.next_row = min(min(x.next_close, x.next_open), x.refresh)
    return chosen


@inlined
def _issue_row(d: Dram, i: int, s: int, now: int) -> None:
    n, c, side, bank = d.constants[0], d.channels[i], d.sides[s], d.banks[s >> 1]
    k = s & 1
    p = bank.pseudo
    x, lane = d.pseudo[p], d.lanes[2 * p + k]
    if bank.row >= 0:
        close_bank(d, s >> 1)
        bank.open = max(bank.open, now + n.rp)
        c.row_bus = now + 1
        d.counters[PRECHARGES] += 1
        _note(d, now, PRE, p, s >> 1, -1)
        x.next_close = x.after_close
        x.next_open = min(x.next_open, bank.open)
    else:
        slot = d.slots[side.miss]
        if k == 0:
            c.reads -= 1
        else:
            c.writes -= 1
        opened_bank(d, s >> 1, slot.row)
        # Who has opened a row goes before all others.
        side.hit_order -= NEVER
        bank.opener = 1
        lane.openers += 1
        x.opened += 1
        d.sides[s & -2].column = now + n.rcd_read
        d.sides[s | 1].column = now + n.rcd_write
        bank.close = now + n.ras
        bank.open = now + n.rc
        d.groups[4 * (s >> n.side_shift) + 2] = now + n.rrd_l
        x.open = now + n.rrd_s
        x.opened_4, x.opened_3, x.opened_2, x.opened_1 = x.opened_3, x.opened_2, x.opened_1, now
        c.row_bus = now + n.act
        d.counters[ACTIVATES] += 1
        _note(d, now, ACT, p, s >> 1, bank.row)
        x.next_column = min(x.next_column, now + min(n.rcd_read, n.rcd_write))
        x.next_open = now + 1
        if c.writes > 0 or c.mode == 1:
            choose_kind(d, i, now + 1)
    x.next_row = min(min(x.next_close, x.next_open), x.refresh)


@inlined
def _refreshed(d: Dram, i: int, p: int, now: int) -> bool:
    """A refresh is due: close all banks, then refresh. Whether a command was issued."""
    n, c, x = d.constants[0], d.channels[i], d.pseudo[p]
    if d.lanes[2 * p].openers + d.lanes[2 * p + 1].openers > 0:
        x.next_row = NEVER  # the column command of the last opener looks again
        return False
    closing = x.opened > 0
    ready = now
    for b in range(p * n.banks, (p + 1) * n.banks):
        bank = d.banks[b]
        if closing:
            ready = max(ready, bank.close if bank.row >= 0 else now)
        else:
            ready = max(ready, bank.open)
    x.next_row = ready
    if ready > now:
        return False
    for b in range(p * n.banks, (p + 1) * n.banks):
        bank = d.banks[b]
        if not closing:
            bank.open = now + n.rfc
            continue
        if bank.row >= 0:
            close_bank(d, b)
            d.counters[PRECHARGES] += 1
        bank.open = max(bank.open, now + n.rp)
    c.row_bus = now + 1
    x.next_close = NEVER
    if closing:
        x.next_row = now + n.rp
    else:
        x.refresh += n.refi
        d.counters[REFRESHES] += 1
        x.next_open = now + n.rfc
        x.next_row = min(x.next_open, x.refresh)
    _note(d, now, PREA if closing else REF, p, -1, -1)
    return True
