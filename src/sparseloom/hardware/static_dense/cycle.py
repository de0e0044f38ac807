"""Heads stepped cycle by cycle: passes follow each other on one PE or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparseloom.hardware.engine.compiled import compiled, inlined
from sparseloom.hardware.engine.log import BUSY, Log, close, make_log, note
from sparseloom.hardware.static_dense.analytic import pass_cycles, rates
from sparseloom.hardware.static_dense.config import StaticDenseConfig
from sparseloom.hardware.static_dense.lowering import HeadSize, Passes, deal
from sparseloom.hardware.static_dense.runs import HeadRuns
from sparseloom.hardware.static_dense.units import (
    A_AT,
    A_PHASE,
    A_WAITS,
    ARRAY,
    CAUSES,
    COUNT,
    FIRST,
    IN,
    L_AT,
    L_CAUSE,
    LAST_USE,
    LOADER,
    MAC,
    MOVED,
    N_DONE,
    NORMAL,
    O_LEFT,
    OUT,
    P_LEFT,
    PASSES_LEFT,
    Q_AT,
    RUNS,
    SCAN,
    SCORES,
    SEQUENCER,
    TILES,
    UNITS,
    USED,
    USES,
    WEIGHTS,
    X_DONE,
    X_MADE,
    X_STARTED,
    Sizes,
    step_array,
    step_loader,
    step_normaliser,
    step_port,
    step_sequencer,
    step_softmax,
)  # fmt: skip
from sparseloom.regions import TILE_KEYS, TILE_QUERIES

_QUIET = 1_000_000  # cycles without the end of a pass after which something is stuck


class Run(NamedTuple):
    """cycles; log of all units; port_cycles: in which the global buffer's port moved bytes."""

    cycles: int
    log: Log
    port_cycles: int


def unit_names(pes: int) -> tuple[str, ...]:
    """Names of the log's units."""
    many = [f" {pe}" for pe in range(pes)] if pes > 1 else [""]
    return ("global buffer", *(f"{unit}{pe}" for pe in many for unit in UNITS))


def run(
    config: StaticDenseConfig,
    heads: Sequence[tuple[HeadRuns, Passes]],
    size: HeadSize,
    window: tuple[int, int] = (0, 0),
) -> Run:
    """Run heads of one call one after another, from cold buffers to the last output.

    Raises:
        RuntimeError: the units wait for each other, which no trace may bring about.
    """
    sequenced = any(runs.descriptors > 0 for runs, _ in heads)
    speed = rates(config, size, sequenced=sequenced)
    passes, works, uses, fills = _flat(config, heads, size)
    pes = config.pes
    lists, starts = _lists(config, heads, size)
    state = np.zeros((pes, 32), np.int64)
    state[:, COUNT] = np.diff(starts)
    port = np.zeros(7, np.int64)
    port[PASSES_LEFT] = passes.shape[0]
    log = make_log(1 + len(UNITS) * pes, len(CAUSES), window=window)
    sizes = Sizes(
        speed.key_blocks,
        speed.value_blocks,
        speed.load,
        speed.score_row,
        speed.normal_row,
        speed.latency,
        speed.bubble,
        config.sequencer.run_fifo if sequenced else 0,
        int(config.buffers.weight_kib * 1024),
        round(1000 * TILE_QUERIES * (1 / speed.utilisation - 1)),
    )
    final = np.zeros((pes, TILE_QUERIES), np.int64)
    did = np.zeros((1 + len(UNITS) * pes, 2), np.int64)
    now = _loop(sizes, passes, works, uses, fills, lists, starts, state, port, final, did, log)
    if now < 0:
        raise RuntimeError(f"{config.name}: no pass ended in {_QUIET} cycles: units are stuck")
    return Run(int(now), log, int(port[MOVED]))


