"""The closed form against its own worked numbers: a regression, no evidence for the paper.

Templates, mix and constants were fitted to the published headline together.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.experiments.reproduce.static_templates import (
    HEADS,
    LAYERS,
    MIX,
    encoder,
    mix_trace,
    template_trace,
)
from sparseloom.hardware.report import Report
from sparseloom.hardware.static_dense import StaticDense
from sparseloom.trace import AttentionCall, MaskArrays, Selection, Trace

LATENCY, SPEEDUP = "dense_static_dac_2023", "dense_static_speedup_dac_2023"
# Share of tiles, runs and cycles over dense at 384 tokens.
TEMPLATES = {
    "local": (0.340, 42, 0.369),
    "stripe": (0.271, 42, 0.302),
    "sep": (0.271, 61, 0.306),
    "block": (0.438, 44, 0.464),
    "coarse": (0.517, 79, 0.549),
    "dense": (1.000, 24, 1.005),
}
# Speed-up and change of energy of the mix at other lengths. Beyond 512 tokens the worked numbers
# know no chunks of keys, and beside pooled keys none at 512.
LENGTHS = {128: (1.22, -0.17), 256: (1.83, -0.43), 512: (3.00, -0.65), 1024: (4.83, -0.78)}
ROOMY = {"buffers.weight_kib": 256, "buffers.probability_kib": 64}
SWEEP = {
    0.25: (3.54, -0.69),
    0.30: (3.02, -0.65),
    0.35: (2.63, -0.60),
    0.40: (2.33, -0.55),
    0.45: (2.10, -0.51),
    0.50: (1.90, -0.46),
    0.60: (1.61, -0.37),
}


@cache
def trace(kind: str, length: int) -> Trace:
    return (mix_trace if kind == "mix" else template_trace)(length)


@cache
def report(machine: str, kind: str, length: int, selection: str, roomy: bool = False) -> Report:
    overrides: dict[str, Any] = ROOMY if roomy else {}
    return hardware.load(machine, **overrides).simulate(trace(kind, length), selection)


def gains(machine: str, length: int, **more: Any) -> tuple[float, float]:
    """Speed-up and change of energy of the mix over the dense base."""
    mix, dense = (report(machine, "mix", length, name, **more) for name in ("mix", "dense"))
    return dense.cycles / mix.cycles, mix.total_energy / dense.total_energy - 1


def test_a_dense_head() -> None:
    # The workload's own "dense" is the base without regions; the template of that name has one.
    base = hardware.load(LATENCY).simulate(Trace(encoder(384, layers=1, heads=1)), "dense")
    assert base.cycles == 19_008
    assert base.total_energy == pytest.approx(1.91e-6, rel=0.005)
    share = {name: joules / base.total_energy for name, joules in base.energy.items()}
    assert share == pytest.approx(
        {"mac": 0.74, "softmax": 0.065, "buffer": 0.07, "idle": 0.12}, abs=0.01
    )
    whole = report(LATENCY, "mix", 384, "dense")
    assert whole.seconds == pytest.approx(2.74e-3, rel=0.002)
    assert whole.total_energy == pytest.approx(274e-6, rel=0.002)
    # About 101 fJ per multiply-accumulate with everything around it.
    assert base.total_energy / (base.actions["mac_int8"]) == pytest.approx(101e-15, rel=0.005)


@pytest.mark.parametrize("name", TEMPLATES)
def test_head_templates(name: str) -> None:
    share, runs, cycles = TEMPLATES[name]
    facts = report(LATENCY, "template", 384, name).stages[0].facts
    assert float(facts["tiles"]) / float(facts["grid"]) == pytest.approx(share, rel=0.02)
    assert facts["runs"] == pytest.approx(runs, rel=0.02)
    assert report(LATENCY, "template", 384, name).cycles / 19_008 == pytest.approx(cycles, rel=0.02)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "coarse"])
def test_a_mask_alone_costs_what_its_regions_do(name: str) -> None:
    with_regions = report(LATENCY, "template", 384, name)
    alone = report(LATENCY, "template", 384, f"{name}, mask alone")
    assert alone.cycles == with_regions.cycles
    assert alone.total_energy == pytest.approx(with_regions.total_energy)


def test_the_mix_in_both_readings() -> None:
    assert sum(MIX.values()) == LAYERS * HEADS
    speedup, energy = gains(LATENCY, 384)
    assert 1 / speedup - 1 == pytest.approx(-0.590, abs=0.005)
    assert energy == pytest.approx(-0.569, abs=0.005)
    assert report(LATENCY, "mix", 384, "mix").utilisation["tiles"] == pytest.approx(0.381, abs=1e-3)
    speedup, energy = gains(SPEEDUP, 384)
    assert speedup == pytest.approx(1.60, rel=0.02)
    assert energy == pytest.approx(-0.564, abs=0.005)


@pytest.mark.parametrize("length", LENGTHS)
def test_other_lengths(length: int) -> None:
    speedup, energy = gains(LATENCY, length, roomy=True)
    assert speedup == pytest.approx(LENGTHS[length][0], rel=0.02)
    assert energy == pytest.approx(LENGTHS[length][1], abs=0.01)


def test_chunks_of_keys_cost_what_they_add() -> None:
    wide, _ = gains(LATENCY, 1024, roomy=True)
    speedup, energy = gains(LATENCY, 1024)
    assert 0.9 * wide < speedup < wide
    assert energy < -0.70
    said = report(LATENCY, "mix", 1024, "mix").assumptions
    assert any("worked on in chunks" in sentence for sentence in said)
    said = report(LATENCY, "mix", 384, "mix").assumptions
    assert not any("worked on in chunks" in sentence for sentence in said)


@pytest.mark.parametrize("share", SWEEP)
def test_uniform_density(share: float) -> None:
    # Two runs in every query tile, which keep so many of 12 key tiles on average.
    tiles = round(share * 288)
    keep = np.zeros((24, 12), np.bool_)
    for t in range(24):
        count = tiles // 24 + (t < tiles % 24)
        keep[t, : count - 1], keep[t, count] = True, True
    mask = MaskArrays.from_bool(
        keep.repeat(16, axis=0).repeat(32, axis=1)[None, None], block_size=(16, 32)
    )
    made = Trace(
        encoder(384, layers=1, heads=1), {"uniform": Selection("uniform", (AttentionCall(mask),))}
    )
    machine = hardware.load(LATENCY)
    found, dense = (machine.simulate(made, name) for name in ("uniform", "dense"))
    assert dense.cycles / found.cycles == pytest.approx(SWEEP[share][0], rel=0.02)
    change = found.total_energy / dense.total_energy - 1
    assert change == pytest.approx(SWEEP[share][1], abs=0.01)


@pytest.mark.parametrize(("pj", "change"), [(10, -0.37), (20, -0.28), (30, -0.22)])
def test_dram_for_operands_cuts_the_saving(pj: float, change: float) -> None:
    options: dict[str, Any] = {"scope.dram": True, "scope.dram_pj_per_byte": float(pj)}
    # Fast enough to cost no time: the worked numbers are of energy.
    machine = hardware.load(LATENCY, **options, **{"scope.dram_gbytes_per_second": 1e4})
    mix, dense = (machine.simulate(trace("mix", 384), name) for name in ("mix", "dense"))
    assert mix.total_energy / dense.total_energy - 1 == pytest.approx(change, abs=0.01)
    assert dense.dram_bytes == 144 * 4 * 384 * 64


def test_area_budget() -> None:
    machine = hardware.load(LATENCY)
    assert isinstance(machine, StaticDense)
    assert machine.descriptor_bytes == 1536
    assert machine.area_overhead() == pytest.approx(0.022, abs=0.0005)
    parts = {name: area * 1e6 for name, area in machine.area().items() if name != "base"}
    expected = {
        "descriptor_ram": 1230,
        "sequencer": 360,
        "pooling": 480,
        "run_tags": 100,
        "compaction": 240,
        "wiring": 960,
    }
    assert parts == pytest.approx(expected, rel=0.03)
    assert sum(parts.values()) == pytest.approx(3.4e3, rel=0.02)
    bare = hardware.load(LATENCY, **{"sequencer.present": False})
    assert sum(bare.area().values()) == pytest.approx(0.153)
    # Words of every head of BERT-base, 8 each.
    assert LAYERS * machine.descriptor_bytes / 2 == pytest.approx(9.2e3, rel=0.01)
