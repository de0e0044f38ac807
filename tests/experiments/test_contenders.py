"""Stages of a study: made once, read back, and compared item by item."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparseloom.experiments.contenders import (
    Against,
    chosen,
    rows_against,
    scored,
    study_folder,
    tuned,
)
from sparseloom.methods import Dense, DynamicSparse, Method
from sparseloom.models import LoadedModel
from sparseloom.tasks import Score, Task

pytest.importorskip("accelerate", reason="training needs the train extra")


class LastToken(Task):
    """Whether the model's last logit is positive; counts how often it was asked."""

    name: ClassVar[str] = "last"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __init__(self) -> None:
        self.asked = 0

    def load(self, data: Path | None = None) -> LastToken:
        return self

    def inputs(self, model: Any, *, limit: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(limit or 4):
            yield {"input_ids": torch.randint(0, 256, (1, 40), generator=generator)}

    def score(self, model: Any, *, limit: int | None = None, progress: Any = None) -> Score:
        self.asked += 1
        with torch.no_grad():
            logits = [LoadedModel.of(model).model(**x).logits for x in self.inputs(model)]
        right = np.array([float(one[0, -1, 0] > 0) for one in logits])
        return Score(float(right.mean()), right)


def tiny() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LoadedModel("tiny", LlamaForCausalLM(config).eval(), None)


def test_a_finished_stage_is_read_back(tmp_path: Path) -> None:
    trained: list[str] = []

    def train(loaded: LoadedModel) -> tuple[Method, list[dict[str, float]]]:
        trained.append(loaded.name)
        with torch.no_grad():
            next(loaded.model.parameters()).add_(1.0)
        return Dense(), [{"step": 1.0, "loss": 0.5}]

    first, _ = tuned(tmp_path / "a", tiny, Dense(), train)
    second, method = tuned(tmp_path / "a", tiny, Dense(), train)
    assert trained == ["tiny"]
    assert method == Dense()
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "a-curve.json").read_text() == '[{"step": 1.0, "loss": 0.5}]'


def test_a_score_is_made_once_and_tells_the_choices_of_each_head(tmp_path: Path) -> None:
    from sparseloom.integrations import method_shape

    task, loaded = LastToken(), tiny()
    method = DynamicSparse(sparsity=0.5, minimum_keys=2, projection=0.5)
    method = method.initialise(method_shape(loaded.model))
    file = tmp_path / "score.json"
    entry = scored(file, task, loaded, method, limit=None, probe=2)
    assert scored(file, task, loaded, method, limit=None, probe=2) == entry
    assert task.asked == 1
    by_head = entry["accuracy"]["prediction_accuracy_by_head"]
    assert np.shape(by_head) == (2, 2)
    means = entry["accuracy"]["prediction_accuracy"]
    assert np.mean(by_head, 1) == pytest.approx(means)
    assert 0.4 < entry["density"] < 0.6


def entry(right: list[float], **more: Any) -> dict[str, Any]:
    base = {"method": "dense", "settings": {}, "density": 1.0, "accuracy": {}, "notes": []}
    return {**base, "value": float(np.mean(right)), "per_item": right, **more}


class Agreement(LastToken):
    """A metric that is no mean."""

    def value_of(self, per_item: Any, gold: Any) -> float:
        return 2.0 * float((per_item == gold).mean())


def test_a_metric_that_is_no_mean_is_computed_over_the_items() -> None:
    gold = [1.0, 0.0, 0.0, 1.0]
    scores = {
        "dense": entry([1.0, 0.0, 0.0, 1.0], gold=gold),
        "sparse": entry([1.0, 1.0, 1.0, 1.0], gold=gold),
    }
    rows = rows_against(Against("tiny", Agreement(), "dense", 0), scores)
    assert (rows[1]["difference"], rows[1]["loss"]) == (-1.0, 1.0)
    assert rows[1]["loss_upper95"] > 1.0


def test_losses_are_counted_against_the_named_control() -> None:
    scores = {
        "dense": entry([1.0, 1.0, 0.0, 1.0]),
        "dense, 2": entry([1.0, 0.0], control="dense, 2"),
        "sparse": entry([1.0, 0.0, 0.0, 1.0]),
        "few": entry([0.0, 0.0], control="dense, 2"),
    }
    rows = rows_against(Against("tiny", LastToken(), "dense", 0), scores)
    by = {row["contender"]: row for row in rows}
    assert by["sparse"]["loss"] == 0.25
    assert by["sparse"]["difference"] == -0.25
    assert by["sparse"]["loss_upper95"] > 0.25
    assert (by["few"]["loss"], by["few"]["items"], by["few"]["dense_value"]) == (0.5, 2, 0.5)


def test_a_folder_belongs_to_one_study(tmp_path: Path) -> None:
    study = make_dataclass("study", [("steps", int), ("sizes", tuple[int, ...]), ("first", int)])
    out = tmp_path / "new"
    study_folder(out, study(5, (1, 2), 0), free=("first",))
    study_folder(out, study(5, (1, 2), 3), free=("first",))
    with pytest.raises(ValueError, match=r"a study with steps 5, and this one has 6; choose a"):
        study_folder(out, study(6, (1, 2), 0), free=("first",))
    assert [file.name for file in out.iterdir()] == ["study.json"]


def test_the_control_runs_beside_whatever_is_chosen() -> None:
    every = {"dense": 0, "static 0.25": 1, "static 0.4": 2, "window 0.25": 3}
    assert chosen(every, "dense", "") == every
    assert [*chosen(every, "dense", "window 0.25; static 0.4")] == [
        "dense", "static 0.4", "window 0.25",
    ]  # fmt: skip
    assert [*chosen(every, "dense", "", 2)] == ["dense", "static 0.25"]
    with pytest.raises(ValueError, match=r"unknown only 'windows 0\.25'; did you mean"):
        chosen(every, "dense", "windows 0.25")
    with pytest.raises(ValueError, match=r"first must be 0 .* got -1"):
        chosen(every, "dense", "", -1)
