"""The queues of a memory's controllers: requests in, responses out, what waits at which bank.

Requests of one bank and kind form a chain in the order of arrival. A bank with a request to its
open row stands in its pseudo-channel's list of hits, one with a request to another row in that of
misses, so that the scheduler looks at banks and not at requests.
"""

from __future__ import annotations

from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.units.address_mapping import TABLE_BITS
from sparseloom.hardware.units.dram_state import (
    ACCEPTED,
    B_HEAD,
    B_HIT,
    B_MISS,
    B_PLACE,
    B_ROW,
    B_TAIL,
    BANK_BITS,
    C_FILLED,
    C_FREE_USED,
    C_MODE,
    C_OUTSTANDING,
    C_TAKEN,
    C_WAITING,
    C_WAKE,
    N_ATOM_SHIFT,
    N_BANK_SHIFT,
    N_CHANNELS,
    N_HIGH,
    N_LOW,
    N_OUTSTANDING,
    N_PSEUDO,
    N_READS,
    N_WRITES,
    NEXT_EVENT,
    P_LISTED,
    P_NEXT_COLUMN,
    P_NEXT_ROW,
    P_OPENED,
    S_BANK,
    S_KIND,
    S_NEXT,
    S_OPENER,
    S_ORDER,
    S_PREVIOUS,
    S_ROW,
    S_TAG,
    Dram,
)

_MASK = (1 << TABLE_BITS) - 1


@inlined
def _decoded(d: Dram, address: int) -> int:
    atom = address >> d.numbers[N_ATOM_SHIFT]
    first = d.tables[0, atom & _MASK] ^ d.tables[1, (atom >> TABLE_BITS) & _MASK]
    return first ^ d.tables[2, (atom >> (2 * TABLE_BITS)) & _MASK]


@inlined
def channel_of(d: Dram, address: int) -> int:
    """Channel of an address in bytes."""
    bank = _decoded(d, address) & ((1 << BANK_BITS) - 1)
    return (bank >> d.numbers[N_BANK_SHIFT]) // d.numbers[N_PSEUDO]


@inlined
def can_accept(d: Dram, channel: int, is_write: bool = False) -> bool:
    """Whether the channel has room for a read, or for a write."""
    if is_write:
        return d.channels[channel, C_WAITING + 1] < d.numbers[N_WRITES]
    if d.channels[channel, C_OUTSTANDING] >= d.numbers[N_OUTSTANDING]:
        return False
    return d.channels[channel, C_WAITING + 0] < d.numbers[N_READS]


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
    b = found & ((1 << BANK_BITS) - 1)
    row = found >> BANK_BITS
    k = 1 if is_write else 0
    p = b >> d.numbers[N_BANK_SHIFT]
    d.channels[channel, C_FREE_USED] -= 1
    s = d.free[channel, d.channels[channel, C_FREE_USED]]
    slot = d.slots[channel, s]
    slot[S_ORDER] = d.counters[ACCEPTED]
    slot[S_ROW] = row
    slot[S_BANK] = b
    slot[S_KIND] = k
    slot[S_TAG] = tag
    slot[S_NEXT] = -1
    slot[S_OPENER] = 0
    d.counters[ACCEPTED] += 1
    last = d.banks[b, B_TAIL + k]
    slot[S_PREVIOUS] = last
    if last < 0:
        d.banks[b, B_HEAD + k] = s
    else:
        d.slots[channel, last, S_NEXT] = s
    d.banks[b, B_TAIL + k] = s
    d.channels[channel, C_WAITING + k] += 1
    if k == 0:
        d.channels[channel, C_OUTSTANDING] += 1
    if d.banks[b, B_ROW] == row:
        if d.banks[b, B_HIT + k] < 0:
            d.banks[b, B_HIT + k] = s
            enlist(d, p, b, k, 0)
            d.pseudo[p, P_NEXT_COLUMN] = min(d.pseudo[p, P_NEXT_COLUMN], now)
    elif d.banks[b, B_MISS + k] < 0:
        d.banks[b, B_MISS + k] = s
        enlist(d, p, b, k, 1)
        d.pseudo[p, P_NEXT_ROW] = min(d.pseudo[p, P_NEXT_ROW], now)
    choose_kind(d, channel, now)
    wake = min(d.pseudo[p, P_NEXT_COLUMN], d.pseudo[p, P_NEXT_ROW])
    d.channels[channel, C_WAKE] = min(d.channels[channel, C_WAKE], wake)
    d.counters[NEXT_EVENT] = min(d.counters[NEXT_EVENT], wake)


