"""The compiled per-cycle loop of SpAtten: every unit's step, from the last of the pipeline on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparseloom.hardware.engine.compiled import compiled
from sparseloom.hardware.engine.log import Log, close, make_log
from sparseloom.hardware.spatten import controller, fetch, pipeline
from sparseloom.hardware.spatten import state as st
from sparseloom.hardware.spatten.config import SpAttenConfig
from sparseloom.hardware.spatten.jobs import L_GENERATION, L_RANK_FROM, L_ROWS, N_KEYS, Jobs
from sparseloom.hardware.spatten.state import Sizes, State, make_state, sizes
from sparseloom.hardware.units import dram as memory
from sparseloom.hardware.units.dram import Dram, make_dram

_QUIET = 1_000_000  # cycles without the end of a row after which something is stuck


class Run(NamedTuple):
    """What a run left: its length, the log, the counts and the memory's counters."""

    cycles: int
    log: Log
    state: State
    memory: Dram


def run(
    config: SpAttenConfig,
    memory: Any,
    jobs: Jobs,
    *,
    seed: int = 0,
    window: tuple[int, int] = (0, 0),
) -> Run:
    """Run jobs to their end.

    Args:
        config: the machine.
        memory: the memory's description (`units.dram`).
        jobs: from `lower`.
        seed: of the pivots.
        window: cycles of which the log keeps intervals.

    Raises:
        RuntimeError: the units wait for each other, which no trace may bring about.
    """
    longest = max(
        int(jobs.loads[:, L_RANK_FROM].max(initial=1)), int(jobs.rows[:, N_KEYS].max(initial=1))
    )
    alone = jobs.loads[jobs.loads[:, L_GENERATION] == 1, L_ROWS]
    state = make_state(
        config,
        jobs.loads.shape[0],
        jobs.rows.shape[0],
        longest=longest,
        most_rows=int(alone.max(initial=1)),
        seed=seed,
    )
    log = make_log(len(st.UNITS), len(st.CAUSES), window=window)
    dram = make_dram(memory)
    cycles = _loop(
        sizes(config, jobs.head_dim),
        state,
        dram,
        log,
        jobs.loads,
        jobs.rows,
        jobs.key_ids,
        jobs.value_ids,
        jobs.probabilities,
        _QUIET,
    )
    if cycles < 0:
        raise RuntimeError(f"{config.name}: no row ended in {_QUIET} cycles: the units are stuck")
    return Run(cycles, log, state, dram)


@compiled
def _loop(
    z: Sizes,
    s: State,
    m: Dram,
    log: Log,
    loads: np.ndarray,
    rows: np.ndarray,
    key_ids: np.ndarray,
    value_ids: np.ndarray,
    probabilities: np.ndarray,
    quiet: int,
) -> int:
    """Cycles until the last output, or −1 where nothing moves any more."""
    now, last_done, last_change = 0, 0, 0
    total = rows.shape[0]
    while s.registers[st.R_DONE_ROWS] < total:
        pipeline.step_values(z, s, loads, rows, log, now)
        pipeline.step_value_topk(z, s, loads, rows, probabilities, log, now)
        pipeline.step_decision(z, s, loads, rows, log, now)
        pipeline.step_softmax(z, s, rows, log, now)
        pipeline.step_scores(z, s, loads, rows, log, now)
        fetch.step_convert(z, s, log, now)
        fetch.step_gather(z, s, log, now)
        fetch.step_memory(z, s, m, log, now)
        fetch.step_addresses(z, s, m, log, now)
        memory.step(m, now)
        fetch.step_ports(z, s, m, key_ids, value_ids, log, now)
        controller.step_token_topk(z, s, loads, log, now)
        controller.step_loads(z, s, loads, now)
        if s.registers[st.R_DONE_ROWS] != last_done:
            last_done, last_change = s.registers[st.R_DONE_ROWS], now
        if now - last_change > quiet:
            return -1
        now += 1
    end = max(s.registers[st.R_END], now)
    for unit in range(len(st.UNITS)):
        close(log, unit, now)
        log.running[unit, 0] = st.IDLE
        close(log, unit, end)
    return end
