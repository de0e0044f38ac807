"""DOTA's scheduler: which key is loaded when, for a few queries that run side by side.

A Lane works on `parallel_queries` queries together, one PE group for each. In a step every group
takes at most one key; a key that several of them take in the same step is loaded once (DOTA,
ASPLOS 2022; Liu et al., IEEE TC 2022, §6). Three dataflows:

- `row_by_row`: nothing is shared, every kept pair loads its key;
- `in_order`: in step s each query takes its s-th key; equal ones share a load;
- `out_of_order`: keys wait in 2**T - 1 buffers named by the set of queries that need them. A step
  scans the buffers, the largest sets first, and pops a key wherever all queries of the set are
  still free in this step. If queries stay free, with `split` the buffer that covers most of them
  (of those the smallest set) serves the ones that are free, and its key waits on in the buffer of
  the others, to be loaded again; without `split` those groups idle.

The authors' scheduler is in an appendix that we could not read: the buffers and T = 4 are
published, the order of the scan and the rule for splitting are a reconstruction (default). Sets of
equal size are scanned in the order of their names, '1100' before '1010', query 0 first.

What always holds: every kept pair is served exactly once, steps >= the longest row, and loads >=
the union of the group's keys. Without `split` loads equal the union; with it steps equal the
longest row, and in rare cases more is loaded than in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.engine.compiled import compiled, inlined
from sparseloom.hardware.units.issue_queue import IssueQueue, IssueTiming, issue_timing

Dataflow = Literal["out_of_order", "in_order", "row_by_row"]

MAX_QUERIES = 8
"""255 buffers; the paper chose 4 queries and 15 buffers."""

_DATAFLOWS: dict[Dataflow, int] = {"out_of_order": 0, "in_order": 1, "row_by_row": 2}
_OUT_OF_ORDER, _IN_ORDER = 0, 1


class Issued(NamedTuple):
    """Every load in the order of its issue; the values are loaded in the same order again.

    group, step: of the group's steps, from 0.
    key: what is loaded.
    served: the queries that take it, as bits: 1 << t for query t of the group.
    """

    group: Int32[np.ndarray, "all_loads"]
    step: Int32[np.ndarray, "all_loads"]
    key: Int32[np.ndarray, "all_loads"]
    served: Int32[np.ndarray, "all_loads"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """What each group of `parallel_queries` consecutive queries costs; the last may be ragged.

    Args:
        parallel_queries: T, the PE groups.
        loads: key vectors read from the buffer; as many value vectors follow.
        steps: issue steps, in each of which every PE group takes at most one key.
        idle_slots: PE groups without work, summed over steps: T * steps - kept.
        reloads: loads beyond the first of each key.
        kept: (query, key) pairs served.
        union: different keys of the group: the least loads possible.
        issued: the loads one by one, if they were recorded.
        timing: cycles through the issue queue, if one was given.
    """

    parallel_queries: int
    loads: Int64[np.ndarray, "groups"]
    steps: Int64[np.ndarray, "groups"]
    idle_slots: Int64[np.ndarray, "groups"]
    reloads: Int64[np.ndarray, "groups"]
    kept: Int64[np.ndarray, "groups"]
    union: Int64[np.ndarray, "groups"]
    issued: Issued | None = None
    timing: IssueTiming | None = None

    @property
    def load_ratio(self) -> float:
        """Loads over those row by row; 1 where nothing is kept."""
        kept = int(self.kept.sum())
        return int(self.loads.sum()) / kept if kept else 1.0

    @property
    def utilisation(self) -> float:
        """Slots with work over all slots; 1 where nothing is kept."""
        slots = self.parallel_queries * int(self.steps.sum())
        return int(self.kept.sum()) / slots if slots else 1.0


def schedule(
    offsets: Int64[np.ndarray, "rows_and_one"],
    keys: Int32[np.ndarray, "nnz"],
    *,
    parallel_queries: int = 4,
    dataflow: Dataflow = "out_of_order",
    split: bool = True,
    record: bool = False,
    queue: IssueQueue | None = None,
) -> Schedule:
    """Schedule the rows of one head.

    Args:
        offsets: query i keeps `keys[offsets[i] : offsets[i + 1]]`; may begin anywhere in `keys`.
        keys: ascending and different within a row.
        parallel_queries: T, 1 to 8.
        dataflow: see the module.
        split: whether a key may serve some of its queries now and be loaded again for the others
            (out of order only).
        record: also give every load.
        queue: also give the cycles that the array takes behind this queue.

    Raises:
        MachineError: T out of range, an unknown dataflow, offsets or keys that are no rows.
    """
    if not 1 <= parallel_queries <= MAX_QUERIES:
        raise MachineError(
            f"parallel_queries must be in [1, {MAX_QUERIES}], got {parallel_queries}"
        )
    if dataflow not in _DATAFLOWS:
        raise MachineError(f"dataflow must be one of {', '.join(_DATAFLOWS)}, got {dataflow!r}")
    _check_rows(offsets, keys)
    rows, width = offsets.size - 1, parallel_queries
    starts = np.arange(0, rows, width)
    kept = offsets[np.minimum(starts + width, rows)] - offsets[starts]
    counts = np.zeros((3, starts.size), np.int64)
    loads_at_most = int(kept.sum()) if record else 0
    issued = np.zeros((4, loads_at_most), np.int32)
    scratch = _scratch(width, int(kept.max(initial=0)))
    code = _DATAFLOWS[dataflow]
    made = _run(offsets, keys, width, code, split, _scan_order(width), scratch, counts, issued)
    loads, steps, union = counts
    return Schedule(
        parallel_queries=width,
        loads=loads,
        steps=steps,
        idle_slots=width * steps - kept,
        reloads=loads - union,
        kept=kept,
        union=union,
        issued=Issued(*issued[:, :made]) if record else None,
        timing=None if queue is None else issue_timing(steps, union, queue),
    )


def _check_rows(offsets: Int64[np.ndarray, "rows_and_one"], keys: Int32[np.ndarray, "nnz"]) -> None:
    if offsets.size == 0 or offsets[0] < 0 or offsets[-1] > keys.size:
        ends = (int(offsets[0]), int(offsets[-1])) if offsets.size else ()
        raise MachineError(f"offsets must lie in [0, {keys.size}] (the keys), got {ends}")
    falling = np.flatnonzero(np.diff(offsets) < 0)
    if falling.size:
        raise MachineError(f"offsets must not fall, but do after row {int(falling[0])}")
    first, last = int(offsets[0]), int(offsets[-1])
    used = keys[first:last]
    if used.size and int(used.min()) < 0:
        raise MachineError(f"keys must be at least 0, got {int(used.min())}")
    ascending = np.diff(used) > 0
    starts = offsets[1:-1] - first
    ascending[starts[(starts > 0) & (starts < used.size)] - 1] = True
    if not ascending.all():
        at = first + int(np.flatnonzero(~ascending)[0]) + 1
        raise MachineError(f"keys must ascend within a row, but do not at position {at}")


@cache
def _scan_order(width: int) -> Int64[np.ndarray, "sets"]:
    """All non-empty sets of queries: large ones first, then by name with query 0 leftmost."""

    def rank(members: int) -> tuple[int, str]:
        return members.bit_count(), f"{members:0{width}b}"[::-1]

    return np.array(sorted(range(1, 1 << width), key=rank, reverse=True), np.int64)


class _Scratch(NamedTuple):
    """Working arrays of one group.

    at (T): the next position of each row.
    left (T): outstanding keys of each row.
    key, sets, after (pairs): the keys of the group, who still needs each, and the next in its
        buffer. A key is in one buffer at a time.
    head, tail (2**T): first and last of each buffer, -1 = empty.
    size (2**T): members of each set.
    """

    at: np.ndarray
    left: np.ndarray
    key: np.ndarray
    sets: np.ndarray
    after: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    size: np.ndarray


def _scratch(width: int, pairs: int) -> _Scratch:
    sets = 1 << width
    size = np.array([members.bit_count() for members in range(sets)], np.int64)
    per_row, per_key, per_set = (np.zeros(n, np.int64) for n in (width, pairs, sets))
    return _Scratch(
        at=per_row,
        left=per_row.copy(),
        key=per_key,
        sets=per_key.copy(),
        after=per_key.copy(),
        head=per_set - 1,
        tail=per_set - 1,
        size=size,
    )


@compiled
def _run(
    offsets: np.ndarray,
    keys: np.ndarray,
    width: int,
    dataflow: int,
    split: bool,
    order: np.ndarray,
    s: _Scratch,
    counts: np.ndarray,
    issued: np.ndarray,
) -> int:
    """Fill counts (loads, steps, union; groups) and, if it has room, issued; returns all loads."""
    rows = offsets.shape[0] - 1
    total = 0
    for group in range(counts.shape[1]):
        first = group * width
        n = min(width, rows - first)
        counts[2, group] = _classify(offsets, keys, first, n, s)
        before = total
        if dataflow == _OUT_OF_ORDER:
            pairs = offsets[first + n] - offsets[first]
            steps, total = _pack(n, pairs, counts[2, group], split, order, s, group, total, issued)
        else:
            shared = dataflow == _IN_ORDER
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
def _classify(offsets: np.ndarray, keys: np.ndarray, first: int, n: int, s: _Scratch) -> int:
    """The group's keys in ascending order, each with the set of queries that need it."""
    for t in range(n):
        s.at[t] = offsets[first + t]
        s.left[t] = offsets[first + t + 1] - offsets[first + t]
    found = 0
    while True:
        smallest = 1 << 40
        needed = 0
        for t in range(n):
            at = s.at[t]
            if at < offsets[first + t + 1]:
                key = int(keys[at])
                if key < smallest:
                    smallest = key
                    needed = 1 << t
                elif key == smallest:
                    needed |= 1 << t
        if needed == 0:
            return found
        for t in range(n):
            s.at[t] += (needed >> t) & 1
        s.key[found] = smallest
        s.sets[found] = needed
        found += 1