@inlined
def pop(d: Dram, channel: int, now: int) -> int:
    """Tag of the oldest read of a channel whose data is there at clock `now`, or −1."""
    taken = d.channels[channel, C_TAKEN]
    if taken == d.channels[channel, C_FILLED]:
        return -1
    place = taken & (d.ring.shape[1] - 1)
    if d.ring[channel, place, 0] > now:
        return -1
    d.channels[channel, C_TAKEN] = taken + 1
    d.channels[channel, C_OUTSTANDING] -= 1
    return d.ring[channel, place, 1]


@inlined
def in_flight(d: Dram) -> int:
    """Reads whose data was not taken yet, and writes not yet in the memory."""
    found = 0
    for c in range(d.numbers[N_CHANNELS]):
        found += d.slots.shape[1] - d.channels[c, C_FREE_USED]
        found += d.channels[c, C_FILLED] - d.channels[c, C_TAKEN]
    return found


@inlined
def choose_kind(d: Dram, c: int, now: int) -> None:
    """Reads or writes, by how full the queues are."""
    reads, writes = d.channels[c, C_WAITING + 0], d.channels[c, C_WAITING + 1]
    if d.channels[c, C_MODE] == 0:
        change = writes > 0 and (writes >= d.numbers[N_HIGH] or reads == 0)
    else:
        change = reads > 0 and (writes < d.numbers[N_LOW] or writes == 0)
    if change:
        d.channels[c, C_MODE] = 1 - d.channels[c, C_MODE]
        for p in range(c * d.numbers[N_PSEUDO], (c + 1) * d.numbers[N_PSEUDO]):
            d.pseudo[p, P_NEXT_COLUMN] = now
            d.pseudo[p, P_NEXT_ROW] = now
        d.channels[c, C_WAKE] = min(d.channels[c, C_WAKE], now)
        d.counters[NEXT_EVENT] = min(d.counters[NEXT_EVENT], now)


@inlined
def enlist(d: Dram, p: int, b: int, k: int, which: int) -> None:
    """Put bank b in the list of banks with hits (0) or misses (1)."""
    n = d.pseudo[p, P_LISTED + 2 * k + which]
    d.lists[p, k, which, n] = b
    d.banks[b, B_PLACE + 2 * k + which] = n
    d.pseudo[p, P_LISTED + 2 * k + which] = n + 1


@inlined
def unlist(d: Dram, p: int, b: int, k: int, which: int) -> None:
    """Take bank b from a list: the last one takes its place."""
    n = d.pseudo[p, P_LISTED + 2 * k + which] - 1
    place = d.banks[b, B_PLACE + 2 * k + which]
    moved = d.lists[p, k, which, n]
    d.lists[p, k, which, place] = moved
    d.banks[moved, B_PLACE + 2 * k + which] = place
    d.banks[b, B_PLACE + 2 * k + which] = -1
    d.pseudo[p, P_LISTED + 2 * k + which] = n


@inlined
def finish(d: Dram, c: int, b: int, k: int, s: int) -> None:
    """Take a request out of its bank's chain; its own links stay readable."""
    slot = d.slots[c, s]
    before, after = slot[S_PREVIOUS], slot[S_NEXT]
    if before < 0:
        d.banks[b, B_HEAD + k] = after
    else:
        d.slots[c, before, S_NEXT] = after
    if after < 0:
        d.banks[b, B_TAIL + k] = before
    else:
        d.slots[c, after, S_PREVIOUS] = before
    d.free[c, d.channels[c, C_FREE_USED]] = s
    d.channels[c, C_FREE_USED] += 1


@inlined
def sort_out(d: Dram, c: int, p: int, b: int, k: int) -> None:
    """After an ACT: the oldest request to the new row, and the oldest to another one."""
    row = d.banks[b, B_ROW]
    hit, miss = -1, -1
    s = d.banks[b, B_HEAD + k]
    while s >= 0 and (hit < 0 or miss < 0):
        if d.slots[c, s, S_ROW] == row:
            if hit < 0:
                hit = s
        elif miss < 0:
            miss = s
        s = d.slots[c, s, S_NEXT]
    if hit >= 0:
        d.banks[b, B_HIT + k] = hit
        enlist(d, p, b, k, 0)
    if d.banks[b, B_MISS + k] >= 0 and miss < 0:
        unlist(d, p, b, k, 1)
    d.banks[b, B_MISS + k] = miss


@inlined
def close_bank(d: Dram, p: int, b: int) -> None:
    """After a PRE all requests of the bank miss."""
    d.banks[b, B_ROW] = -1
    d.pseudo[p, P_OPENED] -= 1
    for k in range(2):
        if d.banks[b, B_HIT + k] >= 0:
            d.banks[b, B_HIT + k] = -1
            unlist(d, p, b, k, 0)
        head = d.banks[b, B_HEAD + k]
        if head >= 0 and d.banks[b, B_MISS + k] < 0:
            enlist(d, p, b, k, 1)
        d.banks[b, B_MISS + k] = head
