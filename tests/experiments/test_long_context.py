"""The stretched built-in model: same weights, longer positions, nearly the same short text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseloom.experiments.long_context import Study, run_study, stretched
from sparseloom.models import load_model
from sparseloom.results import read_results


def test_stretching_keeps_weights_and_changes_positions() -> None:
    long, short = stretched(8192), load_model("stdlib")
    assert long.context == 8192
    for one, other in zip(long.model.parameters(), short.model.parameters(), strict=True):
        assert torch.equal(one, other)
    ids = torch.tensor([list(b"\0def f(self):\n    return self\n" * 4)])
    with torch.no_grad():
        a, b = (m.model(input_ids=ids).logits.softmax(-1) for m in (long, short))
    assert not torch.equal(a, b)
    assert (a - b).abs().sum(-1).mean() < 0.3


def test_shorter_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="length must be above 2048, the built-in model's, got 64"):
        run_study(Study(length=64), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_study_goes_on_from_the_shipped_predictor(tmp_path: Path) -> None:
    study = Study(
        length=2112, dense_steps=1, warmup_steps=1, joint_steps=1, windows=2, query_rows=16
    )
    rows = {row["contender"]: row for row in run_study(study, tmp_path)}
    assert rows["dense"]["difference"] == 0.0
    assert rows["window 90 %"]["loss"] > rows["dynamic 90 %"]["loss"] > 0.0
    worst = zip(
        rows["dynamic 90 %"]["retained_mass"], rows["dynamic 90 %"]["oracle_mass"], strict=True
    )
    assert min(ours / best for ours, best in worst) > 0.8  # an untrained one keeps far less
    assert run_study(study, tmp_path) == list(rows.values())


def test_what_was_found_stands_in_the_docs() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs/adaptation.md").read_text("utf-8")
    found = read_results(root / "results/long_context.json").rows
    rows = {row["contender"]: row for row in (row.model_dump() for row in found)}
    for name, row in rows.items():
        change = f"{row['difference']:+.4f} (≤ {row['difference_upper95']:+.4f})"
        shown = "–" if name == "dense" else change
        assert f"| {name} | {row['density']:.1%} | {row['value']:.4f} | {shown} |" in text
    readme = (root / "README.md").read_text("utf-8")
    for name in ("dynamic 90 %", "window 90 %"):
        row = rows[name]
        assert f"{row['difference']:+.4f} (≤ {row['difference_upper95']:+.4f})" in readme
    dynamic = rows["dynamic 90 %"]
    assert dynamic["difference_upper95"] <= 0.02
    assert rows["dynamic 95 %"]["difference_upper95"] <= 0.04
    kept = zip(dynamic["retained_mass"], dynamic["oracle_mass"], strict=True)
    assert min(ours / best for ours, best in kept) >= 0.9
