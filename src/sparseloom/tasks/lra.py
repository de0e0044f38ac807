"""What the tasks of Long Range Arena (Tay et al. 2020) share: splits, batches, accuracy.

Each task gives labelled sequences of tokens; token 0 is padding.  Models are
`LraForSequenceClassification` or anything that takes `input_ids`, `attention_mask` and `labels`
and returns logits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int64
from transformers import PreTrainedModel

from sparseloom.models.base import LoadedModel
from sparseloom.tasks.base import Batch, Progress, Score, Task, choose, evaluating

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """The examples of a split, in a fixed order.

    Attributes:
        items: one raw example each (bytes, a pair of bytes, pixels, token ids).
        labels: the class of each.
    """

    items: Sequence[Any] | np.ndarray
    labels: Int64[np.ndarray, " items"]

    def __post_init__(self) -> None:
        if len(self.items) != len(self.labels):
            raise ValueError(f"labels must hold {len(self.items)} classes, got {len(self.labels)}")


class LraTask(Task):
    """Accuracy on the test split; `per_item` is 1 where the class is right.

    `score` takes all test examples unless it is given a limit.
    """

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self, length: int | None = None, *, split: Split = "test", eval_batch: int = 16
    ) -> None:
        """`length`: tokens at which an input is cut (the model's own limit where that is less);
        `split`: what is scored; `eval_batch`: examples per forward pass of a score."""
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length = length
        self.split: Split = split
        self.eval_batch = eval_batch
        self._loaded = False
        self._splits: dict[str, Examples] = {}

    def load(self, data: Path | None = None) -> LraTask:
        """Find the data and forget what was read of another folder."""
        self._splits = {}
        self._find(data)
        self._loaded = True
        return self

    def examples(self, split: Split) -> Examples:
        """All examples of a split, read once."""
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split must be 'train', 'validation' or 'test', got {split!r}")
        if not self._loaded:
            self.load()
        if split not in self._splits:
            self._splits[split] = self._read(split)
        return self._splits[split]

    @abstractmethod
    def _find(self, data: Path | None) -> None:
        """Find the files; raises FileNotFoundError naming the places looked at."""

    @abstractmethod
    def _read(self, split: Split) -> Examples:
        """Read a split from the files found."""

    @abstractmethod
    def _sequences(self, item: Any, length: int) -> list[Int64[np.ndarray, " tokens"]]:
        """The token ids of an example, cut at `length`: one sequence, or two for a pair."""

    def _notes(self) -> tuple[str, ...]:
        return ()

    def inputs(
        self, model: LoadedModel | PreTrainedModel, *, limit: int | None = None
    ) -> Iterator[Batch]:
        """The padded batches that `score` runs, without labels."""
        bare = bare_model(model)
        for chosen in self._scored(limit):
            yield self._batch(bare, self.split, chosen, labels=False, context=None)

    def score(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Accuracy; examples of like length run together, which changes no result."""
        bare, labels = bare_model(model), self.examples(self.split).labels
        batches = self._scored(limit)
        right: dict[int, float] = {}
        total = sum(map(len, batches))
        with evaluating(bare):
            for chosen in batches:
                batch = self._batch(bare, self.split, chosen, labels=False, context=None)
                found = bare(**batch).logits.argmax(-1).cpu().numpy()
                right.update(zip(chosen, (found == labels[chosen]).astype(float), strict=True))
                if progress is not None:
                    progress(len(right), total)
        per_item = np.array([right[i] for i in sorted(right)])
        return Score(float(per_item.mean()), per_item, notes=self._notes())

    def batches(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        steps: int,
        batch_size: int,
        context: int | None = None,
        seed: int = 0,
    ) -> Iterator[Batch]:
        """Padded training batches with labels; every epoch is a new permutation.

        `context` cuts inputs shorter than the task does.
        """
        bare, examples = bare_model(model), self.examples("train")
        count = len(examples.labels)
        if not 1 <= batch_size <= count:
            raise ValueError(f"batch_size must be in [1, {count}], got {batch_size}")
        generator = np.random.default_rng(seed)
        order = generator.permutation(count)
        at = 0
        for _ in range(steps):
            if at + batch_size > count:
                order, at = generator.permutation(count), 0
            chosen = order[at : at + batch_size].tolist()
            at += batch_size
            yield self._batch(bare, "train", chosen, labels=True, context=context)

    # ------------------------------------------------------------------ private

    def _scored(self, limit: int | None) -> list[list[int]]:
        """Indices of the scored examples, in batches of like length."""
        examples = self.examples(self.split)
        chosen = choose(len(examples.labels), limit)
        longest = self.length or 1 << 30
        order = sorted(chosen, key=lambda i: min(longest, size_of(examples.items[i])))
        size = self.eval_batch
        return [order[first : first + size] for first in range(0, len(order), size)]

    def _batch(
        self,
        model: PreTrainedModel,
        split: Split,
        chosen: Sequence[int],
        *,
        labels: bool,
        context: int | None,
    ) -> Batch:
        examples = self.examples(split)
        limits = [self.length, context, getattr(model.config, "input_length", None)]
        length = min((limit for limit in limits if limit is not None), default=1 << 30)
        rows = [self._sequences(examples.items[i], length) for i in chosen]
        widest = max(1, *(len(sequence) for row in rows for sequence in row))
        ids = np.zeros((len(rows), len(rows[0]), widest), dtype=np.int64)
        for i, row in enumerate(rows):
            for j, sequence in enumerate(row):
                ids[i, j, : len(sequence)] = sequence
        tokens = torch.from_numpy(ids if ids.shape[1] > 1 else ids[:, 0]).to(model.device)
        batch: Batch = {"input_ids": tokens, "attention_mask": tokens != 0}
        if labels:
            batch["labels"] = torch.from_numpy(examples.labels[list(chosen)]).to(model.device)
        return batch


def bare_model(model: LoadedModel | PreTrainedModel) -> PreTrainedModel:
    """The model itself; these tasks need no tokenizer."""
    return model.model if isinstance(model, LoadedModel) else model


def size_of(item: Any) -> int:
    """Length of an example before it is cut; of a pair, the longer one's."""
    return max(map(len, item)) if isinstance(item, tuple) else len(item)


def byte_tokens(text: bytes, length: int) -> Int64[np.ndarray, " tokens"]:
    """Token 1 + b for byte b, as TFDS's ByteTextEncoder (published) has it; 0 is padding."""
    return np.frombuffer(text[:length], dtype=np.uint8).astype(np.int64) + 1
