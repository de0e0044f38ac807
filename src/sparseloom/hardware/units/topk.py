"""The quick-select top-k engine of SpAtten (HPCA 2021, §IV-B, Alg. 3 and Fig. 9).

Select: a round streams the candidates past a random pivot, `lanes` in a cycle; what is smaller
goes through a zero eliminator into FIFO_L, what is larger into FIFO_R, what is equal is counted.
With g larger and e equal ones, the value of rank r (1 = the largest) is in FIFO_R if r <= g, is
the pivot if r <= g + e, and else has rank r - g - e in FIFO_L. (Algorithm 3 as printed mixes ranks
from 0 and from 1.) A round of n candidates takes ceil(n / lanes) cycles to read them and 3 more
until the last group is compared, packed and in its FIFO; then the next one begins. These are the
cycles that the authors' simulator charges. The pivot is drawn uniformly from the candidates.

Filter: the row passes once more and what is larger than the k-th value, and as many equal to it
as there is room for, the first ones first, leaves in the order of the input.

`quick_select` runs a whole row at once; `TopK` with `start` and `step` is the same engine cycle by
cycle. Values are int64 or float64 and never NaN; all arrays of one call have one type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.engine.compiled import allocating, compiled, inlined
from sparseloom.hardware.units.zero_eliminator import eliminate

MAX_LANES = 32
PIPELINE = 3
"""Cycles from the reading of a group to its place in a FIFO: compare, eliminate, write."""


def make_rng(seed: int) -> np.ndarray:
    """State of the pivot generator: one uint64 (SplitMix64, so every seed is good)."""
    return np.array([seed % 2**64], np.uint64)


@inlined
def draw(rng: np.ndarray, n: int) -> int:
    """A uniform integer of 0 … n - 1, for n below 2**31."""
    rng[0] += np.uint64(0x9E3779B97F4A7C15)
    x = rng[0]
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return int(((x >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32))


@allocating
def quick_select(
    values: np.ndarray, start: int, n: int, k: int, lanes: int, rng: np.ndarray
) -> tuple[Any, int, int, int]:
    """The k-th largest of `values[start : start + n]`, as the engine finds it.

    Args:
        values: int64 or float64, not changed.
        start, n: the row.
        k: how many to keep; the engine is bypassed (0 cycles) if k <= 0 or k >= n.
        lanes: comparators of each kind, from 1.
        rng: from `make_rng`; moves on by one draw a round.

    Returns:
        `(threshold, n_equal, cycles, rounds)`: the top k are those above the threshold and the
        first `n_equal` that equal it. Groups compared: `cycles - PIPELINE * rounds`.
    """
    if k <= 0 or k >= n:
        threshold, n_equal = _bypass(values, start, n, k)
        return threshold, n_equal, 0, 0
    return select_from(values[start : start + n].copy(), n, k, lanes, rng)


@inlined
def select_from(
    left: np.ndarray, n: int, k: int, lanes: int, rng: np.ndarray
) -> tuple[Any, int, int, int]:
    """`quick_select` of `left[:n]` for 0 < k < n, in place: it loses its order and its values."""
    size, rank, cycles, rounds = n, k, 0, 0
    while True:
        pivot = left[draw(rng, size)]
        larger, equal = 0, 0
        for i in range(size):
            larger += left[i] > pivot
            equal += left[i] == pivot
        cycles += (size + lanes - 1) // lanes + PIPELINE
        rounds += 1
        if larger < rank <= larger + equal:
            return pivot, rank - larger, cycles, rounds
        keep_larger = rank <= larger
        if not keep_larger:
            rank -= larger + equal
        kept = 0
        for i in range(size):
            if (left[i] > pivot) if keep_larger else (left[i] < pivot):
                left[kept] = left[i]
                kept += 1
        size = kept


@inlined
def _bypass(values: np.ndarray, start: int, n: int, k: int) -> tuple[Any, int]:
    """A threshold that lets all of a row pass (k >= n), or nothing (k <= 0)."""
    threshold = values.dtype.type(0)
    n_equal = 0
    if n > 0:
        threshold = values[start]
    for i in range(start, start + n):
        if k <= 0:
            threshold = max(threshold, values[i])
        elif values[i] < threshold:
            threshold, n_equal = values[i], 1
        else:
            n_equal += values[i] == threshold
    return threshold, n_equal


@compiled
def filter_pass(
    values: np.ndarray, start: int, n: int, threshold: Any, n_equal: int, out_ids: np.ndarray
) -> int:
    """Ids (0 … n - 1) above the threshold and the first `n_equal` equal to it, in input order.

    They are written to the front of `out_ids` (int64); returns how many.
    """
    kept = 0
    for i in range(n):
        value = values[start + i]
        if value > threshold or (value == threshold and n_equal > 0):
            n_equal -= value == threshold
            out_ids[kept] = i
            kept += 1
    return kept


@inlined
def filter_cycles(k: int, results_per_cycle: int, scanned: int, lanes: int) -> int:
    """Cycles of the filter: k results leave, `results_per_cycle` at most in each.

    The authors' simulator charges no more than that: `scanned = 0`. An engine that reads its
    buffer `lanes` values at a time also has to get to the last kept one: `scanned` = its id + 1.
    """
    return max(
        (k + results_per_cycle - 1) // results_per_cycle,
        (scanned + lanes - 1) // lanes,
    )


# ----------------------------------------------------------------------------- cycle by cycle

IDLE, SELECT, DONE = 0, 1, 2
"""Phases of the engine."""

LEFT, RIGHT, ROW = 0, 1, 2
"""Where a round reads its candidates: FIFO_L, FIFO_R, or, in the first one, the row's buffer."""


