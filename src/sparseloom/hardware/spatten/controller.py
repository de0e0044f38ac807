"""The controller and modules 2 and 13: which load starts when, and the ranking of tokens."""

from __future__ import annotations

import numpy as np

from sparseloom.hardware.engine import fifo
from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.engine.log import Log, note
from sparseloom.hardware.spatten import state as st
from sparseloom.hardware.spatten.fetch import request
from sparseloom.hardware.spatten.jobs import (
    L_AFTER,
    L_DRAIN,
    L_FIRST_ROW,
    L_GENERATION,
    L_HEADS,
    L_KEY_ATOMS,
    L_KEY_BASE,
    L_KEY_STRIDE,
    L_KEYS,
    L_KEYS_AT,
    L_LINES,
    L_RANK_FROM,
    L_RANK_TO,
    L_ROWS,
    L_VALUE_ATOMS,
    L_VALUE_BASE,
    L_VALUE_STRIDE,
)
from sparseloom.hardware.spatten.state import Sizes, State
from sparseloom.hardware.units.topk import PIPELINE, filter_cycles, select_from


@inlined
def step_token_topk(z: Sizes, s: State, loads: np.ndarray, log: Log, now: int) -> None:
    """Modules 2 and 13: tokens are ranked where the trace says so; the next loads wait for it."""
    load = s.registers[st.R_RANK_LOAD] - 1
    if load >= 0:
        if s.registers[st.R_RANK_FREE] > now:
            note(log, st.TOKEN_TOPK, st.BUSY, load, now)
            return
        s.loads[load, st.LOAD_RANKED] = 1
        s.registers[st.R_RANK_LOAD] = 0
    if fifo.used(s.queues, st.TO_RANK) == 0:
        note(log, st.TOKEN_TOPK, st.IDLE, -1, now)
        return
    load = fifo.pop(s.queues, st.TO_RANK)
    n, k = loads[load, L_RANK_FROM], loads[load, L_RANK_TO]
    cycles = 0
    if k > 0 and z.merge_sort == 1:
        cycles = s.sorting[n]
    elif k > 0:
        for i in range(n):
            s.scratch[i] = i
        _, _, cycles, rounds = select_from(s.scratch, n, k, z.topk_lanes, s.rng)
        s.counts[st.C_RANK_ITEMS] += (cycles - PIPELINE * rounds) * z.topk_lanes
    cycles += filter_cycles(k, z.emit, n, z.topk_lanes)
    s.counts[st.C_RANK_CYCLES] += cycles
    s.registers[st.R_RANK_LOAD] = load + 1
    s.registers[st.R_RANK_FREE] = now + cycles
    note(log, st.TOKEN_TOPK, st.BUSY, load, now)


@inlined
def step_loads(z: Sizes, s: State, loads: np.ndarray, now: int) -> None:
    """Start the next load once its tokens are known and there is room for it."""
    load = s.registers[st.R_NEXT_LOAD]
    s.registers[st.R_RANKING] = 0
    if (
        load == loads.shape[0]
        or now < z.init_cycles
        or load - s.registers[st.R_LOADS_DONE] >= z.loads_in_flight
    ):
        return
    after = loads[load, L_AFTER]
    if after >= 0 and s.loads[after, st.LOAD_RANKED] == 0:
        s.registers[st.R_RANKING] = 1
        return
    drain = loads[load, L_DRAIN] == 1
    if drain and (s.registers[st.R_LOADS_DONE] < load or now < s.registers[st.R_END]):
        return
    lines = loads[load, L_LINES]
    if s.registers[st.R_KEY_LINES] + lines * loads[load, L_HEADS] > z.key_lines:
        return
    generation = loads[load, L_GENERATION] == 1
    if not generation and s.registers[st.R_VALUE_LINES] + lines > z.value_lines:
        return
    s.registers[st.R_KEY_LINES] += lines * loads[load, L_HEADS]
    # Accepted now, its lines allocated in the next cycle.
    start = now + 1 + z.request_latency
    s.loads[load, st.LOAD_KEY_REQUEST] = request(
        s,
        st.KEYS,
        load,
        loads[load, L_KEYS_AT],
        loads[load, L_KEYS],
        0,
        loads[load, L_KEY_BASE],
        loads[load, L_KEY_STRIDE],
        loads[load, L_KEY_ATOMS],
        start,
        0,
        loads[load, L_HEADS],
    )
    if not generation:
        s.registers[st.R_VALUE_LINES] += lines
        s.rows[loads[load, L_FIRST_ROW], st.ROW_VALUE_REQUEST] = request(
            s,
            st.VALUES_OF,
            load,
            loads[load, L_KEYS_AT],
            loads[load, L_KEYS],
            0,
            loads[load, L_VALUE_BASE],
            loads[load, L_VALUE_STRIDE],
            loads[load, L_VALUE_ATOMS],
            start,
            0,
            1,
        )
    s.loads[load, st.LOAD_UNDECIDED] = loads[load, L_ROWS]
    s.loads[load, st.LOAD_UNFINISHED] = loads[load, L_ROWS]
    s.registers[st.R_ROWS_READY] = loads[load, L_FIRST_ROW] + loads[load, L_ROWS]
    s.registers[st.R_NEXT_LOAD] = load + 1
