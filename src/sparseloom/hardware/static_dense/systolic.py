"""The weight-stationary variant: a Gemmini-like array, keys outer, queries streamed.

A sub-tile of K (P keys × P dimensions) is loaded and the queries of a run stream through it; the
next one is loaded meanwhile. The compiler transposes regions into runs of queries per key tile.
Scores and outputs gather in the accumulator memory, so that maxima and sums of all rows are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparseloom.hardware.engine.compiled import compiled
from sparseloom.hardware.engine.log import BUSY, IDLE, Log, close, make_log, note
from sparseloom.hardware.static_dense import units
from sparseloom.hardware.static_dense.config import StaticDenseConfig
from sparseloom.hardware.static_dense.lowering import HeadSize, Passes
from sparseloom.hardware.static_dense.runs import HeadRuns
from sparseloom.regions import TILE_KEYS, TILE_QUERIES, Mode, runs_of_owners
from sparseloom.trace import Operator

UNITS = ("weights", "array", "softmax")
ROWS, FIRST_OF_RUN, CHAIN_END, PV, SCORED = range(5)


class Run(NamedTuple):
    """cycles, and the log of all units."""

    cycles: int
    log: Log


class Columns(NamedTuple):
    """Runs of queries per column of keys, in the order in which they stream.

    column, rows, keys (runs): which column, queries, and rows of keys that are worked on. A column
    is a key tile or, pooled by s, a group of s of them.
    """

    column: np.ndarray
    rows: np.ndarray
    keys: np.ndarray


def unit_names(pes: int) -> tuple[str, ...]:
    """Names of the log's units; there is one PE."""
    del pes
    return UNITS


