"""The loops of `token_scheduler`: buffers named by sets of queries, and what each step pops.

As long as no buffer runs empty and no key is split, one step is like the one before it: so many
are done at once. Only where loads are recorded does it matter which keys lie in a buffer; else
their number is enough.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sparseloom.hardware.engine.compiled import compiled, inlined

OUT_OF_ORDER, IN_ORDER, ROW_BY_ROW = 0, 1, 2
"""Dataflows."""


class Buffers(NamedTuple):
    """Working arrays for one group of T queries; make them with `make_buffers`.

    order (2**T - 1): all sets of queries in the order in which a step scans them.
    size (2**T): members of each set.
    needed (keys): who needs each key, while the group's keys are put into the buffers.
    waiting (2**T): keys in each buffer.
    left (T): outstanding keys of each query.
    popped, served (T): the sets of which a step pops a key, and which queries it serves.
    head, tail (2**T), key, after (pairs): the buffers as lists, -1 = empty: the group's keys, and
        the next one in the same buffer. They have no room where nothing is recorded.
    """

    order: np.ndarray
    size: np.ndarray
    needed: np.ndarray
    waiting: np.ndarray
    left: np.ndarray
    popped: np.ndarray
    served: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    key: np.ndarray
    after: np.ndarray


def make_buffers(width: int, keys: int, recorded_pairs: int) -> Buffers:
    """Empty buffers for `width` queries and keys below `keys`.

    `recorded_pairs` is the most that a group keeps, or 0 if loads are not recorded.
    """
    sets = 1 << width
    return Buffers(
        order=_scan_order(width),
        size=np.array([members.bit_count() for members in range(sets)], np.int64),
        needed=np.zeros(keys, np.uint8),
        waiting=np.zeros(sets, np.int64),
        left=np.zeros(width, np.int64),
        popped=np.zeros(width, np.int64),
        served=np.zeros(width, np.int64),
        head=np.full(sets, -1, np.int64),
        tail=np.full(sets, -1, np.int64),
        key=np.zeros(recorded_pairs, np.int64),
        after=np.zeros(recorded_pairs, np.int64),
    )


@cache
def _scan_order(width: int) -> Int64[np.ndarray, "sets"]:
    """All non-empty sets of queries: large ones first, then by name with query 0 leftmost."""

    def rank(members: int) -> tuple[int, str]:
        return members.bit_count(), f"{members:0{width}b}"[::-1]

    return np.array(sorted(range(1, 1 << width), key=rank, reverse=True), np.int64)


@compiled
def run_groups(
    offsets: np.ndarray,
    keys: np.ndarray,
    width: int,
    dataflow: int,
    split: bool,
    b: Buffers,
    counts: np.ndarray,
    issued: np.ndarray,
) -> int:
    """All rows of a head, `width` at a time.

    Args:
        offsets, keys: the rows, checked.
        width: T.
        dataflow: one of the constants above.
        split: whether a key may be loaded again for those that it could not serve.
        b: for T queries and all the keys.
        counts: (3, groups), zeros: becomes loads, steps and union.
        issued: (4, loads) becomes group, step, key and served; (4, 0) records nothing.

    Returns:
        All loads.
    """
    rows = offsets.shape[0] - 1
    total = 0
    for group in range(counts.shape[1]):
        first = group * width
        n = min(width, rows - first)
        listed = issued.shape[1] > 0 and dataflow == OUT_OF_ORDER
        counts[2, group] = _classify(offsets, keys, first, n, listed, b)
        before = total
        if dataflow == OUT_OF_ORDER:
            steps, total = _pack(n, split, b, group, total, issued)
        else:
            shared = dataflow == IN_ORDER
            steps, total = _march(offsets, keys, first, n, shared, group, total, issued)
        counts[0, group] = total - before
        counts[1, group] = steps
    return total


@inlined
def _note(issued: np.ndarray, at: int, group: int, step: int, key: int, served: int) -> None:
    if at < issued.shape[1]:
        issued[0, at] = group
        issued[1, at] = step
        issued[2, at] = key
        issued[3, at] = served


@inlined
def _classify(
    offsets: np.ndarray, keys: np.ndarray, first: int, n: int, listed: bool, b: Buffers
) -> int:
    """Fill the buffers with the group's keys, if listed in ascending order; returns how many."""
    for members in range(b.waiting.shape[0]):
        b.waiting[members] = 0
    for t in range(n):
        b.left[t] = offsets[first + t + 1] - offsets[first + t]
        for at in range(offsets[first + t], offsets[first + t + 1]):
            b.needed[keys[at]] |= 1 << t
    found = 0
    if listed:
        for key in range(b.needed.shape[0]):
            members = b.needed[key]
            if members != 0:
                b.key[found] = key
                _push(b, found, members)
                b.waiting[members] += 1
                b.needed[key] = 0
                found += 1
    else:
        for at in range(offsets[first], offsets[first + n]):
            members = b.needed[keys[at]]
            b.waiting[members] += 1
            b.needed[keys[at]] = 0
        # Each key is counted at its first appearance, and as nobody's at all others.
        found = offsets[first + n] - offsets[first] - b.waiting[0]
        b.waiting[0] = 0
    return found


