"""Classification of texts by a fine-tuned classifier: IMDB sentiment, or a table of one's own.

`--task classification --data FOLDER` reads `train.tsv` and `test.tsv` (or .csv, .jsonl; plain or
.gz) with the columns `text` and `label`; labels may be any words or numbers.
"""

from __future__ import annotations

import csv
import io
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from sparseloom.models.base import LoadedModel
from sparseloom.models.load import Head
from sparseloom.tasks.base import Batch, Progress, Score, Task, choose, evaluating
from sparseloom.tasks.data import find_data, find_file, read_text
from sparseloom.tasks.embedding import length_batches, shuffled_batches, tokenized
from sparseloom.tasks.imdb import MovieReviews

_BATCH = 16
_KINDS = ("tsv", "csv", "jsonl")

Split = Literal["train", "test"]


class Example(NamedTuple):
    """A text and the name of its class."""

    text: str
    label: str


class TextClassification(Task):
    """Accuracy of a sequence classifier on whole texts, cut at `max_length` tokens.

    `per_item` is 1 where the class is right.  With a `limit`, the first so many test texts of a
    fixed random order are taken, so a smaller choice is part of every larger one.
    """

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    head: ClassVar[Head] = "classifier"

    def __init__(self, max_length: int = 512) -> None:
        self.max_length = max_length

    @abstractmethod
    def examples(self, split: Split) -> list[Example]:
        """All texts of a split."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; their place is the label that the model is given."""

    def inputs(
        self, model: LoadedModel | PreTrainedModel, *, limit: int | None = None
    ) -> Iterator[Batch]:
        """The padded batches that `score` classifies, with their labels."""
        loaded = self._checked(model)
        examples = self._chosen(limit)
        for chosen in length_batches([example.text for example in examples], _BATCH):
            yield self._batch(loaded, [examples[i] for i in chosen], self.max_length)

    def score(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """The metric over the test texts."""
        loaded = self._checked(model)
        examples = self._chosen(limit)
        found, gold = np.zeros(len(examples)), np.zeros(len(examples))
        done = 0
        with evaluating(loaded.model):
            for chosen in length_batches([example.text for example in examples], _BATCH):
                batch = self._batch(loaded, [examples[i] for i in chosen], self.max_length)
                gold[chosen] = batch.pop("labels").double().cpu().numpy()
                found[chosen] = loaded.model(**batch).logits.argmax(-1).double().cpu().numpy()
                done += len(chosen)
                if progress is not None:
                    progress(done, len(examples))
        return self._judged(found, gold)

    def batches(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        steps: int,
        batch_size: int,
        context: int | None = None,
        seed: int = 0,
    ) -> Iterator[Batch]:
        """Training texts in a random order, each once before any is seen again."""
        loaded = self._checked(model)
        examples = self.examples("train")
        texts = [example.text for example in examples]
        for chosen in shuffled_batches(texts, steps=steps, batch_size=batch_size, seed=seed):
            batch = [examples[i] for i in chosen]
            yield self._batch(loaded, batch, context or self.max_length)

    def _judged(
        self, found: Float[np.ndarray, " items"], gold: Float[np.ndarray, " items"]
    ) -> Score:
        """The score of the numbers of the classes that were found, beside the right ones."""
        right = (found == gold).astype(np.float64)
        return Score(float(right.mean()), right)

    def _chosen(self, limit: int | None) -> list[Example]:
        examples = self.examples("test")
        return [examples[i] for i in choose(len(examples), limit)]

    def _batch(self, loaded: LoadedModel, examples: Sequence[Example], length: int) -> Batch:
        batch = tokenized(loaded, [example.text for example in examples], max_length=length)
        numbers = {name: number for number, name in enumerate(self.classes)}
        batch["labels"] = torch.tensor([numbers[example.label] for example in examples])
        return {key: value.to(loaded.model.device) for key, value in batch.items()}

    def _checked(self, model: LoadedModel | PreTrainedModel) -> LoadedModel:
        loaded = LoadedModel.of(model)
        if not type(loaded.model).__name__.endswith("ForSequenceClassification"):
            raise ValueError(
                f"the task {self.name!r} needs a sequence classifier, but {loaded.name!r} is a "
                f"{type(loaded.model).__name__}: adapt it with joint steps first "
                f"(load_model(…, head='classifier') puts a classifier on top)"
            )
        if loaded.model.config.num_labels != len(self.classes):
            raise ValueError(
                f"model must have {len(self.classes)} classes for the task {self.name!r}, "
                f"got {loaded.model.config.num_labels}"
            )
        return loaded


class SentimentClassification(TextClassification):
    """Whether an IMDB review (Maas et al. 2011) is favourable: the supervised form of `imdb`."""

    name: ClassVar[str] = "imdb-sentiment"

    def __init__(self, max_length: int = 512) -> None:
        super().__init__(max_length)
        self._source = MovieReviews(max_length)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class 1 is favourable."""
        return ("negative", "positive")

    def load(self, data: Path | None = None) -> SentimentClassification:
        """Find `train.tsv` and `test.tsv` in `imdb`."""
        self._source.load(data)
        return self

    def examples(self, split: Split) -> list[Example]:
        """All 25,000 reviews of a split."""
        reviews = self._source.reviews(split)
        return [Example(review.text, self.classes[review.positive]) for review in reviews]


class OwnClassification(TextClassification):
    """A table of one's own: `train` and `test` files with the columns `text` and `label`."""

    name: ClassVar[str] = "classification"

    def __init__(self, max_length: int = 512) -> None:
        super().__init__(max_length)
        self._examples: dict[Split, list[Example]] = {}
        self._folder: Path | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels of the training table, sorted."""
        return tuple(sorted({example.label for example in self.examples("train")}))

    def load(self, data: Path | None = None) -> OwnClassification:
        """Read both tables of the folder `data`.

        Raises:
            FileNotFoundError: no such tables.
            ValueError: a column is missing, a table is empty or damaged, or a label of the test
                table does not occur in training.
        """
        names = tuple(f"train.{kind}" for kind in _KINDS)
        self._folder = find_data("classification", data, files=names)
        self._examples = {}
        strange = {example.label for example in self.examples("test")} - set(self.classes)
        if strange:
            raise ValueError(f"label {min(strange)!r} of the test table is not in the training one")
        return self

    def examples(self, split: Split) -> list[Example]:
        """All texts of a split."""
        if self._folder is None:
            self.load()
        assert self._folder is not None
        if split not in self._examples:
            names = [f"{split}.{kind}" for kind in _KINDS]
            raw = read_text(self._folder, *names)
            path = find_file(self._folder, *names)
            assert path is not None
            self._examples[split] = read_examples(raw, path)
        return self._examples[split]


def read_examples(raw: str, path: Path) -> list[Example]:
    """The rows of a table; its kind is in the name of the file.

    Raises ValueError naming the file, and the line where there is one.
    """
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    rows: list[Mapping[str, object]] = []
    if kind == "jsonl":
        for number, line in enumerate(raw.splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is not JSON: {error.msg}") from None
            rows.append(row if isinstance(row, dict) else {})
    else:
        quoting = csv.QUOTE_NONE if kind == "tsv" else csv.QUOTE_MINIMAL
        delimiter = "\t" if kind == "tsv" else ","
        stream = io.StringIO(raw, newline="")
        reader = csv.DictReader(stream, delimiter=delimiter, quoting=quoting)
        try:
            rows += list(reader)
        except csv.Error as error:
            raise ValueError(
                f"line {reader.reader.line_num} of {path} cannot be read: {error}"
            ) from None
    examples: list[Example] = []
    for number, row in enumerate(rows, 1):
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or label is None:
            raise ValueError(f"row {number} of {path} lacks the column text or label")
        examples.append(Example(text, str(label)))
    if not examples:
        raise ValueError(f"{path} holds no rows")
    return examples
