"""STS-B (Cer et al. 2017): do cosines of sentence embeddings rank pairs as people do?"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from sparseloom.errors import require
from sparseloom.models.base import LoadedModel
from sparseloom.tasks.base import Batch, Progress, Score, Task, spread
from sparseloom.tasks.data import find_data, read_text
from sparseloom.tasks.embedding import embed, length_batches, tokenized

_FILES = {
    "train": ("stsb-en-train.csv",),
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
    """

    name: ClassVar[str] = "sts-b"
    metric: ClassVar[str] = "spearman"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self, split: Literal["train", "dev", "test"] = "dev", batch_size: int = 32
    ) -> None:
        """`split`: the part that is scored; `batch_size`: sentences per forward pass."""
        self.split: Literal["train", "dev", "test"] = split
        self.batch_size = batch_size
        self._folder: Path | None = None

    def load(self, data: Path | None = None) -> SemanticSimilarity:
        """Find `stsb-en-dev.csv` (or the split's file) in `glue/STS-B`."""
        self._folder = find_data("glue/STS-B", data, files=_FILES[self.split])
        return self

    def pairs(self, split: Literal["train", "dev", "test"]) -> list[Pair]:
        """All pairs of a split."""
        if self._folder is None:
            self.load()
        assert self._folder is not None
        return read_pairs(read_text(self._folder, *_FILES[split]))

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
        statistics = require("scipy.stats", extra="train")
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
        spearman = float(statistics.spearmanr(cosines, gold).statistic)
        pearson = float(statistics.pearsonr(cosines, gold).statistic)
        return Score(spearman, cosines, extra={"pearson": pearson})

    def batches(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        steps: int,
        batch_size: int,
        context: int | None = None,
        seed: int = 0,
    ) -> Iterator[Batch]:
        """Padded batches of sentences of the training split, without labels."""
        loaded = LoadedModel.of(model)
        pairs = self.pairs("train")
        sentences = sorted({s for pair in pairs for s in (pair.first, pair.second)})
        generator = np.random.default_rng(seed)
        for _ in range(steps):
            chosen = generator.integers(0, len(sentences), batch_size)
            yield tokenized(loaded, [sentences[i] for i in chosen], max_length=context)


def _sentences(pairs: Sequence[Pair]) -> list[str]:
    """Every sentence once, in order of appearance."""
    return list(dict.fromkeys(s for pair in pairs for s in (pair.first, pair.second)))
