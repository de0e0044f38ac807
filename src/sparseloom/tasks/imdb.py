"""IMDB movie reviews (Maas et al. 2011): long documents with a sentiment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparseloom.models.base import LoadedModel
from sparseloom.tasks.base import Batch, Progress, Score, Task, choose
from sparseloom.tasks.data import find_data, read_bytes
from sparseloom.tasks.embedding import embed, length_batches, tokenized

Split = Literal["train", "test"]
_DEFAULT_LIMIT = 500
_BATCH = 8


@dataclass(frozen=True, slots=True)
class Review:
    """One review and whether it is favourable."""

    positive: bool
    text: str


def read_table(raw: bytes) -> Iterator[tuple[bool, bytes]]:
    """(favourable, text) of each row of a table label, rating, id, text with a header.

    Texts are bytes as they stand and may hold tabs.  Raises ValueError naming the first line that
    is something else.
    """
    header, *lines = raw.removesuffix(b"\n").split(b"\n")
    if header.split(b"\t") != [b"label", b"rating", b"id", b"text"]:
        raise ValueError("the IMDB table must begin with the columns label, rating, id, text")
    for number, line in enumerate(lines, 2):
        fields = line.split(b"\t", 3)
        if len(fields) != 4 or fields[0] not in {b"0", b"1"}:
            raise ValueError(f"line {number} of the IMDB table is not label, rating, id, text")
        yield fields[0] == b"1", fields[3]


def read_reviews(raw: bytes) -> list[Review]:
    """The rows of `read_table` with decoded texts."""
    return [
        Review(positive, text.decode("utf-8", errors="replace"))
        for positive, text in read_table(raw)
    ]


class MovieReviews(Task):
    """Sentiment read off frozen embeddings of whole documents, and documents for other studies.

    The score is the accuracy of a ridge classifier on the embeddings of the chosen test documents
    (500 unless limited), each predicted by the fit to all others (leave-one-out in closed form).
    `per_item` is 1 where the prediction is right.
    """

    name: ClassVar[str] = "imdb"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __init__(self, max_length: int = 512, ridge: float = 1.0) -> None:
        """`max_length`: tokens at which a document is cut; `ridge`: weight of the penalty."""
        self.max_length = max_length
        self.ridge = ridge
        self._folder: Path | None = None
        self._reviews: dict[str, list[Review]] = {}

    def load(self, data: Path | None = None) -> MovieReviews:
        """Find `train.tsv` and `test.tsv` in `imdb`."""
        self._folder = find_data("imdb", data, files=("test.tsv", "train.tsv"))
        self._reviews = {}
        return self

    def reviews(self, split: Split = "test") -> list[Review]:
        """All reviews of a split (25,000)."""
        if self._folder is None:
            self.load()
        assert self._folder is not None
        if split not in self._reviews:
            self._reviews[split] = read_reviews(read_bytes(self._folder, f"{split}.tsv"))
        return self._reviews[split]

    def documents(
        self, model: LoadedModel, *, length: int = 512, count: int = 64, split: Split = "test"
    ) -> Int[Tensor, "count length"]:
        """Token ids of `count` reviews that fill `length` tokens, special tokens included.

        Reviews are visited in a fixed random order; shorter ones are passed over, longer ones cut.
        """
        if length > model.context:
            raise ValueError(f"length must be at most {model.context}, the model's, got {length}")
        reviews = self.reviews(split)
        rows: list[Tensor] = []
        for i in np.random.default_rng(0).permutation(len(reviews)):
            # A token has at least one character: most short reviews need no tokenizer.
            if len(reviews[i].text) < length:
                continue
            ids = tokenized(model, [reviews[i].text], max_length=length)["input_ids"]
            if ids.shape[1] == length:
                rows.append(ids[0])
            if len(rows) == count:
                return torch.stack(rows)
        raise ValueError(
            f"count must be at most {len(rows)}, the reviews of {length} tokens, got {count}"
        )

    def chosen(self, limit: int | None) -> list[Review]:
        """The first `limit` test reviews of a fixed random order: files alternate the classes."""
        reviews = self.reviews("test")
        return [reviews[i] for i in choose(len(reviews), limit)]

    def inputs(
        self, model: LoadedModel | PreTrainedModel, *, limit: int | None = None
    ) -> Iterator[Batch]:
        """The padded batches of documents that `score` embeds."""
        loaded = LoadedModel.of(model)
        texts = [review.text for review in self.chosen(_DEFAULT_LIMIT if limit is None else limit)]
        for chosen in length_batches(texts, _BATCH):
            batch = tokenized(loaded, [texts[i] for i in chosen], max_length=self.max_length)
            yield {key: value.to(loaded.model.device) for key, value in batch.items()}

    def score(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Leave-one-out accuracy of a ridge classifier on the embeddings."""
        loaded = LoadedModel.of(model)
        chosen = self.chosen(_DEFAULT_LIMIT if limit is None else limit)
        labels = np.array([review.positive for review in chosen])
        if labels.all() or not labels.any():
            raise ValueError(f"limit must be larger: {len(labels)} reviews of one sentiment only")
        vectors = embed(
            loaded,
            [review.text for review in chosen],
            batch_size=_BATCH,
            max_length=self.max_length,
            progress=progress,
        )
        right = leave_one_out(vectors.double().numpy(), labels, self.ridge) == labels
        note = f"ridge classifier on {len(chosen)} embeddings, leave-one-out"
        return Score(float(right.mean()), right.astype(np.float64), notes=(note,))

    def batches(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        steps: int,
        batch_size: int,
        context: int | None = None,
        seed: int = 0,
    ) -> Iterator[Batch]:
        """Padded batches of training reviews, without labels."""
        loaded = LoadedModel.of(model)
        reviews = self.reviews("train")
        generator = np.random.default_rng(seed)
        for _ in range(steps):
            chosen = generator.integers(0, len(reviews), batch_size)
            texts = [reviews[i].text for i in chosen]
            yield tokenized(loaded, texts, max_length=context or self.max_length)


def leave_one_out(
    features: Float[np.ndarray, "items width"], labels: Bool[np.ndarray, " items"], ridge: float
) -> Bool[np.ndarray, " items"]:
    """What ridge regression on ±1 predicts for each item when fitted to all others.

    With hat matrix H = X(XᵀX + λI)⁻¹Xᵀ the left-out prediction is y − (y − Hy) / (1 − diag H).
    """
    design = np.hstack([features, np.ones((len(features), 1))])
    target = np.where(labels, 1.0, -1.0)
    penalty = ridge * np.eye(design.shape[1])
    penalty[-1, -1] = 1e-9  # the intercept is free
    hat = design @ np.linalg.solve(design.T @ design + penalty, design.T)
    left_out = target - (target - hat @ target) / (1.0 - np.diag(hat))
    return left_out > 0
