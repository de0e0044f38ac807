"""LRA Text: the sentiment of an IMDB review (Maas et al. 2011), read as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64

from sparseloom.tasks.data import find_data, read_bytes
from sparseloom.tasks.imdb import read_table
from sparseloom.tasks.lra import Examples, LraTask, Split, byte_tokens


class LraText(LraTask):
    """25,000 training and 25,000 test reviews; the test half doubles as validation (published).

    Reads the official folder (`aclImdb/{train,test}/{pos,neg}/ID_RATING.txt`) or tables
    `train.tsv` and `test.tsv` (label, rating, id, text; plain or gzip) in `imdb`.
    """

    name: ClassVar[str] = "lra-text"

    def _find(self, data: Path | None) -> None:
        try:
            self._folder = find_data("imdb", data, files=("test.tsv", "train.tsv"))
            self._tree = False
        except FileNotFoundError as tables:
            self._folder = find_tree(data, tables)
            self._tree = True

    def _read(self, split: Split) -> Examples:
        part = "train" if split == "train" else "test"
        if self._tree:
            return read_tree(self._folder / part)
        rows = list(read_table(read_bytes(self._folder, f"{part}.tsv")))
        labels = np.array([positive for positive, _ in rows], dtype=np.int64)
        return Examples([text for _, text in rows], labels)

    def _sequences(self, item: Any, length: int) -> list[Int64[np.ndarray, " tokens"]]:
        return [byte_tokens(item, length)]


def find_tree(data: Path | None, missing: FileNotFoundError) -> Path:
    """The folder that holds `train/pos`: aclImdb of the data folder, or the data folder itself."""
    try:
        folder = find_data("aclImdb", data)
    except FileNotFoundError:
        if data is None:
            raise missing from None
        folder = data
    if not (folder / "train" / "pos").is_dir():
        raise FileNotFoundError(f"{missing}; nor is there a folder aclImdb with train/pos")
    return folder


def read_tree(folder: Path) -> Examples:
    """Reviews of `folder/pos` and `folder/neg`, by number, the favourable first.

    Raises ValueError for a folder without reviews or a file of another name.
    """
    texts: list[bytes] = []
    labels: list[int] = []
    for label, kind in ((1, "pos"), (0, "neg")):
        files = sorted((folder / kind).glob("*.txt"), key=_number)
        if not files:
            raise ValueError(f"{folder / kind} holds no reviews (ID_RATING.txt)")
        texts += [file.read_bytes() for file in files]
        labels += [label] * len(files)
    return Examples(texts, np.array(labels, dtype=np.int64))


def _number(file: Path) -> int:
    try:
        return int(file.stem.split("_")[0])
    except ValueError:
        raise ValueError(f"{file} is not named ID_RATING.txt, as IMDB reviews are") from None