class Control(NamedTuple):
    """Registers of the engine, int64 arrays of one element."""

    phase: np.ndarray
    source: np.ndarray
    unread: np.ndarray  # candidates of this round that are still to be read
    next_row: np.ndarray  # position in the row's buffer
    rank: np.ndarray
    larger: np.ndarray
    equal: np.ndarray
    n_equal: np.ndarray
    cycles: np.ndarray
    rounds: np.ndarray


class TopK(NamedTuple):
    """State of the engine; make one with `make_topk`. Widths in items.

    row (capacity): the buffer of the row, from which the first round and the filter read.
    fifo (2, capacity), head, used (2): FIFO_L and FIFO_R as rings of single items.
    pivot, threshold (1): of the values' type.
    read (lanes), n_read (1): the group that the comparators see next.
    compared (2, lanes), mask (2, lanes), n_compared (1): it and its two masks, before packing.
    packed (2, lanes), n_packed (2), packed_equal (1), packed_valid (1): after packing.
    gaps (lanes): the prefix sum of the eliminators.
    """

    lanes: int
    row: np.ndarray
    fifo: np.ndarray
    head: np.ndarray
    used: np.ndarray
    pivot: np.ndarray
    threshold: np.ndarray
    read: np.ndarray
    n_read: np.ndarray
    compared: np.ndarray
    mask: np.ndarray
    n_compared: np.ndarray
    packed: np.ndarray
    n_packed: np.ndarray
    packed_equal: np.ndarray
    packed_valid: np.ndarray
    gaps: np.ndarray
    control: Control


def make_topk(lanes: int = 16, depth: int = 64, dtype: type = np.int64) -> TopK:
    """An idle engine whose FIFOs hold `depth` times `lanes` values of `dtype`.

    Raises:
        MachineError: lanes or depth out of range, or another type than int64 and float64.
    """
    if not 1 <= lanes <= MAX_LANES:
        raise MachineError(f"lanes must be in [1, {MAX_LANES}], got {lanes}")
    if depth < 1:
        raise MachineError(f"depth must be at least 1, got {depth}")
    if dtype not in (np.int64, np.float64):
        raise MachineError(f"dtype must be numpy's int64 or float64, got {dtype}")
    capacity = depth * lanes
    return TopK(
        lanes,
        np.zeros(capacity, dtype),
        np.zeros((2, capacity), dtype),
        np.zeros(2, np.int64),
        np.zeros(2, np.int64),
        np.zeros(1, dtype),
        np.zeros(1, dtype),
        np.zeros(lanes, dtype),
        np.zeros(1, np.int64),
        np.zeros((2, lanes), dtype),
        np.zeros((2, lanes), np.bool_),
        np.zeros(1, np.int64),
        np.zeros((2, lanes), dtype),
        np.zeros(2, np.int64),
        np.zeros(1, np.int64),
        np.zeros(1, np.int64),
        np.zeros(lanes, np.int64),
        Control(*(np.zeros(1, np.int64) for _ in Control._fields)),
    )


