"""SST-2 and CoLA: their tables, what is held out, and Matthews correlation."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from sparseloom.models import LoadedModel
from sparseloom.tasks import get_task
from sparseloom.tasks.glue import SST2, CoLA


@pytest.fixture
def cola(tmp_path: Path) -> Path:
    rows = [f"gj04\t{i % 2}\t{'' if i % 2 else '*'}\tthe dog {i}\n" for i in range(30)]
    folder = tmp_path / "glue" / "CoLA"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text("".join(rows))
    (folder / "dev.tsv.gz").write_bytes(gzip.compress("".join(rows[:10]).encode()))
    return tmp_path


def classifier(encoder: LoadedModel) -> LoadedModel:
    torch.manual_seed(2)
    settings: Any = {**encoder.model.config.to_dict(), "num_labels": 2}
    model = BertForSequenceClassification(BertConfig(**settings)).eval()
    return LoadedModel("tiny-classifier", model, encoder.tokenizer)


def test_a_tenth_of_the_training_sentences_is_held_out(cola: Path) -> None:
    task = CoLA().load(cola)
    kept = task.held_out()
    train, held_out, dev = task.examples("train"), kept.examples("test"), task.examples("test")
    assert (len(train), len(held_out), len(dev)) == (27, 3, 10)
    assert not {one.text for one in train} & {one.text for one in held_out}
    assert kept.examples("train") == train
    assert dev[1] == ("the dog 1", "acceptable")


def test_sst2_comes_whole_or_in_two_parts(tmp_path: Path) -> None:
    def table(rows: int) -> str:
        return "sentence\tlabel\n" + "".join(f"a film {i} \t{i % 2}\n" for i in range(rows))

    for file, rows in {"train_90pct": 9, "train_10pct": 2, "dev": 4}.items():
        (tmp_path / f"{file}.tsv").write_text(table(rows))
    task = SST2().load(tmp_path)
    sizes = [len(task.examples("train")), len(task.held_out().examples("test"))]
    assert sizes == [9, 2]
    assert task.examples("test")[1] == ("a film 1", "positive")
    (tmp_path / "train.tsv").write_text(table(20))
    whole = SST2().load(tmp_path)
    assert [len(whole.examples("train")), len(whole.held_out().examples("test"))] == [18, 2]


def test_matthews_correlation_and_its_items(cola: Path, encoder: LoadedModel) -> None:
    metrics = pytest.importorskip("sklearn.metrics", exc_type=ImportError)
    task, loaded = CoLA().load(cola), classifier(encoder)
    generator = np.random.default_rng(0)
    found, gold = generator.integers(0, 2, (2, 50)).astype(float)
    assert task.value_of(found, gold) == pytest.approx(metrics.matthews_corrcoef(gold, found))
    assert task.value_of(np.ones(50), gold) == 0.0
    score = task.score(loaded)
    assert score.gold is not None
    assert sorted(score.gold.tolist()) == [0.0] * 5 + [1.0] * 5
    assert score.value == pytest.approx(task.value_of(score.per_item, score.gold))
    accuracy = (score.per_item == score.gold).mean()
    assert score.extra["accuracy"] == accuracy


def test_sst2_scores_are_right_or_wrong(tmp_path: Path, encoder: LoadedModel) -> None:
    rows = "sentence\tlabel\n" + "a good film\t1\nthe bad film\t0\n" * 5
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / file).write_text(rows)
    loaded = classifier(encoder)
    top: Any = loaded.model
    with torch.no_grad():  # always the class "positive"
        top.classifier.weight.zero_()
        top.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    score = SST2().load(tmp_path).score(loaded)
    assert (score.value, sorted(score.per_item), score.gold) == (0.5, [0.0] * 5 + [1.0] * 5, None)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (CoLA, "gj04\t1\tthe dog\n", "line 1 of train.tsv in .* is not source, label, mark"),
        (
            CoLA,
            "gj04\t2\t\tthe dog\n",
            "line 1 of train.tsv .* must have the label 0 or 1, got '2'",
        ),
        (
            SST2,
            "text\tlabel\na\t1\n",
            "train.tsv in .* must begin with the columns sentence, label",
        ),
        (SST2, "sentence\tlabel\na\t-1\n", "line 2 of train.tsv .* must have the label 0 or 1"),
    ],
)
def test_damaged_tables_are_named(tmp_path: Path, kind: Any, text: str, said: str) -> None:
    (tmp_path / "train.tsv").write_text(text)
    good = "sentence\tlabel\na\t1\n" if kind is SST2 else "gj04\t1\t\tthe dog\n"
    (tmp_path / "dev.tsv").write_text(good)
    with pytest.raises(ValueError, match=said):
        kind().load(tmp_path).examples("train")


def test_the_real_sets_have_their_published_sizes(real_data: Path) -> None:
    sizes = {"sst-2": (60_614, 6_735, 872), "cola": (7_696, 855, 1_043)}
    for name, expected in sizes.items():
        task: Any = get_task(name).load(real_data)
        held_out = task.held_out()
        parts = (task.examples("train"), held_out.examples("test"), task.examples("test"))
        assert tuple(map(len, parts)) == expected
