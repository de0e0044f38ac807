"""DOTA's closed form: by hand, and the laws that any trace must obey."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom import hardware
from sparseloom.results import validate_results
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Operator,
    PredictorShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)

DOTA = "dota_asplos_2022"
BANDWIDTH = {"closed_form.memory": "bandwidth"}
SHAPE = ModelShape(
    layers=2, hidden_size=64, heads=4, kv_heads=4, head_dim=32, intermediate_size=128
)
LENGTH = 32


def workload(
    shape: ModelShape = SHAPE, *, length: int = LENGTH, batch: int = 1, **sizes: Any
) -> Workload:
    operators = transformer_operators(shape, q_len=length, batch=batch, **sizes)
    return Workload(shape, operators, name="w")


def with_masks(base: Workload, *keep: np.ndarray, predictor: PredictorShape | None = None) -> Trace:
    """A trace whose selection "m" keeps these pairs, layer by layer."""
    causal = base.model.is_causal
    calls = tuple(
        AttentionCall(MaskArrays.from_bool(k, is_causal=causal), predictor=predictor) for k in keep
    )
    return Trace(base, {"m": Selection("m", calls, quality={"value": 1.5, "dense_value": 1})})


def random_keep(seed: int, share: float, *, heads: int = 4, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(seed).random((1, heads, length, length)) < share


def simulate(trace: Trace, selection: str | None = None, **changes: object) -> hardware.Report:
    """Ideal memory unless asked: with few tokens the weights take longer than the products."""
    settings = {"closed_form.memory": "ideal"} | changes
    return hardware.load(DOTA, **settings).simulate(trace, selection)


def test_dense_by_hand() -> None:
    report = simulate(Trace(workload()))
    n, d, wide, inner = LENGTH, 64, 128, 128
    assert report.components == pytest.approx(
        {
            "linear": 2 * 3 * n * d * wide / 2048,
            "attention": 2 * 2 * n * n * 32 / 512,
            "other": 2 * (n * wide * d + 2 * n * d * inner) / 2048,
        }
    )
    assert report.cycles == round(sum(report.components.values()))
    assert report.utilisation["rmmu"] == pytest.approx(1.0)
    assert report.stalls == {}
    assert report.seconds == pytest.approx(report.cycles * 1e-9)


def test_detection_by_hand() -> None:
    keep = random_keep(0, 0.25)
    for bits, products in ((2, 64), (4, 16), (8, 4), (16, 1), (32, 1)):
        predictor = PredictorShape(head_dim=8, bits=bits)
        trace = with_masks(workload(), keep, keep, predictor=predictor)
        work = 2 * LENGTH * 64 * 8 + LENGTH * LENGTH * 8
        assert simulate(trace).components["detection"] == pytest.approx(2 * work / (512 * products))
    linear = simulate(
        with_masks(workload(), keep, keep, predictor=PredictorShape(head_dim=8)),
        **{"rmmu.multiplier": "linear"},
    )
    assert linear.components["detection"] == pytest.approx(2 * work / (512 * 4))


def test_words_that_are_not_full_can_be_charged() -> None:
    keep = random_keep(0, 0.25)
    trace = with_masks(workload(), keep, keep, predictor=PredictorShape(head_dim=2, bits=4))
    ideal = simulate(trace)
    words = simulate(trace, **{"closed_form.detection": "whole_words"})
    # With k_h = 2, two of the eight INT4 values of a word are used.
    assert words.components["detection"] == pytest.approx(4 * ideal.components["detection"])
    assert any("take 4 times as long and is not charged" in text for text in ideal.assumptions)
    assert any("take 4 times as long and is charged" in text for text in words.assumptions)


def test_the_function_units_bound_narrow_heads() -> None:
    shape = SHAPE.model_copy(update={"head_dim": 4, "layers": 1})
    report = simulate(Trace(workload(shape)))
    assert report.components["attention"] == pytest.approx(LENGTH * LENGTH / 16)
    assert report.utilisation["rmmu_attention"] == pytest.approx(2 * 4 / 512 * 16)


def test_a_call_ends_with_its_slowest_lane() -> None:
    keep = np.zeros((1, 4, LENGTH, LENGTH), np.bool_)
    keep[0, 2] = True
    trace = with_masks(workload(), keep, keep)
    measured = simulate(trace)
    even = simulate(trace, **{"closed_form.lane_balance": "ideal"})
    dense = simulate(trace, "dense")
    assert measured.components["attention"] == dense.components["attention"]
    assert even.components["attention"] == pytest.approx(dense.components["attention"] / 4)
    assert measured.utilisation["rmmu_attention"] == pytest.approx(0.25)


@pytest.mark.parametrize(("heads", "turns"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_more_heads_than_lanes_take_turns(heads: int, turns: int) -> None:
    shape = SHAPE.model_copy(update={"heads": heads, "kv_heads": heads, "layers": 1})
    for balance in ("measured", "ideal"):
        report = simulate(Trace(workload(shape)), **{"closed_form.lane_balance": balance})
        one = 2 * LENGTH * LENGTH * 32 / 512
        assert report.components["attention"] == pytest.approx(turns * one)


def test_causal_pairs_are_charged_as_said() -> None:
    shape = SHAPE.model_copy(update={"is_causal": True})
    triangle = np.tril(np.ones((1, 1, LENGTH, LENGTH), np.bool_))
    trace = with_masks(workload(shape), triangle, triangle, predictor=PredictorShape(head_dim=8))
    allowed = simulate(trace)
    square = simulate(trace, **{"closed_form.pairs": "square"})
    share = (LENGTH + 1) / (2 * LENGTH)
    assert allowed.components["attention"] == pytest.approx(share * square.components["attention"])
    assert allowed.components["linear"] == square.components["linear"]
    work = 2 * LENGTH * 64 * 8
    assert allowed.components["detection"] * 512 * 16 / 2 == pytest.approx(
        work + share * LENGTH**2 * 8
    )
    assert square.components["detection"] * 512 * 16 / 2 == pytest.approx(work + LENGTH**2 * 8)
    # What a causal mask keeps above the diagonal is never computed.
    full = np.ones((1, 1, LENGTH, LENGTH), np.bool_)
    assert (
        simulate(with_masks(workload(shape), full, full)).components["attention"]
        == (allowed.components["attention"])
    )


def test_padding_is_not_charged_in_attention() -> None:
    padding = np.ones((1, LENGTH), np.bool_)
    padding[0, : LENGTH // 4] = False
    operators = transformer_operators(SHAPE, q_len=LENGTH, padding=0)
    padded = Trace(Workload(SHAPE, operators, paddings=(padding,)))
    plain = simulate(Trace(workload()))
    report = simulate(padded)
    assert report.components["attention"] == pytest.approx(0.75 * plain.components["attention"])
    assert "padded tokens are charged in the matrix products" in report.assumptions


def test_sequences_run_one_after_another() -> None:
    one = simulate(Trace(workload()))
    three = simulate(Trace(workload(batch=3)))
    assert three.cycles == 3 * one.cycles
    assert three.latency_cycles == one.latency_cycles == one.cycles
    assert three.total_energy == pytest.approx(3 * one.total_energy)
    order = [stage.sequence for stage in three.stages]
    assert order == sorted(order)


def test_generation_waits_for_memory() -> None:
    step = workload(length=1, kv_len=64, stage="decode")
    report = simulate(Trace(step), **BANDWIDTH)
    weights = sum(op.inner * op.columns * 2 for op in step.operators if op.kind == "gemm")
    keys = 2 * 64 * 2 * 32 * 4 * 2  # layers · keys · (k and v) · head_dim · heads · bytes
    assert report.dram_bytes > weights + keys
    assert report.stalls["dram"] > 0.8 * report.cycles
    assert report.utilisation["dram"] == pytest.approx(1.0)
    ideal = simulate(Trace(step))
    assert ideal.stalls == {}
    assert ideal.cycles < report.cycles
    assert any("generation keeps all elements busy" in text for text in report.assumptions)


def test_three_projections_cost_what_one_does() -> None:
    fused = workload()
    split: list[Operator] = []
    for operator in fused.operators:
        third = operator.model_copy(update={"columns": operator.columns // 3})
        split += [third] * 3 if operator.role == "qkv" else [operator]
    one = simulate(Trace(fused))
    three = simulate(Trace(Workload(SHAPE, tuple(split))))
    assert three.components == pytest.approx(one.components)
    assert three.dram_bytes == one.dram_bytes
    assert three.total_energy == pytest.approx(one.total_energy)


def test_keys_that_do_not_fit_are_streamed() -> None:
    small = simulate(Trace(workload(length=128)), **{"sram.kib_per_lane": 8})
    large = simulate(Trace(workload(length=128)))
    loads = 2 * 128 / 4 * 128 * 2 * 32 * 4 * 2  # layers · groups · keys · (k, v) · d_h · heads · B
    assert small.dram_bytes - large.dram_bytes >= loads
    assert small.components == large.components


def test_selections_without_a_predictor_detect_nothing_and_say_so() -> None:
    keep = random_keep(1, 0.2)
    free = simulate(with_masks(workload(), keep, keep))
    assert "detection" not in free.components
    assert any("no detection is charged for attention" in text for text in free.assumptions)
    paid = simulate(with_masks(workload(), keep, keep, predictor=PredictorShape(head_dim=8)))
    assert paid.components["attention"] == free.components["attention"]
    assert not any("no detection" in text for text in paid.assumptions)


def test_counts_without_keys_are_enough() -> None:
    operator = Operator(
        kind="attention", heads=2, kv_heads=2, q_len=1, kv_len=100, head_dim=32, value_dim=32,
        stage="decode", layer=0,
    )  # fmt: skip
    base = Workload(SHAPE, (operator,), scope="attention")
    counts = np.array([[[50], [20]]], np.int64)
    values = np.array([[[10], [20]]], np.int64)
    call = AttentionCall(key_counts=counts, value_counts=values)
    report = simulate(Trace(base, {"m": Selection("m", (call,))}))
    assert report.components == {"attention": pytest.approx((50 + 10) * 32 / 512)}
    assert report.scope == "attention"
    assert any("counts kept keys without naming them" in text for text in report.assumptions)
    # Head 1 alone is left: it moves to the first Lane.
    alive = AttentionCall(key_counts=counts, heads_alive=np.array([False, True]))
    alone = simulate(Trace(base, {"m": Selection("m", (alive,))}))
    assert alone.components == {"attention": pytest.approx(max(2 * 20 * 32 / 512, 20 / 16))}


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 1),
    more=st.floats(0, 1),
    causal=st.booleans(),
    pairs=st.sampled_from(["allowed", "square"]),
    balance=st.sampled_from(["measured", "ideal"]),
    bandwidth=st.sampled_from([0.5, 256.0]),
)
def test_more_kept_pairs_are_never_faster(
    seed: int, share: float, more: float, causal: bool, pairs: str, balance: str, bandwidth: float
) -> None:
    shape = SHAPE.model_copy(update={"is_causal": causal, "layers": 1})
    base = workload(shape, length=16)
    few = random_keep(seed, share, length=16)
    many = few | random_keep(seed + 1, more, length=16)
    machine = hardware.load(
        DOTA,
        **{
            "closed_form.pairs": pairs,
            "closed_form.lane_balance": balance,
            "dram.gbytes_per_second": bandwidth,
        },
    )
    sparse, fuller = (machine.simulate(with_masks(base, keep)) for keep in (few, many))
    dense = machine.simulate(with_masks(base, many), "dense")
    assert sparse.cycles <= fuller.cycles <= dense.cycles
    assert sparse.total_energy <= fuller.total_energy * (1 + 1e-12)
    assert sparse.dram_bytes <= fuller.dram_bytes


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 6),
    length=st.integers(1, 24),
    bandwidth=st.sampled_from([1.0, 256.0]),
    decode=st.booleans(),
)
def test_busy_and_idle_fill_the_time(
    seed: int, heads: int, length: int, bandwidth: float, decode: bool
) -> None:
    shape = SHAPE.model_copy(update={"heads": heads, "kv_heads": heads})
    keep = random_keep(seed, 0.4, heads=heads, length=length)
    stage = "decode" if decode else "prefill"
    predictor = PredictorShape(head_dim=8)
    trace = with_masks(workload(shape, length=length, stage=stage), keep, keep, predictor=predictor)
    machine = hardware.load(DOTA, **{"dram.gbytes_per_second": bandwidth})
    report = machine.simulate(trace)
    total = sum(report.components.values())
    for event, slots in (("rmmu_pe_cycle", 2048), ("mfu_cycle", 4), ("detector_cycle", 4)):
        assert report.actions[event] + report.actions[f"idle {event}"] == pytest.approx(
            slots * total
        )
    assert all(0 <= share <= 1 + 1e-9 for share in report.utilisation.values())
    assert sum(report.stalls.values()) <= report.cycles + len(report.stalls)
    assert report.actions["dram_bit"] == pytest.approx(8 * report.dram_bytes, abs=8)
    assert report.energy["dram"] == pytest.approx(8 * report.dram_bytes * 3.9e-12, rel=1e-3)
    faster = hardware.load(DOTA, **{"dram.gbytes_per_second": 2 * bandwidth}).simulate(trace)
    assert faster.cycles <= report.cycles


def test_the_clock_and_the_size_scale_as_they_should() -> None:
    trace = Trace(workload())
    base, slow = simulate(trace), simulate(trace, clock_ghz=0.5)
    assert slow.cycles == base.cycles
    assert slow.seconds == pytest.approx(2 * base.seconds)
    assert slow.energy["sram_leakage"] == pytest.approx(2 * base.energy["sram_leakage"])
    wide = simulate(trace, **{"rmmu.columns": 32})
    assert wide.components["linear"] == pytest.approx(base.components["linear"] / 2)
    assert wide.energy["rmmu"] == pytest.approx(base.energy["rmmu"], rel=0.05)


def test_fidelity_and_selection_are_checked() -> None:
    machine = hardware.load(DOTA)
    trace = Trace(workload())
    with pytest.raises(ValueError, match="fidelity must be one of analytic, cycle, rtl, got 'x'"):
        machine.simulate(trace, fidelity="x")
    with pytest.raises(NotImplementedError, match="has fidelity analytic, cycle, got 'rtl'"):
        machine.simulate(trace, fidelity="rtl")
    with pytest.raises(ValueError, match="no selection 'oracle'"):
        machine.simulate(trace, "oracle")


def test_the_report_is_a_valid_results_file() -> None:
    keep = random_keep(2, 0.3)
    report = simulate(with_masks(workload(), keep, keep, predictor=PredictorShape(head_dim=8)))
    data = json.loads(report.to_json(command="sparseloom simulate dota_asplos_2022 w"))
    validate_results(data)
    row = data["rows"][0]
    assert (row["machine"], row["trace"], row["selection"]) == (DOTA, "w", "m")
    assert (row["value"], row["dense_value"], row["scope"]) == (1.5, 1, "model")
    assert row["cycles"] == report.cycles
    assert sum(row["energy_j"].values()) == pytest.approx(report.total_energy)
    assert row["area_mm2"] == pytest.approx(4.423)
    assert row["energy_table"] == "dota_22nm"
    assert row["config_hash"] == report.config_hash != hardware.load(DOTA).config_hash
    assert any("closed form" in text for text in row["assumptions"])


def test_the_timeline_is_a_chrome_trace(tmp_path: Path) -> None:
    keep = random_keep(3, 0.3)
    base = workload(batch=2)
    report = simulate(with_masks(base, keep, keep, predictor=PredictorShape(head_dim=8)))
    report.to_perfetto(tmp_path / "out" / "timeline.json")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["timeline.json"]
    data = json.loads((tmp_path / "out" / "timeline.json").read_text())
    slices = [event for event in data["traceEvents"] if event["ph"] == "X"]
    names = [event for event in data["traceEvents"] if event["ph"] == "M"]
    assert len(slices) == len(report.stages) == 2 * 2 * 6
    assert {event["pid"] for event in slices} == {1, 2}
    assert {event["args"]["name"] for event in names} >= {"linear", "attention", "detection"}
    # One after another without a gap, as long as the report says; microseconds at 1 GHz.
    end = 0.0
    for event in slices:
        assert event["ts"] == pytest.approx(end)
        end = event["ts"] + event["dur"]
    assert end == pytest.approx(report.seconds * 1e6, abs=1e-3)  # a cycle
    attention = next(event for event in slices if event["cat"] == "attention")
    assert 0 < attention["args"]["density"] < 1
