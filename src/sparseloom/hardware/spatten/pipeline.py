"""Modules 7 to 12: scores, softmax, decision, selection of values, weighted sum.

Rows flow in order. A row holds its place in the row FIFO until its sum is known, and in the
decision's FIFO until the next stage takes it; what has no room waits, and says for what.
"""

from __future__ import annotations

import numpy as np

from sparseloom.hardware.engine import fifo
from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.engine.log import Log, note
from sparseloom.hardware.spatten import state as st
from sparseloom.hardware.spatten.fetch import request
from sparseloom.hardware.spatten.jobs import (
    L_FIRST_ROW,
    L_GENERATION,
    L_HEAD_REGION,
    L_HEADS,
    L_KEYS,
    L_KEYS_AT,
    L_LINES,
    L_LOW_ATOMS,
    L_LOW_BASE,
    L_LOW_STRIDE,
    L_RANK_FROM,
    L_VALUE_ATOMS,
    L_VALUE_BASE,
    L_VALUE_STRIDE,
    N_KEYS,
    N_LINES,
    N_LOAD,
    N_PROBABILITIES_AT,
    N_REFETCH,
    N_VALUE_IDS_AT,
    N_VALUE_LINES,
    N_VALUES,
)
from sparseloom.hardware.spatten.state import Sizes, State
from sparseloom.hardware.units.topk import PIPELINE, filter_cycles, select_from

NEVER = 1 << 60


@inlined
def step_values(
    z: Sizes, s: State, loads: np.ndarray, rows: np.ndarray, log: Log, now: int
) -> None:
    """Module 11: a line of values times its probabilities, and the row's end (12)."""
    note(log, st.HEAD_SCORE, st.IDLE, -1, now)
    if fifo.used(s.queues, st.TO_VALUES) == 0:
        note(log, st.VALUES, st.IDLE, -1, now)
        return
    row = fifo.peek(s.queues, st.TO_VALUES)
    load = rows[row, N_LOAD]
    generation = loads[load, L_GENERATION] == 1
    needed = rows[row, N_VALUES]
    lines = rows[row, N_VALUE_LINES]
    line = s.registers[st.R_VALUE_LINE]
    if line < lines:
        upto = min(needed, (line + 1) * z.keys_per_line)
        q = (
            s.rows[row, st.ROW_VALUE_REQUEST]
            if generation
            else s.rows[loads[load, L_FIRST_ROW], st.ROW_VALUE_REQUEST]
        )
        if s.rows[row, st.ROW_EMITTED] < upto:
            note(log, st.VALUES, st.ON_VALUE_TOPK, row, now)
            return
        if s.requests[q, st.Q_READY] < upto:
            note(log, st.VALUES, st.ON_DATA, row, now)
            return
        s.counts[st.C_VALUE_LINES] += 1
        s.counts[st.C_VALUES] += upto - line * z.keys_per_line
        s.registers[st.R_VALUE_LINE] = line + 1
        note(log, st.VALUES, st.BUSY, row, now)
    else:
        note(log, st.VALUES, st.IDLE, row, now)  # it keeps no value
    if s.registers[st.R_VALUE_LINE] < lines:
        return
    fifo.pop(s.queues, st.TO_VALUES)
    s.registers[st.R_VALUE_LINE] = 0
    note(log, st.HEAD_SCORE, st.BUSY, row, now)
    if generation:
        s.registers[st.R_VALUE_LINES] -= lines
    s.registers[st.R_DONE_ROWS] += 1
    s.loads[load, st.LOAD_UNFINISHED] -= 1
    if s.loads[load, st.LOAD_UNFINISHED] == 0:
        if not generation:
            s.registers[st.R_VALUE_LINES] -= loads[load, L_LINES]
        s.registers[st.R_LOADS_DONE] += 1
        s.loads[load, st.LOAD_END] = now + 1 + z.value_latency
        s.registers[st.R_END] = max(s.registers[st.R_END], s.loads[load, st.LOAD_END])


