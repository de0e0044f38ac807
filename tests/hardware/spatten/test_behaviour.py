"""What the machine does with odd work, and in which order it does things."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.hardware.config import MachineError
from sparseloom.hardware.spatten import SpAtten, cycle
from sparseloom.hardware.spatten import jobs as j
from sparseloom.hardware.spatten import state as st
from sparseloom.hardware.units.topk import filter_cycles, make_rng, quick_select
from sparseloom.trace import AttentionCall, MaskArrays, Operator, Trace


def _machine(name: str = "spatten_hpca_2021", **settings: Any) -> SpAtten:
    found = hardware.load(name, **settings)
    assert isinstance(found, SpAtten)
    return found


def _run(machine: SpAtten, trace: Trace, seed: int = 0, window: tuple[int, int] = (0, 0)):
    jobs = machine.jobs(trace, trace.selection())
    return jobs, cycle.run(machine.settings, machine.memory, jobs, seed=seed, window=window)


def _pruned(op: Operator) -> AttentionCall:
    values = np.zeros((1, op.heads, 1, op.kv_len), np.bool_)
    values[..., ::5] = True
    return AttentionCall(value_mask=MaskArrays.from_bool(values), key_bits=8, value_bits=8)


def test_a_seed_decides_everything(traces: dict[str, Trace]) -> None:
    for name in ("counted", "reruns"):
        one = _machine().simulate(traces[name], fidelity="cycle", seed=4)
        again = _machine().simulate(traces[name], fidelity="cycle", seed=4)
        assert one == again


def test_seeds_change_pivots_and_nothing_else(traces: dict[str, Trace]) -> None:
    """Keys are named by masks here: what is read and computed stays, what selections take moves."""
    runs = [_run(_machine(), traces["reruns"], seed)[1].state.counts for seed in range(6)]
    pivots = (st.C_TOPK_CYCLES, st.C_TOPK_ITEMS, st.C_TOPK_ROUNDS)
    rest = [i for i in range(len(st.COUNTS)) if i not in pivots]
    for i in rest:
        assert len({int(run[i]) for run in runs}) == 1, st.COUNTS[i]
    for i in pivots:
        assert len({int(run[i]) for run in runs}) > 1, st.COUNTS[i]
    none = [_run(_machine(), traces["padded"], seed)[1].cycles for seed in range(3)]
    assert len(set(none)) == 1  # a prompt selects no values


@pytest.mark.parametrize(
    ("settings", "lengths", "message"),
    [
        ({}, (1, 1025), "1025 scores of a row take 129 lines of 8, but softmax.row_fifo_depth"),
        ({"key_sram.lines": 64}, (1, 513), "513 keys of 1 heads take 65 lines of 8, but key_sram"),
        ({"value_sram.lines": 4}, (2, 33), "33 values take 5 lines of 8, but value_sram holds 4"),
    ],
)
def test_what_does_not_fit_is_said_at_once(
    maker: Any, settings: dict[str, Any], lengths: tuple[int, int], message: str
) -> None:
    trace = maker().trace([lengths], lambda _: AttentionCall(key_bits=8, value_bits=8))
    for fidelity in ("analytic", "cycle"):
        with pytest.raises(MachineError, match=message) as error:
            _machine(**settings).simulate(trace, fidelity=fidelity)
        assert f"{lengths[1]} tokens" in str(error.value)


def test_what_just_fits_runs(maker: Any) -> None:
    """1024 keys fill the softmax's rows, and two packed heads of them the key SRAM."""
    call = AttentionCall(key_bits=6, value_bits=6)
    trace = maker(layers=1, heads=2, kv_heads=2).trace([(1, 1024)], lambda _: call)
    jobs, run = _run(_machine(), trace)
    assert jobs.loads[0, j.L_HEADS] == 2
    assert run.state.counts[st.C_SCORES] == 2 * 1024


