"""LRA ListOps: the value of a nested list operation of 500 to 2000 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64

from sparseloom.tasks.data import find_data, read_bytes
from sparseloom.tasks.listops import TOKENS, read_listops
from sparseloom.tasks.lra import Examples, LraTask, Split

_FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
_IDS = {token: i for i, token in enumerate(TOKENS, 1)}


class LraListOps(LraTask):
    """Ten classes.  Reads the published `basic_{train,val,test}.tsv` in `listops`.

    `python -m sparseloom.tasks.listops` draws such files.  Closing brackets are tokens, as in the
    published pipeline since it renames them (its first version lost every bracket).
    """

    name: ClassVar[str] = "lra-listops"

    def _find(self, data: Path | None) -> None:
        try:
            self._folder = find_data("listops", data, files=tuple(_FILES.values()))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; `python -m sparseloom.tasks.listops --out FOLDER` draws the files"
            ) from None

    def _read(self, split: Split) -> Examples:
        name = _FILES[split]
        expressions, values = read_listops(read_bytes(self._folder, name), name)
        ids = [np.array([_IDS[token] for token in tokens]) for tokens in expressions]
        return Examples(ids, np.array(values, dtype=np.int64))

    def _sequences(self, item: Any, length: int) -> list[Int64[np.ndarray, " tokens"]]:
        return [item[:length]]
