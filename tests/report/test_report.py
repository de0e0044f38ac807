"""The HTML report: whole, self-contained, and true to its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparseloom.mask import SparseMask
from sparseloom.report import figures
from sparseloom.report.html import Section, write_report

MACHINE = "dota_asplos_2022"


def row(method: str, sparsity: float | None, value: float, **more: Any) -> dict[str, Any]:
    density = 1.0 if sparsity is None else 1 - sparsity
    return {
        "model": "stdlib",
        "task": "stdlib",
        "method": method,
        "settings": {},
        "sparsity": sparsity,
        "density": density,
        "metric": "bits_per_byte",
        "value": value,
        "dense_value": 1.0,
        "macs": 1e9 * density,
        "attention_ms": 50.0 * density,
        "model_ms": 100.0 * density,
        "dense_attention_ms": 50.0,
        "dense_model_ms": 100.0,
        "prediction_accuracy": [0.5, 0.75],
        "retained_mass": [0.9, 0.5],
        "oracle_mass": [1.0, 1.0],
        "cycles": {MACHINE: int(1e6 * density)},
        "note": None,
        **more,
    }


ROWS = [
    row("dense", None, 1.0),
    row("dynamic", 0.9, 1.01),
    row("dynamic", 0.8, 1.005),
    row("dynamic", 0.9, 1.02, settings={"block_size": [8, 1]}),
    row("window", 0.9, 1.3, settings={"growing": True}),
]


def test_families_tell_variants_apart() -> None:
    assert [figures.family(r) for r in ROWS] == [
        "dense",
        "dynamic",
        "dynamic",
        "dynamic 8×1",
        "window growing",
    ]


def test_quality_lines_are_sorted_by_density_and_dense_is_a_rule() -> None:
    figure = figures.quality_figure(ROWS)
    lines = {trace.name: trace for trace in figure.data}
    assert list(lines) == ["dynamic", "dynamic 8×1", "window growing"]
    assert lines["dynamic"].y == (1.01, 1.005)
    assert figure.layout.shapes[0].y0 == 1.0


def test_accuracy_figure_divides_by_the_oracle() -> None:
    figure = figures.accuracy_figure(
        [row("dynamic", 0.9, 1.0, oracle_mass=[1.0, 0.8]), row("dynamic", 0.8, 1.0)], 0.9
    )
    assert len(figure.data) == 2
    assert tuple(figure.data[0].y) == pytest.approx((0.9, 0.625))
    assert tuple(figure.data[1].y) == (0.5, 0.75)


def test_mask_figure_marks_who_kept_what() -> None:
    first = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    second = first.clone()
    first[0, 0, 3, 3] = first[0, 0, 3, 2] = True
    second[0, 0, 3, 3] = second[0, 0, 3, 0] = True
    figure = figures.mask_figure(
        SparseMask.from_bool(first), SparseMask.from_bool(second), head=0, zoom=2
    )
    assert np.array(figure.data[2].z).tolist() == [[0, 0], [1, 3]]


def test_large_masks_shrink_to_their_mean() -> None:
    keep = np.zeros((512, 1024), dtype=bool)
    keep[:2, :4] = True  # exactly one cell of 2 × 4
    cells = figures._shrink(keep)
    assert cells.shape == (256, 256)
    assert cells[0, 0] == 255
    assert cells.sum() == 255


def test_the_page_needs_no_network_and_shows_every_row(tmp_path: Path) -> None:
    results = {
        "command": "sparseloom demo",
        "date": "2026-01-01T00:00:00+00:00",
        "machine": {"cpu": "Test <CPU>", "threads": 2, "isa": ["avx2"], "gpu": None},
        "versions": {"torch": "2.13.0"},
        "rows": ROWS,
    }
    path = tmp_path / "report.html"
    write_report(
        path,
        title="A report",
        summary=["one < two"],
        results=results,
        sections=[Section("Quality", "Lower is better.", (figures.quality_figure(ROWS),))],
        notes=["a note"],
    )
    page = path.read_text("utf-8")
    body = page[page.index("</script>") :]
    assert 'src="http' not in body
    assert 'href="http' not in body
    assert "one &lt; two" in body
    assert "Test &lt;CPU&gt;" in body
    assert body.count("<tr>") + body.count('<tr class="dense">') == len(ROWS) + 1
    assert "+0.3000" in body
    assert "10.00×" in body
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
