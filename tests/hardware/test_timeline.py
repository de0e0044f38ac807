"""The timeline of units: it loads, stays in its window, and says what the event log says."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.hardware import timeline
from sparseloom.hardware.report import Events, Report, Stage
from sparseloom.trace.spatten_benchmarks import benchmark

NAMES = ("left", "right"), ("idle", "busy", "waits")


def simulated(window: tuple[int, int]) -> Report:
    trace = benchmark("bert-base-cola").trace()
    machine = hardware.load("spatten_hpca_2021", clock_ghz=0.5)
    return machine.simulate(trace, "spatten", fidelity="cycle", window=window)


@pytest.fixture(scope="module")
def report() -> Report:
    return simulated((500, 1500))


@pytest.fixture(scope="module")
def data(report: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("lines") / "one.json"
    report.to_perfetto(file)
    return json.loads(file.read_text("utf-8"))


def of_units(data: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [one for one in data["traceEvents"] if one["pid"] == 2 and one["ph"] == phase]


def test_threads_are_numbered_as_perfetto_tells_them_apart(data: dict[str, Any]) -> None:
    processes = {(one["tid"], one["pid"]) for one in data["traceEvents"]}
    threads = [thread for thread, _ in processes]
    assert len(set(threads)) == len(threads) > 5
    assert not set(threads) & {0, *(process for _, process in processes)}


def test_every_unit_has_a_named_track(report: Report, data: dict[str, Any]) -> None:
    assert report.events is not None
    named = {
        one["tid"]: one["args"]["name"]
        for one in of_units(data, "M")
        if one["name"] == "thread_name"
    }
    assert tuple(named[thread] for thread in sorted(named)) == report.events.units
    assert {one["name"] for one in of_units(data, "X")} <= set(report.events.causes[1:])
    assert data["otherData"] == {"window_cycles": "500:1500", "intervals_dropped": "0"}


def test_slices_stay_in_the_window_at_the_clock(data: dict[str, Any]) -> None:
    slices = [one for one in data["traceEvents"] if one["ph"] == "X"]
    assert {one["pid"] for one in slices} == {1, 2}
    # At 0.5 GHz a cycle takes 2 ns.
    assert min(one["ts"] for one in slices) == pytest.approx(1.0)
    assert max(one["ts"] + one["dur"] for one in slices) == pytest.approx(3.0)
    assert all(one["dur"] > 0 for one in slices)


def test_no_track_overlaps_itself(data: dict[str, Any]) -> None:
    tracks: dict[int, list[tuple[float, float]]] = {}
    for one in of_units(data, "X"):
        tracks.setdefault(one["tid"], []).append((one["ts"], one["ts"] + one["dur"]))
    assert len(tracks) > 5
    for spans in tracks.values():
        spans.sort()
        for (_, end), (start, _) in pairwise(spans):
            assert start >= end - 1e-9


def test_cycles_of_the_whole_run_are_those_of_the_report(report: Report) -> None:
    whole = simulated((0, 10**9))
    assert whole.events is not None
    assert whole.events.dropped == 0
    found: Counter[tuple[str, str]] = Counter()
    for one in timeline.slices(whole.events):
        found[whole.events.units[one.unit], whole.events.causes[one.code]] += one.end - one.start
    told = {
        (unit, code): cycles
        for unit, codes in whole.unit_cycles.items()
        for code, cycles in codes.items()
        if code != "idle" and cycles
    }
    assert found == told
    assert report.unit_cycles == whole.unit_cycles


def test_cycles_of_a_window_are_those_of_the_log(report: Report, data: dict[str, Any]) -> None:
    assert report.events is not None
    start, end = report.events.window
    threads = sorted({one["tid"] for one in of_units(data, "M") if one["name"] == "thread_name"})
    for i, thread in enumerate(threads):
        rows = report.events.intervals
        mine = rows[(rows[:, 0] == i) & (rows[:, 1] == 1)]
        inside = np.clip(mine[:, 3], start, end) - np.clip(mine[:, 2], start, end)
        shown = [
            one for one in of_units(data, "X") if one["tid"] == thread and one["name"] == "busy"
        ]
        assert sum(one["args"]["cycles"] for one in shown) == inside.sum()


def test_touching_intervals_join_and_idle_ones_go() -> None:
    rows = [
        (1, 1, 30, 40, 2),
        (0, 1, 0, 10, 5),
        (0, 1, 10, 20, 5),
        (0, 1, 20, 30, 6),
        (0, 0, 30, 35, -1),
        (0, 2, 35, 90, -1),
    ]
    events = Events(*NAMES, np.array(rows, np.int64), window=(5, 50))
    assert timeline.slices(events) == [
        (0, 1, 5, 20, 5),
        (0, 1, 20, 30, 6),
        (0, 2, 35, 50, -1),
        (1, 1, 30, 40, 2),
    ]


def test_tags_are_named_and_stages_are_cut() -> None:
    events = Events(*NAMES, np.array([(0, 1, 2, 6, 9)], np.int64), (4, 8), tags="vector")
    stages = [Stage("a", 5.0), Stage("b", 10.0), Stage("a", 10.0)]
    found = [one for one in timeline.trace_events("m", 1.0, stages, events) if one["ph"] == "X"]
    assert [(one["name"], one["ts"], one["dur"]) for one in found] == [
        ("a", 0.004, pytest.approx(0.001)),
        ("b", 0.005, pytest.approx(0.003)),
        ("busy", 0.004, pytest.approx(0.002)),
    ]
    assert found[2]["args"] == {"cycles": 2, "from_cycle": 4, "vector": 9}


def test_a_compressed_file_holds_the_same(report: Report, tmp_path: Path) -> None:
    report.to_perfetto(tmp_path / "a.json")
    report.to_perfetto(tmp_path / "a.json.gz")
    assert (
        gzip.decompress((tmp_path / "a.json.gz").read_bytes()) == (tmp_path / "a.json").read_bytes()
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.json.gz"]
