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

from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.units.dram_queue import (
    can_accept,
    channel_of,
    choose_kind,
    close_bank,
    finish,
    in_flight,
    pop,
    push,
    sort_out,
    unlist,
)
from sparseloom.hardware.units.dram_state import (
    ACTIVATES,
    B_ACT,
    B_COLUMN,
    B_HIT,
    B_MISS,
    B_OPENER,
    B_PRE,
    B_ROW,
    BUSY,
    C_FILLED,
    C_MODE,
    C_ROW_BUS,
    C_WAITING,
    C_WAKE,
    G_ACT,
    LOGGED,
    N_ACT,
    N_BANK_SHIFT,
    N_BANKS,
    N_BURST,
    N_CCD_L,
    N_CCD_S,
    N_CHANNELS,
    N_FAW,
    N_GROUP_SHIFT,
    N_PSEUDO,
    N_RAS,
    N_RC,
    N_RCD,
    N_RD_WR,
    N_READ_LATENCY,
    N_REFI,
    N_RFC,
    N_RP,
    N_RRD_L,
    N_RRD_S,
    N_RTP,
    N_SHARED_BUS,
    N_WR_PRE,
    N_WR_RD_L,
    N_WR_RD_S,
    NEVER,
    NEXT_EVENT,
    P_ACT,
    P_COLUMN,
    P_LISTED,
    P_NEXT_COLUMN,
    P_NEXT_ROW,
    P_OLDEST,
    P_OPENED,
    P_OPENERS,
    P_REFRESH,
    P_WINDOW,
    PRECHARGES,
    READS,
    REFRESHES,
    ROW_HITS,
    S_NEXT,
    S_OPENER,
    S_ORDER,
    S_ROW,
    S_TAG,
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
def _note(d: Dram, now: int, command: int, p: int, b: int, row: int) -> None:
    used = d.counters[LOGGED]
    if used < d.log.shape[0]:
        d.log[used, 0] = now
        d.log[used, 1] = command
        d.log[used, 2] = p
        d.log[used, 3] = b & (d.numbers[N_BANKS] - 1) if b >= 0 else -1
        d.log[used, 4] = row
    d.counters[LOGGED] = used + 1


@inlined
def step(d: Dram, now: int) -> None:
    """One clock of the memory: at most one column and one row command for each channel."""
    if now < d.counters[NEXT_EVENT]:
        return
    first = NEVER
    for c in range(d.numbers[N_CHANNELS]):
        if d.channels[c, C_WAKE] <= now:
            _step_channel(d, c, now)
        first = min(first, d.channels[c, C_WAKE])
    d.counters[NEXT_EVENT] = first


@inlined
def next_event(d: Dram) -> int:
    """The first clock in which a `step` may do something; no need to step before it."""
    return d.counters[NEXT_EVENT]


@inlined
def _step_channel(d: Dram, c: int, now: int) -> None:
    start = c * d.numbers[N_PSEUDO]
    end = start + d.numbers[N_PSEUDO]
    done = False
    best = NEVER
    chosen, kind = -1, 0
    bus_free = d.channels[c, C_ROW_BUS] <= now
    for p in range(start, end):
        if d.pseudo[p, P_NEXT_COLUMN] > now or (d.numbers[N_SHARED_BUS] and not bus_free):
            continue
        order, b, k = _pick_column(d, c, p, now)
        if order < best:
            best, chosen, kind = order, b, k
    if chosen >= 0:
        _issue_column(d, c, chosen, kind, now)
        done = True
    if bus_free and not (done and d.numbers[N_SHARED_BUS]):
        best = NEVER
        chosen, kind = -1, 0
        for p in range(start, end):
            if d.pseudo[p, P_NEXT_ROW] > now:
                continue
            if d.pseudo[p, P_REFRESH] <= now:
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
        wake = min(wake, d.pseudo[p, P_NEXT_COLUMN])
        wake = min(wake, max(d.pseudo[p, P_NEXT_ROW], d.channels[c, C_ROW_BUS]))
    d.channels[c, C_WAKE] = max(wake, now + 1)


@inlined
def _pick_column(d: Dram, c: int, p: int, now: int) -> tuple[int, int, int]:
    """(order, bank, kind) of the best column command of a pseudo-channel, or order NEVER."""
    best = NEVER
    chosen, kind = -1, 0
    later = NEVER
    refreshing = d.pseudo[p, P_REFRESH] <= now
    for k in range(2):
        only_openers = refreshing or k != d.channels[c, C_MODE]
        n = d.pseudo[p, P_LISTED + 2 * k + 0]
        if n == 0 or (only_openers and d.pseudo[p, P_OPENERS + k] == 0):
            continue
        bus = d.pseudo[p, P_COLUMN + k]
        if bus > now:
            later = min(later, bus)
            continue
        for i in range(n):
            b = d.lists[p, k, 0, i]
            slot = d.slots[c, d.banks[b, B_HIT + k]]
            if only_openers and slot[S_OPENER] == 0:
                continue
            ready = max(d.banks[b, B_COLUMN + k], d.groups[b >> d.numbers[N_GROUP_SHIFT], k])
            if ready > now:
                later = min(later, ready)
                continue
            # Who has opened a row goes first.
            order = slot[S_ORDER] - (NEVER if slot[S_OPENER] else 0)
            if order < best:
                best, chosen, kind = order, b, k
    d.pseudo[p, P_NEXT_COLUMN] = now if chosen >= 0 else later
    return best, chosen, kind


@inlined
def _issue_column(d: Dram, c: int, b: int, k: int, now: int) -> None:
    p = b >> d.numbers[N_BANK_SHIFT]
    g = b >> d.numbers[N_GROUP_SHIFT]
    s = d.banks[b, B_HIT + k]
    slot = d.slots[c, s]
    other = 1 - k
    d.pseudo[p, P_COLUMN + k] = max(d.pseudo[p, P_COLUMN + k], now + d.numbers[N_CCD_S])
    d.groups[g, k] = max(d.groups[g, k], now + d.numbers[N_CCD_L])
    if k == 0:
        d.pseudo[p, P_COLUMN + other] = max(d.pseudo[p, P_COLUMN + other], now + d.numbers[N_RD_WR])
        d.banks[b, B_PRE] = max(d.banks[b, B_PRE], now + d.numbers[N_RTP])
        filled = d.channels[c, C_FILLED]
        place = filled & (d.ring.shape[1] - 1)
        d.ring[c, place, 0] = now + d.numbers[N_READ_LATENCY]
        d.ring[c, place, 1] = slot[S_TAG]
        d.channels[c, C_FILLED] = filled + 1
        d.counters[READS] += 1
    else:
        d.pseudo[p, P_COLUMN + other] = max(
            d.pseudo[p, P_COLUMN + other], now + d.numbers[N_WR_RD_S]
        )
        d.groups[g, other] = max(d.groups[g, other], now + d.numbers[N_WR_RD_L])
        d.banks[b, B_PRE] = max(d.banks[b, B_PRE], now + d.numbers[N_WR_PRE])
        d.counters[WRITES] += 1
    d.counters[BUSY] += d.numbers[N_BURST]
    _note(d, now, RD if k == 0 else WR, p, b, slot[S_ROW])
    if slot[S_OPENER]:
        d.banks[b, B_OPENER] = 0
        d.pseudo[p, P_OPENERS + k] -= 1
        d.pseudo[p, P_NEXT_ROW] = min(d.pseudo[p, P_NEXT_ROW], now + 1)
    else:
        d.counters[ROW_HITS] += 1
        d.channels[c, C_WAITING + k] -= 1
    finish(d, c, b, k, s)
    # The next one to the same row, if there is one.
    follow = slot[S_NEXT]
    row = d.banks[b, B_ROW]
    while follow >= 0 and d.slots[c, follow, S_ROW] != row:
        follow = d.slots[c, follow, S_NEXT]
    d.banks[b, B_HIT + k] = follow
    if follow < 0:
        unlist(d, p, b, k, 0)
    if d.pseudo[p, P_LISTED] + d.pseudo[p, P_LISTED + 2] > 0:
        d.pseudo[p, P_NEXT_COLUMN] = min(d.pseudo[p, P_COLUMN], d.pseudo[p, P_COLUMN + 1])
    else:
        d.pseudo[p, P_NEXT_COLUMN] = NEVER
    choose_kind(d, c, now + 1)


@inlined
def _pick_row(d: Dram, c: int, p: int, now: int) -> tuple[int, int, int]:
    """(order, bank, kind) of the best ACT or PRE of a pseudo-channel, or order NEVER."""
    best = NEVER
    chosen = -1
    later = d.pseudo[p, P_REFRESH]
    k = d.channels[c, C_MODE]
    window = d.pseudo[p, P_WINDOW + d.pseudo[p, P_OLDEST]] + d.numbers[N_FAW]
    act = max(d.pseudo[p, P_ACT], window)
    for i in range(d.pseudo[p, P_LISTED + 2 * k + 1]):
        b = d.lists[p, k, 1, i]
        if d.banks[b, B_ROW] >= 0:
            if d.banks[b, B_OPENER]:
                continue
            ready = d.banks[b, B_PRE]
        else:
            ready = max(max(act, d.banks[b, B_ACT]), d.groups[b >> d.numbers[N_GROUP_SHIFT], G_ACT])
        if ready > now:
            later = min(later, ready)
            continue
        order = d.slots[c, d.banks[b, B_MISS + k], S_ORDER]
        if order < best:
            best, chosen = order, b
    d.pseudo[p, P_NEXT_ROW] = now if chosen >= 0 else later
    return best, chosen, k


@inlined
def _issue_row(d: Dram, c: int, b: int, k: int, now: int) -> None:
    p = b >> d.numbers[N_BANK_SHIFT]
    if d.banks[b, B_ROW] >= 0:
        close_bank(d, p, b)
        d.banks[b, B_ACT] = max(d.banks[b, B_ACT], now + d.numbers[N_RP])
        d.channels[c, C_ROW_BUS] = now + 1
        d.counters[PRECHARGES] += 1
        _note(d, now, PRE, p, b, -1)
        d.pseudo[p, P_NEXT_ROW] = now + 1
        return
    g = b >> d.numbers[N_GROUP_SHIFT]
    s = d.banks[b, B_MISS + k]
    row = d.slots[c, s, S_ROW]
    d.slots[c, s, S_OPENER] = 1
    d.channels[c, C_WAITING + k] -= 1
    d.banks[b, B_OPENER] = 1
    d.pseudo[p, P_OPENERS + k] += 1
    d.pseudo[p, P_OPENED] += 1
    d.banks[b, B_ROW] = row
    for kind in range(2):
        d.banks[b, B_COLUMN + kind] = now + d.numbers[N_RCD + kind]
        sort_out(d, c, p, b, kind)
    d.banks[b, B_PRE] = now + d.numbers[N_RAS]
    d.banks[b, B_ACT] = now + d.numbers[N_RC]
    d.groups[g, G_ACT] = now + d.numbers[N_RRD_L]
    d.pseudo[p, P_ACT] = now + d.numbers[N_RRD_S]
    oldest = d.pseudo[p, P_OLDEST]
    d.pseudo[p, P_WINDOW + oldest] = now
    d.pseudo[p, P_OLDEST] = (oldest + 1) & 3
    d.channels[c, C_ROW_BUS] = now + d.numbers[N_ACT]
    d.counters[ACTIVATES] += 1
    _note(d, now, ACT, p, b, row)
    ready = now + min(d.numbers[N_RCD], d.numbers[N_RCD + 1])
    d.pseudo[p, P_NEXT_COLUMN] = min(d.pseudo[p, P_NEXT_COLUMN], ready)
    d.pseudo[p, P_NEXT_ROW] = now + 1
    choose_kind(d, c, now + 1)


@inlined
def _refreshed(d: Dram, p: int, now: int) -> bool:
    """A refresh is due: close all banks, then refresh. Whether a command was issued."""
    c = p // d.numbers[N_PSEUDO]
    first = p * d.numbers[N_BANKS]
    last = first + d.numbers[N_BANKS]
    if d.pseudo[p, P_OPENED] > 0:
        if d.pseudo[p, P_OPENERS + 0] + d.pseudo[p, P_OPENERS + 1] > 0:
            d.pseudo[p, P_NEXT_ROW] = NEVER  # the column command of the last opener looks again
            return False
        ready = now
        for b in range(first, last):
            if d.banks[b, B_ROW] >= 0:
                ready = max(ready, d.banks[b, B_PRE])
        if ready > now:
            d.pseudo[p, P_NEXT_ROW] = ready
            return False
        for b in range(first, last):
            if d.banks[b, B_ROW] >= 0:
                close_bank(d, p, b)
                d.counters[PRECHARGES] += 1
            d.banks[b, B_ACT] = max(d.banks[b, B_ACT], now + d.numbers[N_RP])
        d.channels[c, C_ROW_BUS] = now + 1
        d.pseudo[p, P_NEXT_ROW] = now + d.numbers[N_RP]
        _note(d, now, PREA, p, -1, -1)
        return True
    ready = now
    for b in range(first, last):
        ready = max(ready, d.banks[b, B_ACT])
    if ready > now:
        d.pseudo[p, P_NEXT_ROW] = ready
        return False
    for b in range(first, last):
        d.banks[b, B_ACT] = now + d.numbers[N_RFC]
    d.pseudo[p, P_REFRESH] += d.numbers[N_REFI]
    d.channels[c, C_ROW_BUS] = now + 1
    misses = d.pseudo[p, P_LISTED + 1] + d.pseudo[p, P_LISTED + 3]
    d.pseudo[p, P_NEXT_ROW] = now + d.numbers[N_RFC] if misses else d.pseudo[p, P_REFRESH]
    d.counters[REFRESHES] += 1
    _note(d, now, REF, p, -1, -1)
    return True
