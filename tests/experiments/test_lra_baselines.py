"""The table of baselines: which contenders there are, and that they train from scratch equally."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sparseloom.experiments.lra import CONTROL, Runner
from sparseloom.experiments.lra_baselines import SMALL, baseline_study, baselines_of
from sparseloom.methods import ARENA, Selector, parse_method

pytest.importorskip("accelerate", reason="training needs the train extra")


def test_every_baseline_of_the_published_table_is_there() -> None:
    paper = baselines_of(baseline_study("text", "paper"))
    names = [one.name for one in paper]
    assert names == [CONTROL, *ARENA, "dynamic 90 %"]
    assert all(one.start == "scratch" and one.context is None for one in paper)
    assert [one.method for one in paper[1:-1]] == [parse_method(text) for text in ARENA.values()]
    assert len(ARENA) == 10
    assert list(SMALL) == list(ARENA)
    for name, text in SMALL.items():
        small, published = parse_method(text), parse_method(ARENA[name])
        assert type(small) is type(published)


def test_every_pattern_leaves_something_out_at_its_size() -> None:
    for size in ("small", "paper"):
        study = baseline_study("text", size)
        for one in baselines_of(study)[1:]:
            if isinstance(one.method, Selector):
                assert one.method.worthwhile(study.length + 1, study.length + 1), one.name


def test_contenders_train_from_scratch_on_the_same_batches(tmp_path: Path) -> None:
    lines = [b"label\trating\tid\ttext"]
    lines += [b"%d\t9\t%d\t%s" % (i % 2, i, b"good bad"[i % 2 :] * 12) for i in range(12)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_bytes(b"\n".join(lines) + b"\n")
    study = baseline_study("text")
    recipe = dataclasses.replace(study.recipe, steps=2, batch_size=2)
    study = dataclasses.replace(study, recipe=recipe, length=64, items=6, diagnosed=2)
    chosen = [one for one in baselines_of(study) if one.name in (CONTROL, "local", "linformer")]
    rows = Runner(study, tmp_path / "out", data=tmp_path).run(chosen)
    assert [row["contender"] for row in rows] == [CONTROL, "local", "linformer"]
    assert not (tmp_path / "out" / "text-small" / "vanilla").exists()
    dense, local, linformer = rows
    assert dense["density"] == linformer["density"] == 1.0
    assert local["density"] < 0.3
    assert dense["macs"] == 2 * 2 * 2 * 65 * 65 * 32
    assert linformer["macs"] == 2 * 2 * 4 * 65 * 16 * 32
    assert local["macs"] == pytest.approx(dense["macs"] * local["density"])
