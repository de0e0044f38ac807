"""What A3 (Ham et al., HPCA 2020) computes: fixed point, candidate search, post-scoring, output.

Everything is integer arithmetic on operands of `integer_bits` and `fraction_bits`, so that which
keys are kept does not depend on the order of additions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from sparseloom.hardware.engine.compiled import allocating, compiled, inlined

_EMPTY = -(1 << 62)


class FixedPoint(NamedTuple):
    """Operand format: `integer_bits` (sign included) and `fraction_bits`.

    Scores have 2 · `fraction_bits` behind the point, and so have exponentials and weights; outputs
    have 3 · `fraction_bits` (A3, section on the base pipeline).
    """

    integer_bits: int
    fraction_bits: int

    @property
    def bits(self) -> int:
        """Bits of an operand."""
        return self.integer_bits + self.fraction_bits


class Chosen(NamedTuple):
    """What the search found, per query.

    candidates (q_len): how many keys have a positive greedy score.
    kept (q_len, kv_len): the keys whose weight is at least the threshold's share of the largest.
    """

    candidates: np.ndarray
    kept: np.ndarray


def quantise(values: Float[np.ndarray, "..."], number: FixedPoint) -> Int64[np.ndarray, "..."]:
    """Round to the operand format, saturating."""
    limit = 1 << (number.bits - 1)
    scaled = np.rint(np.asarray(values, np.float64) * (1 << number.fraction_bits))
    return np.clip(scaled, -limit, limit - 1).astype(np.int64)


def bitonic_compares(keys: int, head_dim: int) -> int:
    """Compare-exchanges that sort every column of a (keys, head_dim) matrix, padded to 2^k."""
    stages = max(0, int(keys - 1).bit_length())
    return head_dim * ((1 << stages) // 2) * (stages * (stages + 1) // 2)


def sorted_columns(
    key: Int64[np.ndarray, "kv_len head_dim"],
) -> tuple[Int64[np.ndarray, "head_dim kv_len"], Int64[np.ndarray, "head_dim kv_len"]]:
    """Every column in ascending order, and the row each value came from (stable)."""
    columns = np.ascontiguousarray(key.T)
    rows = np.argsort(columns, axis=1, kind="stable")
    return np.ascontiguousarray(np.take_along_axis(columns, rows, axis=1)), rows.astype(np.int64)


def choose(
    query: Int64[np.ndarray, "q_len head_dim"],
    key: Int64[np.ndarray, "kv_len head_dim"],
    visible: Bool[np.ndarray, "q_len kv_len"],
    *,
    iterations_share: float,
    threshold_percent: float,
    number: FixedPoint,
    scale: float,
) -> Chosen:
    """Greedy candidate search and post-scoring selection for every query of a head.

    A query that sees n keys runs max(1, ⌊iterations_share · n⌋) iterations.  Keys that it may not
    see are passed over at no cost.  `scale` multiplies scores (1 / √head_dim), and the threshold
    t = ln(100 / percent) is in scaled scores: a key stays where its weight is at least
    `threshold_percent` of the largest.
    """
    # One memory layout: each further one would be compiled anew.
    query, key, visible = (np.ascontiguousarray(part) for part in (query, key, visible))
    values, rows = sorted_columns(key)
    seen = visible.sum(axis=1)
    iterations = np.maximum(1, np.floor(iterations_share * seen)).astype(np.int64)
    margin = np.log(100.0 / threshold_percent) / scale * 4.0**number.fraction_bits
    candidates = np.zeros(len(query), np.int64)
    kept = np.zeros(visible.shape, np.bool_)
    _search(query, key, values, rows, visible, iterations, margin, candidates, kept)
    return Chosen(candidates, kept)


def greedy_scores(
    query: Int64[np.ndarray, "head_dim"],
    key: Int64[np.ndarray, "kv_len head_dim"],
    iterations: int,
) -> Int64[np.ndarray, "kv_len"]:
    """Scores of one query that sees every key after so many iterations of the search."""
    values, rows = sorted_columns(key)
    scores = np.zeros(len(key), np.int64)
    visible = np.ones(len(key), np.bool_)
    state = np.zeros((4, len(query)), np.int64)
    _greedy(query, values, rows, visible, iterations, scores, state)
    return scores


def exponentials(
    below: Int64[np.ndarray, "..."], number: FixedPoint, *, head_dim: int, scale: float
) -> Int64[np.ndarray, "..."]:
    """e^−x from two small tables, x being how far a score lies below the largest.

    `below` has 2 · fraction_bits behind the point and is not yet scaled.  The scaled x is split in
    half: e^−x = e^−high · e^−low, one table of 2^(bits / 2) entries each.
    """
    fraction = 2 * number.fraction_bits
    width = 2 * number.bits + max(1, int(head_dim - 1).bit_length())
    half = -(-width // 2)
    x = np.minimum(np.rint(below * scale).astype(np.int64), (1 << 2 * half) - 1)
    one = 1 << fraction
    entries = np.arange(1 << half, dtype=np.float64) / one
    low = np.rint(np.exp(-entries) * one).astype(np.int64)
    high = np.rint(np.exp(-entries * (1 << half)) * one).astype(np.int64)
    product = high[x >> half] * low[x & ((1 << half) - 1)]
    return (product + (one >> 1)) >> fraction


def attend(
    query: Float[np.ndarray, "q_len head_dim"],
    key: Float[np.ndarray, "kv_len head_dim"],
    value: Float[np.ndarray, "kv_len value_dim"],
    kept: Bool[np.ndarray, "q_len kv_len"],
    *,
    number: FixedPoint,
    scale: float,
) -> Float[np.ndarray, "q_len value_dim"]:
    """The pipeline's output over the kept keys, in fixed point throughout.

    A query that keeps nothing gives zeros.
    """
    q, k, v = (quantise(part, number) for part in (query, key, value))
    scores = np.where(kept, q @ k.T, _EMPTY)
    largest = scores.max(axis=1, keepdims=True)
    below = np.where(kept, largest - scores, 0)
    e = exponentials(below, number, head_dim=query.shape[1], scale=scale)
    e = np.where(kept, e, 0)
    total = np.maximum(e.sum(axis=1, keepdims=True), 1)
    # The divider rounds to the fraction of a weight.
    weights = ((e << (2 * number.fraction_bits)) + total // 2) // total
    return (weights @ v).astype(np.float64) / float(8**number.fraction_bits)


@compiled
def _greedy(
    query: np.ndarray,
    values: np.ndarray,
    rows: np.ndarray,
    visible: np.ndarray,
    iterations: int,
    scores: np.ndarray,
    state: np.ndarray,
) -> None:
    """Add up the `iterations` largest and smallest partial products, guarded by the running sum.

    state (4, head_dim): positions of the next largest and next smallest product, and the products.
    """
    width, length = values.shape
    for j in range(width):
        state[0, j] = length if query[j] >= 0 else -1
        state[1, j] = -1 if query[j] >= 0 else length
        for side in range(2):
            _advance(query, values, rows, visible, state, side, j)
    total = 0
    for _ in range(iterations):
        for side in range(2):
            if side == 1 and total < 0:
                continue
            best, at = _EMPTY, -1
            for j in range(width):
                # The smallest product is kept negated, so that both sides look for a maximum.
                if state[2 + side, j] > best:
                    best, at = state[2 + side, j], j
            if at < 0:
                continue
            if best > 0:
                gain = best if side == 0 else -best
                scores[rows[at, state[side, at]]] += gain
                total += gain
            _advance(query, values, rows, visible, state, side, at)


@inlined
def _advance(
    query: np.ndarray,
    values: np.ndarray,
    rows: np.ndarray,
    visible: np.ndarray,
    state: np.ndarray,
    side: int,
    j: int,
) -> None:
    """Move a column's pointer to its next product and buffer that product."""
    length = values.shape[1]
    # Down from the top of the column where that makes products fall (largest side, q ≥ 0).
    step = -1 if (query[j] >= 0) == (side == 0) else 1
    at = state[side, j] + step
    while 0 <= at < length and not visible[rows[j, at]]:
        at += step
    state[side, j] = at
    if at < 0 or at >= length:
        state[2 + side, j] = _EMPTY
    else:
        product = query[j] * values[j, at]
        state[2 + side, j] = product if side == 0 else -product


