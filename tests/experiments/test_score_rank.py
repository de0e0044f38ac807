"""The rank of attention scores: gauges against what they are defined as, and a tiny study."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseloom.experiments import score_rank
from sparseloom.experiments.score_rank import (
    Contender,
    Study,
    effective_rank,
    energy_within,
    run_study,
    score_singular_values,
)


def test_singular_values_are_those_of_the_product() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 20, 5), torch.randn(2, 30, 5)
    expected = torch.linalg.svdvals((query @ key.mT).double())[..., :5]
    torch.testing.assert_close(score_singular_values(query, key), expected, atol=1e-5, rtol=1e-5)


def test_gauges_of_known_spectra() -> None:
    flat, single = torch.ones(8), torch.tensor([3.0, 0, 0, 0])
    assert float(effective_rank(flat)) == pytest.approx(8)
    assert float(effective_rank(single)) == pytest.approx(1)
    assert float(energy_within(flat, 2)) == pytest.approx(0.25)
    assert float(energy_within(torch.tensor([3.0, 1.0]), 1)) == pytest.approx(0.9)


def test_study_tunes_measures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {
        "before": Contender(tuned=False),
        "squared error into both sides": Contender(loss="mse", gradient="both"),
    }
    monkeypatch.setattr(score_rank, "CONTENDERS", chosen)
    study = Study(context=64, batch=1, warmup_steps=1, joint_steps=1, windows=1, lr=1e-2)
    rows = run_study(study, tmp_path)
    before, after = rows
    assert len(before["effective_rank"]) == len(before["energy_within_width"]) == 4
    assert all(1 < rank <= 64 for rank in before["effective_rank"])
    assert before["curve"] == []
    assert len(after["curve"]) == 1
    assert before["effective_rank"] != after["effective_rank"]
    monkeypatch.setattr(score_rank, "_tune", None)  # a second run trains nothing
    assert run_study(study, tmp_path) == rows
