"""STS-B in GLUE's form: one model reads both sentences of a pair and says how alike they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from sparseloom.models.base import LoadedModel
from sparseloom.models.load import Head
from sparseloom.tasks.base import Batch, Progress, Score, Task, correlation, evaluating, spread
from sparseloom.tasks.embedding import length_batches, shuffled_batches
from sparseloom.tasks.stsb import Pair, SemanticSimilarity, Split


class PairSimilarity(Task):
    """Spearman correlation of a regression on the first token with people's ratings, on dev.

    The input is `[CLS] first [SEP] second [SEP]`, the model a sequence classifier of one class (a
    number from 0 to 5), as Wang et al. 2019 (GLUE) and Devlin et al. 2019 (§4.1) fine-tune it.
    `per_item` holds the number found for each pair.  Splits are those of `SemanticSimilarity`.
    """

    name: ClassVar[str] = "sts-b-pairs"
    metric: ClassVar[str] = "spearman"
    higher_is_better: ClassVar[bool] = True
    head: ClassVar[Head] = "classifier"

    def __init__(self, split: Split = "dev", batch_size: int = 32) -> None:
        """`split`: the part that is scored; `batch_size`: pairs per forward pass."""
        self.batch_size = batch_size
        self._source = SemanticSimilarity(split, batch_size)

    @property
    def classes(self) -> tuple[str, ...]:
        """The one number that is found."""
        return ("similarity",)

    def load(self, data: Path | None = None) -> PairSimilarity:
        """Find the tables of `glue/STS-B`."""
        self._source.load(data)
        return self

    def held_out(self) -> PairSimilarity:
        """The task on a tenth of the training pairs, which `batches` never draws."""
        other = PairSimilarity("held-out", self.batch_size)
        other._source = self._source.held_out()
        return other

    def value_of(
        self, per_item: Float[np.ndarray, " items"], gold: Float[np.ndarray, " items"]
    ) -> float:
        """Spearman's correlation of what was found with what people found."""
        return self._source.value_of(per_item, gold)

    def inputs(
        self, model: LoadedModel | PreTrainedModel, *, limit: int | None = None
    ) -> Iterator[Batch]:
        """The padded batches of pairs that `score` rates, with people's ratings as `labels`."""
        loaded = _checked(model)
        pairs = self._chosen(limit)
        for chosen in length_batches(_texts(pairs), self.batch_size):
            yield _batch(loaded, [pairs[i] for i in chosen])

    def score(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Spearman correlation over the pairs; `extra` holds Pearson's."""
        loaded = _checked(model)
        pairs = self._chosen(limit)
        if len(pairs) < 3:
            raise ValueError(f"limit must be at least 3 for a correlation, got {len(pairs)} pairs")
        found = np.zeros(len(pairs))
        done = 0
        with evaluating(loaded.model):
            for chosen in length_batches(_texts(pairs), self.batch_size):
                batch = _batch(loaded, [pairs[i] for i in chosen])
                batch.pop("labels")
                found[chosen] = loaded.model(**batch).logits[:, 0].double().cpu().numpy()
                done += len(chosen)
                if progress is not None:
                    progress(done, len(pairs))
        gold = np.array([pair.similarity for pair in pairs])
        extra = {"pearson": correlation(found, gold)}
        return Score(self.value_of(found, gold), found, extra=extra, gold=gold)

    def batches(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        steps: int,
        batch_size: int,
        context: int | None = None,
        seed: int = 0,
    ) -> Iterator[Batch]:
        """Training pairs in a random order, each once before any comes again."""
        loaded = _checked(model)
        pairs = self._source.training_pairs()
        texts = _texts(pairs)
        for chosen in shuffled_batches(texts, steps=steps, batch_size=batch_size, seed=seed):
            yield _batch(loaded, [pairs[i] for i in chosen], context)

    def _chosen(self, limit: int | None) -> list[Pair]:
        pairs = self._source.pairs(self._source.split)
        return [pairs[i] for i in spread(len(pairs), limit)]


def _texts(pairs: Sequence[Pair]) -> list[str]:
    """As long as the pairs: what batches of similar length are sorted by."""
    return [pair.first + pair.second for pair in pairs]


def _batch(loaded: LoadedModel, pairs: Sequence[Pair], context: int | None = None) -> Batch:
    assert loaded.tokenizer is not None
    batch = loaded.tokenizer(
        [pair.first for pair in pairs],
        [pair.second for pair in pairs],
        padding=True,
        truncation=True,
        max_length=min(context or loaded.context, loaded.context),
        return_tensors="pt",
    )
    batch = dict(batch)
    batch["labels"] = torch.tensor([pair.similarity for pair in pairs])
    return {key: value.to(loaded.model.device) for key, value in batch.items()}


def _checked(model: LoadedModel | PreTrainedModel) -> LoadedModel:
    loaded = LoadedModel.of(model)
    one = getattr(loaded.model.config, "num_labels", None) == 1
    if not (one and type(loaded.model).__name__.endswith("ForSequenceClassification")):
        raise ValueError(
            f"the task 'sts-b-pairs' needs a sequence classifier of one class, but {loaded.name!r} "
            f"is a {type(loaded.model).__name__}: adapt it with joint steps first "
            "(load_model(…, head='classifier', classes=('similarity',)) puts a regression on top)"
        )
    if loaded.tokenizer is None:
        raise ValueError(f"sts-b-pairs needs a tokenizer, but {loaded.name!r} has none")
    return loaded
