"""The search of pruning ratios: its space, its bound, its front, and going on where it stopped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from sparseloom.cli import boundary
from sparseloom.experiments.search import search, spatten
from sparseloom.integrations import sparsify
from sparseloom.integrations.stats import left_of
from sparseloom.methods import SpAtten
from sparseloom.models import LoadedModel
from sparseloom.tasks import Score, Task

LAYERS = 4


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=32, num_labels=2, initializer_range=0.3,
    )  # fmt: skip
    return LoadedModel("tiny", BertForSequenceClassification(config).eval(), None)


class Agreement(Task):
    """How often the class is that of the whole model: 1 for dense, less the more is pruned."""

    name: ClassVar[str] = "agreement"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    whole: ClassVar[dict[tuple[int, int], torch.Tensor]] = {}

    def __init__(self, exactly: bool = False, part: int = 3) -> None:
        self.exactly, self.part, self.asked = exactly, part, 0

    def load(self, data: Path | None = None) -> Agreement:
        return self

    def held_out(self) -> Agreement | None:
        return None if self.part == 4 else Agreement(self.exactly, 4)

    def inputs(self, model: Any, *, limit: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.part)
        yield {"input_ids": torch.randint(1, 50, (limit or 40, 20), generator=generator)}

    def score(self, model: Any, *, limit: int | None = None, progress: Any = None) -> Score:
        self.asked += 1
        with torch.no_grad():
            logits = model.model(**next(self.inputs(model, limit=limit))).logits
        whole = self.whole.setdefault((self.part, len(logits)), logits)  # dense comes first
        if self.exactly:
            same = (logits - whole).abs().amax(1) < 1e-6
        else:
            same = logits.argmax(1) == whole.argmax(1)
        right = same.double().numpy()
        return Score(float(right.mean()), right)


@pytest.mark.parametrize("layers", [2, 3, 6, 12, 24])
def test_every_corner_of_the_space_is_a_setting(layers: int) -> None:
    fronts = {1, max(1, layers // 2)}
    for front, *shares in itertools.product(fronts, *[(0.0, 1e-6, 0.37, 0.95)] * 2, *[(0, 1)] * 2):
        values = dict(zip(("token_pruned", "head_pruned", "token_start", "head_start"), shares,
                          strict=True)) | {"front": front}  # fmt: skip
        method = spatten(layers, lambda name, low, high, v=values: v[name])
        tokens = method.kept_tokens(layers, 1000)
        assert tokens[:front] == [1000] * front
        assert np.mean(tokens) / 1000 == pytest.approx(method.token_keep, abs=1e-3)
        assert method.kept_heads(layers, 1000)[0] == 1000
        expected = 1 - values["token_pruned"] * (layers - front) / layers
        assert method.token_keep == pytest.approx(expected, abs=2e-4)


def test_the_best_is_the_cheapest_within_the_bound(loaded: LoadedModel) -> None:
    pytest.importorskip("optuna", reason="needs the search extra")
    task = Agreement(part=4)
    found = search(loaded, task, loss=10.0, trials=14, seed=1)
    rows = [row.model_dump() for row in found.results.rows]
    within = [row for row in rows if row["loss"] <= 10.0]
    assert within
    assert any(row["loss"] > 10.0 for row in rows)
    assert [row["within"] for row in rows] == [row["loss"] <= 10.0 for row in rows]
    best = next(row for row in rows if row["best"])
    assert best["macs_left"] == min(row["macs_left"] for row in within)
    assert best["pareto"]
    front = sorted((row["macs_left"], row["loss"]) for row in rows if row["pareto"])
    assert [loss for _, loss in front] == sorted((loss for _, loss in front), reverse=True)
    assert isinstance(found.best, SpAtten)
    with sparsify(loaded.model, found.best, when="always") as sparse:
        again = task.score(loaded)
    assert again.value == best["value"]
    assert left_of(sparse.stats())["macs_left"] == best["macs_left"]
    assert task.asked == 1 + len(rows) + 1
    assert best["note"] == "on the items that the task is scored on"


def test_a_search_that_was_stopped_goes_on(loaded: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the search extra")
    whole = search(loaded, Agreement(), trials=12, loss=5.0, limit=20, seed=2)
    search(loaded, Agreement(), trials=4, loss=5.0, limit=20, seed=2, out=tmp_path)
    task = Agreement()
    resumed = search(loaded, task, trials=12, loss=5.0, limit=20, seed=2, out=tmp_path)
    assert resumed.results.rows == whole.results.rows
    assert resumed.results.rows[0].model_dump()["note"] == "on held-out training items"
    assert task.asked == 0  # its held-out part was
    stored = json.loads((tmp_path / "search.json").read_text())
    assert len(stored["rows"]) == len(whole.results.rows)
    with pytest.raises(ValueError, match=r"out: .* keeps a search with loss 5.0, .* has 2.0"):
        search(loaded, Agreement(), trials=12, loss=2.0, limit=20, seed=2, out=tmp_path)


def test_nothing_within_the_bound_is_said(loaded: LoadedModel) -> None:
    pytest.importorskip("optuna", reason="needs the search extra")
    found = search(loaded, Agreement(exactly=True, part=4), loss=0.0, trials=2, limit=5)
    assert found.best is None
    assert not any(row.model_dump()["best"] for row in found.results.rows)


def test_bad_input_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="unknown method to search 'dynamic'"):
        search(loaded, Agreement(), method="dynamic")
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        search(loaded, Agreement(), trials=0)
    with pytest.raises(ValueError, match="loss must be 0 or more points, got nan"):
        search(loaded, Agreement(), loss=float("nan"))
    pytest.importorskip("optuna", reason="needs the search extra")
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    decoder = LoadedModel("tiny-llama", LlamaForCausalLM(config).eval(), None)
    with pytest.raises(ValueError, match=r"model must be an encoder, .* 'tiny-llama' is a decoder"):
        search(decoder, Agreement())


def test_the_absence_of_optuna_is_one_sentence(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"optuna is not installed: pip install 'sparseloom\[se"):
        search(loaded, Agreement())


def test_statistics_of_other_methods_tell_nothing_left() -> None:
    with pytest.raises(ValueError, match="layers must be the statistics of an encoder"):
        left_of([])


def test_the_command_prints_the_front_and_the_setting(
    loaded: LoadedModel, words: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason="needs the search extra")
    loaded.model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    rows = "text\tlabel\n" + "".join(f"w{i} w{i + 7} w{i * 3}\t{'ab'[i % 2]}\n" for i in range(12))
    for file in ("train.tsv", "test.tsv"):
        (tmp_path / file).write_text(rows)
    line = ["search", "spatten", "--model", tmp_path / "model", "--task", "classification"]
    line += ["--data", tmp_path, "--trials", 3, "--loss", 100, "--out", tmp_path / "found"]
    assert boundary.run([str(word) for word in line]) == 0
    out = capfd.readouterr().out
    assert "--method spatten:token_keep=" in out
    assert "MACs left" in out
    assert "best" in out
    assert len(json.loads((tmp_path / "found" / "search.json").read_text())["rows"]) == 3
