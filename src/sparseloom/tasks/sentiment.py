"""Sentiment of IMDB reviews by a fine-tuned classifier: the supervised form of the `imdb` task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from sparseloom.models.base import LoadedModel
from sparseloom.models.load import Head
from sparseloom.tasks.base import Batch, Progress, Score, Task, evaluating
from sparseloom.tasks.embedding import length_batches, tokenized
from sparseloom.tasks.imdb import MovieReviews, Review

_BATCH = 16
_POOL = 32
"""Training batches that are drawn together and sorted by length, to compute little on padding."""


class SentimentClassification(Task):
    """Accuracy of a sequence classifier on whole reviews, cut at `max_length` tokens.

    Needs a model with two classes on top; `load_model(name, head="classifier")` puts one there.
    `per_item` is 1 where the class is right; class 1 is favourable.
    """

    name: ClassVar[str] = "imdb-sentiment"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    head: ClassVar[Head] = "classifier"

    def __init__(self, max_length: int = 512) -> None:
        self.max_length = max_length
        self._source = MovieReviews(max_length)

    def load(self, data: Path | None = None) -> SentimentClassification:
        """Find `train.tsv` and `test.tsv` in `imdb`."""
        self._source.load(data)
        return self

    def inputs(
        self, model: LoadedModel | PreTrainedModel, *, limit: int | None = None
    ) -> Iterator[Batch]:
        """The padded batches that `score` classifies, with their labels."""
        loaded = _classifier(model)
        reviews = self._source.chosen(limit)
        for chosen in length_batches([review.text for review in reviews], _BATCH):
            yield self._batch(loaded, [reviews[i] for i in chosen], self.max_length)

    def score(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Share of right classes over the test reviews (all 25,000 unless limited)."""
        loaded = _classifier(model)
        reviews = self._source.chosen(limit)
        right = np.zeros(len(reviews))
        done = 0
        with evaluating(loaded.model):
            for chosen in length_batches([review.text for review in reviews], _BATCH):
                batch = self._batch(loaded, [reviews[i] for i in chosen], self.max_length)
                labels = batch.pop("labels")
                found = loaded.model(**batch).logits.argmax(-1)
                right[chosen] = (found == labels).double().cpu().numpy()
                done += len(chosen)
                if progress is not None:
                    progress(done, len(reviews))
        return Score(float(right.mean()), right)

    def batches(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        steps: int,
        batch_size: int,
        context: int | None = None,
        seed: int = 0,
    ) -> Iterator[Batch]:
        """Training reviews in a random order, each once before any is seen again."""
        loaded = _classifier(model)
        reviews = self._source.reviews("train")
        generator = np.random.default_rng(seed)
        length = context or self.max_length
        waiting: list[int] = []
        made = 0
        while made < steps:
            while len(waiting) < _POOL * batch_size:
                waiting += generator.permutation(len(reviews)).tolist()
            pool, waiting = waiting[: _POOL * batch_size], waiting[_POOL * batch_size :]
            sorted_batches = length_batches([reviews[i].text for i in pool], batch_size)
            for index in generator.permutation(len(sorted_batches))[: steps - made]:
                chosen = [reviews[pool[i]] for i in sorted_batches[index]]
                yield self._batch(loaded, chosen, length)
                made += 1

    def _batch(self, loaded: LoadedModel, reviews: Sequence[Review], length: int) -> Batch:
        batch = tokenized(loaded, [review.text for review in reviews], max_length=length)
        batch["labels"] = torch.tensor([int(review.positive) for review in reviews])
        return {key: value.to(loaded.model.device) for key, value in batch.items()}


def _classifier(model: LoadedModel | PreTrainedModel) -> LoadedModel:
    loaded = LoadedModel.of(model)
    classes = int(getattr(loaded.model.config, "num_labels", 0))
    if not hasattr(loaded.model, "classifier") and not hasattr(loaded.model, "score"):
        raise ValueError(
            f"imdb-sentiment needs a classifier on top, but {loaded.name!r} is a "
            f"{type(loaded.model).__name__}: load it with load_model(name, head='classifier')"
        )
    if classes != 2:
        raise ValueError(f"model must have 2 classes, favourable or not, got {classes}")
    return loaded
