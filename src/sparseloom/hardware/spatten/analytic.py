"""SpAtten in closed form: each load takes as long as its slowest stage, for many designs at once.

Per load: bytes over bandwidth, lines of scores (twice where low bits are fetched again), expected
cycles of the selection, lines of values; stages of different loads overlap perfectly. Rankings of
tokens, and the fill of the pipeline behind each, do not overlap with anything. More bandwidth,
lanes or multipliers is never slower here, which with random pivots and FIFOs holds only on average.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparseloom.hardware.engine.compiled import compiled
from sparseloom.hardware.spatten import jobs as j
from sparseloom.hardware.spatten.jobs import Jobs
from sparseloom.hardware.spatten.layout import ATOM
from sparseloom.hardware.spatten.state import Sizes

PIVOT_CYCLES = 3  # of a round, besides the groups that it reads

# Columns of a design.
D_BYTES, D_MULTIPLIERS, D_SOFTMAX, D_TOPK, D_EMIT, D_MERGE = range(6)


class Kinds(NamedTuple):
    """Loads that are alike, once each.

    loads (kinds, 5): how many, atoms, tokens ranked from and to, whether all before must end.
    rows (entries, 4): how many, keys, values, whether low bits are fetched again.
    ends (kinds + 1): where the entries of each kind begin.
    fill: cycles of the pipeline from a request to its output, without the few levels of
    adders that depend on the keys in a line. head_dim: values in a vector.
    """

    loads: np.ndarray
    rows: np.ndarray
    ends: np.ndarray
    fill: float
    head_dim: int


def kinds(jobs: Jobs, sizes: Sizes) -> Kinds:
    """The distinct loads of a run. Equal rows of a load become one entry."""
    loads, rows = jobs.loads, jobs.rows
    entries: list[np.ndarray] = []
    table: dict[tuple[int, ...], int] = {}
    counts: list[int] = []
    heads: list[tuple[int, int, int, int]] = []
    for load in loads:
        mine = rows[load[j.L_FIRST_ROW] : load[j.L_FIRST_ROW] + load[j.L_ROWS]]
        atoms = int(load[j.L_KEYS] * load[j.L_KEY_ATOMS])
        atoms += int((mine[:, j.N_REFETCH] * load[j.L_KEYS]).sum() * load[j.L_LOW_ATOMS])
        own = mine[:, j.N_VALUES].sum() if load[j.L_GENERATION] else load[j.L_KEYS]
        atoms += int(own * load[j.L_VALUE_ATOMS])
        triples = mine[:, [j.N_KEYS, j.N_VALUES, j.N_REFETCH]]
        if len(triples) > 1:
            distinct, times = np.unique(triples, axis=0, return_counts=True)
        else:
            distinct, times = triples, np.ones(1, np.int64)
        found = np.concatenate([times[:, None], distinct], axis=1)
        ranks = int(load[j.L_RANK_FROM]), int(load[j.L_RANK_TO]), int(load[j.L_DRAIN])
        key = (atoms, *ranks, *found.ravel().tolist())
        place = table.setdefault(key, len(table))
        if place == len(counts):
            counts.append(0)
            entries.append(found)
            heads.append((atoms, *ranks))
        counts[place] += 1
    ends = np.concatenate([[0], np.cumsum([len(e) for e in entries])]).astype(np.int64)
    fill = sizes.request_latency + sizes.convert_latency + sizes.tree_latency
    fill += sizes.sum_latency + sizes.probability_latency + sizes.decision_latency
    fill += sizes.replay_latency + sizes.request_latency + sizes.convert_latency
    fill += sizes.value_latency - (sizes.keys_per_line - 1).bit_length()
    return Kinds(
        np.array([[n, *head] for n, head in zip(counts, heads, strict=True)], np.int64),
        np.concatenate(entries) if entries else np.zeros((0, 4), np.int64),
        ends,
        float(fill),
        jobs.head_dim,
    )


def cycles(found: Kinds, designs: np.ndarray) -> np.ndarray:
    """Cycles of every design (designs, `D_…` columns, float64), shape (designs,)."""
    arrays, array = _distinct(designs[:, [D_MULTIPLIERS, D_SOFTMAX]])
    engines, engine = _distinct(designs[:, [D_TOPK, D_EMIT, D_MERGE]])
    kinds_, starts = len(found.loads), found.ends[:-1]
    work = np.zeros((len(arrays), kinds_))
    for i, (multipliers, softmax) in enumerate(arrays):
        per_line = multipliers // found.head_dim
        lines = np.ceil(found.rows[:, 1:3] / per_line)
        # A line is scored in a cycle, and the softmax takes so many scores.
        lines[:, 0] = np.maximum(lines[:, 0], found.rows[:, 1] / softmax)
        lines[:, 0] *= 1 + found.rows[:, 3]
        sums = np.add.reduceat(found.rows[:, :1] * lines, starts, axis=0)
        work[i] = sums.max(axis=1)
    chosen, ranked = np.zeros((len(engines), kinds_)), np.zeros((len(engines), kinds_))
    for i, (lanes, emit, merge) in enumerate(engines):
        each = found.rows[:, 0] * _selection(found.rows[:, 1], found.rows[:, 2], lanes, emit, merge)
        chosen[i] = np.add.reduceat(each, starts)
        one = _selection(found.loads[:, 2], found.loads[:, 3], lanes, emit, merge)
        # The pipeline is empty behind a ranking, and before a call that waits for all others.
        refills = (found.loads[:, 2] > 0) + found.loads[:, 4]
        ranked[i] = one + found.fill * refills
    starts_empty = 1.0 - float(found.loads[0, 4]) if len(found.loads) else 1.0
    out = np.full(len(designs), found.fill * starts_empty)
    fetched = found.loads[:, 1] * float(ATOM)
    times = found.loads[:, 0].astype(np.float64)
    per_byte = 1 / designs[:, D_BYTES]
    _add_up(fetched, times, work, chosen, ranked, per_byte, array, engine, out)
    return out


def _distinct(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows and the place of each; by one number per row, as sorting rows is slow."""
    code = np.zeros(len(table), np.int64)
    for column in table.T:
        values, place = np.unique(column, return_inverse=True)
        code = code * len(values) + place
    _, first, which = np.unique(code, return_index=True, return_inverse=True)
    return table[first], which


