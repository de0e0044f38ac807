from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from sparseloom.models import LoadedModel, load_model
from sparseloom.tasks import get_task
from sparseloom.tasks import stdlib as stdlib_corpus
from sparseloom.tasks.language_modelling import (
    PennTreebank,
    StdlibBitsPerByte,
    WikiText2,
    negative_log_likelihood,
)
from sparseloom.tasks.stdlib import StdlibCorpus


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> StdlibCorpus:
    held_out = b"".join(b"\0import os%d\nprint(os)\n" % i for i in range(9))
    small = StdlibCorpus(
        train=b"\0def f(x):\n    return x\n" * 40,
        held_out=held_out,
        held_out_files=("a.py",),
        comparable=False,
        differences=("a.py",),
    )
    monkeypatch.setattr("sparseloom.tasks.language_modelling.load_stdlib", lambda: small)
    return small


def bits_of(model: LlamaForCausalLM, text: bytes, context: int) -> float:
    """Bits of text[1:], token by token: the slow way."""
    bits = 0.0
    with torch.no_grad():
        for at in range(1, len(text)):
            first = (at - 1) // context * context
            logits = model(input_ids=torch.tensor([list(text[first:at])])).logits[0, -1]
            bits -= float(torch.log_softmax(logits.double(), -1)[text[at]]) / np.log(2)
    return bits


def test_stdlib_scores_every_byte_but_the_first(
    byte_model: LlamaForCausalLM, corpus: StdlibCorpus
) -> None:
    task = StdlibBitsPerByte(context=50).load()
    seen: list[tuple[int, int]] = []
    score = task.score(byte_model, progress=lambda done, total: seen.append((done, total)))
    assert score.weights is not None
    assert score.weights.sum() == len(corpus.held_out) - 1
    assert score.value == pytest.approx(np.average(score.per_item, weights=score.weights))
    expected = bits_of(byte_model, corpus.held_out, 50) / (len(corpus.held_out) - 1)
    assert score.value == pytest.approx(expected, abs=1e-5)
    assert seen[-1] == (score.items, score.items)
    assert score.notes[0].startswith("not comparable: Python 3.")


def test_limited_scores_are_those_windows_of_the_whole(
    byte_model: LlamaForCausalLM, corpus: StdlibCorpus
) -> None:
    task = StdlibBitsPerByte(context=32).load()
    every, some = task.score(byte_model), task.score(byte_model, limit=3)
    assert some.items == 3
    assert set(some.per_item.tolist()) <= set(every.per_item.tolist())
    windows = task.windows("held_out", context=32, limit=3)
    with torch.no_grad():
        nats = negative_log_likelihood(byte_model, windows)
    torch.testing.assert_close(torch.from_numpy(some.per_item), nats / np.log(2) / 32)
    inputs = [batch["input_ids"] for batch in task.inputs(byte_model, limit=3)]
    assert torch.equal(torch.cat(inputs), windows[:, :-1])
    assert torch.equal(
        task.sample(byte_model)["input_ids"], task.windows(context=32, limit=1)[:, :-1]
    )


def test_windows_are_consecutive(corpus: StdlibCorpus) -> None:
    task = StdlibBitsPerByte()
    windows = task.windows("train", context=100)
    assert bytes(windows[:, :-1].flatten().tolist()) == corpus.train[: windows.shape[0] * 100]
    assert torch.equal(windows[1:, 0], windows[:-1, -1])
    with pytest.raises(ValueError, match="context must be below"):
        task.windows(context=10_000)


def test_training_batches_come_from_the_training_half(
    byte_model: LlamaForCausalLM, corpus: StdlibCorpus
) -> None:
    task = StdlibBitsPerByte().load()
    first = list(task.batches(byte_model, steps=3, batch_size=2, context=24, seed=5))
    again = list(task.batches(byte_model, steps=3, batch_size=2, context=24, seed=5))
    assert len(first) == 3
    for batch, same in zip(first, again, strict=True):
        assert batch["input_ids"].shape == (2, 24)
        assert torch.equal(batch["input_ids"], same["input_ids"])
        assert torch.equal(batch["labels"], batch["input_ids"])
        for row in batch["input_ids"].tolist():
            assert bytes(row) in corpus.train
    assert torch.isfinite(byte_model(**first[0]).loss)


