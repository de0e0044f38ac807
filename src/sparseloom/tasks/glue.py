"""SST-2 and CoLA of GLUE (Wang et al. 2019): sentences of two classes, for a tuned classifier.

Scored on GLUE's dev sets, since the labels of its test sets are not public.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from sparseloom.tasks.base import Score, choose, correlation
from sparseloom.tasks.classification import Example, Split, TextClassification
from sparseloom.tasks.data import find_data, read_text


class GlueSentences(TextClassification):
    """Sentences of a GLUE task; `examples("test")` is its dev set.

    A part of the training set is held out: `examples("train")` never has it.
    """

    folder: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    """What the folder must hold, of which one is enough to find it."""

    def __init__(self, max_length: int = 128) -> None:
        super().__init__(max_length)
        self._folder: Path | None = None
        self._parts: dict[str, list[Example]] = {}
        self._scores_held_out = False

    def load(self, data: Path | None = None) -> GlueSentences:
        """Find the task's tables."""
        self._folder = find_data(self.folder, data, files=self.files)
        self._parts = {}
        return self

    def held_out(self) -> GlueSentences:
        """The task on the part of the training set that is held out."""
        other = copy.copy(self)
        other._scores_held_out = True
        return other

    def examples(self, split: Split) -> list[Example]:
        """All sentences of a split."""
        if self._folder is None:
            self.load()
        assert self._folder is not None
        if not self._parts:
            train, held_out, dev = self._read(self._folder)
            self._parts.update(train=train, held_out=held_out, dev=dev)
        if split == "train":
            return self._parts["train"]
        return self._parts["held_out" if self._scores_held_out else "dev"]

    @abstractmethod
    def _read(self, folder: Path) -> tuple[list[Example], list[Example], list[Example]]:
        """Training, held-out and dev sentences."""

    def _labelled(self, folder: Path, text: str, label: str, *, line: int, file: str) -> Example:
        """One sentence, its label 0 or 1 in the file."""
        if label not in ("0", "1"):
            raise ValueError(
                f"line {line} of {file} in {folder} must have the label 0 or 1, got {label!r}"
            )
        return Example(text.strip(), self.classes[int(label)])


class SST2(GlueSentences):
    """Whether a phrase of a film review is favourable (Socher et al. 2013): accuracy.

    Tables `sentence<TAB>label` with a header: `dev.tsv` and `train.tsv`, of whose fixed random
    order the last tenth is held out; or the training set as `train_90pct.tsv` and
    `train_10pct.tsv`, the second of which is.
    """

    name: ClassVar[str] = "sst-2"
    folder: ClassVar[str] = "glue/SST-2"
    files: ClassVar[tuple[str, ...]] = ("train.tsv", "train_90pct.tsv")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class 1 is favourable."""
        return ("negative", "positive")

    def _read(self, folder: Path) -> tuple[list[Example], list[Example], list[Example]]:
        dev = self._table(folder, "dev.tsv")
        try:
            whole = self._table(folder, "train.tsv")
        except FileNotFoundError:
            parts = [self._table(folder, f"train_{share}pct.tsv") for share in (90, 10)]
            return parts[0], parts[1], dev
        return *_parted(whole), dev

    def _table(self, folder: Path, file: str) -> list[Example]:
        header, *lines = _lines(folder, file)
        if header.split("\t") != ["sentence", "label"]:
            raise ValueError(f"{file} in {folder} must begin with the columns sentence, label")
        found: list[Example] = []
        for number, line in enumerate(lines, 2):
            text, _, label = line.rpartition("\t")
            found.append(self._labelled(folder, text, label, line=number, file=file))
        return found


class CoLA(GlueSentences):
    """Whether a sentence is acceptable English (Warstadt et al. 2019): Matthews correlation.

    `per_item` holds the class that was found.  Tables without header, source, label, mark and
    sentence: `dev.tsv` and `train.tsv`, of whose fixed random order the last tenth is held out.
    """

    name: ClassVar[str] = "cola"
    metric: ClassVar[str] = "matthews"
    folder: ClassVar[str] = "glue/CoLA"
    files: ClassVar[tuple[str, ...]] = ("train.tsv",)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class 1 is acceptable."""
        return ("unacceptable", "acceptable")

    def value_of(
        self, per_item: Float[np.ndarray, " items"], gold: Float[np.ndarray, " items"]
    ) -> float:
        """Matthews correlation: of two classes, Pearson's of their numbers; 0 where one is all."""
        return correlation(per_item, gold)

    def _judged(
        self, found: Float[np.ndarray, " items"], gold: Float[np.ndarray, " items"]
    ) -> Score:
        extra = {"accuracy": float((found == gold).mean())}
        return Score(self.value_of(found, gold), found, extra=extra, gold=gold)

    def _read(self, folder: Path) -> tuple[list[Example], list[Example], list[Example]]:
        return *_parted(self._table(folder, "train.tsv")), self._table(folder, "dev.tsv")

    def _table(self, folder: Path, file: str) -> list[Example]:
        found: list[Example] = []
        for number, line in enumerate(_lines(folder, file), 1):
            fields = line.split("\t")
            if len(fields) != 4:
                raise ValueError(
                    f"line {number} of {file} in {folder} is not source, label, mark, sentence"
                )
            found.append(self._labelled(folder, fields[3], fields[1], line=number, file=file))
        return found


def _lines(folder: Path, file: str) -> list[str]:
    return read_text(folder, file).replace("\r\n", "\n").removesuffix("\n").split("\n")


def _parted(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """All but the last tenth of a fixed random order, and that tenth."""
    order = choose(len(examples), None)
    first = len(order) - len(order) // 10
    return [examples[i] for i in order[:first]], [examples[i] for i in order[first:]]
