"""The table of predictors, run whole on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparseloom.experiments import predictors
from sparseloom.models import LoadedModel

pytest.importorskip("accelerate", reason="training needs the train extra")


def tiny(_name: str) -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=192,
    )
    return LoadedModel("tiny", LlamaForCausalLM(config).eval(), None)


def test_every_contender_has_a_row_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictors, "load_model", tiny)
    study = predictors.Study(windows=2, probe=1, steps=12, context=128, sparsity=0.6, tile=64)
    rows = {row["contender"]: row for row in predictors.run_study(study, tmp_path)}
    assert len(rows) == 13
    learned = {name for name, row in rows.items() if "curve" in row}
    assert learned == {
        "dynamic",
        "dynamic, one mask for all heads",
        "dynamic, local top-k",
        "dynamic 64×64",
        "dynamic, MSE",
        "dynamic, not rotated",
        "indexer",
        "gate",
    }
    for name, row in rows.items():
        assert row["items"] == 2
        assert row["density"] == 1.0 if name == "dense" else row["density"] < 0.7
        expected = name in learned or name.startswith("oracle")
        assert (row["prediction_macs_share"] > 0) == expected
        if name in learned:
            assert [step for step, _ in row["curve"]] == [10.0, 12.0]
    assert rows["dynamic, local top-k"]["settings"]["tile"] == 64
    assert rows["dynamic, MSE"]["loss_name"] == "mse"

    lines = predictors.table(list(rows.values()))
    assert len(lines) == 2 + len(rows)
    values = [float(line.split("|")[3]) for line in lines[2:]]
    assert values == sorted(values)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(predictors, "adapt", refuse)
    assert {row["contender"]: row for row in predictors.run_study(study, tmp_path)} == rows