def expected_quick_select(n: np.ndarray, k: np.ndarray, lanes: float) -> np.ndarray:
    """Mean cycles of the quick-select of k among n distinct values, 0 where it is bypassed.

    Expected rounds H_k + H_{n−k+1} − 1 and expected comparisons (Knuth, Find); a round reads half
    a group more than it has, on average.
    """
    bypassed = (k <= 0) | (k >= n)
    n, k = np.where(bypassed, 2, n), np.where(bypassed, 1, k)
    every, mine, rest = _harmonic(n), _harmonic(k), _harmonic(n - k + 1)
    rounds = mine + rest - 1
    compared = 2 * ((n + 1) * every - (n + 3 - k) * rest - (k + 2) * mine + n + 3)
    items = np.maximum(compared, 0.0) + rounds
    cycles = items / lanes + rounds * (PIVOT_CYCLES + (lanes - 1) / (2 * lanes))
    return np.where(bypassed, 0.0, cycles)


def _selection(n: np.ndarray, k: np.ndarray, lanes: float, emit: float, merge: float) -> np.ndarray:
    """Select and filter; 0 where everything passes."""
    if merge:
        groups = np.ceil(n / lanes)
        one = groups * np.maximum(1.0, np.ceil(np.log2(np.maximum(1.0, groups))))
    else:
        one = expected_quick_select(n, k, lanes)
    return np.where(k < n, one + np.maximum(n / lanes, k / emit), 0.0)


def _harmonic(n: np.ndarray) -> np.ndarray:
    """1 + 1/2 + … + 1/n."""
    small = np.cumsum(1 / np.arange(1, 21))
    large = np.log(n) + np.euler_gamma + 1 / (2 * n) - 1 / (12 * n * n)
    return np.where(n <= 20, small[np.clip(n, 1, 20).astype(np.int64) - 1], large)


@compiled
def _add_up(
    fetched: np.ndarray,
    times: np.ndarray,
    work: np.ndarray,
    chosen: np.ndarray,
    ranked: np.ndarray,
    per_byte: np.ndarray,
    array: np.ndarray,
    engine: np.ndarray,
    out: np.ndarray,
) -> None:
    for d in range(out.shape[0]):
        a, e = array[d], engine[d]
        for i in range(times.shape[0]):
            took = max(fetched[i] * per_byte[d], max(work[a, i], chosen[e, i]))
            out[d] += times[i] * (took + ranked[e, i])