@inlined
def step_value_topk(
    z: Sizes,
    s: State,
    loads: np.ndarray,
    rows: np.ndarray,
    probabilities: np.ndarray,
    log: Log,
    now: int,
) -> None:
    """Module 10: select the largest probabilities of a row, or let all of it pass."""
    row = s.registers[st.R_TOPK_ROW] - 1
    if row < 0:
        if fifo.used(s.queues, st.TO_TOPK) == 0:
            note(log, st.VALUE_TOPK, st.IDLE, -1, now)
            return
        row = fifo.peek(s.queues, st.TO_TOPK)
        if s.rows[row, st.ROW_READY_AT] > now:
            note(log, st.VALUE_TOPK, st.ON_PROBABILITIES, row, now)
            return
        load = rows[row, N_LOAD]
        generation = loads[load, L_GENERATION] == 1
        needed = rows[row, N_VALUE_LINES]
        if generation and s.registers[st.R_VALUE_LINES] + needed > z.value_lines:
            note(log, st.VALUE_TOPK, st.ON_SRAM, row, now)
            return
        fifo.pop(s.queues, st.TO_TOPK)
        s.registers[st.R_TOPK_ROW] = row + 1
        s.registers[st.R_DECIDE_USED] -= rows[row, N_LINES]
        s.registers[st.R_TOPK_FREE] = now
        s.registers[st.R_TOPK_LINE] = 0
        s.registers[st.R_TOPK_LINES] = needed
        n, k = rows[row, N_KEYS], rows[row, N_VALUES]
        if 0 < k < n:
            at = rows[row, N_PROBABILITIES_AT]
            cycles, scanned = 0, n
            if z.merge_sort == 1:
                cycles = s.sorting[n]
            else:
                for i in range(n):
                    s.scratch[i] = i if at < 0 else probabilities[at + i]
                _, _, cycles, rounds = select_from(s.scratch, n, k, z.topk_lanes, s.rng)
                s.counts[st.C_TOPK_ROUNDS] += rounds
                s.counts[st.C_TOPK_ITEMS] += (cycles - PIPELINE * rounds) * z.topk_lanes
            s.counts[st.C_TOPK_CYCLES] += cycles
            s.registers[st.R_TOPK_FREE] = now + cycles
            s.registers[st.R_TOPK_LINES] = filter_cycles(k, z.emit, scanned, z.topk_lanes)
        if generation and k > 0:
            head = (row - loads[load, L_FIRST_ROW]) * loads[load, L_HEAD_REGION]
            s.registers[st.R_VALUE_LINES] += needed
            own = rows[row, N_VALUE_IDS_AT] >= 0
            s.rows[row, st.ROW_VALUE_REQUEST] = request(
                s,
                st.VALUES_OF,
                row,
                rows[row, N_VALUE_IDS_AT] if own else loads[load, L_KEYS_AT],
                k,
                s.registers[st.R_TOPK_LINES],
                loads[load, L_VALUE_BASE] + head,
                loads[load, L_VALUE_STRIDE],
                loads[load, L_VALUE_ATOMS],
                s.registers[st.R_TOPK_FREE] + z.request_latency,
                1 if own else 0,
                1,
            )
        fifo.push(s.queues, st.TO_VALUES, row)
    if s.registers[st.R_TOPK_FREE] > now:
        note(log, st.VALUE_TOPK, st.BUSY, row, now)
        return
    k = rows[row, N_VALUES]
    s.registers[st.R_TOPK_LINE] += 1
    if s.registers[st.R_TOPK_LINES] > 0:
        s.rows[row, st.ROW_EMITTED] = (
            k * s.registers[st.R_TOPK_LINE] // s.registers[st.R_TOPK_LINES]
        )
    note(log, st.VALUE_TOPK, st.BUSY, row, now)
    if s.registers[st.R_TOPK_LINE] >= s.registers[st.R_TOPK_LINES]:
        s.counts[st.C_EMITTED] += k
        s.registers[st.R_TOPK_ROW] = 0


@inlined
def step_decision(
    z: Sizes, s: State, loads: np.ndarray, rows: np.ndarray, log: Log, now: int
) -> None:
    """Module 9: accept a row, or fetch the low bits of its keys and run it once more."""
    if fifo.used(s.queues, st.TO_DECIDE) == 0:
        note(log, st.DECISION, st.IDLE, -1, now)
        return
    row = fifo.peek(s.queues, st.TO_DECIDE)
    if s.rows[row, st.ROW_READY_AT] > now:
        note(log, st.DECISION, st.ON_PROBABILITIES, row, now)
        return
    fifo.pop(s.queues, st.TO_DECIDE)
    note(log, st.DECISION, st.BUSY, row, now)
    load = rows[row, N_LOAD]
    if rows[row, N_REFETCH] == 1 and s.rows[row, st.ROW_RERUN] == 0:
        s.rows[row, st.ROW_RERUN] = 1
        s.registers[st.R_DECIDE_USED] -= rows[row, N_LINES]
        s.registers[st.R_LOW_PENDING] += 1
        s.counts[st.C_RERUNS] += 1
        head = (row - loads[load, L_FIRST_ROW]) * loads[load, L_HEAD_REGION]
        s.rows[row, st.ROW_LOW_REQUEST] = request(
            s,
            st.LOW,
            row,
            loads[load, L_KEYS_AT],
            loads[load, L_KEYS],
            0,
            loads[load, L_LOW_BASE] + head,
            loads[load, L_LOW_STRIDE],
            loads[load, L_LOW_ATOMS],
            now + z.request_latency,
            0,
            1,
        )
        fifo.push(s.queues, st.TO_RERUN, row)
        return
    s.rows[row, st.ROW_READY_AT] = now + z.replay_latency
    fifo.push(s.queues, st.TO_TOPK, row)
    s.loads[load, st.LOAD_UNDECIDED] -= 1
    if s.loads[load, st.LOAD_UNDECIDED] == 0:
        s.registers[st.R_KEY_LINES] -= loads[load, L_LINES] * loads[load, L_HEADS]
        if loads[load, L_RANK_FROM] > 0:
            fifo.push(s.queues, st.TO_RANK, load)


