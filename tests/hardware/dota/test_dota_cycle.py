"""DOTA cycle by cycle: against the closed form, conservation, and what must never get worse."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.hardware.dota import state as s
from sparseloom.hardware.report import Report
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Operator,
    PredictorShape,
    Selection,
    Trace,
    Workload,
)

PREDICTOR = PredictorShape(head_dim=8)


def run(machine: Any, trace: Trace, selection: str | None = None, **options: Any) -> Report:
    return machine.simulate(trace, selection, fidelity="cycle", **options)


def check(report: Report) -> None:
    """What holds for every run."""
    for unit, codes in report.unit_cycles.items():
        assert sum(codes.values()) == report.cycles, unit
        assert all(cycles > 0 for cycles in codes.values())
    assert sum(stage.cycles for stage in report.stages) == report.cycles
    assert 0 < report.useful_bytes <= report.dram_bytes
    assert report.actions["dram_bit"] == 8 * report.dram_bytes
    assert all(0 <= share <= 1 + 1e-9 for share in report.utilisation.values())


def test_a_dense_encoder_takes_what_the_formula_says_and_its_fill(load: Any, make: Any) -> None:
    # Sizes that fill every tile: 64 rows, columns of 64 in each Lane.
    maker = make(heads=4, head_dim=64, length=64, layers=2)
    fast = load(dram__gbytes_per_second=1e5, dram__latency_cycles=0, mfu__elements_per_cycle=4096)
    trace = Trace(maker.workload())
    report, ideal = run(fast, trace), fast.simulate(trace)
    check(report)
    products = sum(op.kind == "gemm" for op in maker.workload().operators)
    fill = products * (32 + 16)
    array = report.unit_cycles["lane 0 array"]
    assert array["fill"] == fill
    assert array["busy"] == ideal.cycles
    # Beyond that: the last group's softmax in each layer, tiles of norms, writing at the end.
    rest = report.cycles - ideal.cycles - fill
    assert 0 < rest < 2 * 100
    assert report.operations == ideal.operations
    assert report.dram_bytes == ideal.dram_bytes


@pytest.mark.parametrize("policy", ["sequential", "split"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_cost_at_least_the_formula(load: Any, make: Any, policy: str, causal: bool) -> None:
    trace = make(layers=2, length=70, is_causal=causal).trace(0.3, predictor=PREDICTOR)
    machine = load(rmmu__policy=policy)
    report, ideal = run(machine, trace), machine.simulate(trace)
    check(report)
    assert report.cycles > ideal.cycles
    assert report.operations == ideal.operations
    named = report.unit_cycles["lane 0 detecting rows"]
    assert ("busy" in named) == (policy == "split")
    assert report.unit_cycles["lane 0 detector"]["busy"] > 0
    assert report.unit_cycles["lane 0 scheduler"]["busy"] > 0


def test_detection_on_rows_of_its_own_overlaps(load: Any, make: Any) -> None:
    """With half of the rows each, both sides run at once, and the array never detects."""
    trace = make(length=200, head_dim=64).trace(0.2, predictor=PredictorShape(head_dim=16))
    attention = {}
    for rows in (4, 8, 28):
        report = run(load(rmmu__policy="split", rmmu__detecting_rows=rows), trace)
        check(report)
        attention[rows] = report.components["attention"]
    balanced = run(load(rmmu__policy="split"), trace)
    assert balanced.components["attention"] <= min(attention.values())
    sequential = run(load(), trace)
    assert sequential.components["attention"] < attention[28]


def test_events_tell_the_whole_story(load: Any, make: Any, tmp_path: Path) -> None:
    trace = make(heads=6, layers=2).trace(predictor=PREDICTOR)
    whole = run(load(), trace, window=(0, 1 << 40))
    plain = run(load(), trace)
    assert plain.events is None
    assert plain.unit_cycles == whole.unit_cycles
    events = whole.events
    assert events is not None
    assert events.units == s.units(4)
    assert events.dropped == 0
    for u, unit in enumerate(events.units):
        rows = events.intervals[events.intervals[:, 0] == u]
        rows = rows[np.argsort(rows[:, 2], kind="stable")]
        # Without a gap or an overlap, from the first cycle to the last.
        assert rows[0, 2] == 0
        assert rows[-1, 3] == whole.cycles
        assert all(a[3] == b[2] for a, b in pairwise(rows))
        for code, cause in enumerate(events.causes):
            spent = int((rows[:, 3] - rows[:, 2])[rows[:, 1] == code].sum())
            assert whole.unit_cycles[unit].get(cause, 0) == spent
    whole.to_perfetto(tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in data if event["name"] == "thread_name"}
    assert {"attention", "lane 3 array", "lane 0 mfu", "accumulator"} <= tracks
    waits = {event["name"] for event in data if event.get("cat") == "unit"}
    assert {"busy", "dram", "fill", "lane imbalance"} <= waits
    part = run(load(), trace, window=(500, 600)).events
    assert part is not None
    assert 0 < len(part.intervals) < len(events.intervals)


def test_work_is_counted_once(load: Any, make: Any) -> None:
    """Units are busy exactly as long as the masks say."""
    maker = make(heads=5, length=40)
    trace = maker.trace(0.25, predictor=PREDICTOR)
    keep = maker.keep(0.25)[0]
    report = run(load(), trace)
    groups = keep.reshape(5, 10, 4, 40)
    stage = next(stage for stage in report.stages if stage.component == "attention")
    assert stage.facts["kept_pairs"] == keep.sum()
    assert stage.facts["key_loads"] >= groups.any(axis=2).sum()
    taken = (-(-keep.sum(axis=2) // 16)).sum(axis=1)
    codes = 2 * 40 * 8
    # All Lanes norm, activate and quantise; each does the softmax of its own heads.
    tokens, hidden = 40, 80
    shared = 2 * (tokens * hidden) + tokens * 2 * hidden + tokens * hidden
    for lane in range(4):
        own = taken[lane::4].sum() + len(taken[lane::4]) * -(-codes // 16)
        assert report.unit_cycles[f"lane {lane} mfu"]["busy"] == own + -(-shared // 64)
    pushed = [-(-groups[h].any(axis=1).sum(axis=1) // 16) for h in range(5)]
    busy = report.unit_cycles["lane 1 detector"]["busy"]
    assert busy >= pushed[1].sum()


@pytest.mark.parametrize("heads", [1, 4, 6, 9])
def test_heads_take_turns_and_idle_lanes_wait(load: Any, make: Any, heads: int) -> None:
    report = run(load(), make(heads=heads).trace(0.3))
    check(report)
    array = [report.unit_cycles[f"lane {lane} array"] for lane in range(4)]
    waits = [codes.get("lane imbalance", 0) for codes in array]
    if heads % 4:
        # Lanes beyond the last head wait for the others, in projections too.
        assert min(waits[heads % 4 :]) > max(waits[: heads % 4])
    # Lanes without heads still take their part of the feed-forward product.
    assert min(codes["busy"] for codes in array) > 0


def test_key_streams_that_do_not_fit(load: Any, make: Any) -> None:
    trace = make(length=160, head_dim=64).trace(0.1)
    here = run(load(), trace)
    streams = run(load(sram__kib_per_lane=36), trace)
    check(streams)
    stage = next(stage for stage in streams.stages if stage.component == "attention")
    vectors = 2 * int(stage.facts["key_loads"]) * 64 * 2
    rows = 4 * 160 * 2 * 64 * 2
    assert streams.dram_bytes - here.dram_bytes >= vectors + rows
    assert streams.components["attention"] > here.components["attention"]
    assert streams.unit_cycles["lane 0 dram port"]["busy"] > (vectors + rows) / 256
    with pytest.raises(hardware.MachineError, match=r"sram.kib_per_lane must hold 2 blocks"):
        run(load(sram__kib_per_lane=2), trace)


def test_generation_waits_for_dram(load: Any, make: Any) -> None:
    step = make(length=1, kv_len=96, stage="decode", head_dim=64)
    report = run(load(), step.trace(0.5, predictor=PREDICTOR))
    check(report)
    array = report.unit_cycles["lane 0 array"]
    assert array["dram"] > array["busy"]
    moved = report.dram_bytes / 256
    assert moved < report.cycles < 2 * moved + 1500
    # One query has the whole array, and few tokens spread over its rows.
    assert run(load(dram__gbytes_per_second=1e5), step.trace(0.5)).cycles < report.cycles


def test_generation_of_counted_keys_draws_them(load: Any) -> None:
    operator = Operator(
        kind="attention", heads=2, kv_heads=2, q_len=1, kv_len=100, head_dim=32, value_dim=32,
        stage="decode", layer=0,
    )  # fmt: skip
    shape = ModelShape(layers=1, hidden_size=64, heads=2, kv_heads=2, head_dim=32)
    counts = np.array([[[50], [20]]], np.int64)
    call = AttentionCall(key_counts=counts, value_counts=np.array([[[10], [20]]], np.int64))
    trace = Trace(Workload(shape, (operator,), scope="attention"), {"m": Selection("m", (call,))})
    report = run(load(), trace, seed=3)
    check(report)
    assert report.seed == 3
    assert report.operations == 2 * (70 + 30) * 32
    assert any("drawn, seed 3" in text for text in report.assumptions)


def test_padding_pruned_heads_and_value_masks(load: Any, make: Any) -> None:
    maker = make(heads=4, length=32)
    base = maker.workload()
    padding = np.ones((1, 32), np.bool_)
    padding[0, 24:] = False
    operators = tuple(
        op.model_copy(update={"padding": 0}) if op.is_attention else op for op in base.operators
    )
    padded = Workload(base.model, operators, paddings=(padding,))
    keep = maker.keep(0.4)
    few = keep & maker.keep(0.5, seed=9)
    alive = np.array([True, False, True, True])
    call = AttentionCall(MaskArrays.from_bool(keep), MaskArrays.from_bool(few), heads_alive=alive)
    trace = Trace(padded, {"m": Selection("m", (call,))})
    report, ideal = run(load(), trace), load().simulate(trace)
    check(report)
    assert report.operations == ideal.operations
    heads = keep[0][alive] & padding[0], few[0][alive] & padding[0]
    stage = next(stage for stage in report.stages if stage.component == "attention")
    assert stage.facts["kept_pairs"] == heads[0].sum()
    pairs = int(heads[0].sum() + heads[1].sum())
    gemms = sum(op.macs for op in padded.operators if op.kind == "gemm")
    assert report.operations == 2 * (16 * pairs + gemms)


SLOWER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"dram__gbytes_per_second": 8.0}, {"dram__gbytes_per_second": 64.0}),
    ({"dram__latency_cycles": 400}, {"dram__latency_cycles": 100}),
    ({"detector__scores_per_cycle": 16}, {"detector__scores_per_cycle": 512}),
    ({"scheduler__pushes_per_cycle": 1}, {"scheduler__pushes_per_cycle": 16}),
    ({"scheduler__steps_per_cycle": 1}, {"scheduler__steps_per_cycle": 4}),
    ({"sram__port_bytes": 2}, {"sram__port_bytes": 16}),
    (
        {"sram__conflicts": "modelled", "sram__operand_bytes": 1024},
        {"sram__conflicts": "ideal", "sram__operand_bytes": 1024},
    ),
    ({"sram__operand_bytes": 512}, {"sram__operand_bytes": 8192}),
    ({"mfu__exponentials_per_cycle": 1}, {"mfu__exponentials_per_cycle": 16}),
    ({"mfu__elements_per_cycle": 1}, {"mfu__elements_per_cycle": 16}),
    ({"accumulator__additions_per_cycle": 8}, {"accumulator__additions_per_cycle": 512}),
    ({"sram__code_bytes_per_cycle": 32}, {"sram__code_bytes_per_cycle": 1024}),
    ({"dram__buffers": 1}, {"dram__buffers": 2}),
    ({"scheduler__dataflow": "row_by_row"}, {"scheduler__dataflow": "out_of_order"}),
]


@pytest.mark.parametrize(("slow", "fast"), SLOWER, ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("policy", ["sequential", "split"])
def test_more_is_never_slower(
    load: Any, make: Any, policy: str, slow: dict[str, Any], fast: dict[str, Any]
) -> None:
    trace = make(length=60, heads=5, head_dim=64).trace(0.3, predictor=PREDICTOR)
    less = run(load(rmmu__policy=policy, **slow), trace)
    more = run(load(rmmu__policy=policy, **fast), trace)
    check(less)
    check(more)
    assert more.cycles < less.cycles


def test_narrow_heads_are_bound_by_the_function_unit(load: Any, make: Any) -> None:
    """At head_dim 8 softmax takes twice the time of both products together."""
    maker = make(heads=4, head_dim=8, length=256)
    dense = run(load(), Trace(maker.workload()))
    bound = 256 * 256 / 16
    assert bound <= dense.components["attention"] < 1.05 * bound
    array, mfu = dense.unit_cycles["lane 0 array"], dense.unit_cycles["lane 0 mfu"]
    assert array["mfu"] > 0.4 * bound
    assert mfu["busy"] >= bound
    sparse = run(
        load(scheduler__steps_per_cycle=16, scheduler__pushes_per_cycle=64), maker.trace(0.1)
    )
    kept = maker.keep(0.1)[0]
    least = (-(-kept.sum(axis=2) // 16)).sum(axis=1).max()
    assert least <= sparse.components["attention"] < 1.3 * least


def test_accelerators_share_sequences_and_memory(load: Any, make: Any) -> None:
    trace = make(batch=4, length=64, head_dim=64).trace(0.2)
    cycles = {}
    for count in (1, 2, 3, 4, 12):
        machine = load(accelerators=count)
        report = run(machine, trace)
        for codes in report.unit_cycles.values():
            assert sum(codes.values()) == report.cycles
        cycles[count] = report.cycles
        assert report.total_area == pytest.approx(count * 4.423)
        assert sum(machine.power().values()) == pytest.approx(count * 3.003, rel=1e-3)
        assert report.utilisation["dram"] <= 1
    # Two sequences each; three need two turns as well; no more than one for each sequence.
    assert cycles[4] < cycles[3] <= cycles[1]
    assert cycles[2] < cycles[1]
    assert cycles[12] == cycles[4]
    # Ample memory scales by sequences; a narrow one is the limit, whoever shares it.
    ample = [
        run(load(accelerators=n, dram__gbytes_per_second=1e5), trace).cycles for n in (1, 2, 4)
    ]
    assert ample[0] == pytest.approx(2 * ample[1], rel=1e-3)
    assert ample[0] == pytest.approx(4 * ample[2], rel=1e-3)
    narrow = [run(load(accelerators=n, dram__gbytes_per_second=4.0), trace) for n in (1, 4)]
    assert narrow[1].cycles > 0.9 * narrow[0].cycles
    assert narrow[1].utilisation["dram"] > 0.9
    closed = [load(accelerators=n).simulate(trace).cycles for n in (1, 2, 4)]
    assert closed[0] > closed[1] > closed[2]


def test_sequences_of_one_accelerator_follow_each_other(load: Any, make: Any) -> None:
    maker = make(batch=2)
    two = run(load(), Trace(maker.workload()))
    one = run(load(), Trace(replace(maker, batch=1).workload()))
    assert two.cycles == 2 * one.cycles
    assert two.latency_cycles == one.latency_cycles
    assert [stage.sequence for stage in two.stages] == sorted(
        stage.sequence for stage in two.stages
    )


def test_a_layer_of_long_text_takes_its_share_of_two_seconds(load: Any, make: Any) -> None:
    """LRA Text (2000 tokens, four layers) is to take 2 s once compiled; here is one layer."""
    trace = make(head_dim=64, length=2000).trace(0.05, predictor=PredictorShape(head_dim=16))
    run(load(), make(head_dim=64).trace(0.05, predictor=PREDICTOR))
    start = time.process_time()
    run(load(), trace)
    assert time.process_time() - start < 2 / 4


def test_energy_follows_the_work(load: Any, make: Any) -> None:
    trace = make(length=64).trace(0.2, predictor=PREDICTOR)
    few, all_pairs = run(load(), trace, "m"), run(load(), trace, "dense")
    assert few.energy["rmmu"] < all_pairs.energy["rmmu"]
    for report in (few, all_pairs):
        busy = {name: cycles.get("busy", 0) for name, cycles in report.unit_cycles.items()}
        lanes = [busy[f"lane {lane} mfu"] for lane in range(4)]
        assert report.actions["mfu_cycle"] == sum(lanes)
        assert report.actions["idle mfu_cycle"] == 4 * report.cycles - sum(lanes)
        assert report.actions["accumulator_cycle"] == busy["accumulator"]
        assert report.energy_table == "dota_22nm"