@compiled
def start(engine: TopK, values: np.ndarray, first: int, n: int, k: int, rng: np.ndarray) -> None:
    """Take `values[first : first + n]` into the row's buffer and begin to select.

    Raises:
        ValueError: the row does not fit in the buffer, or the engine is at work.
    """
    c = engine.control
    if n > engine.row.shape[0]:
        raise ValueError("n must fit in the engine's FIFOs (depth times lanes)")
    if c.phase[0] == SELECT:
        raise ValueError("the engine is still selecting: step it until its phase is DONE")
    # Loops over items: numba takes seconds to compile assignments of slices.
    for i in range(n):
        engine.row[i] = values[first + i]
    engine.used[LEFT] = engine.used[RIGHT] = 0
    c.cycles[0] = c.rounds[0] = 0
    if k <= 0 or k >= n:
        engine.threshold[0], c.n_equal[0] = _bypass(values, first, n, k)
        c.phase[0] = DONE
        return
    c.phase[0] = SELECT
    c.rank[0] = k
    c.next_row[0] = 0
    c.source[0] = ROW
    _begin_round(engine, n, rng)


@compiled
def step(engine: TopK, rng: np.ndarray) -> None:
    """One cycle: write, pack, compare, read, the last stage of the pipeline first."""
    c = engine.control
    if c.phase[0] != SELECT:
        return
    c.cycles[0] += 1
    _write(engine)
    _pack(engine)
    _compare(engine)
    _read(engine)
    waiting = engine.n_read[0] + engine.n_compared[0] + engine.packed_valid[0] + c.unread[0]
    if waiting > 0:
        return
    if c.rank[0] <= c.larger[0]:
        c.source[0] = RIGHT
    elif c.rank[0] <= c.larger[0] + c.equal[0]:
        engine.threshold[0] = engine.pivot[0]
        c.n_equal[0] = c.rank[0] - c.larger[0]
        c.phase[0] = DONE
        return
    else:
        c.rank[0] -= c.larger[0] + c.equal[0]
        c.source[0] = LEFT
    engine.used[1 - c.source[0]] = 0
    _begin_round(engine, int(engine.used[c.source[0]]), rng)


@inlined
def _begin_round(engine: TopK, n: int, rng: np.ndarray) -> None:
    c = engine.control
    c.unread[0] = n
    c.larger[0] = c.equal[0] = 0
    c.rounds[0] += 1
    at = draw(rng, n)
    if c.source[0] == ROW:
        engine.pivot[0] = engine.row[at]
    else:
        side = c.source[0]
        engine.pivot[0] = engine.fifo[side, (engine.head[side] + at) % engine.fifo.shape[1]]


@inlined
def _write(engine: TopK) -> None:
    """Packed groups into FIFO_L and FIFO_R: there is room, for as many have been read before."""
    if not engine.packed_valid[0]:
        return
    depth = engine.fifo.shape[1]
    for side in range(2):
        for i in range(engine.n_packed[side]):
            if engine.used[side] == depth:
                raise ValueError("a FIFO of the top-k engine overflows")
            engine.fifo[side, (engine.head[side] + engine.used[side]) % depth] = engine.packed[
                side, i
            ]
            engine.used[side] += 1
    engine.control.larger[0] += engine.n_packed[RIGHT]
    engine.control.equal[0] += engine.packed_equal[0]
    engine.packed_valid[0] = 0


@inlined
def _pack(engine: TopK) -> None:
    n = engine.n_compared[0]
    if n == 0:
        return
    for side in range(2):
        for i in range(n):
            engine.packed[side, i] = engine.compared[side, i]
        kept = eliminate(engine.packed[side], engine.mask[side], engine.gaps, n)
        engine.n_packed[side] = kept
    engine.packed_equal[0] = n - engine.n_packed[LEFT] - engine.n_packed[RIGHT]
    engine.packed_valid[0] = 1
    engine.n_compared[0] = 0


@inlined
def _compare(engine: TopK) -> None:
    for i in range(engine.n_read[0]):
        value = engine.read[i]
        engine.compared[LEFT, i] = engine.compared[RIGHT, i] = value
        engine.mask[LEFT, i] = value < engine.pivot[0]
        engine.mask[RIGHT, i] = value > engine.pivot[0]
    engine.n_compared[0] = engine.n_read[0]
    engine.n_read[0] = 0


@inlined
def _read(engine: TopK) -> None:
    c = engine.control
    n = min(engine.lanes, c.unread[0])
    side, depth = c.source[0], engine.fifo.shape[1]
    for i in range(n):
        if side == ROW:
            engine.read[i] = engine.row[c.next_row[0]]
            c.next_row[0] += 1
        else:
            engine.read[i] = engine.fifo[side, engine.head[side]]
            engine.head[side] = (engine.head[side] + 1) % depth
            engine.used[side] -= 1
    engine.n_read[0] = n
    c.unread[0] -= n
