"""Devices: rooflines by hand, published times that they are fitted to, this machine's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseloom import hardware
from sparseloom.experiments.reproduce.spatten_rivals import gpt2_medium
from sparseloom.hardware.devices import Device, this_machine_file
from sparseloom.trace import ModelShape, Operator, Trace, Workload, transformer_operators

NAMES = ("titan_xp", "xeon_e5_2640v4", "jetson_nano", "raspberry_pi_4")
GPUS = ("v100", "v100_fused")
SHAPE = ModelShape(
    layers=2, hidden_size=128, heads=2, kv_heads=2, head_dim=64, intermediate_size=512
)
TRACE = Trace(Workload(SHAPE, transformer_operators(SHAPE, q_len=64), name="t"))


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "here" / "this.yaml"
    monkeypatch.setenv("SPARSELOOM_THIS_MACHINE", str(file))
    return file


def test_a_product_by_hand() -> None:
    device = hardware.load("titan_xp")
    assert isinstance(device, Device)
    large = Operator(kind="gemm", role="ffn", rows=4096, inner=4096, columns=4096)
    assert device.cost(large).seconds == pytest.approx(2 * 4096**3 / (12.15e12 * 0.5) + 95.7e-6)
    row = large.model_copy(update={"rows": 1})
    moved = (4096**2 + 2 * 4096) * 4
    assert device.cost(row).seconds == pytest.approx(moved / (547.7e9 * 0.75) + 95.7e-6)
    assert device.cost(row).moved == moved


def test_attention_by_hand() -> None:
    device = hardware.load("titan_xp")
    assert isinstance(device, Device)
    sizes = {"heads": 16, "kv_heads": 16, "q_len": 1, "kv_len": 1000, "head_dim": 64}
    operator = Operator(kind="attention", role="attention", value_dim=64, **sizes)
    moved = (16 * 1000 * 64 + 16 * 64 + 16 * 1000) * 4
    products = 2 * (moved / (547.7e9 * 0.75) + 54.2e-6)
    cost = device.cost(operator)
    assert cost.products == pytest.approx(products)
    assert cost.seconds == pytest.approx(products / 0.27)
    # 73 % of attention on the GPU is softmax and the moving of data, as published.
    assert 1 - cost.products / cost.seconds == pytest.approx(0.73)


SIZES = {"heads": 4, "kv_heads": 4, "q_len": 2000, "kv_len": 2000, "head_dim": 64, "value_dim": 64}


def test_attention_of_a_v100_by_hand() -> None:
    """Unfused: two products of 2·n²·h·d operations and three kernels that read and write n²·h
    scores. Fused: the same operations in one kernel, queries, keys, values and outputs moved."""
    operator = Operator(kind="attention", role="attention", **SIZES)
    scores = 4 * 2000 * 2000
    work = 2 * scores * 64
    reach, stream, start = 15.7e12 * 0.5, 900e9 * 0.75, 5e-6
    unfused, fused = (hardware.load(name) for name in GPUS)
    assert isinstance(unfused, Device)
    assert isinstance(fused, Device)
    found = unfused.cost(operator)
    assert found.products == pytest.approx(2 * (work / reach + start))
    between = 3 * (2 * scores * 4 / stream + start)
    assert found.seconds == pytest.approx(found.products + between)
    one = 4 * (4 * 2000 * 64) * 4
    assert found.moved == pytest.approx(one + 8 * scores * 4)
    found = fused.cost(operator)
    assert found.seconds == pytest.approx(2 * work / reach + start)
    assert (found.flops, found.moved) == (2 * work, one)
    # Narrow heads are bound by the traffic of the scores, and fusing spares just that.
    narrow = operator.model_copy(update={"head_dim": 8, "value_dim": 8})
    assert unfused.cost(narrow).seconds > 5 * fused.cost(narrow).seconds


def test_the_dense_bound_keeps_its_multipliers_busy() -> None:
    device = hardware.load("dense_ideal")
    assert isinstance(device, Device)
    operator = Operator(kind="attention", role="attention", **SIZES)
    assert device.cost(operator).seconds == pytest.approx(2 * 4 * 2000**2 * 64 / 128 / 1e9)
    assert device.simulate(TRACE).energy == {}
    # Half of the pairs of a causal call are forbidden, and a bound does not compute them.
    shape = SHAPE.model_copy(update={"is_causal": True})
    causal = Trace(Workload(shape, transformer_operators(shape, q_len=64), name="c"))
    cycles = [
        hardware.load("dense_ideal").simulate(trace).components["attention"]
        for trace in (TRACE, causal)
    ]
    assert cycles[1] / cycles[0] == pytest.approx(65 / 128)
    every = [hardware.load("v100").simulate(trace).cycles for trace in (TRACE, causal)]
    assert every[0] == every[1]


def test_scores_have_one_account() -> None:
    with pytest.raises(hardware.MachineError, match=r"matmul_share must be 1.*got 0\.5"):
        hardware.load("v100", **{"attention.matmul_share": 0.5})


@pytest.mark.parametrize(
    ("name", "attention_ms", "linear_ms"),
    [
        ("titan_xp", 366.7, 388.3),
        ("xeon_e5_2640v4", 1474.0, 942.0),
        ("jetson_nano", 5642.0, 5872.0),
        ("raspberry_pi_4", 42641.0, None),
    ],
)
def test_fitted_times(name: str, attention_ms: float, linear_ms: float | None) -> None:
    """GPT-2-Medium, 32 tokens: what the overheads were fitted to, so that nobody moves them."""
    report = hardware.load(name).simulate(gpt2_medium())
    found = {part: c / report.clock_ghz / 1e6 for part, c in report.components.items()}
    assert found["attention"] == pytest.approx(attention_ms, rel=0.005)
    if linear_ms is not None:
        assert found["linear"] == pytest.approx(linear_ms, rel=0.005)
    assert report.stalls == {}


def test_every_number_says_where_it_comes_from() -> None:
    for name in (*NAMES, *GPUS, "dense_ideal", "this"):
        device = hardware.load(name)
        assert isinstance(device, Device)
        s = device.settings
        keys = {
            f"{part}.{key}"
            for part in ("processor", "gemm", "attention", "scores")
            if getattr(s, part) is not None
            for key in type(getattr(s, part)).model_fields
        }
        assert set(s.basis) == keys - {"processor.bits"}


def test_a_trace_runs_in_order_and_energy_is_power_times_time() -> None:
    for name in (*NAMES, *GPUS):
        report = hardware.load(name).simulate(TRACE)
        assert len(report.stages) == len(TRACE.workload.operators)
        assert sum(report.components.values()) == pytest.approx(
            report.seconds * report.clock_ghz * 1e9, rel=1e-3
        )
        watts = hardware.load(name).power()["processor"]
        # Cycles are rounded up, and these are few.
        assert report.total_energy == pytest.approx(watts * report.seconds, rel=1e-4)
        assert 0 < report.utilisation["arithmetic"] < 1
        assert report.scope == "model"


def test_faster_is_never_slower() -> None:
    for key in ("processor.peak_gflops", "processor.memory_gbytes_per_second"):
        cycles = [
            hardware.load("titan_xp", **{key: value}).simulate(TRACE).cycles
            for value in (0.01, 1.0, 1e3, 1e6)
        ]
        assert cycles == sorted(cycles, reverse=True)
        assert cycles[0] > cycles[-1]


MEASURED: dict[str, Any] = {
    "schema": "sparseloom/this_machine/1",
    "cpu": "a processor",
    "threads": 2,
    "date": "2026-01-01T00:00:00+00:00",
    "processor": {"peak_gflops": 100.0, "memory_gbytes_per_second": 10.0, "bits": 32},
    "gemm": {"compute_efficiency": 0.5, "memory_efficiency": 0.5, "overhead_us": 1.0},
    "attention": {
        "compute_efficiency": 0.5,
        "memory_efficiency": 0.5,
        "overhead_us": 1.0,
        "matmul_share": 1.0,
    },
}


def test_this_machine_says_what_to_run(nothing_measured: Path) -> None:
    machine = hardware.load("this")
    with pytest.raises(
        hardware.MachineError, match=r"sparseloom\.experiments\.this_machine"
    ) as error:
        machine.simulate(TRACE)
    assert "\n" not in str(error.value)
    by_hand = {"processor.peak_gflops": 100.0, "processor.memory_gbytes_per_second": 10.0}
    report = hardware.load("this", **by_hand).simulate(TRACE)
    assert report.cycles > 0
    assert report.energy == {}
    assert any("no energy is reported" in text for text in report.assumptions)
    nothing_measured.parent.mkdir()
    nothing_measured.write_text(yaml.safe_dump(MEASURED), encoding="utf-8")
    found = hardware.load("this")
    assert found.config_hash != machine.config_hash
    assert isinstance(found, Device)
    large = Operator(kind="gemm", role="ffn", rows=1024, inner=1024, columns=1024)
    assert found.cost(large).seconds == pytest.approx(2 * 1024**3 / 50e9 + 1e-6)


def test_a_damaged_measurement_is_one_line(nothing_measured: Path) -> None:
    nothing_measured.parent.mkdir()
    bad = {**MEASURED, "gemm": {**MEASURED["gemm"], "memory_efficiency": 2.0}}
    for text, message in (
        (yaml.safe_dump(bad), "gemm.memory_efficiency"),
        ("[", "cannot be read"),
        ("cpu: x\n", "schema"),
    ):
        nothing_measured.write_text(text, encoding="utf-8")
        with pytest.raises(hardware.MachineError, match=message) as caught:
            hardware.load("this")
        assert "\n" not in str(caught.value)
        assert str(nothing_measured) in str(caught.value)


def test_where_the_measurement_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSELOOM_THIS_MACHINE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert this_machine_file() == tmp_path / "sparseloom" / "this_machine.yaml"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gemm.compute_efficiency": 1.2}, "gemm.compute_efficiency"),
        ({"processor.peak": 3.0}, "unknown key 'processor.peak'"),
        ({"basis": {"gemm.overhead_us": "guess"}}, "basis.gemm.overhead_us"),
    ],
)
def test_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(hardware.MachineError, match=message) as caught:
        hardware.load("titan_xp", **setting)
    assert "\n" not in str(caught.value)
