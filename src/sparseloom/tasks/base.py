"""What a task is: data, a metric, and per-item results that paired statistics can use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparseloom.models.base import LoadedModel
from sparseloom.models.load import Head
from sparseloom.models.modes import in_mode

Progress = Callable[[int, int], None]
"""Called with (items done, items in all) while a score is computed."""

Batch = dict[str, Tensor]
"""Keyword arguments of one training step of a Hugging Face model."""


@dataclass(frozen=True, eq=False)
class Score:
    """The outcome of one task for one model.

    Attributes:
        value: the metric.
        per_item: one float64 per item, in the same order for every model and method, so that two
            scores can be compared item by item; each task says what it holds.
        weights: how much each item counts in `value` (bytes of a window), or None for equally.
        notes: remarks for people, such as "not comparable: Python 3.14.0".
        extra: further figures by name, such as "token_perplexity".
        gold: what each item should be, where the metric is no mean of `per_item` but compares the
            two over all items (a correlation); see `Task.value_of`.
    """

    value: float
    per_item: Float[np.ndarray, " items"]
    weights: Float[np.ndarray, " items"] | None = None
    notes: tuple[str, ...] = ()
    extra: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    gold: Float[np.ndarray, " items"] | None = None

    @property
    def items(self) -> int:
        """How many items were scored."""
        return len(self.per_item)


class Task(ABC):
    """A data set with a metric.  `load` once, then `score` any number of models."""

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    head: ClassVar[Head] = "auto"
    """What `load_model` has to put on top of a model for this task."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, where the task has any, once it is loaded."""
        return ()

    @abstractmethod
    def load(self, data: Path | None = None) -> Task:
        """Read the data and return the task.

        `data` is the folder given with `--data`; the environment variable SPARSELOOM_DATA stands in
        for it.  Raises FileNotFoundError naming the places looked at.
        """

    @abstractmethod
    def score(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Score `model` as it stands: inside `sparsify` the sparse model is what is scored.

        `limit` bounds the items; they are spread over the data, the same ones at every call.
        Computed in the model's own type, without autocast; sums are float64.  Loads the data from
        SPARSELOOM_DATA when `load` was not called.
        """

    @abstractmethod
    def inputs(
        self, model: LoadedModel | PreTrainedModel, *, limit: int | None = None
    ) -> Iterator[Batch]:
        """What `score` feeds the model: keyword arguments of one forward pass after another.

        With `limit`, of the items that `score` takes with the same `limit`; on the model's device.
        """

    def value_of(
        self, per_item: Float[np.ndarray, " items"], gold: Float[np.ndarray, " items"]
    ) -> float:
        """The metric over some items of a `Score` that has `gold`, such as a resample of them."""
        raise NotImplementedError(f"the task {self.name!r} scores items one by one")

    def held_out(self) -> Task | None:
        """The same task on a part of the training data that `batches` never draws, or None.

        Settings are chosen there, so that the items of `score` stay unseen until the end.
        """
        return None

    def sample(self, model: LoadedModel | PreTrainedModel) -> Batch:
        """The input of one typical forward pass."""
        return next(iter(self.inputs(model, limit=1)))

    def batches(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        steps: int,
        batch_size: int,
        context: int | None = None,
        seed: int = 0,
    ) -> Iterator[Batch]:
        """`steps` training batches drawn from the training half, the same ones for one seed."""
        raise NotImplementedError(f"the task {self.name!r} has no training data")


@contextmanager
def evaluating(model: PreTrainedModel) -> Generator[torch.device]:
    """Evaluation mode without gradients; yields the model's device, restores the modes."""
    with torch.no_grad(), in_mode(model, training=False):
        yield model.device


def correlation(one: Float[np.ndarray, " items"], other: Float[np.ndarray, " items"]) -> float:
    """Pearson's correlation; 0 where one of the two is constant."""
    one, other = one - one.mean(), other - other.mean()
    scale = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / scale if scale > 0 else 0.0


def spread(items: int, limit: int | None) -> list[int]:
    """At most `limit` of `items` indices, evenly spread and ascending: a fixed choice.

    Raises ValueError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if limit is None or limit >= items:
        return list(range(items))
    return [(2 * i + 1) * items // (2 * limit) for i in range(limit)]


def choose(items: int, limit: int | None) -> list[int]:
    """The first `limit` of `items` indices in a fixed random order: a smaller choice is part of
    every larger one, and files that alternate their classes give all of them.

    Raises ValueError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    return np.random.default_rng(0).permutation(items)[:limit].tolist()