@inlined
def step_softmax(z: Sizes, s: State, rows: np.ndarray, log: Log, now: int) -> None:
    """Module 8: a row leaves the row FIFO when its sum is known, and is divided by it."""
    if fifo.used(s.queues, st.TO_SOFTMAX) == 0:
        note(log, st.SOFTMAX, st.IDLE, -1, now)
        note(log, st.TOKEN_SCORE, st.IDLE, -1, now)
        return
    row = fifo.peek(s.queues, st.TO_SOFTMAX)
    waits = st.BUSY
    if z.pass_through == 0 and s.rows[row, st.ROW_READY_AT] > now:
        waits = st.ON_ROW_END
    elif (
        fifo.used(s.row_fifo, 0) == 0
        or fifo.peek(s.row_fifo, 0) > now
        or s.registers[st.R_SOFT_FREE] > now
    ):
        waits = st.ON_DATA
    elif s.registers[st.R_DECIDE_USED] == z.row_fifo_lines:
        waits = st.ON_VALUE_TOPK
    note(log, st.SOFTMAX, waits, row, now)
    note(log, st.TOKEN_SCORE, st.BUSY if waits == st.BUSY else st.IDLE, -1, now)
    if waits != st.BUSY:
        return
    fifo.pop(s.row_fifo, 0)
    s.registers[st.R_DECIDE_USED] += 1
    s.registers[st.R_SOFT_LINE] += 1
    s.registers[st.R_SOFT_FREE] = now + z.line_cycles
    if s.registers[st.R_SOFT_LINE] == rows[row, N_LINES]:
        s.counts[st.C_SOFTMAX] += rows[row, N_KEYS]
        s.registers[st.R_SOFT_LINE] = 0
        fifo.pop(s.queues, st.TO_SOFTMAX)
        s.rows[row, st.ROW_READY_AT] = now + z.probability_latency + z.decision_latency
        fifo.push(s.queues, st.TO_DECIDE, row)


@inlined
def step_scores(
    z: Sizes, s: State, loads: np.ndarray, rows: np.ndarray, log: Log, now: int
) -> None:
    """Module 7: a line of keys times the query; re-runs go first."""
    row = s.registers[st.R_SCORE_ROW] - 1
    if row < 0:
        if fifo.used(s.queues, st.TO_RERUN) > 0 and _low_started(
            s, fifo.peek(s.queues, st.TO_RERUN)
        ):
            row = fifo.pop(s.queues, st.TO_RERUN)
            s.registers[st.R_LOW_PENDING] -= 1
        elif s.registers[st.R_LOW_PENDING] > 0 and z.hold == 1:
            note(log, st.SCORES, st.ON_LOW_BITS, fifo.peek(s.queues, st.TO_RERUN), now)
            return
        elif s.registers[st.R_NEXT_ROW] < s.registers[st.R_ROWS_READY]:
            row = s.registers[st.R_NEXT_ROW]
            s.registers[st.R_NEXT_ROW] += 1
        else:
            cause = st.ON_TOKENS if s.registers[st.R_RANKING] > 0 else st.IDLE
            note(log, st.SCORES, cause, -1, now)
            return
        s.registers[st.R_SCORE_ROW] = row + 1
        s.registers[st.R_SCORE_LINE] = 0
    if s.registers[st.R_SCORE_FREE] > now or fifo.used(s.row_fifo, 0) >= z.row_fifo_lines:
        note(log, st.SCORES, st.ON_ROW_FIFO, row, now)
        return
    load = rows[row, N_LOAD]
    line = s.registers[st.R_SCORE_LINE]
    keys = rows[row, N_KEYS]
    upto = min(keys, (line + 1) * z.keys_per_line)
    if s.requests[s.loads[load, st.LOAD_KEY_REQUEST], st.Q_READY] < upto * loads[load, L_HEADS]:
        note(log, st.SCORES, st.ON_DATA, row, now)
        return
    if s.rows[row, st.ROW_RERUN] == 1:
        if s.requests[s.rows[row, st.ROW_LOW_REQUEST], st.Q_READY] < upto:
            note(log, st.SCORES, st.ON_LOW_BITS, row, now)
            return
        s.counts[st.C_RERUN_SCORES] += upto - line * z.keys_per_line
    note(log, st.SCORES, st.BUSY, row, now)
    s.counts[st.C_SCORE_LINES] += 1
    s.counts[st.C_SCORES] += upto - line * z.keys_per_line
    fifo.push(s.row_fifo, 0, now + z.tree_latency)
    s.registers[st.R_SCORE_FREE] = now + z.line_cycles
    if line == 0:
        s.rows[row, st.ROW_READY_AT] = NEVER
        fifo.push(s.queues, st.TO_SOFTMAX, row)
    s.registers[st.R_SCORE_LINE] = line + 1
    if upto == keys:
        s.rows[row, st.ROW_READY_AT] = now + z.tree_latency + z.sum_latency
        s.registers[st.R_SCORE_ROW] = 0


@inlined
def _low_started(s: State, row: int) -> bool:
    return s.requests[s.rows[row, st.ROW_LOW_REQUEST], st.Q_READY] > 0
