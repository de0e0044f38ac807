"""SpAtten in closed form: each load takes as long as its slowest stage, for many designs at once.

Per load: bytes over bandwidth, lines of scores (twice where low bits are fetched again), expected
cycles of the selection, lines of values; stages of different loads overlap perfectly. Rankings of
tokens, and the fill of the pipeline behind each, do not overlap with anything. More bandwidth,
lanes or multipliers is never slower here, which with random pivots and FIFOs holds only on average.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparseloom.hardware.engine.compiled import compiled, inlined
from sparseloom.hardware.spatten import jobs as j
from sparseloom.hardware.spatten.jobs import Jobs
from sparseloom.hardware.spatten.layout import ATOM
from sparseloom.hardware.spatten.state import Sizes

PIVOT_CYCLES = 3  # of a round, besides the groups that it reads

# Columns of a design.
D_BYTES, D_MULTIPLIERS, D_SOFTMAX, D_TOPK, D_EMIT, D_MERGE = range(6)


class Kinds(NamedTuple):
    """Loads that are alike, once each.

    loads (kinds, 5): how many, atoms, tokens ranked from and to, first entry in `rows`.
    rows (entries, 4): how many, keys, values, whether low bits are fetched again.
    ends (kinds + 1): where the entries of each kind begin.
    fill: cycles of the pipeline from a request to its output. head_dim: values in a vector.
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
    heads: list[tuple[int, int, int]] = []
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
        ranks = int(load[j.L_RANK_FROM]), int(load[j.L_RANK_TO])
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
    fill += sizes.value_latency
    return Kinds(
        np.array([[n, *head] for n, head in zip(counts, heads, strict=True)], np.int64),
        np.concatenate(entries) if entries else np.zeros((0, 4), np.int64),
        ends,
        float(fill),
        jobs.head_dim,
    )


def cycles(found: Kinds, designs: np.ndarray) -> np.ndarray:
    """Cycles of every design (designs, `D_…` columns, float64), shape (designs,)."""
    out = np.zeros(len(designs))
    _cycles(found.loads, found.rows, found.ends, found.fill, found.head_dim, designs, out)
    return out


@inlined
def expected_quick_select(n: float, k: float, lanes: float) -> float:
    """Mean cycles of the quick-select of k among n distinct values.

    Expected rounds H_k + H_{n−k+1} − 1 and expected comparisons (Knuth, Find); a round reads half
    a group more than it has, on average.
    """
    if k <= 0 or k >= n:
        return 0.0
    hn, hk, hr = _harmonic(n), _harmonic(k), _harmonic(n - k + 1)
    rounds = hk + hr - 1
    compared = 2 * ((n + 1) * hn - (n + 3 - k) * hr - (k + 2) * hk + n + 3)
    items = max(compared, 0.0) + rounds
    return items / lanes + rounds * (PIVOT_CYCLES + (lanes - 1) / (2 * lanes))


@inlined
def _harmonic(n: float) -> float:
    if n < 20:
        found = 0.0
        for i in range(int(n)):
            found += 1 / (i + 1)
        return found
    return np.log(n) + 0.5772156649015329 + 1 / (2 * n) - 1 / (12 * n * n)


@inlined
def _sort(n: float, lanes: float) -> float:
    groups = np.ceil(n / lanes)
    return groups * max(1.0, np.ceil(np.log2(max(1.0, groups))))


@compiled
def _cycles(
    loads: np.ndarray,
    rows: np.ndarray,
    ends: np.ndarray,
    fill: float,
    head_dim: int,
    designs: np.ndarray,
    out: np.ndarray,
) -> None:
    # Designs that share lanes share the selections' cycles.
    for d in range(designs.shape[0]):
        per_byte = 1 / designs[d, D_BYTES]
        per_line = np.floor(designs[d, D_MULTIPLIERS] / head_dim)
        line_cycles = np.ceil(per_line / designs[d, D_SOFTMAX])
        lanes, emit = designs[d, D_TOPK], designs[d, D_EMIT]
        merge = designs[d, D_MERGE] > 0
        total = fill
        for i in range(loads.shape[0]):
            fetch = loads[i, 1] * ATOM * per_byte
            scores, values, chosen = 0.0, 0.0, 0.0
            for r in range(ends[i], ends[i + 1]):
                many, n, k = rows[r, 0], rows[r, 1], rows[r, 2]
                scores += many * np.ceil(n / per_line) * line_cycles * (1 + rows[r, 3])
                values += many * np.ceil(k / per_line)
                if k < n:
                    one = _sort(n, lanes) if merge else expected_quick_select(n, k, lanes)
                    chosen += many * (one + max(n / lanes, k / emit))
            took = max(max(fetch, scores), max(values, chosen))
            if loads[i, 2] > 0:
                n, k = loads[i, 2], loads[i, 3]
                one = _sort(n, lanes) if merge else expected_quick_select(n, k, lanes)
                took += one + max(n / lanes, k / emit) + fill
            total += took * loads[i, 0]
        out[d] = total