def columns(config: StaticDenseConfig, runs: HeadRuns, size: HeadSize) -> Columns:
    """A head's runs transposed: per block of queries that the accumulators hold, by column."""
    most = int(config.systolic.accumulator_kib * 1024) // (4 * size.value_dim)
    block = max(1, most // TILE_QUERIES)
    owner, parts, base = runs.map(), [], 0
    for first in range(0, runs.query_tiles, block):
        mine = owner[first : first + block]
        for i, kind in enumerate(runs.classes):
            pooled = 1 << kind.log2s if kind.mode is Mode.COARSE else 1
            kept = np.pad(mine == i, ((0, 0), (0, -runs.key_tiles % pooled)))
            kept = kept.reshape(len(mine), -1, pooled).any(axis=2)
            found = runs_of_owners(np.where(kept.T, 0, -1).astype(np.int16))
            last = np.minimum((first + found.end) * TILE_QUERIES, size.q_len)
            rows = last - (first + found.begin) * TILE_QUERIES
            keys = TILE_KEYS * kind.eighths // 8 if kind.mode is Mode.STRIDED else TILE_KEYS
            parts.append(np.stack([base + found.query_tile, rows, np.full(rows.size, keys)]))
            base += -(-runs.key_tiles // pooled)
    whole = np.concatenate(parts, axis=1).astype(np.int64)
    return Columns(*whole)


def head_cycles(config: StaticDenseConfig, runs: HeadRuns, work: Passes, size: HeadSize) -> float:
    """Σ over runs of ⌈keys/P⌉ · ⌈d/P⌉ · max(rows, P), in QKᵀ and PV, and 2 P per chain.

    A chain is what follows without a gap: the runs of a column, in one of the two.
    """
    del work
    p = config.systolic.size
    found = columns(config, runs, size)
    blocks = -(-size.head_dim // p) - (-size.value_dim // p)
    streamed = -(-found.keys // p) * blocks * np.maximum(found.rows, p)
    array = float(streamed.sum()) / (config.sparse_utilisation if runs.descriptors else 1.0)
    return array + 2 * 2 * p * np.unique(found.column).size


def product_cycles(config: StaticDenseConfig, operator: Operator) -> float:
    """A matrix product: sub-tiles of the weights, all rows streamed through each."""
    p = config.systolic.size
    tiles = -(-operator.inner // p) * -(-operator.columns // p)
    return float(tiles * max(operator.rows, p) + 2 * p)


def run(
    config: StaticDenseConfig,
    heads: Sequence[tuple[HeadRuns, Passes]],
    size: HeadSize,
    window: tuple[int, int] = (0, 0),
) -> Run:
    """Run heads of one call one after another, to the last output."""
    p = config.systolic.size
    jobs = np.concatenate([_jobs(config, runs, size) for runs, _ in heads])
    log = make_log(len(UNITS), len(units.CAUSES), window=window)
    sequenced = any(runs.descriptors for runs, _ in heads)
    bubble = config.sequencer.bubble_cycles if sequenced else 0
    use = config.sparse_utilisation if sequenced else 1.0
    softmax = config.softmax
    cycles = _loop(
        jobs, p, bubble, round(1000 / use), softmax.scores_per_cycle, softmax.latency_cycles, log
    )
    return Run(int(cycles), log)


def _jobs(config: StaticDenseConfig, runs: HeadRuns, size: HeadSize) -> np.ndarray:
    """Sub-tiles in order (jobs, 5): rows, begins a run, ends a chain, of PV, scores per row."""
    p = config.systolic.size
    found = columns(config, runs, size)
    parts: list[np.ndarray] = []
    for column in np.unique(found.column):
        mine = np.flatnonzero(found.column == column)
        for phase, width in enumerate((size.head_dim, size.value_dim)):
            chain: list[tuple[int, int, int, int, int]] = []
            for i in mine:
                for sub in range(-(-int(found.keys[i]) // p)):
                    keys = min(p, int(found.keys[i]) - sub * p)
                    last = -(-width // p) - 1
                    for e in range(last + 1):
                        scored = keys if phase == 0 and e == last else 0
                        begins = int(sub == 0 and e == 0)
                        chain.append((int(found.rows[i]), begins, 0, phase, scored))
            table = np.array(chain, np.int64)
            table[-1, CHAIN_END] = 1
            parts.append(table)
    return np.concatenate(parts) if parts else np.zeros((0, 5), np.int64)


@compiled
def _loop(
    jobs: np.ndarray, p: int, bubble: int, per_row: int, rate: int, latency: int, log: Log
) -> int:
    """Cycles until the last sub-tile has streamed and drained; `per_row` in thousandths."""
    now, at, loaded = 0, 0, 0
    load_left, stream_left, drain_left, backlog, quiet, row = 0, 0, 0, 0, 0, 0
    count = jobs.shape[0]
    while at < count or backlog > 0:
        # Softmax: scores of the rows that have passed, `rate` of them in a cycle.
        if backlog > 0:
            backlog = max(0, backlog - rate)
            quiet = latency
            note(log, 2, BUSY, at, now)
        else:
            quiet = max(0, quiet - 1)
            note(log, 2, IDLE, -1, now)
        # Array.
        if at == count:
            note(log, 1, IDLE, -1, now)
        elif drain_left > 0:
            drain_left -= 1
            note(log, 1, units.DRAIN, at, now)
            if drain_left == 0:
                at += 1
        elif stream_left == 0 and loaded <= at:
            note(log, 1, units.WEIGHTS, at, now)
        elif stream_left == 0 and jobs[at, PV] == 1 and (backlog > 0 or quiet > 0):
            note(log, 1, units.SOFTMAX, at, now)
        else:
            if stream_left == 0:
                stream_left = -(-jobs[at, ROWS] * per_row // 1000)
                row = 0
            # Rows are spread evenly over the cycles where the array is not fully used.
            before = row * 1000 // per_row
            row += 1
            fresh = min(row * 1000 // per_row, jobs[at, ROWS]) - min(before, jobs[at, ROWS])
            backlog += fresh * jobs[at, SCORED]
            note(log, 1, BUSY if fresh > 0 or per_row <= 1000 else units.UNUSED, at, now)
            stream_left -= 1
            if stream_left == 0:
                if jobs[at, CHAIN_END] == 1:
                    drain_left = 2 * p
                else:
                    at += 1
        # Loader: one sub-tile ahead of the one that streams.
        if load_left == 0 and loaded < count and loaded <= at + 1:
            load_left = p + (bubble if jobs[loaded, FIRST_OF_RUN] == 1 else 0)
        if load_left > 0:
            load_left -= 1
            note(log, 0, BUSY, loaded, now)
            loaded += 1 if load_left == 0 else 0
        else:
            note(log, 0, IDLE if loaded == count else units.ARRAY, -1, now)
        now += 1
    for unit in range(3):
        close(log, unit, now)
    return now