@pytest.mark.parametrize("head_dim", [48, 96, 513])
def test_a_head_that_cuts_no_array_is_refused(maker: Any, head_dim: int) -> None:
    trace = maker(head_dim=head_dim).trace([(1, 8)], lambda _: AttentionCall(key_bits=8))
    with pytest.raises(MachineError, match=f"multiple of head_dim, got head_dim {head_dim}"):
        _machine().simulate(trace)


@pytest.mark.parametrize("head_dim", [32, 128, 256, 512])
def test_heads_of_other_widths(maker: Any, head_dim: int) -> None:
    trace = maker(head_dim=head_dim).trace([(4, 16), (1, 17)], lambda _: AttentionCall(key_bits=8))
    _, run = _run(_machine(), trace)
    per_line = 512 // head_dim
    lines = 2 * 4 * (4 * -(-16 // per_line) + -(-17 // per_line))
    assert run.state.counts[st.C_SCORE_LINES] == lines


def test_a_busy_machine_with_one_kv_head(maker: Any) -> None:
    """71 query heads on one KV head: more rows under way than loads."""
    trace = maker(heads=71, kv_heads=1).trace(
        [(1, 9)] * 20, lambda _: AttentionCall(key_bits=8, value_bits=8)
    )
    _, run = _run(_machine("spatten_hpca_2021", **{"value_sram.lines": 4096}), trace)
    assert run.state.counts[st.C_SCORES] == 2 * 20 * 71 * 9


# ----------------------------------------------------------------------------- selections


def test_ties_take_the_cycles_of_the_engine(maker: Any) -> None:
    """Recorded probabilities, row by row in order, with the pivots of the same seed."""
    trace = maker(layers=1).trace([(1, 200)], _pruned)
    rng = np.random.default_rng(0)
    tied = (rng.integers(0, 4, (1, 4, 1, 200)) ** 2).astype(np.int64)
    wanted = {}
    for name, values in (("tied", tied), ("distinct", np.tile(np.arange(200), (1, 4, 1, 1)))):
        pivots = make_rng(7)
        rows = [values[0, head, 0].astype(np.int64) for head in range(4)]
        wanted[name] = sum(quick_select(row, 0, 200, 40, 16, pivots)[2] for row in rows)
    recorded = replace(trace, tensors={"calls.0.probability": tied})
    for name, one in (("tied", recorded), ("distinct", trace)):
        _, run = _run(_machine(), one, seed=7)
        assert run.state.counts[st.C_TOPK_CYCLES] == wanted[name]
    assert wanted["tied"] < wanted["distinct"]


def test_a_merge_sort_takes_its_own_cycles(maker: Any) -> None:
    trace = maker(layers=1).trace([(1, 200)], _pruned)
    _, run = _run(_machine(**{"topk.engine": "merge_sort"}), trace)
    assert run.state.counts[st.C_TOPK_CYCLES] == 4 * 13 * 4  # 13 groups of 16, 4 passes
    assert run.state.counts[st.C_TOPK_ITEMS] == 0


def test_rows_that_keep_everything_or_nothing_select_nothing(traces: dict[str, Trace]) -> None:
    _, run = _run(_machine(), traces["edges"])
    for name in ("topk_rounds",):
        assert run.state.counts[st.COUNTS.index(name)] > 0  # rows that keep 2 of 33
    _, run = _run(_machine(), traces["cola"])
    assert run.state.counts[st.C_TOPK_CYCLES] == 0


def _cascade(op: Operator) -> AttentionCall:
    alive = np.zeros((1, op.kv_len), np.bool_)
    alive[0, : 64 if op.layer == 0 else 32] = True
    keep = 32 if op.layer == 0 else None
    return AttentionCall(tokens_alive=alive, token_keep=keep, key_bits=8, value_bits=8)


@pytest.mark.parametrize("how", ["layer", "head", "row"])
def test_the_next_load_waits_for_its_ranking(maker: Any, how: str) -> None:
    trace = maker().trace([(1, 64)], _cascade)
    m = _machine(**{"topk.token_selection": how})
    jobs, run = _run(m, trace, window=(0, 100_000))
    ranked = np.flatnonzero(jobs.loads[:, j.L_RANK_FROM])
    # Four loads of layer 0, four of layer 1; tokens leave after layer 0.
    assert ranked.tolist() == {"layer": [3], "head": [0, 1, 2, 3], "row": list(range(7))}[how]
    log = run.log.intervals[: run.log.limits[0]]
    ranking = log[(log[:, 0] == st.TOKEN_TOPK) & (log[:, 1] == st.BUSY)]
    decided = log[(log[:, 0] == st.DECISION) & (log[:, 1] == st.BUSY)]
    scored = log[(log[:, 0] == st.SCORES) & (log[:, 1] == st.BUSY)]
    assert ranking[:, 4].tolist() == ranked.tolist()
    for load in ranked:
        mine = ranking[ranking[:, 4] == load][0]
        row = jobs.loads[load, j.L_FIRST_ROW]
        assert mine[2] >= decided[decided[:, 4] == row][0, 2]
        later = jobs.loads[load + 1, j.L_FIRST_ROW]
        # A load's keys are fetched after the ranking, so its scores come well behind it.
        assert scored[scored[:, 4] == later][0, 2] > mine[3] + 20
    assert run.log.totals[st.SCORES, st.ON_TOKENS] > 0


def test_finer_ranking_takes_longer(maker: Any) -> None:
    trace = maker().trace([(1, 64)], _cascade)
    cycles = [
        np.mean(
            [_run(_machine(**{"topk.token_selection": how}), trace, s)[1].cycles for s in range(5)]
        )
        for how in ("layer", "head", "row")
    ]
    assert cycles[0] < cycles[1] < cycles[2]


def test_ranking_cycles_are_those_of_engine_and_filter(maker: Any) -> None:
    trace = maker().trace([(1, 64)], _cascade)
    _, run = _run(_machine(), trace, seed=3)
    selected = quick_select(np.arange(64), 0, 64, 32, 16, make_rng(3))[2]
    assert run.state.counts[st.C_RANK_CYCLES] == selected + filter_cycles(32, 8, 64, 16)


def test_ranking_down_to_nothing_ends(maker: Any) -> None:
    def call(op: Operator) -> AttentionCall:
        return AttentionCall(token_keep=0 if op.layer == 0 else None, key_bits=8, value_bits=8)

    _, run = _run(_machine(), maker().trace([(1, 30)], call))
    assert run.state.counts[st.C_SCORES] == 2 * 4 * 30


# ----------------------------------------------------------------------------- order


def test_drained_calls_do_not_overlap(traces: dict[str, Trace]) -> None:
    trace, m = traces["cola"], _machine()
    jobs = m.jobs(trace, trace.selection())
    loads = jobs.loads.copy()
    calls = loads[:, j.L_CALL]
    loads[np.diff(calls, prepend=-1) != 0, j.L_DRAIN] = 1
    drained = cycle.run(m.settings, m.memory, replace(jobs, loads=loads), window=(0, 1_000_000))
    free = cycle.run(m.settings, m.memory, jobs)
    assert drained.cycles > free.cycles
    log = drained.log.intervals[: drained.log.limits[0]]
    reads = log[(log[:, 0] == st.FETCHER) & (log[:, 1] == st.BUSY)][:, 2]
    ends = drained.state.loads[:, st.LOAD_END]
    for call in range(1, int(calls.max()) + 1):
        before = ends[calls < call].max()
        assert not ((reads > before - 20) & (reads < before)).any()
        mine = ends[calls == call].max()
        assert ((reads >= before) & (reads < mine)).any()


def test_stages_add_up(traces: dict[str, Trace]) -> None:
    for name in ("spatten_hpca_2021", "spatten_e2e_hpca_2021"):
        for trace in traces.values():
            report = _machine(name).simulate(trace, fidelity="cycle")
            _, run = _run(_machine(name), trace)
            assert sum(stage.cycles for stage in report.stages) == pytest.approx(run.cycles)
            assert all(stage.cycles >= 0 for stage in report.stages)
