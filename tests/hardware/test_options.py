"""Keyword arguments of `simulate` that every machine takes, and what it could do at most."""

from __future__ import annotations

import re

import pytest

from sparseloom import hardware
from sparseloom.hardware.report import Report
from sparseloom.trace import Trace
from sparseloom.trace.spatten_benchmarks import benchmark

KNOWN = [name for name in hardware.list_machines() if name != "this"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return benchmark("bert-base-cola").trace()


@pytest.fixture(scope="module")
def report(trace: Trace) -> Report:
    machine = hardware.load("spatten_hpca_2021")
    return machine.simulate(trace, "spatten", fidelity="cycle", seed=3, window=(100, 400))


@pytest.mark.parametrize("name", KNOWN)
def test_work_stays_under_the_roof(name: str, trace: Trace) -> None:
    machine = hardware.load(name)
    roof, report = machine.roof(), machine.simulate(trace, "spatten")
    assert roof is not None
    assert report.operations is not None
    assert 0 < report.operations / report.seconds <= roof.operations
    assert report.dram_bytes / report.seconds <= roof.bytes * (1 + 1e-9)


def test_operations_are_those_of_the_kept_pairs(trace: Trace) -> None:
    pairs = sum(int(kept.sum()) for kept in trace.kept_pairs("spatten"))
    for name in ("dota_asplos_2022", "spatten_hpca_2021"):
        report = hardware.load(name).simulate(trace, "spatten")
        assert report.operations == 2 * 2 * 64 * pairs


def test_a_machine_that_draws_nothing_names_no_seed(trace: Trace) -> None:
    report = hardware.load("dota_asplos_2022").simulate(trace, "spatten", seed=7)
    assert report.seed is None


def test_a_window_of_a_machine_without_events_is_refused(trace: Trace) -> None:
    said = "mnnfast_isca_2019 logs no events at fidelity 'analytic', got window 0:10"
    with pytest.raises(NotImplementedError, match=re.escape(said)):
        hardware.load("mnnfast_isca_2019").simulate(trace, "dense", window=(0, 10))
    with pytest.raises(NotImplementedError, match=re.escape("(it does at cycle)")):
        hardware.load("spatten_hpca_2021").simulate(trace, "dense", window=(0, 10))


@pytest.mark.parametrize("window", [(5, 5), (9, 3), (-1, 4)])
def test_a_window_goes_forward(trace: Trace, window: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="window must go forward"):
        hardware.load("spatten_hpca_2021").simulate(trace, "dense", fidelity="cycle", window=window)


def test_a_negative_seed_is_refused(trace: Trace) -> None:
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        hardware.load("dota_asplos_2022").simulate(trace, "dense", seed=-1)


def test_seed_and_window_reach_the_report(trace: Trace, report: Report) -> None:
    assert report.seed == 3
    assert report.events is not None
    assert report.events.window == (100, 400)
    plain = hardware.load("spatten_hpca_2021").simulate(trace, "spatten", fidelity="cycle", seed=3)
    assert plain.events is None
    assert plain.cycles == report.cycles
