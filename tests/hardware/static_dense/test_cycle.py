"""The stepped machine: gates against the closed form, conservation, stalls by cause, bounds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.experiments.reproduce.static_templates import encoder, mix_trace, template_trace
from sparseloom.hardware.report import Report
from sparseloom.hardware.static_dense import StaticDense, cycle
from sparseloom.hardware.static_dense.lowering import HeadSize, lower
from sparseloom.hardware.static_dense.runs import runs_of_tiles
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)

NAME = "dense_static_dac_2023"
TABLE = {"local": 0.369, "stripe": 0.302, "sep": 0.306, "block": 0.464, "coarse": 0.549}


@cache
def templates() -> Trace:
    return template_trace(384)


@cache
def stepped(selection: str, **overrides: Any) -> Report:
    return hardware.load(NAME, **overrides).simulate(templates(), selection, fidelity="cycle")


@cache
def base() -> Report:
    """The dense loop without regions: a trace that has no template of that name."""
    trace = Trace(encoder(384, layers=1, heads=1))
    return hardware.load(NAME).simulate(trace, "dense", fidelity="cycle")


def random_trace(length: int, dim: int = 64, heads: int = 2, share: float = 0.3) -> Trace:
    rng = np.random.default_rng(length + dim)
    shape = ModelShape(layers=1, hidden_size=heads * dim, heads=heads, kv_heads=heads, head_dim=dim)
    blocks = rng.random((1, heads, -(-length // 16), -(-length // 32))) < share
    blocks[..., 0] = True
    keep = blocks.repeat(16, axis=2).repeat(32, axis=3)[:, :, :length, :length]
    mask = MaskArrays.from_bool(keep, block_size=(16, 32))
    workload = Workload(shape, transformer_operators(shape, q_len=length), name="random")
    return Trace(workload, {"m": Selection("m", (AttentionCall(mask),))})


def simulate(trace: Trace, selection: str = "m", fidelity: str = "cycle", **more: Any) -> Report:
    return hardware.load(NAME, **more).simulate(trace, selection, fidelity=fidelity)


def test_a_dense_head_is_the_closed_form_and_a_cold_start() -> None:
    # Queries of two tiles and the first keys come (2 · 16 + 32), a block of weights (16), and the
    # outputs leave (16); a cycle is gained where they overlap.
    assert base().cycles == 19_008 + 2 * 16 + 32 + 16 + 16 - 1
    # Every further head is the closed form to the cycle: its operands came meanwhile.
    machine = hardware.load(NAME)
    cycles = [
        machine.simulate(Trace(encoder(384, layers=1, heads=n)), "dense", fidelity="cycle").cycles
        for n in (1, 2, 3)
    ]
    assert np.diff(cycles).tolist() == [19_008, 19_008]


def test_one_tile_by_hand() -> None:
    shape = ModelShape(layers=1, hidden_size=64, heads=1, kv_heads=1, head_dim=64)
    workload = Workload(shape, transformer_operators(shape, q_len=16, kv_len=32))
    found = hardware.load(NAME).simulate(Trace(workload), "dense", fidelity="cycle")
    # 16 queries in, 32 of keys, 16 of weights, then QKᵀ 32, PV 32, 24 between, outputs 16.
    assert found.cycles == pytest.approx(16 + 32 + 16 + 32 + 24 + 32 + 16, abs=2)


@pytest.mark.parametrize("name", TABLE)
def test_templates_within_two_percent(name: str) -> None:
    assert stepped(name).cycles / 19_008 == pytest.approx(TABLE[name], rel=0.02)


def test_one_region_of_everything_costs_as_dense() -> None:
    assert stepped("dense").cycles / base().cycles == pytest.approx(1, abs=0.005)


def test_the_mix_is_that_of_the_closed_form() -> None:
    trace = mix_trace(128)
    machine = hardware.load(NAME)
    for name in ("mix", "dense"):
        closed, stepped_ = (
            machine.simulate(trace, name, fidelity=fidelity) for fidelity in machine.fidelities
        )
        assert stepped_.cycles == pytest.approx(closed.cycles, rel=0.03)


@pytest.mark.parametrize(
    ("length", "dim"), [(384, 64), (200, 64), (1024, 64), (256, 32), (256, 128), (256, 96)]
)
def test_closed_form_and_steps_agree_on_random_masks(length: int, dim: int) -> None:
    trace = random_trace(length, dim)
    for name in ("m", "dense"):
        closed = simulate(trace, name, "analytic")
        found = simulate(trace, name)
        assert found.cycles == pytest.approx(closed.cycles, rel=0.06)
        assert found.operations == closed.operations
        moved = ("mac_int8", "buffer_byte", "sequencer_run")
        assert [found.actions.get(k) for k in moved] == [closed.actions.get(k) for k in moved]


@pytest.mark.parametrize("pes", [1, 3])
@pytest.mark.parametrize("length", [200, 1024])
def test_every_cycle_of_every_unit_is_accounted_for(pes: int, length: int) -> None:
    trace = random_trace(length)
    found = simulate(trace, pes=pes)
    assert len(found.unit_cycles) == 1 + 5 * pes
    for unit, codes in found.unit_cycles.items():
        assert sum(codes.values()) == found.cycles, unit
    tiles = int(found.stages[0].facts["tiles"])
    busy: dict[str, int] = dict.fromkeys(("array", "weights", "softmax", "normaliser"), 0)
    for unit, codes in found.unit_cycles.items():
        if unit.split()[0] in busy:
            busy[unit.split()[0]] += codes["busy"]
    # 4 blocks of 16 cycles a tile; 32 cycles for its scores, and for its probabilities.
    assert busy == {
        "array": tiles * 64, "weights": tiles * 64,
        "softmax": tiles * 32, "normaliser": tiles * 32,
    }  # fmt: skip


def test_what_comes_in_is_what_was_asked_for() -> None:
    machine = hardware.load(NAME)
    assert isinstance(machine, StaticDense)
    size = HeadSize(1024, 1024, 64, 64)
    rng = np.random.default_rng(0)
    runs = runs_of_tiles(rng.random((64, 32)) < 0.2, 4)
    work = lower(machine.settings, runs, size)
    assert work.chunk.max() == 1
    found = cycle.run(machine.settings, [(runs, work)], size)
    operands = 2 * work.unit_pass.size * 32 * 64
    # Queries and outputs of every pass, and 24 bits per value where a later chunk adds to it.
    later = work.count - np.unique(work.query_tile).size
    around = 16 * 64 * (work.count + work.count - later) + later * 2 * 16 * 64 * 3
    assert found.port_cycles * 64 == operands + around
    assert found.log.totals[0, 1] == found.port_cycles


def stall(cause: str, **overrides: Any) -> int:
    return stepped("local", **overrides).unit_cycles["array"].get(cause, 0)


def test_stalls_have_their_cause() -> None:
    assert stall("waits for operands", **{"buffers.global_bytes_per_cycle": 4}) > 2000
    assert stall("waits for operands") < 100
    assert stall("waits for weights", **{"vector.weight_bytes_per_cycle": 32}) > 98 * 60
    assert stall("waits for a run", **{"sequencer.bubble_cycles": 40}) > 500
    assert stall("waits for outputs to leave", **{"buffers.global_bytes_per_cycle": 4}) > 0
    assert stall("waits for the softmax unit", **{"softmax.scores_per_cycle": 8}) > 98 * 25
    assert stall("waits for the normaliser", **{"softmax.normalised_per_cycle": 8}) > 98 * 25
    # 16 of 25 cycles at 64 %: nine more for each of four blocks of a tile.
    # Nothing comes after the last block.
    assert stall("lanes unused", sparse_utilisation=0.64) == (98 * 4 - 1) * 9
    narrow = simulate(random_trace(256, 32))
    assert narrow.unit_cycles["array"]["waits for the softmax unit"] > 0


def test_a_short_fifo_scans_again_for_values() -> None:
    one = stepped("sep", **{"sequencer.run_fifo": 1})
    many = stepped("sep")
    busy = [report.unit_cycles["sequencer"]["busy"] for report in (one, many)]
    # 61 runs twice, four descriptors for each of 24 query tiles; all but three (that of [CLS], and
    # two whose runs touch) have more than one run.
    assert busy == [61 * 2 + 4 * 24 + 4 * 21, 61 * 2 + 4 * 24]
    assert one.cycles >= many.cycles


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("buffers.global_bytes_per_cycle", (8, 16, 64, 256)),
        ("vector.weight_bytes_per_cycle", (16, 32, 64)),
        ("softmax.scores_per_cycle", (4, 8, 16, 32)),
        ("sequencer.run_fifo", (1, 2, 8)),
        ("pes", (1, 2, 3, 6, 64)),
    ],
)
def test_more_is_never_slower(setting: str, values: tuple[int, ...]) -> None:
    cycles = [stepped("sep", **{setting: value}).cycles for value in values]
    assert cycles == sorted(cycles, reverse=True)


def test_query_tiles_are_shared_out_evenly() -> None:
    one, four = stepped("block"), stepped("block", pes=4)
    # The longest pass of the head: 12 tiles.
    assert four.cycles <= one.cycles / 4 + 12 * 64 + 200
    assert four.total_area == pytest.approx(4 * one.total_area, rel=1e-3)
    assert four.energy["mac"] == one.energy["mac"]


def test_a_window_of_events_goes_to_the_timeline(tmp_path: Path) -> None:
    machine = hardware.load(NAME)
    found = machine.simulate(templates(), "coarse", fidelity="cycle", window=(1000, 1500))
    events = found.events
    assert events is not None
    assert events.dropped == 0
    rows = events.intervals
    assert ((rows[:, 2] < 1500) & (rows[:, 3] > 1000)).all()
    for unit in range(len(events.units)):
        mine = rows[rows[:, 0] == unit]
        spans = np.minimum(mine[:, 3], 1500) - np.maximum(mine[:, 2], 1000)
        assert spans.sum() == 500
    found.to_perfetto(tmp_path / "t.json")
    written = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {"busy", "waits for the softmax unit"} <= {event["name"] for event in written}


def test_nothing_kept_takes_no_time() -> None:
    trace = random_trace(64)
    empty = MaskArrays.from_bool(np.zeros((1, 1, 64, 64), np.bool_))
    trace = Trace(trace.workload, {"m": Selection("m", (AttentionCall(empty),))})
    for fidelity in ("analytic", "cycle"):
        found = simulate(trace, fidelity=fidelity)
        assert found.cycles == 0
        assert found.total_energy == 0
