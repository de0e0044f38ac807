from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from sparseloom.models import LoadedModel
from sparseloom.tasks import get_task
from sparseloom.tasks.stsb_pairs import PairSimilarity

PAIRS = [
    ("the dog runs", "a dog runs", 4.5),
    ("the cat sleeps", "the dog plays", 1.0),
    ("a good film", "a bad film the cat plays", 2.25),
    ("the cat runs", "the cat runs", 5.0),
]


@pytest.fixture
def task(tmp_path: Path) -> PairSimilarity:
    lines = "".join(f"{a},{b},{score}\n" for a, b, score in PAIRS)
    (tmp_path / "stsb-en-dev.csv").write_text(lines)
    lines = "".join(f"the dog {i},a cat {i},{i / 4}\n" for i in range(20))
    (tmp_path / "stsb-en-train.csv").write_text(lines)
    found = get_task("sts-b-pairs").load(tmp_path)
    assert isinstance(found, PairSimilarity)
    return found


@pytest.fixture
def regression(encoder: LoadedModel) -> LoadedModel:
    torch.manual_seed(2)
    config = copy.deepcopy(encoder.model.config)
    assert isinstance(config, BertConfig)
    config.num_labels = 1
    return LoadedModel("pairs", BertForSequenceClassification(config).eval(), encoder.tokenizer)


def test_each_pair_is_read_as_one_text_and_ranked(
    task: PairSimilarity, regression: LoadedModel
) -> None:
    pytest.importorskip("scipy")
    assert regression.tokenizer is not None
    score = task.score(regression)
    for (first, second, _), found in zip(PAIRS, score.per_item, strict=True):
        alone = regression.tokenizer(first, second, return_tensors="pt")
        with torch.no_grad():
            assert float(regression.model(**alone).logits) == pytest.approx(found, abs=1e-6)
    ours, gold = (np.argsort(np.argsort(x)) for x in (score.per_item, [p[2] for p in PAIRS]))
    assert score.value == pytest.approx(1 - 6 * np.sum((ours - gold) ** 2) / (4 * 15))
    assert score.gold is not None
    assert task.value_of(score.per_item, score.gold) == score.value


def test_training_pairs_come_once_and_never_from_the_held_out(
    task: PairSimilarity, regression: LoadedModel
) -> None:
    made = list(task.batches(regression, steps=6, batch_size=3, seed=1))
    labels = torch.cat([batch["labels"] for batch in made]).tolist()
    kept = next(task.held_out().inputs(regression))["labels"].tolist()
    assert len(kept) == 2
    assert sorted(labels + kept) == pytest.approx([i / 4 for i in range(20)])
    loss = regression.model(**made[0]).loss
    found = regression.model(**made[0]).logits[:, 0]
    torch.testing.assert_close(loss, ((found - made[0]["labels"]) ** 2).mean())


def test_other_models_and_too_few_pairs_are_refused(
    task: PairSimilarity, regression: LoadedModel, encoder: LoadedModel
) -> None:
    with pytest.raises(ValueError, match="needs a sequence classifier of one class"):
        task.score(encoder)
    with pytest.raises(ValueError, match="limit must be at least 3"):
        task.score(regression, limit=2)
    with pytest.raises(ValueError, match="has none"):
        task.score(LoadedModel("mute", regression.model, None))
