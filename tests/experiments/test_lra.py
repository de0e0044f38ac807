"""The LRA studies on a tiny data set: resumable, paired, complete."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseloom.experiments.lra import CONTROL, Contender, Runner, contenders_of
from sparseloom.experiments.lra_sizes import LraStudy, study_of
from sparseloom.methods import Dense, DynamicSparse, Oracle, RandomMask
from sparseloom.models.lra_presets import RECIPES
from sparseloom.results import read_results, write_results

pytest.importorskip("accelerate", reason="training needs the train extra")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    lines = [b"label\trating\tid\ttext"]
    for i in range(24):
        text = bytes(generator.choice([103, 111] if i % 2 else [98, 97], 40).tolist())
        lines.append(b"%d\t9\t%d\t%s" % (i % 2, i, text))
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path


def tiny(**changes: Any) -> LraStudy:
    study = study_of(
        "text",
        length=40,
        recipe=dataclasses.replace(
            RECIPES["text"], steps=30, batch_size=6, warmup_steps=5, peak_lr=1e-2
        ),
        model={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        warmup_steps=3,
        joint_steps=3,
        items=None,
        diagnosed=4,
    )  # fmt: skip
    return dataclasses.replace(study, **changes)


SOME = [
    Contender(CONTROL, Dense()),
    Contender("dynamic", DynamicSparse(sparsity=0.8, projection=0.5, minimum_keys=1)),
    Contender("short", Dense(), context=3),
]


def test_a_study_learns_compares_and_never_runs_twice(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    rows = Runner(tiny(), out, data=data, say=said.append).run(SOME)
    control, dynamic, short = rows
    assert [row["contender"] for row in rows] == [CONTROL, "dynamic", "short"]
    assert control["value"] > 0.9
    assert control["loss"] == 0
    assert 0.15 < dynamic["density"] < 0.25
    assert len(dynamic["prediction_accuracy"]) == len(dynamic["oracle_mass"]) == 2
    assert dynamic["loss"] == pytest.approx(control["value"] - dynamic["value"])
    low, high = dynamic["loss_interval95"]
    assert low <= dynamic["loss"] <= dynamic["loss_upper95"] <= high
    right = np.unpackbits(np.frombuffer(bytes.fromhex(dynamic["right"]), dtype=np.uint8))
    assert right[:24].mean() == pytest.approx(dynamic["value"])
    assert short["length"] == 3
    assert short["density"] == 1
    assert control["curve"][-1][0] == 3
    assert len([line for line in said if "30 steps from scratch" in line]) == 1
    write_results(tmp_path / "lra.json", rows, command="test")
    assert len(read_results(tmp_path / "lra.json").rows) == 3

    said.clear()
    again = Runner(tiny(), out, data=data, say=said.append).run(SOME)
    assert again == rows
    assert said == []
    (out / "text-small" / "score-dynamic.json").unlink()  # stopped after training
    assert Runner(tiny(), out, data=data, say=said.append).run(SOME) == rows
    assert len(said) == 1
    with pytest.raises(ValueError, match="contenders must begin with 'dense', got 'short'"):
        Runner(tiny(), out, data=data).run(SOME[2:])
    with pytest.raises(ValueError, match="belongs to a study with"):
        Runner(tiny(joint_steps=4), out, data=data)


def test_a_stopped_training_goes_on_to_the_same_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny()
    whole = Runner(study, tmp_path / "whole", data=data).run(SOME[:1])
    runner = Runner(study, tmp_path / "stopped", data=data)
    batches = runner.task.batches

    def stop_after_25(*args: Any, **kwargs: Any) -> Any:
        for number, batch in enumerate(batches(*args, **kwargs)):
            if number == 25:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(runner.task, "batches", stop_after_25)
        with pytest.raises(KeyboardInterrupt):
            runner.run(SOME[:1])
    again = Runner(study, tmp_path / "stopped", data=data).run(SOME[:1])
    assert again[0]["right"] == whole[0]["right"]
    assert again[0]["curve"] == whole[0]["curve"]


def test_contenders_from_scratch_take_the_whole_recipe(data: Path, tmp_path: Path) -> None:
    runner = Runner(tiny(), tmp_path / "out", data=data)
    own = Contender("random", RandomMask(sparsity=0.5, minimum_keys=1), "scratch")
    _, row = runner.run([SOME[0], own])
    assert row["curve"][-1][0] == 30
    assert row["start"] == "scratch"
    assert row["density"] == pytest.approx(0.5, abs=0.05)


def test_the_published_contenders_are_all_there() -> None:
    found = {one.name: one for one in contenders_of(study_of("text", "paper"))}
    assert found["dense, first 20 tokens"].context == 20
    dynamic = [one.method for one in found.values() if isinstance(one.method, DynamicSparse)]
    points = {(m.sparsity, m.projection, m.bits) for m in dynamic}
    assert {(s, 0.25, 4) for s in (0.9, 0.95, 0.99)} < points
    assert {(0.9, 0.25, bits) for bits in (2, 4, 8, 32)} < points
    assert {(0.9, size, 4) for size in (0.1, 0.16, 0.2, 0.25, 0.33)} < points
    assert len(dynamic) == 10
    names = [one.name for one in found.values()]
    assert names[0] == CONTROL
    assert "local 99 %" in names
    assert "random 90 %" in names


def test_narrow_heads_get_predictors_of_their_own_width() -> None:
    found = {one.name: one.method for one in contenders_of(study_of("image"))}
    for share in (90, 95):
        method = found[f"dynamic {share} %, sigma 1.0"]
        assert isinstance(method, DynamicSparse)
        assert (method.sparsity, method.projection) == (share / 100, 1.0)
    for task in ("text", "retrieval", "listops"):
        assert not any("sigma 1.0" in one.name for one in contenders_of(study_of(task)))


@pytest.mark.parametrize("task", ["text", "retrieval", "image", "listops"])
def test_the_paper_size_is_the_published_recipe(task: str) -> None:
    study = study_of(f"lra-{task}", "paper")
    assert study.recipe == RECIPES[task]
    assert study.model == {}
    assert study.grad_clip is None
    assert study.items is None
    assert study.settings().betas == (0.9, 0.98)
    json.dumps(dataclasses.asdict(study_of(task)))
    size: Any = "tiny"
    with pytest.raises(Exception, match="tiny"):
        study_of(task, size)
    assert not any(isinstance(one.method, Oracle) for one in contenders_of(study))
