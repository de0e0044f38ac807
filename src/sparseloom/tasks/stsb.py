"""STS-B (Cer et al. 2017): do cosines of sentence embeddings rank pairs as people do?"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparseloom.errors import require
from sparseloom.models.base import LoadedModel
from sparseloom.models.minilm import mean_pool
from sparseloom.tasks.base import Batch, Progress, Score, Task, choose, correlation, spread
from sparseloom.tasks.data import find_data, read_text
from sparseloom.tasks.embedding import embed, length_batches, shuffled_batches, tokenized

Split = Literal["train", "held-out", "dev", "test"]

_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("stsb-en-train.csv",),
    "held-out": ("stsb-en-train.csv",),
    "dev": ("stsb-en-dev.csv",),
    "test": ("stsb-en-test.csv",),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sentences and how alike people found them, from 0 to 5."""

    first: str
    second: str
    similarity: float


def read_pairs(text: str) -> list[Pair]:
    """Pairs of a CSV without header: sentence, sentence, similarity.

    Raises ValueError naming the first line that is something else.
    """
    pairs: list[Pair] = []
    for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), 1):
        try:
            first, second, similarity = row
            pairs.append(Pair(first, second, float(similarity)))
        except ValueError as error:
            raise ValueError(
                f"line {number} of the STS-B file is not `sentence,sentence,similarity`: {error}"
            ) from error
    return pairs


class SemanticSimilarity(Task):
    """Spearman correlation of cosine similarity with people's, on the dev split (1,500 pairs).

    `per_item` holds the cosine of each pair; the value is a rank correlation over all pairs, not
    their mean.  Embeddings are the mean of the last hidden states (`models.minilm.mean_pool`).

    The split "held-out" is a tenth of the training pairs, which `labelled_batches` never draws.
    """

    name: ClassVar[str] = "sts-b"
    metric: ClassVar[str] = "spearman"
    higher_is_better: ClassVar[bool] = True

    def __init__(self, split: Split = "dev", batch_size: int = 32) -> None:
        """`split`: the part that is scored; `batch_size`: sentences per forward pass."""
        self.split: Split = split
        self.batch_size = batch_size
        self._folder: Path | None = None

    def load(self, data: Path | None = None) -> SemanticSimilarity:
        """Find `stsb-en-dev.csv` (or the split's file) in `glue/STS-B`."""
        self._folder = find_data("glue/STS-B", data, files=_FILES[self.split])
        return self

    def pairs(self, split: Split) -> list[Pair]:
        """All pairs of a split; those of "held-out" are in "train", too."""
        if self._folder is None:
            self.load()
        assert self._folder is not None
        pairs = read_pairs(read_text(self._folder, *_FILES[split]))
        return [pairs[i] for i in _held_out(len(pairs))] if split == "held-out" else pairs

    def training_pairs(self) -> list[Pair]:
        """The pairs of "train" that are not in "held-out"."""
        pairs = self.pairs("train")
        left_out = set(_held_out(len(pairs)))
        return [pair for i, pair in enumerate(pairs) if i not in left_out]

    def held_out(self) -> SemanticSimilarity:
        """The task on the split "held-out"."""
        other = SemanticSimilarity("held-out", self.batch_size)
        other._folder = self._folder
        return other

    def value_of(
        self, per_item: Float[np.ndarray, " items"], gold: Float[np.ndarray, " items"]
    ) -> float:
        """Spearman's correlation of cosines with what people found."""
        ranks = require("scipy.stats", extra="train").rankdata
        return correlation(ranks(per_item), ranks(gold))

    def _chosen(self, limit: int | None) -> list[Pair]:
        pairs = self.pairs(self.split)
        return [pairs[i] for i in spread(len(pairs), limit)]

    def inputs(
        self, model: LoadedModel | PreTrainedModel, *, limit: int | None = None
    ) -> Iterator[Batch]:
        """The padded batches of sentences that `score` embeds."""
        loaded = LoadedModel.of(model)
        sentences = _sentences(self._chosen(limit))
        for chosen in length_batches(sentences, self.batch_size):
            batch = tokenized(loaded, [sentences[i] for i in chosen])
            yield {key: value.to(loaded.model.device) for key, value in batch.items()}

    def score(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Spearman correlation over the pairs; `extra` holds Pearson's."""
        loaded = LoadedModel.of(model)
        pairs = self._chosen(limit)
        if len(pairs) < 3:
            raise ValueError(f"limit must be at least 3 for a correlation, got {len(pairs)} pairs")
        sentences = _sentences(pairs)
        row = {sentence: i for i, sentence in enumerate(sentences)}
        vectors = embed(loaded, sentences, batch_size=self.batch_size, progress=progress)
        left = vectors[torch.tensor([row[pair.first] for pair in pairs])].double()
        right = vectors[torch.tensor([row[pair.second] for pair in pairs])].double()
        cosines = (left * right).sum(1).numpy()
        gold = np.array([pair.similarity for pair in pairs])
        extra = {"pearson": correlation(cosines, gold)}
        return Score(self.value_of(cosines, gold), cosines, extra=extra, gold=gold)

    def batches(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        steps: int,
        batch_size: int,
        context: int | None = None,
        seed: int = 0,
    ) -> Iterator[Batch]:
        """Padded batches of sentences of `training_pairs`, without labels."""
        loaded = LoadedModel.of(model)
        pairs = self.training_pairs()
        sentences = sorted({s for pair in pairs for s in (pair.first, pair.second)})
        generator = np.random.default_rng(seed)
        for _ in range(steps):
            chosen = generator.integers(0, len(sentences), batch_size)
            yield tokenized(loaded, [sentences[i] for i in chosen], max_length=context)

    def labelled_batches(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        steps: int,
        batch_size: int,
        seed: int = 0,
    ) -> Iterator[Batch]:
        """Batches for `cosine_loss`: `batch_size` pairs, first sentences, then second ones.

        `labels` holds what people found, from 0 to 1.  Pairs come in a random order, each once
        before any comes again; those of "held-out" never.
        """
        loaded = LoadedModel.of(model)
        pairs = self.training_pairs()
        texts = [max(pair.first, pair.second, key=len) for pair in pairs]
        for chosen in shuffled_batches(texts, steps=steps, batch_size=batch_size, seed=seed):
            some = [pairs[i] for i in chosen]
            batch = tokenized(loaded, [pair.first for pair in some] + [p.second for p in some])
            batch["labels"] = torch.tensor([pair.similarity / 5 for pair in some])
            yield {key: value.to(loaded.model.device) for key, value in batch.items()}


def cosine_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of each pair's cosine: what fine-tunes sentence embeddings on STS-B.

    The `CosineSimilarityLoss` of sentence-transformers (Reimers and Gurevych 2019, §3); a
    `model_loss` of `sparseloom.training.finetune` for the batches of `labelled_batches`.
    """
    vectors = mean_pool(outputs.last_hidden_state.float(), batch["attention_mask"])
    first, second = vectors.chunk(2)
    return torch.nn.functional.mse_loss((first * second).sum(1), batch["labels"])


def _held_out(pairs: int) -> list[int]:
    """The last tenth of a fixed random order of the training pairs."""
    return sorted(choose(pairs, None)[pairs - pairs // 10 :])


def _sentences(pairs: Sequence[Pair]) -> list[str]:
    """Every sentence once, in order of appearance."""
    return list(dict.fromkeys(s for pair in pairs for s in (pair.first, pair.second)))