@inlined
def _push(s: _Scratch, entry: int, members: int) -> None:
    s.sets[entry] = members
    s.after[entry] = -1
    if s.head[members] < 0:
        s.head[members] = entry
    else:
        s.after[s.tail[members]] = entry
    s.tail[members] = entry


@inlined
def _largest_overlap(order: np.ndarray, s: _Scratch, free: int) -> int:
    """The set that covers most of the free queries; of those the smallest, then the first."""
    best, overlap = 0, 0
    for i in range(order.shape[0]):
        members = order[i]
        covered = s.size[members & free]
        if s.head[members] < 0 or covered < max(overlap, 1):
            continue
        if covered > overlap or s.size[members] < s.size[best]:
            best = members
            overlap = covered
    return best


@inlined
def _pack(
    n: int,
    pairs: int,
    union: int,
    split: bool,
    order: np.ndarray,
    s: _Scratch,
    group: int,
    total: int,
    issued: np.ndarray,
) -> tuple[int, int]:
    """Steps of the out-of-order dataflow and the loads so far; all buffers end empty."""
    for entry in range(union):
        _push(s, entry, s.sets[entry])
    steps = 0
    while pairs > 0:
        free = 0
        for t in range(n):
            if s.left[t] > 0:
                free |= 1 << t
        # One pass: a buffer that does not fit now will not fit later in this step, as the free
        # queries only become fewer.
        i = 0
        while free != 0:
            best = 0
            while i < order.shape[0] and best == 0:
                if s.head[order[i]] >= 0 and order[i] & ~free == 0:
                    best = order[i]
                i += 1
            if best == 0 and split:
                best = _largest_overlap(order, s, free)
            if best == 0:
                break
            entry = s.head[best]
            s.head[best] = s.after[entry]
            served = best & free
            if best != served:
                _push(s, entry, best & ~free)
            _note(issued, total, group, steps, int(s.key[entry]), served)
            total += 1
            pairs -= s.size[served]
            for t in range(n):
                s.left[t] -= (served >> t) & 1
            free &= ~served
        steps += 1
    return steps, total


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