def test_the_real_corpus_is_comparable_on_the_reference_python() -> None:
    task = StdlibBitsPerByte().load()
    expected = stdlib_corpus.read_manifest()["python"]
    assert bool(task.notes()) != task.corpus.comparable
    assert f"reference: Python {expected}" in (*task.notes(), f"reference: Python {expected}")[0]
    assert task.text("train")[:1] == task.text("held_out")[:1] == b"\0"


def test_wrong_settings_are_named(
    byte_model: LlamaForCausalLM, encoder: LoadedModel, corpus: StdlibCorpus
) -> None:
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        StdlibBitsPerByte(context=0)
    with pytest.raises(ValueError, match="context must be at most 64, the model's, got 65"):
        StdlibBitsPerByte(context=65).score(byte_model)
    with pytest.raises(
        ValueError, match="needs a causal language model, but 'tiny-bert' is a bert"
    ):
        StdlibBitsPerByte().score(encoder)
    with pytest.raises(ValueError, match="split must be 'train' or 'held_out', got 'test'"):
        StdlibBitsPerByte().text("test")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        StdlibBitsPerByte().score(byte_model, limit=0)


def test_word_perplexity_normalises_by_words(
    byte_model: LlamaForCausalLM, encoder: LoadedModel, tmp_path: Path
) -> None:
    text = "the dog runs\nthe cat sleeps\n" * 4
    (tmp_path / "valid.txt").write_text(text)
    score = WikiText2(context=30).load(tmp_path).score(byte_model)
    bits = bits_of(byte_model, b"\0" + text.encode(), 30)
    words = 4 * (6 + 2)
    assert score.value == pytest.approx(2 ** (bits / words), rel=1e-5)
    assert score.extra["bits_per_byte"] == pytest.approx(bits / len(text), rel=1e-6)
    assert score.extra["token_perplexity"] == pytest.approx(2 ** (bits / len(text)), rel=1e-5)
    assert any(f"({words} of them)" in note for note in score.notes)

    tokenized = LoadedModel("tiny", byte_model, encoder.tokenizer)
    other = WikiText2(context=8).load(tmp_path).score(tokenized)
    nats = 24 * np.log(other.extra["token_perplexity"])  # line ends are no tokens here …
    assert np.log(other.value) * words == pytest.approx(nats, rel=0.2)  # … and no bos is scored
    assert other.extra["bits_per_byte"] < score.extra["bits_per_byte"]


def test_a_missing_split_is_named(byte_model: LlamaForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("a b\n" * 99)
    task = WikiText2().load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no train split of 'wikitext2'.*train\.txt"):
        next(iter(task.batches(byte_model, steps=1, batch_size=1)))
    (tmp_path / "train.txt").write_text("c d\n" * 99)
    batch = next(iter(task.batches(byte_model, steps=1, batch_size=1, context=16)))
    assert set(batch["input_ids"].flatten().tolist()) <= set(b"c d\n\0")


def test_real_corpora_have_the_published_counts(
    real_data: Path, byte_model: LlamaForCausalLM
) -> None:
    loaded = LoadedModel.of(byte_model)
    for task, words in ((WikiText2(), 217_646), (PennTreebank(), 73_760)):
        task.load(real_data)
        assert task.stream(loaded, "valid").words_done[-1] == words
        assert task.score(loaded, limit=2).items == 2


def test_a_real_model_knows_stories_better_than_news(real_data: Path) -> None:
    loaded = load_model(real_data / "ckpt_stories260K")
    score = get_task("ptb").load(real_data).score(loaded, limit=4)
    assert 2.0 < score.extra["bits_per_byte"] < 6.0
