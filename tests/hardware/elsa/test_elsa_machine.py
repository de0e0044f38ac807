"""The ELSA machine on traces: whose candidates, counts, energy, area, several units, timelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.hardware.elsa import Elsa
from sparseloom.hardware.elsa.jobs import hasher_of
from sparseloom.hardware.elsa.numbers import candidates, level_of, similarity
from sparseloom.hashing import angle_bias
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Selection,
    Trace,
    TraceError,
    Workload,
    transformer_operators,
)

NAME, DOZEN = "elsa_isca_2021", "elsa_12_isca_2021"
FIDELITIES = ("analytic", "cycle")


def shape_of(heads: int = 2, dim: int = 64, layers: int = 1, causal: bool = False) -> ModelShape:
    return ModelShape(
        layers=layers,
        hidden_size=heads * dim,
        heads=heads,
        kv_heads=heads,
        head_dim=dim,
        is_causal=causal,
    )


def trace(
    length: int = 48,
    *,
    heads: int = 2,
    dim: int = 64,
    layers: int = 1,
    batch: int = 1,
    causal: bool = False,
    values: bool = False,
    share: float = 0.25,
    method: str = "m",
) -> Trace:
    shape = shape_of(heads, dim, layers, causal)
    operators = tuple(
        op.model_copy(update={"batch": batch}) for op in transformer_operators(shape, q_len=length)
    )
    random = np.random.default_rng(3)
    calls = []
    for _ in range(layers):
        keep = random.random((batch, heads, length, length)) < share
        calls.append(AttentionCall(MaskArrays.from_bool(keep, is_causal=causal)))
    names = ("query", "key", "value") if values else ()
    tensors = {
        f"calls.{i}.{n}": random.standard_normal((batch, heads, length, dim))
        for i in range(layers)
        for n in names
    }
    return Trace(
        Workload(shape, operators, name="t"),
        {"m": Selection("m", tuple(calls), {"method": method})},
        tensors,
    )


def machine(name: str = NAME, /, **changes: Any) -> Elsa:
    found = hardware.load(name, **changes)
    assert isinstance(found, Elsa)
    return found


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_base_latency_beside_an_ideal_machine(fidelity: str) -> None:
    """Published: 1.03 times 528 multipliers that are always busy; hashes are not needed for it."""
    base = machine(**{"search.mode": "base"})
    report = base.simulate(trace(512, heads=1), "dense", fidelity=fidelity)
    ideal = 512 * 512 * 2 * 64 / base.settings.multipliers
    assert report.cycles / ideal == pytest.approx(1.03, abs=0.005)
    whole = machine(**{"search.retention": 1.0})
    hashed = whole.simulate(trace(512, heads=1, values=True), "dense", fidelity=fidelity)
    assert hashed.cycles - report.cycles == 3 * 513


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_products_are_the_closed_form(fidelity: str) -> None:
    """Everything kept: 768 per hash, 64 per norm, 1 per key looked at, 128 per pair, 64 per row."""
    n, heads = 40, 2
    report = machine(**{"search.retention": 1.0}).simulate(
        trace(n, heads=heads, values=True), "dense", fidelity=fidelity
    )
    done = report.actions
    assert done["hash multiply 9b"] == heads * 2 * n * 768
    assert done["norm multiply 9b"] == heads * n * 64
    assert done["selectors multiply 8b"] == heads * n * n
    assert done["attention multiply 9b"] == heads * n * n * 2 * 64
    assert done["division multiply 18b"] == heads * n * 64
    assert report.operations == 2 * 2 * heads * n * n * 64
    base = machine(**{"search.mode": "base"}).simulate(trace(n), "dense", fidelity=fidelity)
    assert base.actions["attention multiply 9b"] == done["attention multiply 9b"]
    assert base.actions["hash multiply 9b"] == base.actions["selectors multiply 8b"] == 0


def test_narrow_heads_are_charged_in_full() -> None:
    by_width = {
        dim: machine(**{"search.evidence": "selection"}).simulate(trace(96, dim=dim), "m")
        for dim in (8, 64, 128)
    }
    assert by_width[8].cycles == by_width[64].cycles
    assert (
        by_width[8].actions["attention multiply 9b"]
        == (by_width[64].actions["attention multiply 9b"])
    )
    assert by_width[8].operations == pytest.approx(by_width[64].operations / 8)  # pyright: ignore[reportOptionalOperand]
    assert 1.8 < by_width[128].cycles / by_width[64].cycles < 2.8
    for dim, report in by_width.items():
        assert any("take turns" in text for text in report.assumptions) == (dim != 64)


def test_longer_inputs_have_longer_memories() -> None:
    short, long = (
        machine(**{"search.mode": "base"}).simulate(trace(n, heads=1, share=0.1), "dense")
        for n in (512, 1024)
    )
    assert any("memories hold 1024 keys instead of 512" in text for text in long.assumptions)
    assert not any("memories hold" in text for text in short.assumptions)
    assert long.area["external_key"] == pytest.approx(2 * 0.253)
    assert long.area["attention"] == short.area["attention"]
    rate = long.energy["leakage"] / long.seconds / (short.energy["leakage"] / short.seconds)
    memories = (1.05 + 0.29 + 8.02) / (13.31 + 8.02)
    assert rate == pytest.approx(1 + memories)


# ------------------------------------------------------------------------- whose candidates


def test_evidence() -> None:
    sampled = trace(48, values=True)
    own = machine().simulate(sampled, "m")
    assert any("ELSA's own search" in text for text in own.assumptions)
    assert any("'m' is not followed" in text for text in own.assumptions)
    assert own.seed is None
    made = machine().settings
    hasher = hasher_of(made, 64)
    pairs, kept = np.ones((48, 48), np.bool_), 0
    for h in range(2):
        query, key = (sampled.tensors[f"calls.0.{n}"][0, h] for n in ("query", "key"))
        bias, numbers = angle_bias(64), made.numbers
        found = similarity(query, key, pairs, hasher=hasher, bias=bias, numbers=numbers)
        kept += int(candidates(found, pairs, level_of(found, pairs, 0.2)).sum())
    assert own.stages[0].facts["candidates"] == kept
    assert kept >= 0.2 * 2 * 48 * 48

    drawn = machine().simulate(trace(48), "m", seed=5)
    assert drawn.stages[0].facts["candidates"] == 2 * 48 * 10  # ⌈0.2 · 48⌉ each
    assert drawn.seed == 5
    assert any("drawn at random" in text for text in drawn.assumptions)

    for one in (
        machine(**{"search.evidence": "selection"}).simulate(trace(48), "m"),
        machine().simulate(trace(48, method="elsa"), "m"),
    ):
        assert one.stages[0].facts["candidates"] == int(trace(48).kept_pairs("m")[0].sum())
        assert any("are the pairs that the selection keeps" in text for text in one.assumptions)
    base = machine(**{"search.mode": "base"}).simulate(trace(48, method="elsa"), "m")
    assert base.stages[0].facts["candidates"] == 2 * 48 * 48


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_causality(fidelity: str, causal: bool) -> None:
    shape = shape_of(1, causal=causal)
    (operator,) = (op for op in transformer_operators(shape, q_len=32) if op.is_attention)
    operator = operator.model_copy(update={"padding": 0})
    padding = np.ones((1, 32), np.bool_)
    padding[0, :8] = False  # on the left
    keep = np.ones((1, 1, 32, 32), np.bool_)
    mask = MaskArrays.from_bool(keep, is_causal=causal)
    workload = Workload(shape, (operator,), name="p", paddings=(padding,))
    selection = Selection("m", (AttentionCall(mask),))
    report = machine(**{"search.evidence": "selection"}).simulate(
        Trace(workload, {"m": selection}), "m", fidelity=fidelity
    )
    pairs = 32 * 24 if not causal else sum(range(25))
    assert report.stages[0].facts["visible"] == report.stages[0].facts["candidates"] == pairs
    # Keys that are padding are not hashed.
    assert report.stages[0].facts["preprocessing"] == 3 * 25


def test_counts_without_keys_and_dead_tokens_and_heads() -> None:
    base = trace(32)
    counts = np.full((1, 2, 32), 5)
    alive = np.arange(32)[None] < 20
    calls = {
        "counts": AttentionCall(key_counts=counts),
        "alive": AttentionCall(tokens_alive=alive, heads_alive=np.array([True, False])),
    }
    one = Trace(base.workload, {name: Selection(name, (c,)) for name, c in calls.items()})
    follow = machine(**{"search.evidence": "selection"})
    assert follow.simulate(one, "counts").stages[0].facts["candidates"] == 2 * 32 * 5
    pruned = follow.simulate(one, "alive").stages[0].facts
    assert (pruned["candidates"], pruned["heads"]) == (32 * 20, 1)
    assert pruned["preprocessing"] == 3 * 21


# ------------------------------------------------------------------------- units and memory


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_twelve_units_share_the_heads_of_a_call(fidelity: str) -> None:
    for heads, batch, rounds in ((12, 1, 1), (13, 1, 2), (6, 4, 2)):
        given = trace(24, heads=heads, batch=batch)
        one = machine(**{"search.mode": "base"}).simulate(given, "dense", fidelity=fidelity)
        many = machine(DOZEN, **{"search.mode": "base"}).simulate(given, "dense", fidelity=fidelity)
        assert many.cycles == pytest.approx(rounds * one.cycles / heads / batch)
        assert many.total_area == pytest.approx(12 * one.total_area)


def test_memory_time_is_hidden_or_charged() -> None:
    free = machine().simulate(trace(48), "m")
    assert free.dram_bytes == 2 * 4 * 48 * 64 * 9 / 8
    assert free.stalls == {}
    for copies, slow in ((1, 0.5), (2, 0.5), (1, 64.0), (2, 64.0)):
        changes = {"memory.copies": copies, "dram.gbytes_per_second": slow}
        charged = machine(**{"memory.time": "charged"}, **changes).simulate(trace(48), "m")
        transfer = int(np.ceil(free.dram_bytes / slow))
        extra = transfer if copies == 1 else max(0, transfer - free.cycles)
        assert charged.cycles == free.cycles + extra
        assert charged.stalls == ({"dram": extra} if extra else {})


def test_more_bandwidth_and_more_units_are_never_slower() -> None:
    given = trace(64, heads=4)
    charged = {"memory.time": "charged", "search.evidence": "selection"}
    cycles = [
        machine(**charged, **{"dram.gbytes_per_second": b, "units": u}).simulate(given, "m").cycles
        for b, u in ((0.5, 1), (4.0, 1), (64.0, 1), (64.0, 2), (64.0, 4))
    ]
    assert cycles == sorted(cycles, reverse=True)
    assert cycles[0] > cycles[2] > cycles[4]


# ------------------------------------------------------------------------- area, power, energy


def test_sums_of_table_1() -> None:
    """Published: 1.255 mm², 956.05 mW and 13.31 mW of a unit; 0.892, 516.84 and 8.02 outside."""

    def both(sizes: dict[str, float], factor: float = 1.0) -> tuple[float, float]:
        outside = factor * sum(size for name, size in sizes.items() if "external" in name)
        return factor * sum(sizes.values()) - outside, outside

    one = machine()
    assert both(one.area()) == pytest.approx((1.255, 0.892))
    assert both(one.dynamic_power(), 1e3) == pytest.approx((956.05, 516.84))
    assert both(one.static_power(), 1e3) == pytest.approx((13.31, 8.02))
    dozen = machine(DOZEN)
    assert both(dozen.area()) == pytest.approx((15.06, 10.704))
    assert sum(dozen.power().values()) == pytest.approx(17.93, abs=0.005)
    assert sum(one.power().values()) == pytest.approx(1.494, abs=0.001)


def test_energy_of_a_unit_that_is_always_busy_is_its_power() -> None:
    """Attention modules at work in every cycle draw what the table says."""
    report = machine(**{"search.mode": "base"}).simulate(trace(512, heads=1), "dense")
    seconds = 512 * 128 / 1e9
    assert report.energy["attention"] == pytest.approx(0.56642 * seconds)
    assert report.energy["external_value"] == pytest.approx(0.16739 * seconds, rel=0.01)
    assert report.energy["leakage"] == pytest.approx(0.02133 * report.seconds)
    full = machine(**{"search.retention": 0.002}).simulate(trace(512, heads=1, values=True), "m")
    # The selectors look at 32 keys in each of 16 cycles a query.
    assert full.energy["selectors"] == pytest.approx(0.07841 * 512 * 16 / 1e9)
    assert full.energy["hash"] == pytest.approx(0.11508 * 3 * 1024 / 1e9)
    assert "elsa_40nm" in full.energy_table


def test_counted_actions_instead_of_published_power() -> None:
    counted = machine(**{"energy.source": "actions"}).simulate(trace(48), "m")
    assert {"attention", "hash", "external_key", "dram", "leakage"} <= set(counted.energy)
    assert "aladdin_40nm" in counted.energy_table
    assert counted.total_energy > 0


# ------------------------------------------------------------------------- cycles and events


def test_units_and_causes_add_up() -> None:
    for changes in ({}, {"memory.time": "charged", "dram.gbytes_per_second": 1.0}):
        given = trace(40, batch=2, layers=2)
        report = machine(**{"search.evidence": "selection"}, **changes).simulate(
            given, "m", fidelity="cycle", window=(0, 300)
        )
        assert {sum(unit.values()) for unit in report.unit_cycles.values()} == {report.cycles}
        assert len(report.unit_cycles) == 1 + 32 + 4 + 1
        hashes = 3 * 2 * 2 * 2 * 80
        assert report.unit_cycles["hash"]["busy"] == hashes
        assert report.stalls["preprocessing"] > 0
        assert [stage.sequence for stage in report.stages] == [0, 0, 1, 1]
        events = report.events
        assert events is not None
        starts, ends = events.intervals[:, 2], events.intervals[:, 3]
        assert (starts < 300).all()
        assert (ends > starts).all()


def test_the_timeline_opens(tmp_path: Path) -> None:
    report = machine().simulate(trace(32), "m", fidelity="cycle", window=(0, 400))
    report.to_perfetto(tmp_path / "units.json")
    events = json.loads((tmp_path / "units.json").read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"hash", "selector 0.0", "attention 3", "division"} <= tracks
    with pytest.raises(NotImplementedError, match="logs events of one unit only, got units=12"):
        machine(DOZEN).simulate(trace(32), "m", fidelity="cycle", window=(0, 400))


def test_both_fidelities_on_real_masks() -> None:
    given = trace(200, values=True)
    one, other = (machine().simulate(given, "m", fidelity=f) for f in FIDELITIES)
    assert 0.85 * one.cycles <= other.cycles <= 1.02 * one.cycles
    assert one.stages[0].facts == other.stages[0].facts
    assert one.energy["attention"] == other.energy["attention"]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"search.mode": "exact"}, "search.mode"),
        ({"search.retention": 0.0}, "search.retention"),
        ({"units": 0}, "units"),
        ({"selection.queue": 0}, "selection.queue"),
        ({"memory.time": "free"}, "memory.time"),
        ({"selection.depth": 3}, "unknown key 'selection.depth'"),
    ],
)
def test_bad_settings(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(hardware.MachineError, match=message) as caught:
        hardware.load(NAME, **settings_)
    assert "\n" not in str(caught.value)


def test_values_of_another_shape_are_refused() -> None:
    good = trace(48, values=True)
    tensors = {**good.tensors, "calls.0.key": np.zeros((1, 2, 47, 64))}
    with pytest.raises(TraceError, match=r"calls.0.key must be \(1, 2, 48, 64\)"):
        machine().simulate(Trace(good.workload, {}, tensors))
