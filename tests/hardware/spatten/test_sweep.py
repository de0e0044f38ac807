"""Sweeps: each design is what the machine itself would report, and nothing beats the front."""

from __future__ import annotations

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.hardware.config import MachineError
from sparseloom.hardware.spatten import SpAtten
from sparseloom.hardware.spatten.analytic import expected_quick_select
from sparseloom.hardware.spatten.sweep import grid, sweep
from sparseloom.hardware.units.topk import make_rng, quick_select
from sparseloom.trace import Trace
from sparseloom.trace.spatten_benchmarks import benchmark


def _machine(**settings: object) -> SpAtten:
    found = hardware.load("spatten_hpca_2021", **settings)
    assert isinstance(found, SpAtten)
    return found


@pytest.fixture(scope="module")
def trace() -> Trace:
    return benchmark("bert-base-cola").trace()


def test_a_design_is_what_the_machine_reports(trace: Trace) -> None:
    found = sweep(
        _machine(),
        trace,
        "spatten",
        multipliers=np.array([512, 256, 512, 512]),
        channels=np.array([16, 16, 8, 16]),
        ports=np.array([32, 32, 32, 16]),
        softmax_lanes=np.array([8, 8, 8, 4]),
        topk_lanes=np.array([16, 16, 16, 8]),
    )
    settings = [
        {},
        {"scores.multipliers": 256, "values.multipliers": 256},
        {"dram.channels": 8},
        {"fetcher.ports": 16, "softmax.lanes": 4, "topk.lanes": 8},
    ]
    for i, overrides in enumerate(settings):
        if "scores.multipliers" in overrides:
            # A sweep keeps the capacity of the SRAMs: twice the lines of half the width.
            overrides |= {"key_sram.lines": 512, "value_sram.lines": 512}
        if "softmax.lanes" in overrides:
            overrides |= {"softmax.row_fifo_depth": 128}
        report = _machine(**overrides).simulate(trace, "spatten")
        assert int(np.ceil(found.cycles[i] - 1e-6)) == report.cycles
        if "softmax.lanes" not in overrides:
            # Fewer lanes of one depth hold fewer tokens, which a sweep leaves as they are.
            assert found.energy[i] == pytest.approx(report.total_energy, rel=2e-3)
            assert found.area[i] == pytest.approx(report.total_area, rel=1e-6)


def test_nothing_beats_the_front(trace: Trace) -> None:
    values = grid(multipliers=[64, 128, 512], channels=[2, 8, 16], topk_lanes=[2, 16])
    found = sweep(_machine(), trace, "spatten", **values)
    points = np.stack([found.cycles, found.energy, found.area], axis=1)
    front = found.pareto()
    assert 0 < len(front) < len(points)
    for i in range(len(points)):
        beaten = (points <= points[i]).all(axis=1) & (points < points[i]).any(axis=1)
        assert beaten.any() == (i not in front)


def test_more_is_never_slower(trace: Trace) -> None:
    values = grid(multipliers=[64, 128, 512], channels=[2, 8, 16], topk_lanes=[1, 4, 16])
    cycles = sweep(_machine(), trace, "spatten", **values).cycles.reshape(3, 3, 3)
    for axis in range(3):
        assert (np.diff(cycles, axis=axis) <= 1e-9).all()


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_the_expected_selection_is_the_mean_of_real_ones(lanes: int) -> None:
    values, rng = np.arange(512), make_rng(3)
    for n, k in ((512, 256), (300, 30), (64, 32)):
        real = [quick_select(values, 0, n, k, lanes, rng)[2] for _ in range(1500)]
        expected = expected_quick_select(np.array([n]), np.array([k]), lanes)[0]
        assert expected == pytest.approx(np.mean(real), rel=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lanes": np.array([1])}, "settings must be among multipliers"),
        ({"multipliers": np.array([100])}, "multipliers must be multiples of 64"),
        ({"channels": np.array([0])}, "channels must be multiples of 1 from 1"),
        ({"ports": np.array([1, 2]), "channels": np.array([1])}, "columns of one length"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    trace: Trace, settings: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(MachineError, match=message):
        sweep(_machine(), trace, "spatten", **settings)


def test_calls_between_linear_layers_fill_the_pipeline_anew(trace: Trace) -> None:
    model = benchmark("bert-base-cola").trace(scope="model")
    machine = hardware.load("spatten_e2e_hpca_2021")
    found = {f: machine.simulate(model, "dense", fidelity=f) for f in ("analytic", "cycle")}
    attention = {f: r.components["attention"] for f, r in found.items()}
    assert 0.7 <= attention["analytic"] / attention["cycle"] <= 1.05
    pipelined = _machine().simulate(trace, "dense").cycles
    assert attention["analytic"] > 1.2 * pipelined


def test_an_sram_slower_than_the_clock_is_refused() -> None:
    with pytest.raises(MachineError, match=r"key_sram.*too slow for 2 GHz"):
        _machine(clock_ghz=2.0)
    assert _machine(clock_ghz=2.0, **{"energy.sram_cell": "hp"}).settings.clock_ghz == 2.0
