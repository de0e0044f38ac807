"""The queues of a memory's controllers: requests in, responses out, what waits at which bank.

Requests of one bank and kind form a chain in the order of arrival. A bank with a request to its
open row stands in the list HITS of its lane, one with a request to another row in CLOSING (once the
request that opened the row is served), one with requests and no open row in OPENING: the
scheduler looks at banks that a command could help, and not at requests.
"""

from __future__ import annotations

from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.units.address_mapping import TABLE_BITS
from sparseloom.hardware.units.dram_state import (
    ACCEPTED,
    BANK_BITS,
    CLOSING,
    HITS,
    NEVER,
    NEXT_EVENT,
    OPENING,
    TAKEN,
    WRITES,
    Dram,
)

_MASK = (1 << TABLE_BITS) - 1
_BANK = (1 << BANK_BITS) - 1


@inlined
def _decoded(d: Dram, address: int) -> int:
    atom = address >> d.constants[0].atom_shift
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
    c, bank, side = d.channels[channel], d.banks[b], d.sides[2 * b + k]
    p = d.pseudo[bank.pseudo]
    lane = 2 * bank.pseudo + k
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
    if bank.row == row:
        if side.hit < 0:
            side.hit = s
            side.hit_order = order
            enlist(d, lane, HITS, 2 * b + k)
            wake = max(now, side.column)
            p.next_column = min(p.next_column, wake)
    elif side.miss < 0:
        side.miss = s
        side.miss_order = order
        if bank.row < 0:
            enlist(d, lane, OPENING, 2 * b + k)
            wake = max(now, bank.open)
            p.next_open = min(p.next_open, wake)
            p.next_row = min(p.next_row, wake)
        elif bank.opener == 0:
            enlist(d, lane, CLOSING, 2 * b + k)
            wake = max(now, bank.close)
            p.next_close = min(p.next_close, wake)
            p.next_row = min(p.next_row, wake)
    if c.writes > 0:
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
            p.next_close = now
            p.next_open = now
        c.wake = min(c.wake, now)
        d.counters[NEXT_EVENT] = min(d.counters[NEXT_EVENT], now)


@inlined
def enlist(d: Dram, lane: int, which: int, side: int) -> None:
    """Put a side in a list of its lane."""
    banks = d.constants[0].banks
    at = (3 * lane + which) * (2 * banks + 2)
    used = d.lists[at] + 1
    d.lists[at] = used
    d.lists[at + 1 + used] = side
    d.lists[at + 2 + banks + ((side >> 1) & (banks - 1))] = used


@inlined
def unlist(d: Dram, lane: int, which: int, side: int) -> None:
    """Take a side from a list: the last one takes its place."""
    banks = d.constants[0].banks
    at = (3 * lane + which) * (2 * banks + 2)
    used = d.lists[at]
    d.lists[at] = used - 1
    moved = d.lists[at + 1 + used]
    place = d.lists[at + 2 + banks + ((side >> 1) & (banks - 1))]
    d.lists[at + 1 + place] = moved
    d.lists[at + 2 + banks + ((moved >> 1) & (banks - 1))] = place


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
    bank = d.banks[b]
    bank.row = row
    for k in range(2):
        side = d.sides[2 * b + k]
        if side.miss < 0:
            continue
        unlist(d, 2 * bank.pseudo + k, OPENING, 2 * b + k)
        hit, miss = -1, -1
        s = side.head
        while s >= 0 and (hit < 0 or miss < 0):
            slot = d.slots[s]
            if slot.row == row:
                if hit < 0:
                    hit = s
                    side.hit_order = slot.order
            elif miss < 0:
                miss = s
                side.miss_order = slot.order
            s = slot.next
        side.hit = hit
        side.miss = miss
        if hit >= 0:
            enlist(d, 2 * bank.pseudo + k, HITS, 2 * b + k)


@inlined
def close_bank(d: Dram, b: int) -> None:
    """After a PRE all requests of the bank wait for an ACT. No opener may wait."""
    bank = d.banks[b]
    bank.row = -1
    p = d.pseudo[bank.pseudo]
    p.opened -= 1
    for k in range(2):
        side = d.sides[2 * b + k]
        if side.hit >= 0:
            side.hit = -1
            unlist(d, 2 * bank.pseudo + k, HITS, 2 * b + k)
        if side.miss >= 0:
            unlist(d, 2 * bank.pseudo + k, CLOSING, 2 * b + k)
        side.miss = side.head
        if side.head >= 0:
            side.miss_order = d.slots[side.head].order
            enlist(d, 2 * bank.pseudo + k, OPENING, 2 * b + k)
