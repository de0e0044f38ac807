"""What the units of a PE, and the port that they share, do in one cycle.

A PE has a region sequencer, a loader of weight registers, an array, a softmax unit and a
normaliser. Every step returns what the unit does: busy, idle, or the code of what it waits for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.engine.log import BUSY, IDLE
from sparseloom.regions import TILE_QUERIES

UNITS = ("sequencer", "weights", "array", "softmax", "normaliser")
"""Of each PE; the port of the global buffer comes before them all."""
CAUSES = (
    "idle",
    "busy",
    "waits for operands",
    "waits for queries",
    "waits for a run",
    "waits for weights",
    "waits for the array",
    "waits for the softmax unit",
    "waits for the normaliser",
    "waits for outputs to leave",
    "waits for room",
    "lanes unused",
    "fills and drains",
)
(
    OPERANDS, QUERIES, RUN, WEIGHTS, ARRAY, SOFTMAX, NORMALISER, OUTPUT, ROOM, UNUSED, DRAIN
) = range(2, 13)  # fmt: skip
SEQUENCER, LOADER, MAC, SCORES, NORMAL = range(5)

# Columns of the passes.
FIRST, TILES, RUNS, SCAN, IN, OUT, KEY, VALUE, USES, LAST_USE = range(10)
# Columns of a PE's state.
(
    A_AT, A_PHASE, A_TILE, A_BLOCK, A_ROW, A_GAP, A_BLOCKS, A_WAITS,
    L_AT, L_PHASE, L_TILE, L_BLOCK, L_LEFT, L_READY, L_POP, L_BUBBLE, L_CAUSE,
    Q_AT, Q_PHASE, Q_SCAN, Q_EMIT, Q_OPEN, FIFO,
    X_MADE, X_STARTED, X_DONE, X_LEFT, N_DONE, N_LEFT, I_READY, O_LEFT, COUNT,
) = range(32)  # fmt: skip
# Columns of the port's state.
P_LEFT, P_KIND, P_PE, FILLED, USED, MOVED, PASSES_LEFT = range(7)
_NOTHING, _OPERAND, _QUERY, _OUTPUT = range(4)


class Sizes(NamedTuple):
    """Constants of the loop."""

    key_blocks: int
    value_blocks: int
    load: int
    score_row: int
    normal_row: int
    latency: int
    bubble: int
    fifo: int
    room: int
    gap_in_1000: int


@inlined
def step_normaliser(
    z: Sizes, p: np.ndarray, s: np.ndarray, final: np.ndarray, pe: int, now: int
) -> int:
    """A row is normalised once its sum is final: `final` holds the cycle of each."""
    if s[pe, A_AT] >= s[pe, COUNT] or s[pe, X_MADE] == 0:
        return IDLE
    last = (p[TILES] - 1) * TILE_QUERIES
    row = s[pe, N_DONE] % TILE_QUERIES
    if s[pe, N_LEFT] == 0:
        if s[pe, N_DONE] >= p[TILES] * TILE_QUERIES or s[pe, X_MADE] <= last:
            return IDLE
        if s[pe, X_DONE] <= last + row or final[pe, row] > now:
            return SOFTMAX
        s[pe, N_LEFT] = z.normal_row
    s[pe, N_LEFT] -= 1
    if s[pe, N_LEFT] == 0:
        s[pe, N_DONE] += 1
    return BUSY


@inlined
def step_softmax(
    z: Sizes, p: np.ndarray, s: np.ndarray, final: np.ndarray, pe: int, now: int
) -> int:
    """Takes rows of 32 scores in the order in which the array makes them."""
    if s[pe, X_LEFT] == 0:
        if s[pe, X_STARTED] == s[pe, X_MADE]:
            waits = s[pe, A_AT] < s[pe, COUNT] and s[pe, A_PHASE] == 0
            return ARRAY if waits else IDLE
        s[pe, X_STARTED] += 1
        s[pe, X_LEFT] = z.score_row
    s[pe, X_LEFT] -= 1
    if s[pe, X_LEFT] == 0:
        s[pe, X_DONE] += 1
        if s[pe, X_DONE] > (p[TILES] - 1) * TILE_QUERIES:
            final[pe, (s[pe, X_DONE] - 1) % TILE_QUERIES] = now + z.latency + 1
    return BUSY


@inlined
def step_array(z: Sizes, p: np.ndarray, s: np.ndarray, pe: int) -> int:
    """One query of a block in a cycle; A_WAITS says that a pass is whole."""
    if s[pe, A_AT] >= s[pe, COUNT]:
        return IDLE
    if s[pe, A_WAITS] > 0:
        return OUTPUT
    if s[pe, A_GAP] > 0:
        s[pe, A_GAP] -= 1
        return UNUSED
    row, tile = s[pe, A_ROW], s[pe, A_TILE]
    scores = s[pe, A_PHASE] == 0
    at = tile * TILE_QUERIES + row
    if row == 0:
        if s[pe, L_READY] == 0:
            return s[pe, L_CAUSE]
        if scores and s[pe, I_READY] <= s[pe, A_AT]:
            return QUERIES
    if s[pe, A_BLOCK] == 0:
        # A latch is free once the softmax unit has read the score before.
        if scores and tile > 0 and s[pe, X_STARTED] <= at - TILE_QUERIES:
            return SOFTMAX
        if not scores and s[pe, N_DONE] <= at:
            return SOFTMAX if s[pe, X_DONE] < p[TILES] * TILE_QUERIES else NORMALISER
    blocks = z.key_blocks if scores else z.value_blocks
    s[pe, A_ROW] += 1
    if scores and s[pe, A_BLOCK] == blocks - 1:
        s[pe, X_MADE] += 1
    if s[pe, A_ROW] < TILE_QUERIES:
        return BUSY
    s[pe, A_ROW] = 0
    s[pe, L_READY] -= 1
    done = s[pe, A_BLOCKS] * z.gap_in_1000 // 1000
    s[pe, A_BLOCKS] += 1
    s[pe, A_GAP] = s[pe, A_BLOCKS] * z.gap_in_1000 // 1000 - done
    s[pe, A_BLOCK] += 1
    if s[pe, A_BLOCK] == blocks:
        s[pe, A_BLOCK] = 0
        s[pe, A_TILE] += 1
        if s[pe, A_TILE] == p[TILES]:
            s[pe, A_TILE] = 0
            if scores:
                s[pe, A_PHASE] = 1
            else:
                s[pe, A_WAITS] = 1
    return BUSY


@inlined
def step_loader(
    z: Sizes, p: np.ndarray, works: np.ndarray, s: np.ndarray, port: np.ndarray, pe: int
) -> int:
    """Loads the weights of one block while the array works on the one before."""
    if s[pe, L_AT] >= s[pe, COUNT]:
        return IDLE
    if s[pe, L_LEFT] == 0:
        if s[pe, L_READY] >= 2:
            return ARRAY
        work = p[FIRST] + s[pe, L_TILE]
        if s[pe, L_BLOCK] == 0 and s[pe, L_POP] == 0:
            # One more than the runs that are still to be taken: 0 has not looked yet.
            s[pe, L_POP] = 1 + (works[work, 2] if z.fifo > 0 else 0)
        if s[pe, L_BUBBLE] > 0:
            s[pe, L_BUBBLE] -= 1
            return RUN
        if s[pe, L_POP] > 1:
            if s[pe, FIFO] == 0:
                return RUN
            s[pe, FIFO] -= 1
            s[pe, L_POP] -= 1
            if z.bubble > 0:
                s[pe, L_BUBBLE] = z.bubble - 1
                return RUN
        if port[FILLED] <= works[work, s[pe, L_PHASE]]:
            return OPERANDS
        s[pe, L_LEFT] = z.load
    s[pe, L_LEFT] -= 1
    if s[pe, L_LEFT] > 0:
        return BUSY
    s[pe, L_READY] += 1
    s[pe, L_BLOCK] += 1
    blocks = z.key_blocks if s[pe, L_PHASE] == 0 else z.value_blocks
    if s[pe, L_BLOCK] == blocks:
        s[pe, L_BLOCK] = 0
        s[pe, L_POP] = 0
        s[pe, L_TILE] += 1
        if s[pe, L_TILE] == p[TILES]:
            s[pe, L_TILE] = 0
            s[pe, L_AT] += s[pe, L_PHASE]
            s[pe, L_PHASE] = 1 - s[pe, L_PHASE]
    return BUSY


@inlined
def step_sequencer(z: Sizes, p: np.ndarray, s: np.ndarray, pe: int) -> int:
    """Scans descriptors for a query tile, then hands out its runs: for QKᵀ, and again for PV.

    It works at most one query tile ahead. The runs of PV are replayed; where there are more than
    the FIFO holds they are found anew.
    """
    if z.fifo == 0 or s[pe, Q_AT] >= s[pe, COUNT]:
        return IDLE
    if s[pe, Q_OPEN] == 0:
        if s[pe, Q_AT] > s[pe, L_AT] + 1:
            return IDLE
        s[pe, Q_OPEN] = 1
        again = s[pe, Q_PHASE] == 0 or p[RUNS] > z.fifo
        s[pe, Q_SCAN] = p[SCAN] if again else 0
        s[pe, Q_EMIT] = p[RUNS]
    if s[pe, Q_SCAN] > 0:
        s[pe, Q_SCAN] -= 1
        return BUSY
    if s[pe, FIFO] == z.fifo:
        return ROOM
    s[pe, FIFO] += 1
    s[pe, Q_EMIT] -= 1
    if s[pe, Q_EMIT] == 0:
        s[pe, Q_OPEN] = 0
        s[pe, Q_AT] += s[pe, Q_PHASE]
        s[pe, Q_PHASE] = 1 - s[pe, Q_PHASE]
    return BUSY


@inlined
def step_port(
    z: Sizes,
    passes: np.ndarray,
    fills: np.ndarray,
    lists: np.ndarray,
    starts: np.ndarray,
    s: np.ndarray,
    port: np.ndarray,
) -> int:
    """One transfer at a time: outputs first, then queries, then keys and values.

    Queries come one pass ahead.
    """
    code = BUSY
    if port[P_LEFT] == 0:
        port[P_KIND] = _NOTHING
        for pe in range(s.shape[0]):
            if port[P_KIND] == _NOTHING and s[pe, O_LEFT] > 0:
                port[P_KIND], port[P_PE], port[P_LEFT] = _OUTPUT, pe, s[pe, O_LEFT]
        for pe in range(s.shape[0]):
            ready = s[pe, I_READY]
            ahead = ready > s[pe, A_AT] + 1 or ready >= s[pe, COUNT]
            if port[P_KIND] == _NOTHING and not ahead:
                port[P_KIND], port[P_PE] = _QUERY, pe
                port[P_LEFT] = passes[lists[starts[pe] + ready], IN]
        if port[P_KIND] == _NOTHING:
            code = IDLE
            if port[FILLED] < fills.shape[0]:
                code = ROOM
                bytes_ = fills[port[FILLED], 0]
                if port[USED] + bytes_ <= z.room:
                    code = BUSY
                    port[USED] += bytes_
                    port[P_KIND], port[P_LEFT] = _OPERAND, fills[port[FILLED], 1]
    if code == BUSY:
        port[P_LEFT] -= 1
        port[MOVED] += 1
        if port[P_LEFT] == 0:
            if port[P_KIND] == _OPERAND:
                port[FILLED] += 1
            elif port[P_KIND] == _QUERY:
                s[port[P_PE], I_READY] += 1
            else:
                s[port[P_PE], O_LEFT] = 0
    return code
