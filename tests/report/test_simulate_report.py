"""The page of `simulate`: shares add up, states of cells are those of the log, nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.hardware.report import Events, Report
from sparseloom.report import machine_figures as figures
from sparseloom.report.simulate import run_names, write_simulate_report
from sparseloom.results import results
from sparseloom.trace.spatten_benchmarks import benchmark


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    trace = benchmark("bert-base-cola").trace()
    spatten = hardware.load("spatten_hpca_2021")
    return [
        spatten.simulate(trace, "spatten", fidelity="cycle", window=(0, 600)),
        hardware.load("titan_xp").simulate(trace, "spatten"),
    ]


@pytest.fixture(scope="module")
def rows(reports: list[Report]) -> list[dict[str, Any]]:
    found = [row for report in reports for row in report.rows()]
    roofs = [hardware.load(report.machine).roof() for report in reports]
    return [
        {**row, "roof": roof._asdict()}
        for row, roof in zip(found, roofs, strict=True)
        if roof is not None
    ]


def test_the_page_shows_every_run_and_needs_no_network(
    reports: list[Report], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    write_simulate_report(file, results(rows, command="sparseloom simulate <x>"), reports)
    page = file.read_text("utf-8")
    body = page[page.index("</script>") :]
    assert 'src="http' not in body
    assert "sparseloom simulate &lt;x&gt;" in body
    for report in reports:
        assert f"<td>{report.machine}</td>" in body
        assert f"{report.cycles:,}" in body
    assert body.count("<h2>What the units did: ") == 1
    assert body.count("<h2>Cycles 0 to 600: ") == 1
    sentence = json.loads(results(rows, command="").to_json())["rows"][1]["assumptions"][1]
    assert f"titan_xp: {sentence}" in body
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_shares_of_energy_add_up(reports: list[Report]) -> None:
    figure = figures.parts_figure(["a", "b"], [r.energy for r in reports], "energy", "J")
    assert sum(np.array(bar.x) for bar in figure.data) == pytest.approx(1.0)
    shown = {bar.name: bar.x[0] for bar in figure.data}
    assert shown["dram"] == pytest.approx(reports[0].energy["dram"] / reports[0].total_energy)


def test_states_of_a_unit_add_up_to_the_run(reports: list[Report]) -> None:
    figure = figures.unit_cycles_figure(reports[0])
    assert (sum(np.array(bar.x) for bar in figure.data) == reports[0].cycles).all()
    assert [figure.data[0].name, figure.data[-1].name] == ["busy", "idle"]


def test_speeds_are_against_the_first_run(rows: list[dict[str, Any]]) -> None:
    figure = figures.speed_figure(rows, ["a", "b"])
    assert figure.data[0].x == pytest.approx((1.0, rows[0]["seconds"] / rows[1]["seconds"]))


def test_dots_lie_under_their_roof(rows: list[dict[str, Any]]) -> None:
    figure = figures.roofline_figure(rows, ["a", "b"])
    roofs = [line for line in figure.data if line.mode == "lines"]
    dots = [line for line in figure.data if line.mode != "lines"]
    assert len(roofs) == len(dots) == 2
    for row, roof, dot in zip(rows, roofs, dots, strict=True):
        assert max(roof.y) == row["roof"]["operations"]
        assert dot.y[0] == pytest.approx(row["operations"] / row["seconds"])
        assert dot.y[0] <= min(row["roof"]["operations"], row["roof"]["bytes"] * dot.x[0])


def test_cells_show_what_fills_most_of_them() -> None:
    intervals = [(0, 1, 0, 10, -1), (0, 2, 10, 14, -1), (1, 2, 8, 20, -1)]
    events = Events(("a", "b"), ("idle", "busy", "waits"), np.array(intervals, np.int64), (4, 16))
    codes, edges = figures.cells(events, limit=3)
    assert edges.tolist() == [4, 8, 12, 16]
    assert codes.tolist() == [[1, 1, 0], [0, 2, 2]]


def test_names_say_what_differs() -> None:
    rows = [
        {"machine": "m", "trace": "t/one", "selection": s, "config_hash": h}
        for s, h in (("a", "123456789"), ("b", "123456789"), ("a", "abcdefghi"))
    ]
    assert run_names(rows[:1]) == ["m"]
    assert run_names(rows[:2]) == ["a", "b"]
    assert run_names(rows) == ["123456 · a", "123456 · b", "abcdef · a"]
