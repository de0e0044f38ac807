"""Classification of whole texts: tables, splits, scores, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from sparseloom.models import LoadedModel
from sparseloom.tasks import get_task
from sparseloom.tasks.classification import (
    OwnClassification,
    SentimentClassification,
    read_examples,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [("good film", "up"), ("bad dog", "down"), ("a cat plays the cat", "level")] * 10
    lines = "".join(f"{text}\t{label}\n" for text, label in rows)
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + lines)
    test = "".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in rows)
    (tmp_path / "test.jsonl").write_text(test)
    return tmp_path


def classifier(encoder: LoadedModel, classes: int) -> LoadedModel:
    torch.manual_seed(2)
    settings: Any = {**encoder.model.config.to_dict(), "num_labels": classes}
    config = BertConfig(**settings)
    model = BertForSequenceClassification(config).eval()
    return LoadedModel("tiny-classifier", model, encoder.tokenizer)


def test_batches_go_through_all_texts_before_any_comes_again(
    folder: Path, encoder: LoadedModel
) -> None:
    task = OwnClassification().load(folder)
    assert task.classes == ("down", "level", "up")
    loaded = classifier(encoder, 3)
    made = list(task.batches(loaded, steps=10, batch_size=3, seed=4))
    labels = torch.cat([batch["labels"] for batch in made])
    assert torch.bincount(labels).tolist() == [10, 10, 10]
    again = list(task.batches(loaded, steps=10, batch_size=3, seed=4))
    for one, other in zip(made, again, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_scores_are_right_or_wrong_and_smaller_choices_are_nested(
    folder: Path, encoder: LoadedModel
) -> None:
    task = OwnClassification().load(folder)
    loaded = classifier(encoder, 3)
    top: Any = loaded.model
    with torch.no_grad():  # always the class "up"
        top.classifier.weight.zero_()
        top.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    whole, few = task.score(loaded), task.score(loaded, limit=7)
    assert whole.value == pytest.approx(1 / 3)
    assert few.per_item.tolist() == whole.per_item[:7].tolist()
    assert sum(len(batch["labels"]) for batch in task.inputs(loaded, limit=7)) == 7


def test_models_without_the_right_classes_are_refused(folder: Path, encoder: LoadedModel) -> None:
    task = OwnClassification().load(folder)
    with pytest.raises(ValueError, match="needs a sequence classifier, but 'tiny-bert' is a Bert"):
        task.score(encoder)
    with pytest.raises(ValueError, match="model must have 3 classes for the task"):
        task.score(classifier(encoder, 2))


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("train.jsonl", '{"text": 1}', "row 1 of .* lacks the column text or label"),
        ("train.jsonl", "{", "line 1 of .* is not JSON"),
        ("train.csv", "text,class\na,b\n", "row 1 of .* lacks"),
        ("train.tsv", "text\tlabel\n", "holds no rows"),
        ("train.csv", f"text,label\n{'x' * 140_000},a\n", "line 2 of .* cannot be read: field la"),
    ],
)
def test_damaged_tables_are_named(tmp_path: Path, name: str, raw: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_examples(raw, tmp_path / name)


def test_quotes_are_text_in_tsv_and_quotes_in_csv(tmp_path: Path) -> None:
    assert read_examples('text\tlabel\n"a\t1\n', tmp_path / "x.tsv")[0] == ('"a', "1")
    assert read_examples('text,label\n"a, b",1\n', tmp_path / "x.csv.gz")[0] == ("a, b", "1")


def test_labels_unknown_in_training_are_refused(folder: Path) -> None:
    (folder / "test.jsonl").write_text('{"text": "a", "label": "sideways"}\n')
    with pytest.raises(ValueError, match="label 'sideways' of the test table is not in"):
        OwnClassification().load(folder)


def test_reviews_of_both_classes_are_among_any_choice(real_data: Path) -> None:
    task = SentimentClassification().load(real_data)
    labels = [example.label for example in task._chosen(100)]
    assert 35 < labels.count("positive") < 65


def test_the_task_is_found_by_name() -> None:
    task = get_task("imdb-sentiment")
    assert (task.head, task.classes) == ("classifier", ("negative", "positive"))
