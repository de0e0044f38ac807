"""The queues of a memory's controllers: requests in, responses out, what waits at which bank.

Requests of one bank and kind form a chain in the order of arrival. The board of a pseudo-channel
has the oldest one to the open row and the oldest to another row of each bank, so that the
scheduler looks at banks and not at requests.
"""

from __future__ import annotations

from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.units.address_mapping import TABLE_BITS
from sparseloom.hardware.units.dram_state import (
    ACCEPTED,
    ACT_FROM,
    BANK_BITS,
    BOARD_ROWS,
    CLOSE,
    COLUMN,
    HIT,
    KEY_BITS,
    KIND,
    MISS,
    NEVER,
    NEXT_EVENT,
    TAKEN,
    WRITES,
    Dram,
)

_MASK = (1 << TABLE_BITS) - 1
_BANK = (1 << BANK_BITS) - 1


@inlined
def _decoded(d: Dram, address: int) -> int:
    atom: int = address >> d.constants[0].atom_shift
    first = d.tables[atom & _MASK] ^ d.tables[((atom >> TABLE_BITS) & _MASK) + (_MASK + 1)]
    return first ^ d.tables[((atom >> (2 * TABLE_BITS)) & _MASK) + 2 * (_MASK + 1)]


@inlined
def channel_of(d: Dram, address: int) -> int:
    """Channel of an address in bytes."""
    return (_decoded(d, address) & _BANK) >> d.constants[0].channel_shift


@inlined
def can_accept(d: Dram, channel: int, is_write: bool = False) -> bool:
    """Whether the channel has room for a read, or for a write."""
    c = d.channels[channel]
    if is_write:
        return c.writes < d.constants[0].writes
    return c.outstanding < d.constants[0].outstanding and c.reads < d.constants[0].reads


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
    b = found & _BANK
    row = found >> BANK_BITS
    k = 1 if is_write else 0
    n, c, bank, side = d.constants[0], d.channels[channel], d.banks[b], d.sides[2 * b + k]
    p = d.pseudo[bank.pseudo]
    s = c.free
    slot = d.slots[s]
    c.free = slot.next
    order = d.counters[ACCEPTED]
    d.counters[ACCEPTED] = order + 1
    last = side.tail
    slot.order = order
    slot.tag = tag
    slot.row = row
    slot.next = -1
    slot.previous = last
    side.tail = s
    if last < 0:
        side.head = s
    else:
        d.slots[last].next = s
    if is_write:
        c.writes += 1
    else:
        c.reads += 1
        c.outstanding += 1
    wake = NEVER
    local = b & (n.banks - 1)
    at = bank.pseudo * BOARD_ROWS * n.banks + local
    if bank.row == row:
        if side.hit < 0:
            side.hit = s
            d.board[at + (HIT + KIND * k) * n.banks] = (order << KEY_BITS) | local
            wake = max(now, d.board[at + (COLUMN + KIND * k) * n.banks])
            p.next_column = min(p.next_column, wake)
    elif side.miss < 0:
        side.miss = s
        d.board[at + (MISS + KIND * k) * n.banks] = (order << KEY_BITS) | local
        wake = max(now, min(d.board[at], d.board[at + CLOSE * n.banks]))
        p.next_row = min(p.next_row, wake)
    if c.writes > 0 or c.mode == 1:
        choose_kind(d, channel, now)
    if wake < c.wake:
        c.wake = wake
        d.counters[NEXT_EVENT] = min(d.counters[NEXT_EVENT], wake)


@inlined
def pop(d: Dram, channel: int, now: int) -> int:
    """Tag of the oldest read of a channel whose data is there at clock `now`, or −1."""
    c = d.channels[channel]
    taken = c.taken
    if taken == c.filled:
        return -1
    ring = d.constants[0].ring
    response = d.ring[channel * ring + (taken & (ring - 1))]
    if response.clock > now:
        return -1
    c.taken = taken + 1
    c.outstanding -= 1
    d.counters[TAKEN] += 1
    return response.tag


@inlined
def in_flight(d: Dram) -> int:
    """Reads whose data was not taken yet, and writes not yet in the memory."""
    return d.counters[ACCEPTED] - d.counters[TAKEN] - d.counters[WRITES]


@inlined
def choose_kind(d: Dram, channel: int, now: int) -> None:
    """Reads or writes, by how full the queues are."""
    c, n = d.channels[channel], d.constants[0]
    if c.mode == 0:
        change = c.writes > 0 and (c.writes >= n.high or c.reads == 0)
    else:
        change = c.reads > 0 and (c.writes < n.low or c.writes == 0)
    if change:
        c.mode = 1 - c.mode
        for i in range(channel * n.pseudo, (channel + 1) * n.pseudo):
            p = d.pseudo[i]
            p.next_column = now
            p.next_row = now
        c.wake = min(c.wake, now)
        d.counters[NEXT_EVENT] = min(d.counters[NEXT_EVENT], now)


@inlined
def take_out(d: Dram, channel: int, which: int, s: int) -> None:
    """Take a request out of the chain of its side `which` and free its slot."""
    slot, side, c = d.slots[s], d.sides[which], d.channels[channel]
    before, after = slot.previous, slot.next
    if before < 0:
        side.head = after
    else:
        d.slots[before].next = after
    if after < 0:
        side.tail = before
    else:
        d.slots[after].previous = before
    slot.next = c.free
    c.free = s


@inlined
def opened_bank(d: Dram, b: int, row: int) -> None:
    """After an ACT: the oldest request to the new row and the oldest to another one, both kinds."""
    n, bank = d.constants[0], d.banks[b]
    bank.row = row
    local = b & (n.banks - 1)
    for k in range(2):
        side = d.sides[2 * b + k]
        hit, miss = -1, -1
        hit_key, miss_key = NEVER, NEVER
        s = side.head
        while s >= 0 and (hit < 0 or miss < 0):
            slot = d.slots[s]
            key = (slot.order << KEY_BITS) | local
            if slot.row == row:
                if hit < 0:
                    hit, hit_key = s, key
            elif miss < 0:
                miss, miss_key = s, key
            s = slot.next
        side.hit = hit
        side.miss = miss
        at = (bank.pseudo * BOARD_ROWS + KIND * k) * n.banks + local
        d.board[at + HIT * n.banks] = hit_key
        d.board[at + MISS * n.banks] = miss_key


@inlined
def close_bank(d: Dram, b: int, now: int) -> None:
    """After a PRE all requests of the bank wait for an ACT. No opener may wait."""
    n, bank = d.constants[0], d.banks[b]
    bank.row = -1
    d.pseudo[bank.pseudo].opened -= 1
    local = b & (n.banks - 1)
    at = bank.pseudo * BOARD_ROWS * n.banks + local
    legal = max(d.board[at + ACT_FROM * n.banks], now + n.rp)
    d.board[at + ACT_FROM * n.banks] = legal
    d.board[at] = legal
    d.board[at + CLOSE * n.banks] = NEVER
    for k in range(2):
        side = d.sides[2 * b + k]
        side.hit = -1
        side.miss = side.head
        key = (d.slots[side.head].order << KEY_BITS) | local if side.head >= 0 else NEVER
        d.board[at + (HIT + KIND * k) * n.banks] = NEVER
        d.board[at + (MISS + KIND * k) * n.banks] = key