@allocating
def _search(
    query: np.ndarray,
    key: np.ndarray,
    values: np.ndarray,
    rows: np.ndarray,
    visible: np.ndarray,
    iterations: np.ndarray,
    margin: float,
    candidates: np.ndarray,
    kept: np.ndarray,
) -> None:
    length, width = key.shape
    state = np.zeros((4, width), np.int64)
    greedy = np.zeros(length, np.int64)
    exact = np.zeros(length, np.int64)
    for i in range(query.shape[0]):
        greedy[:] = 0
        _greedy(query[i], values, rows, visible[i], iterations[i], greedy, state)
        best, at = _EMPTY, -1
        found = 0
        for row in range(length):
            if not visible[i, row]:
                continue
            if greedy[row] > 0:
                found += 1
            if greedy[row] > best:
                best, at = greedy[row], row
        if at < 0:
            continue
        largest = _EMPTY
        for row in range(length):
            # Where no score is positive the largest one is the only candidate.
            if visible[i, row] and (greedy[row] > 0 or (found == 0 and row == at)):
                exact[row] = 0
                for j in range(width):
                    exact[row] += query[i, j] * key[row, j]
                largest = max(largest, exact[row])
                kept[i, row] = True
        candidates[i] = max(found, 1)
        for row in range(length):
            if kept[i, row] and exact[row] < largest - margin:
                kept[i, row] = False
