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
    in_flight,
    opened_bank,
    pop,
    push,
    take_out,
)
from sparseloom.hardware.units.dram_state import (
    ACT_FROM,
    ACTIVATES,
    BOARD_ROWS,
    BUSY,
    CLOSE,
    COLUMN,
    HIT,
    KEY_BITS,
    KIND,
    LOGGED,
    MISS,
    NEVER,
    NEXT_EVENT,
    OPEN,
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
        entry.bank = bank
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
    chosen, kind = -1, 0
    if bus_free or n.shared_bus == 0:
        best = NEVER
        for p in range(start, end):
            if d.pseudo[p].next_column <= now:
                key, k = _pick_column(d, p, c.mode, now)
                if key < best:
                    best, chosen, kind = key, p, k
        if chosen >= 0:
            _issue_column(d, i, chosen, best, kind, now)
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
            key = _pick_row(d, p, c.mode, now)
            if key < best:
                best, chosen = key, p
        if chosen >= 0:
            _issue_row(d, i, chosen, best, now)
    wake = NEVER
    for p in range(start, end):
        wake = min(wake, min(d.pseudo[p].next_column, max(d.pseudo[p].next_row, c.row_bus)))
    c.wake = max(wake, now + 1)


@inlined
def _pick_column(d: Dram, p: int, mode: int, now: int) -> tuple[int, int]:
    """Key and kind of the best column command of a pseudo-channel that is legal, or NEVER."""
    n, x = d.constants[0], d.pseudo[p]
    best = NEVER
    kind = 0
    later = NEVER
    found = 0
    for k in range(2):
        lane = d.lanes[2 * p + k]
        # Of the kind that is not served now, and before a refresh, only what has opened a row.
        limit = 0 if k != mode or x.refresh <= now else NEVER
        if limit == 0 and lane.openers == 0:
            continue
        if lane.bus > now:
            later = min(later, lane.bus)
            continue
        columns = np.uint64((p * BOARD_ROWS + COLUMN + KIND * k) * n.banks)
        keys = np.uint64((p * BOARD_ROWS + HIT + KIND * k) * n.banks)
        before = best
        for b in range(np.uint64(n.banks)):
            key = d.board[keys + b]
            ready = d.board[columns + b] if key < limit else NEVER
            legal = ready <= now
            found += legal
            best = min(best, key if legal else NEVER)
            later = min(later, NEVER if legal else ready)
        kind = k if best < before else kind
    x.next_column = now if found > 0 else later
    x.after_column = now if found > 1 else later
    return best, kind


@inlined
def _issue_column(d: Dram, i: int, p: int, key: int, k: int, now: int) -> None:
    n, c, x, board = d.constants[0], d.channels[i], d.pseudo[p], d.board
    local = key & ((1 << KEY_BITS) - 1)
    b = p * n.banks + local
    side, bank, lane, other = (
        d.sides[2 * b + k],
        d.banks[b],
        d.lanes[2 * p + k],
        d.lanes[2 * p + 1 - k],
    )
    request = side.hit
    slot = d.slots[request]
    lane.bus = max(lane.bus, now + n.ccd_s)
    at = p * BOARD_ROWS * n.banks
    first = at + (local & -n.group_banks)
    own = first + (COLUMN + KIND * k) * n.banks
    for j in range(own, own + n.group_banks):
        board[j] = max(board[j], now + n.ccd_l)
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
        bank.close = max(bank.close, now + n.wr_pre)
        reads = first + COLUMN * n.banks
        for j in range(reads, reads + n.group_banks):
            board[j] = max(board[j], now + n.wr_rd_l)
        d.counters[WRITES] += 1
    d.counters[BUSY] += n.burst
    _note(d, now, WR if k else RD, p, local, bank.row)
    if key < 0:
        bank.opener = 0
        lane.openers -= 1
        if side.miss >= 0 or d.sides[2 * b + 1 - k].miss >= 0:
            x.next_row = min(x.next_row, max(now + 1, bank.close))
        if x.refresh <= now:
            x.next_row = now + 1
    else:
        d.counters[ROW_HITS] += 1
        if k == 0:
            c.reads -= 1
        else:
            c.writes -= 1
    if bank.opener == 0:
        board[at + CLOSE * n.banks + local] = bank.close
    # The next one to the same row, if there is one.
    follow = slot.next
    while follow >= 0 and d.slots[follow].row != bank.row:
        follow = d.slots[follow].next
    side.hit = follow
    next_key = (d.slots[follow].order << KEY_BITS) | local if follow >= 0 else NEVER
    board[at + (HIT + KIND * k) * n.banks + local] = next_key
    take_out(d, i, 2 * b + k, request)
    x.next_column = max(now if follow >= 0 else x.after_column, min(lane.bus, other.bus))
    if c.writes > 0 or c.mode == 1:
        choose_kind(d, i, now + 1)


@inlined
def _pick_row(d: Dram, p: int, mode: int, now: int) -> int:
    """Key of the best ACT or PRE of a pseudo-channel that is legal, or NEVER."""
    n, x = d.constants[0], d.pseudo[p]
    best = NEVER
    later = NEVER
    found = 0
    gate = max(x.open, x.opened_4 + n.faw)
    opens = np.uint64((p * BOARD_ROWS + OPEN) * n.banks)
    closes = np.uint64((p * BOARD_ROWS + CLOSE) * n.banks)
    keys = np.uint64((p * BOARD_ROWS + MISS + KIND * mode) * n.banks)
    for b in range(np.uint64(n.banks)):
        key = d.board[keys + b]
        ready = min(max(d.board[opens + b], gate), d.board[closes + b]) if key < NEVER else NEVER
        legal = ready <= now
        found += legal
        best = min(best, key if legal else NEVER)
        later = min(later, NEVER if legal else ready)
    later = min(later, x.refresh)
    x.next_row = now if found > 0 else later
    x.after_row = now + 1 if found > 1 else later
    return best


@inlined
def _issue_row(d: Dram, i: int, p: int, key: int, now: int) -> None:
    n, c, x, board = d.constants[0], d.channels[i], d.pseudo[p], d.board
    k = c.mode
    local = key & ((1 << KEY_BITS) - 1)
    b = p * n.banks + local
    bank, side, lane = d.banks[b], d.sides[2 * b + k], d.lanes[2 * p + k]
    at = p * BOARD_ROWS * n.banks + local
    x.next_row = x.after_row
    if bank.row >= 0:
        close_bank(d, b, now)
        c.row_bus = now + 1
        d.counters[PRECHARGES] += 1
        _note(d, now, PRE, p, local, -1)
        x.next_row = min(x.next_row, board[at])
        return
    opened_bank(d, b, d.slots[side.miss].row)
    # Who has opened a row leaves the queue and goes before all others.
    board[at + (HIT + KIND * k) * n.banks] -= NEVER
    if k == 0:
        c.reads -= 1
    else:
        c.writes -= 1
    bank.opener = 1
    lane.openers += 1
    x.opened += 1
    bank.close = now + n.ras
    first = at - local + (local & -n.group_banks)
    for j in range(first, first + n.group_banks):
        legal = max(board[j + ACT_FROM * n.banks], now + n.rrd_l)
        board[j + ACT_FROM * n.banks] = legal
        if board[j] < NEVER:
            board[j] = legal
    board[at] = NEVER
    board[at + ACT_FROM * n.banks] = now + n.rc
    reads, writes = at + COLUMN * n.banks, at + (COLUMN + KIND) * n.banks
    board[reads] = max(board[reads], now + n.rcd_read)
    board[writes] = max(board[writes], now + n.rcd_write)
    x.open = now + n.rrd_s
    x.opened_4, x.opened_3, x.opened_2, x.opened_1 = x.opened_3, x.opened_2, x.opened_1, now
    c.row_bus = now + n.act
    d.counters[ACTIVATES] += 1
    _note(d, now, ACT, p, local, bank.row)
    x.next_column = min(x.next_column, now + min(n.rcd_read, n.rcd_write))
    if c.writes > 0 or c.mode == 1:
        choose_kind(d, i, now + 1)


@inlined
def _refreshed(d: Dram, i: int, p: int, now: int) -> bool:
    """A refresh is due: close all banks, then refresh. Whether a command was issued."""
    n, c, x, board = d.constants[0], d.channels[i], d.pseudo[p], d.board
    if d.lanes[2 * p].openers + d.lanes[2 * p + 1].openers > 0:
        x.next_row = NEVER  # the column command of the last opener looks again
        return False
    closing = x.opened > 0
    at = p * BOARD_ROWS * n.banks
    ready = now
    for b in range(n.banks):
        close = board[at + CLOSE * n.banks + b]
        if not closing:
            ready = max(ready, board[at + ACT_FROM * n.banks + b])
        elif close < NEVER:
            ready = max(ready, close)
    x.next_row = ready
    if ready > now:
        return False
    for b in range(n.banks):
        if closing and d.banks[p * n.banks + b].row >= 0:
            close_bank(d, p * n.banks + b, now)
            d.counters[PRECHARGES] += 1
        after = now + n.rp if closing else now + n.rfc
        legal = max(board[at + ACT_FROM * n.banks + b], after)
        board[at + ACT_FROM * n.banks + b] = legal
        board[at + b] = legal
    c.row_bus = now + 1
    x.next_row = now + n.rp
    if not closing:
        x.refresh += n.refi
        d.counters[REFRESHES] += 1
        x.next_row = min(now + n.rfc, x.refresh)
    _note(d, now, PREA if closing else REF, p, -1, -1)
    return True