@inlined
def _push(b: Buffers, entry: int, members: int) -> None:
    b.after[entry] = -1
    if b.head[members] < 0:
        b.head[members] = entry
    else:
        b.after[b.tail[members]] = entry
    b.tail[members] = entry


@inlined
def _largest_overlap(b: Buffers, free: int) -> int:
    """The set that covers most of the free queries; of those the smallest, then the first."""
    best, overlap = 0, 0
    for i in range(b.order.shape[0]):
        members = b.order[i]
        covered = b.size[members & free]
        if b.waiting[members] == 0 or covered < max(overlap, 1):
            continue
        if covered > overlap or b.size[members] < b.size[best]:
            best = members
            overlap = covered
    return best


@inlined
def _choose(free: int, split: bool, b: Buffers) -> tuple[int, int]:
    """What one step pops: how many loads, and how many steps in a row do the same."""
    loads = 0
    repeat = 1 << 40
    # One pass: a buffer that does not fit now will not fit later in this step, as the free
    # queries only become fewer.
    for i in range(b.order.shape[0]):
        members = b.order[i]
        if b.waiting[members] > 0 and members & ~free == 0:
            b.popped[loads] = members
            b.served[loads] = members
            loads += 1
            repeat = min(repeat, int(b.waiting[members]))
            free &= ~members
            if free == 0:
                break
    if split:
        # Every free query has a key that waits, so each turn serves at least one.
        while free != 0:
            members = _largest_overlap(b, free)
            b.popped[loads] = members
            b.served[loads] = members & free
            loads += 1
            repeat = 1
            free &= ~members
    return loads, repeat


@inlined
def _pack(
    n: int, split: bool, b: Buffers, group: int, total: int, issued: np.ndarray
) -> tuple[int, int]:
    """Steps of the out-of-order dataflow and the loads so far; all buffers end empty."""
    steps = 0
    while True:
        free = 0
        for t in range(n):
            if b.left[t] > 0:
                free |= 1 << t
        if free == 0:
            return steps, total
        loads, repeat = _choose(free, split, b)
        for i in range(loads):
            members, served = b.popped[i], b.served[i]
            b.waiting[members] -= repeat
            b.waiting[members & ~served] += repeat  # of nobody: set 0, which is not scanned
            for t in range(n):
                b.left[t] -= repeat * ((served >> t) & 1)
        if issued.shape[1] > 0:
            for step in range(repeat):
                for i in range(loads):
                    members, served = b.popped[i], b.served[i]
                    entry = int(b.head[members])
                    b.head[members] = b.after[entry]
                    if members != served:
                        _push(b, entry, members & ~served)
                    at = total + step * loads + i
                    _note(issued, at, group, steps + step, int(b.key[entry]), served)
        total += repeat * loads
        steps += repeat


@inlined
def _march(
    offsets: np.ndarray,
    keys: np.ndarray,
    first: int,
    n: int,
    shared: bool,
    group: int,
    total: int,
    issued: np.ndarray,
) -> tuple[int, int]:
    """Steps and loads so far where in step s each query takes its s-th key."""
    steps = 0
    for t in range(n):
        steps = max(steps, offsets[first + t + 1] - offsets[first + t])
    for step in range(steps):
        done = 0
        for t in range(n):
            at = offsets[first + t] + step
            if at >= offsets[first + t + 1] or (done >> t) & 1:
                continue
            served = 1 << t
            if shared:
                for u in range(t + 1, n):
                    other = offsets[first + u] + step
                    if other < offsets[first + u + 1] and keys[other] == keys[at]:
                        served |= 1 << u
            done |= served
            _note(issued, total, group, step, int(keys[at]), served)
            total += 1
    return steps, total
