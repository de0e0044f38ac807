"""The machine as a whole: scopes, the systolic variant, what it says it rests on and refuses."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.experiments.reproduce.static_templates import (
    encoder,
    mix_trace,
    selection,
    template_trace,
    templates,
)
from sparseloom.hardware import MachineError
from sparseloom.hardware.report import Report
from sparseloom.hardware.static_dense.assumptions import scope_text
from sparseloom.hardware.static_dense.config import StaticDenseConfig
from sparseloom.regions import Mode, Region, stripe
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Operator,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)

NAME = "dense_static_dac_2023"
SYSTOLIC: dict[str, Any] = {"array": "systolic"}


@cache
def mix() -> Trace:
    return mix_trace(128)


def simulate(trace: Trace, name: str, fidelity: str = "analytic", **more: Any) -> Report:
    return hardware.load(NAME, **more).simulate(trace, name, fidelity=fidelity)


def one_head(regions: tuple[Region, ...], length: int = 384) -> Trace:
    return Trace(encoder(length, layers=1, heads=1), {"s": selection("s", [[regions]], length)})


def test_scopes_add_products_and_dram() -> None:
    reports = {
        work: simulate(mix(), "mix", **{"scope.work": work}) for work in ("core", "mha", "model")
    }
    core, mha, model = (reports[work] for work in ("core", "mha", "model"))
    assert set(core.components) == {"attention"}
    # 12 layers of 128 × 768 × 3072 for the projections, at 1024 products a cycle.
    assert mha.components["linear"] == 12 * 128 * 768 * 3072 / 1024
    assert model.components["linear"] == 3 * mha.components["linear"]
    assert mha.components["attention"] == core.components["attention"]
    assert (core.scope, mha.scope, model.scope) == ("attention", "attention", "model")
    for work, report in reports.items():
        words = {"core": "core", "mha": "projections", "model": "every matrix product"}[work]
        assert words in report.assumptions[0]
        assert "without DRAM" in report.assumptions[0]
    slow: dict[str, Any] = {"scope.dram": True, "scope.dram_gbytes_per_second": 4.0}
    fed = simulate(mix(), "mix", **{"scope.work": "model"}, **slow)
    assert fed.dram_bytes == 12 * (4 * 128 * 768 + 768 * (4 * 768 + 2 * 3072))
    assert fed.energy["dram"] == pytest.approx(fed.dram_bytes * 20e-12)
    assert fed.cycles > model.cycles
    assert fed.stalls["dram"] == pytest.approx(fed.cycles - model.cycles, abs=2)
    assert "with DRAM at 20 pJ/B" in fed.assumptions[0]


def test_the_two_readings_differ_as_they_say() -> None:
    latency, speedup = (hardware.load(f"dense_static_{n}dac_2023") for n in ("", "speedup_"))
    assert isinstance(latency.config, StaticDenseConfig)
    assert isinstance(speedup.config, StaticDenseConfig)
    assert scope_text(latency.config) == scope_text(speedup.config)
    both = [machine.simulate(mix(), "dense") for machine in (latency, speedup)]
    # The dense base runs as fast in both, on half the energy of the global buffer.
    assert both[0].cycles == both[1].cycles
    assert both[0].energy["buffer"] == pytest.approx(2 * both[1].energy["buffer"])
    sparse = [machine.simulate(mix(), "mix") for machine in (latency, speedup)]
    assert sparse[1].cycles > sparse[0].cycles
    assert any("used to 64%" in text for text in sparse[1].assumptions)


def test_the_base_alone_follows_nothing() -> None:
    alone: dict[str, Any] = {"sequencer.present": False}
    bare = simulate(mix(), "mix", **alone)
    assert bare.cycles == simulate(mix(), "dense").cycles
    assert any("not followed" in text for text in bare.assumptions)


@pytest.mark.parametrize("fidelity", ["analytic", "cycle"])
def test_causal_heads_do_half_and_padding_is_left_out(fidelity: str) -> None:
    shape = ModelShape(layers=1, hidden_size=64, heads=1, kv_heads=1, head_dim=64, is_causal=True)
    causal = Trace(Workload(shape, transformer_operators(shape, q_len=256)))
    whole = Trace(encoder(256, layers=1, heads=1))
    facts = [simulate(t, "dense", fidelity).stages[0].facts for t in (causal, whole)]
    assert facts[0]["tiles"] == sum(t // 2 + 1 for t in range(16))
    assert facts[1]["tiles"] == 128
    valid = np.arange(256)[None] < np.array([[256], [100]])
    plain = shape.model_copy(update={"is_causal": False})
    operators = transformer_operators(plain, q_len=256, batch=2, padding=0)
    padded = simulate(Trace(Workload(plain, operators, paddings=(valid,))), "dense", fidelity)
    assert [stage.facts["tiles"] for stage in padded.stages] == [16 * 8, 16 * 4]
    assert padded.latency_cycles < padded.cycles


def test_low_precision_and_strided_work() -> None:
    full = one_head((stripe(0, 384),))
    low = one_head((stripe(0, 384, mode=Mode.LOW_PRECISION),))
    quarter = one_head((Region(Mode.STRIDED, 0, 512, 0, 24, pattern=0b00010001),))
    a, b, c = (simulate(trace, "s") for trace in (full, low, quarter))
    assert b.cycles == a.cycles
    assert b.energy["mac"] == pytest.approx(a.energy["mac"] * 0.0322 / 0.075)
    assert c.stages[0].facts["tiles"] == 24 * 12 // 4
    assert c.energy["mac"] == pytest.approx(a.energy["mac"] / 4)


def test_pooled_keys_cost_their_writing() -> None:
    report = simulate(template_trace(384), "coarse")
    local = simulate(template_trace(384), "local")
    assert report.actions["pooling_element"] == 2 * 384 * 64
    assert report.actions["buffer_byte"] - local.actions["buffer_byte"] == 2 * 384 * 64 / 4


def test_long_inputs_widen_the_power_sum() -> None:
    report = simulate(Trace(encoder(2048, layers=1, heads=1)), "dense")
    assert any("Q(11,6) for 2048 keys" in text for text in report.assumptions)
    short = simulate(Trace(encoder(1024, layers=1, heads=1)), "dense")
    assert not any("power sum" in text for text in short.assumptions)


# ------------------------------------------------------------------- weight-stationary


def test_a_dense_head_on_the_systolic_array() -> None:
    report = simulate(Trace(encoder(384, layers=1, heads=1)), "dense", **SYSTOLIC)
    # 12 key tiles of two sub-tiles, 4 of dimensions, 384 queries through each, in QKᵀ and in PV;
    # the array fills and drains for every key tile and phase.
    assert report.cycles == 2 * 12 * (2 * 4 * 384 + 2 * 16)
    assert report.utilisation["mac"] == pytest.approx(1, abs=0.02)
    # A quarter of the multipliers is a quarter of the base.
    assert report.area["base"] == pytest.approx(0.153 / 4)


@pytest.mark.parametrize("name", ["local", "stripe", "sep", "block", "coarse", "dense"])
def test_the_systolic_steps_follow_the_closed_form(name: str) -> None:
    trace = template_trace(384)
    closed, found = (simulate(trace, name, f, **SYSTOLIC) for f in ("analytic", "cycle"))
    assert found.cycles == pytest.approx(closed.cycles, rel=0.03)
    assert found.cycles >= closed.cycles
    for unit, codes in found.unit_cycles.items():
        assert sum(codes.values()) == found.cycles, unit
    assert found.unit_cycles["array"]["fills and drains"] % 32 == 0


def test_runs_of_few_queries_waste_the_array() -> None:
    shape = ModelShape(layers=1, hidden_size=64, heads=1, kv_heads=1, head_dim=64)
    one = Trace(Workload(shape, transformer_operators(shape, q_len=1, kv_len=512)))
    sixteen = Trace(Workload(shape, transformer_operators(shape, q_len=16, kv_len=512)))
    cycles = [simulate(trace, "dense", **SYSTOLIC).cycles for trace in (one, sixteen)]
    assert cycles[0] == cycles[1]


def test_queries_beyond_the_accumulators_take_another_round() -> None:
    trace = Trace(encoder(1024, layers=1, heads=1))
    twice: dict[str, Any] = {"systolic.accumulator_kib": 256.0}
    wide = simulate(trace, "dense", **SYSTOLIC, **twice)
    narrow = simulate(trace, "dense", **SYSTOLIC)
    # The same products; every key tile fills and drains twice.
    assert narrow.cycles - wide.cycles == 32 * 2 * 32


def test_several_systolic_arrays_are_refused() -> None:
    with pytest.raises(MachineError, match="pes must be 1 with a systolic array, got 2"):
        hardware.load(NAME, pes=2, **SYSTOLIC)


# ------------------------------------------------------------------------------- limits


def test_counts_alone_are_drawn_and_said() -> None:
    operator = Operator(
        kind="attention", role="attention", heads=1, kv_heads=1, q_len=64, kv_len=128,
        head_dim=64, value_dim=64,
    )  # fmt: skip
    shape = ModelShape(layers=1, hidden_size=64, heads=1, kv_heads=1, head_dim=64)
    call = AttentionCall(key_counts=np.full((1, 1, 64), 3))
    trace = Trace(Workload(shape, (operator,), scope="attention"), {"s": Selection("s", (call,))})
    report = hardware.load(NAME).simulate(trace, "s", seed=4)
    assert report.seed == 4
    assert any("drawn evenly, seed 4" in text for text in report.assumptions)
    # Three keys of a query that all heads and queries share reach at most three tiles of four.
    assert 4 <= int(report.stages[0].facts["tiles"]) <= 12
    assert simulate(trace, "dense").seed is None


def test_alignment_is_charged_and_said() -> None:
    keep = np.zeros((1, 1, 128, 128), np.bool_)
    keep[..., ::32] = True  # one key of every tile
    call = AttentionCall(MaskArrays.from_bool(keep))
    trace = Trace(encoder(128, layers=1, heads=1), {"s": Selection("s", (call,))})
    report = simulate(trace, "s")
    assert report.stages[0].facts["tiles"] == 32
    assert any("32 pairs for every one kept" in text for text in report.assumptions)
    # A mask is charged as the regions that cover it would be.
    regions = {"s": selection("s", [[templates(128)["dense"]]], 128)}
    assert simulate(Trace(trace.workload, regions), "s").cycles == report.cycles
