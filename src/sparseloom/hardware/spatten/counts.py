"""Counts behind a report: what a run did, or what it would do on average."""

from __future__ import annotations

import numpy as np

from sparseloom.hardware.spatten import cycle, power
from sparseloom.hardware.spatten import jobs as j
from sparseloom.hardware.spatten import state as st
from sparseloom.hardware.spatten.jobs import Jobs
from sparseloom.hardware.spatten.layout import ATOM
from sparseloom.hardware.units import dram

PASSES = 3.4  # times the quick-select looks at a candidate: 1024 of them, half kept


def counted(run: cycle.Run) -> power.Activity:
    """What a run did."""
    c = run.state.counts
    keys = int(c[st.C_KEY_VECTORS])
    return power.Activity(
        scores=int(c[st.C_SCORES]),
        values=int(c[st.C_VALUES]),
        score_lines=int(c[st.C_SCORE_LINES]),
        value_lines=int(c[st.C_VALUE_LINES]),
        key_vectors_written=keys,
        low_vectors_written=int(c[st.C_LOW_VECTORS]),
        value_vectors_written=int(c[st.C_VALUE_VECTORS]),
        softmax_scores=int(c[st.C_SOFTMAX]),
        topk_items=int(c[st.C_TOPK_ITEMS]),
        rank_items=int(c[st.C_RANK_ITEMS]),
        atoms=int(c[st.C_ATOMS]),
        activates=int(run.memory.counters[dram.ACTIVATES]),
    )


def expected(jobs: Jobs) -> power.Activity:
    """What the cycle fidelity would count; candidates and activations by their averages."""
    loads, rows = jobs.loads, jobs.rows
    load = rows[:, j.N_LOAD]
    generation = loads[load, j.L_GENERATION] == 1
    again = 1 + rows[:, j.N_REFETCH]
    low = int((rows[:, j.N_REFETCH] * loads[load, j.L_KEYS]).sum())
    own = int(rows[generation, j.N_VALUES].sum())
    shared = int(loads[loads[:, j.L_GENERATION] == 0, j.L_KEYS].sum())
    atoms = int((loads[:, j.L_KEYS] * loads[:, j.L_KEY_ATOMS]).sum())
    per_row = rows[:, j.N_REFETCH] * loads[load, j.L_KEYS] * loads[load, j.L_LOW_ATOMS]
    atoms += int(per_row.sum())
    wanted = np.where(generation, rows[:, j.N_VALUES], 0) * loads[load, j.L_VALUE_ATOMS]
    prompt = loads[:, j.L_GENERATION] == 0
    atoms += int(wanted.sum() + (loads[prompt, j.L_KEYS] * loads[prompt, j.L_VALUE_ATOMS]).sum())
    scores = int((rows[:, j.N_KEYS] * again).sum())
    chosen = rows[rows[:, j.N_VALUES] < rows[:, j.N_KEYS], j.N_KEYS]
    return power.Activity(
        scores=scores,
        values=int(rows[:, j.N_VALUES].sum()),
        score_lines=int((rows[:, j.N_LINES] * again).sum()),
        value_lines=int(rows[:, j.N_VALUE_LINES].sum()),
        key_vectors_written=int((loads[:, j.L_KEYS] * loads[:, j.L_HEADS]).sum()),
        low_vectors_written=low,
        value_vectors_written=own + shared,
        softmax_scores=scores,
        topk_items=PASSES * int(chosen.sum()),
        rank_items=PASSES * int(loads[:, j.L_RANK_FROM].sum()),
        atoms=atoms,
        activates=atoms * ATOM / 1024,
    )


def useful_bytes(jobs: Jobs) -> int:
    """Bytes of the vectors themselves, without what atoms add."""
    loads, rows = jobs.loads, jobs.rows
    load = rows[:, j.N_LOAD]
    one = np.where(loads[:, j.L_KEY_ATOMS] * ATOM < loads[:, j.L_KEY_STRIDE], 2, 1)
    total = (loads[:, j.L_KEYS] * loads[:, j.L_KEY_STRIDE] // one).sum()
    total += (rows[:, j.N_REFETCH] * loads[load, j.L_KEYS] * loads[load, j.L_LOW_STRIDE]).sum()
    generation = loads[load, j.L_GENERATION] == 1
    values = np.where(generation, rows[:, j.N_VALUES], 0) * loads[load, j.L_VALUE_STRIDE]
    prompt = loads[:, j.L_GENERATION] == 0
    shared = (loads[prompt, j.L_KEYS] * loads[prompt, j.L_VALUE_STRIDE]).sum()
    return int(total + values.sum() + shared)


def unit_cycles_of(run: cycle.Run) -> dict[str, dict[str, int]]:
    """Cycles of each unit by what it did."""
    return {
        unit: {
            cause: int(spent)
            for cause, spent in zip(st.CAUSES, run.log.totals[u], strict=True)
            if spent
        }
        for u, unit in enumerate(st.UNITS)
    }
