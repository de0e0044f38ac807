"""The studies of static masks: their contenders, their toy task, and that a stopped one goes on."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from sparseloom.experiments import static_quality, static_toy
from sparseloom.experiments.static_quality import PATTERNS, contenders
from sparseloom.methods import StaticSparse, TileAligned
from sparseloom.tasks.classification import OwnClassification

pytest.importorskip("accelerate", reason="training needs the train extra")


def test_the_toy_asks_for_one_item_by_its_key() -> None:
    (batch,) = static_toy.lookups(1, 50, 3)
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == (50, static_toy.LENGTH - 1)
    asked, items = ids[:, 0] - 1, ids[:, 1:] - 1 - static_toy.KEYS
    found = items // 2 == asked[:, None]
    assert (found.sum(1) == 1).all()
    assert torch.equal((items % 2)[found], labels)
    assert 0.2 < labels.float().mean() < 0.8
    assert int(ids.min()) >= 1
    assert int(items.max()) < 2 * static_toy.KEYS


def test_a_small_toy_study_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = static_toy.Study(
        weights="0.1/0.1",
        densities="0.5",
        seeds=1,
        batch=8,
        dense_steps=2,
        entropy_steps=2,
        masked_steps=1,
        items=256,
    )
    (row,) = static_toy.run_study(study, tmp_path)
    assert {mask["by"] for mask in row["masks"]} == {"mass", "saliency"}
    assert all(0.5 < mask["mass"] <= 1 for mask in row["masks"])  # the heaviest half
    assert 0 <= row["entropy"] <= row["mean_entropy"] <= 1

    def never(*_: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(static_toy, "_one", never)
    assert static_toy.run_study(study, tmp_path) == [row]


def test_an_unknown_contender_leaves_nothing_behind(tmp_path: Path) -> None:
    study = static_quality.Study(task="bytes", only="static 9")
    with pytest.raises(ValueError, match="unknown only 'static 9'"):
        static_quality.run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_contenders_of_the_study() -> None:
    found = contenders(static_quality.Study())
    assert list(found)[:4] == ["dense", "static 0.25", "static 0.4", "static 0.15"]
    for density in (0.25, 0.4, 0.15):
        for pattern in PATTERNS:
            assert found[f"{pattern} {density}"].method == TileAligned(pattern, density=density)
    ours = {name: one.method for name, one in found.items() if name.startswith("static 0.25")}
    assert len(ours) == 7
    assert all(isinstance(one, StaticSparse) for one in ours.values())
    assert found["static 0.25, by mass"].method == StaticSparse(density=0.25, by="mass")
    assert found["static 0.15"].method == StaticSparse(density=0.15, force="diagonal")
    assert found["static 0.25, no entropy terms"].phase == "plain"
    for density in (0.25, 0.4, 0.15):
        method = found[f"static {density}, no coarse"].method
        assert isinstance(method, StaticSparse)
        assert (method.density, method.coarse) == (density, False)
    phases = {one.phase for one in found.values()}
    plain = static_quality.Study().entropy("plain")
    assert (plain.entropy_weight, plain.mutual_weight) == (0, 0)
    assert all(static_quality.Study().entropy(phase) for phase in phases)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny classifier and its data."""
    words = [f"w{i}" for i in range(20)]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=80,
    )  # fmt: skip
    base = tmp_path / "base"
    BertForSequenceClassification(config).save_pretrained(base)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=80
    )
    fast.save_pretrained(base)
    for split in ("train", "test"):
        with (tmp_path / f"{split}.tsv").open("w", newline="") as stream:
            table = csv.writer(stream, delimiter="\t")
            table.writerow(["text", "label"])
            for i in range(8):
                table.writerow([" ".join(words[(i * j) % 20] for j in range(70)), str(i % 2)])
    return tmp_path


def test_a_small_study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = OwnClassification(80).load(folder)
    monkeypatch.setattr(static_quality, "_task", lambda *_: task)
    study = static_quality.Study(
        base=str(folder / "base"), densities="0.9", context=80, batch=2, entropy_steps=1,
        masked_steps=1, calibration_steps=1, items=8, fewer_items=4, mixed_precision="no", first=3,
    )  # fmt: skip
    rows = static_quality.run_study(study, folder / "out")
    by = {row["contender"]: row for row in rows}
    assert list(by) == ["dense", "dense, 4 items", "static 0.9", "window 0.9"]
    assert by["dense"]["tile_density"] == by["dense"]["density"] == 1.0
    assert 0.8 < by["static 0.9"]["tile_density"] <= 0.9
    assert by["window 0.9"]["tile_density"] >= 0.9
    assert by["static 0.9"]["items"] == 8
    assert by["window 0.9"]["items"] == 4
    assert by["static 0.9"]["phase"] == "entropy"
    again = static_quality.run_study(study, folder / "out")
    assert again == rows
    # Where all are scored on as many items, there is one control, scored once.
    equal = dataclasses.replace(study, items=4, first=2)
    rows = static_quality.run_study(equal, folder / "equal")
    assert [row["contender"] for row in rows] == ["dense", "static 0.9"]
    assert len(list((folder / "equal").glob("score-dense*"))) == 1


def test_unknown_tasks_and_missing_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task must be one of imdb, lra-image, bytes, got 'text'"):
        static_quality.run_study(static_quality.Study(task="text"), tmp_path)
