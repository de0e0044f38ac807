"""Pictures of published figures, and their page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseloom.report.bar_figures import bars, lines
from sparseloom.report.head_figures import head_grid, kept_cells, log_cells
from sparseloom.report.html import Section
from sparseloom.report.reproduce import write_reproduce_page
from sparseloom.results import results


def test_cells_show_the_largest_probability_and_the_share_of_kept_pairs() -> None:
    probabilities = np.full((400, 400), 1e-6)
    probabilities[0, 0] = 1.0
    probabilities[399, 0] = 1e-2
    cells = log_cells(probabilities)
    assert cells.shape == (192, 192)
    assert (cells[0, 0], cells[-1, 0], cells[5, 5]) == (255, 128, 0)
    keep = np.zeros((4, 4), dtype=bool)
    keep[1, 2] = True
    assert kept_cells(keep).tolist() == (keep * 255).tolist()
    keep = np.zeros((384, 384), dtype=bool)
    keep[0, 0] = True
    assert kept_cells(keep)[0, 0] == 128  # one pair of four, under a square root


def test_grid_has_one_map_per_head_and_input() -> None:
    maps = [[np.eye(8), np.eye(8), np.eye(8)] for _ in range(2)]
    figure: Any = head_grid(maps, rows=["a", "b"], columns=["x", "y", "z"], probabilities=True)
    assert len(figure.data) == 6


def test_bars_and_lines() -> None:
    figure: Any = bars({"one": {"a": 1.0, "b": 2.0}, "two": {"a": 3.0}}, title="ms")
    assert [tuple(trace.y) for trace in figure.data] == [(1.0, 2.0), (3.0,)]
    curve: Any = lines(
        {"a": [(2.0, 1.0), (1.0, 5.0)]}, x_title="x", y_title="y", rule=(1.0, "dense")
    )
    assert tuple(curve.data[0].x) == (1.0, 2.0)
    assert curve.layout.shapes[0].y0 == 1.0


def test_page_holds_rows_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    row = {
        "paper": "p", "table": "fig", "quantity": "a quantity", "published": 2.0, "ours": 3.0,
        "difference": 0.5, "tolerance": 0.1, "within": False, "basis": "scenario",
        "assumptions": ["an assumption"], "note": "a note",
    }  # fmt: skip
    page = tmp_path / "page.html"
    section = Section("A picture", "How to read it.", (bars({"one": {"a": 1.0}}, title="ms"),))
    write_reproduce_page(page, results([row], command="test"), title="T", sections=[section])
    text = page.read_text("utf-8")
    for words in ("a quantity", "+50.0 %", "an assumption", "a note", "A picture", "0 of the 1"):
        assert words in text
    assert "http" not in text.split("</script>")[-1]