def _flat(
    config: StaticDenseConfig, heads: Sequence[tuple[HeadRuns, Passes]], size: HeadSize
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Passes, tiles of work, uses and fills of all heads, one after another.

    works (tiles, 3): fill of K and of V that must be there, runs that begin.
    uses (uses): fills, in pairs of K and V, by pass. fills (fills, 3): bytes, cycles, uses left.
    """
    width = config.buffers.global_bytes_per_cycle
    all_passes, all_works, all_uses, all_fills = [], [], [], []
    tiles = fills = used = 0
    for runs, work in heads:
        units = work.unit_pass.size
        # K of a pass before its V, each in the order of use.
        order = np.lexsort(
            (np.tile(np.arange(units), 2), np.repeat([0, 1], units), np.tile(work.unit_pass, 2))
        )
        rank = np.empty(2 * units, np.int64)
        rank[order] = np.arange(2 * units)
        key, value = rank[:units] + fills, rank[units:] + fills
        bytes_ = np.repeat([TILE_KEYS * size.head_dim, TILE_KEYS * size.value_dim], units)[order]
        count = np.bincount(work.used_unit, minlength=units)
        table = np.zeros((work.count, 10), np.int64)
        table[:, FIRST] = tiles + np.cumsum(work.tiles) - work.tiles
        table[:, TILES], table[:, RUNS] = work.tiles, work.runs
        table[:, SCAN] = runs.descriptors
        table[:, IN] = -(-work.incoming(size) // width)
        table[:, OUT] = -(-work.outgoing(size) // width)
        per_pass = np.bincount(work.used_pass, minlength=work.count) * 2
        table[:, LAST_USE] = used + np.cumsum(per_pass)
        table[:, USES] = table[:, LAST_USE] - per_pass
        all_passes.append(table)
        # A tile waits for the latest of the operands of its pass up to it.
        all_works.append(np.stack([key[work.unit], value[work.unit], work.starts], axis=1))
        all_uses.append(np.stack([key[work.used_unit], value[work.used_unit]], axis=1).reshape(-1))
        all_fills.append(np.stack([bytes_, -(-bytes_ // width), np.tile(count, 2)[order]], axis=1))
        tiles += int(work.tiles.sum())
        fills += 2 * units
        used += 2 * work.used_unit.size
    parts = (all_passes, all_works, all_uses, all_fills)
    one, two, three, four = (np.concatenate(part).astype(np.int64) for part in parts)
    return one, two, three, four


def _lists(
    config: StaticDenseConfig, heads: Sequence[tuple[HeadRuns, Passes]], size: HeadSize
) -> tuple[np.ndarray, np.ndarray]:
    """Passes of each PE in order, and where each PE's begin."""
    dealt: list[np.ndarray] = []
    for runs, work in heads:
        speed = rates(config, size, sequenced=runs.descriptors > 0)
        cost = np.ceil(pass_cycles(speed, work)).astype(np.int64)
        pe = np.zeros(work.count, np.int64)
        for chunk in np.unique(work.chunk):
            mine = work.chunk == chunk
            pe[mine] = deal(cost[mine], config.pes)
        dealt.append(pe)
    pe = np.concatenate(dealt)
    counts = np.bincount(pe, minlength=config.pes)
    return np.argsort(pe, kind="stable"), np.append(0, np.cumsum(counts)).astype(np.int64)


@compiled
def _loop(
    z: Sizes,
    passes: np.ndarray,
    works: np.ndarray,
    uses: np.ndarray,
    fills: np.ndarray,
    lists: np.ndarray,
    starts: np.ndarray,
    s: np.ndarray,
    port: np.ndarray,
    final: np.ndarray,
    did: np.ndarray,
    log: Log,
) -> int:
    """Cycles until the last output has left, or −1 where nothing moves any more."""
    now, changed, writing = 0, 0, 0
    pes = s.shape[0]
    while port[PASSES_LEFT] > 0 or writing > 0:
        for pe in range(pes):
            first = 1 + 5 * pe
            at = _pass(lists, starts, s, pe, A_AT)
            p = passes[at]
            did[first + NORMAL, 0] = step_normaliser(z, p, s, final, pe, now)
            did[first + SCORES, 0] = step_softmax(z, p, s, final, pe, now)
            did[first + MAC, 0] = step_array(z, p, s, pe)
            did[first + MAC : first + NORMAL + 1, 1] = at
            if s[pe, A_WAITS] > 0 and s[pe, O_LEFT] == 0:
                # The pass leaves: its outputs wait for the port, its operands make room.
                s[pe, O_LEFT] = p[OUT]
                for i in range(p[USES], p[LAST_USE]):
                    fills[uses[i], 2] -= 1
                    if fills[uses[i], 2] == 0:
                        port[USED] -= fills[uses[i], 0]
                port[PASSES_LEFT] -= 1
                changed = now
                s[pe, A_AT] += 1
                for column in (A_PHASE, A_WAITS, X_MADE, X_STARTED, X_DONE, N_DONE):
                    s[pe, column] = 0
            at = _pass(lists, starts, s, pe, L_AT)
            code = step_loader(z, passes[at], works, s, port, pe)
            s[pe, L_CAUSE] = WEIGHTS if code in (BUSY, ARRAY) else code
            did[first + LOADER, 0], did[first + LOADER, 1] = code, at
            at = _pass(lists, starts, s, pe, Q_AT)
            did[first + SEQUENCER, 0] = step_sequencer(z, passes[at], s, pe)
            did[first + SEQUENCER, 1] = at
        did[0, 0], did[0, 1] = step_port(z, passes, fills, lists, starts, s, port), -1
        writing = 1 if port[P_LEFT] > 0 else 0
        for pe in range(pes):
            writing += s[pe, O_LEFT]
        for unit in range(did.shape[0]):
            note(log, unit, did[unit, 0], did[unit, 1], now)
        if now - changed > _QUIET:
            return -1
        now += 1
    for unit in range(did.shape[0]):
        close(log, unit, now)
    return now


@inlined
def _pass(lists: np.ndarray, starts: np.ndarray, s: np.ndarray, pe: int, column: int) -> int:
    """The pass that a unit of a PE is at; its last one when it is done."""
    if s[pe, COUNT] == 0:
        return 0
    at: int = starts[pe] + min(s[pe, column], s[pe, COUNT] - 1)
    return lists[at]
