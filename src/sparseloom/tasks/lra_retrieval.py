"""LRA Retrieval: does one paper cite the other?  Both are read as bytes, apart from each other.

The published data are pairs of the ACL Anthology Network (Radev et al. 2013).  Where they are
absent, citation pairs among the papers of CL-SciSumm / ScisummNet stand in for them: the same
question on the same kind of text, but 3,678 training pairs instead of 147,086; scores say so.
"""

from __future__ import annotations

import html
import re
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64

from sparseloom.tasks.data import find_data, find_file, read_bytes
from sparseloom.tasks.lra import Examples, LraTask, Split, byte_tokens

_AAN = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
_PAIRS = {"train": "pairs_train.tsv", "validation": "pairs_dev.tsv", "test": "pairs_test.tsv"}
_PAPERS = "papers_xml.tar.gz"


class LraRetrieval(LraTask):
    """Pairs of papers, class 1 where the first cites the second.

    Reads the published `new_aan_pairs.{train,eval,test}.tsv` (label, id, id, text, text) in `aan`,
    else `pairs_{train,dev,test}.tsv` (label, id, id) with `papers_xml.tar.gz` in `acl_scisumm`.
    """

    name: ClassVar[str] = "lra-retrieval"

    def _find(self, data: Path | None) -> None:
        self._papers: dict[str, bytes] | None = None
        try:
            self._folder = find_data("aan", data, files=tuple(_AAN.values()))
            self._stand_in = False
        except FileNotFoundError as published:
            try:
                self._folder = find_data("acl_scisumm", data, files=(_PAIRS["test"],))
            except FileNotFoundError as stand_in:
                raise FileNotFoundError(f"{published}; {stand_in}") from None
            self._stand_in = True

    def _read(self, split: Split) -> Examples:
        if not self._stand_in:
            return read_aan(read_bytes(self._folder, _AAN[split]), _AAN[split])
        if self._papers is None:
            self._papers = read_papers(self._folder)
        return read_pairs(read_bytes(self._folder, _PAIRS[split]), self._papers, _PAIRS[split])

    def _sequences(self, item: Any, length: int) -> list[Int64[np.ndarray, " tokens"]]:
        return [byte_tokens(text, length) for text in item]

    def _notes(self) -> tuple[str, ...]:
        if not self._stand_in:
            return ()
        return ("stand-in: citation pairs of CL-SciSumm papers instead of the AAN pairs",)


def read_aan(raw: bytes, name: str) -> Examples:
    """Pairs of a table label, id, id, text, text without a header; labels read `0.0` and `1.0`.

    Raises ValueError naming the first line that is something else.
    """
    texts: list[tuple[bytes, bytes]] = []
    labels: list[int] = []
    for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n"), 1):
        fields = line.split(b"\t", 4)
        if len(fields) != 5 or fields[0] not in {b"0.0", b"1.0", b"0", b"1"}:
            raise ValueError(f"line {number} of {name} is not label, id, id, text, text")
        labels.append(int(fields[0][:1]))
        texts.append((fields[3], fields[4]))
    return Examples(texts, np.array(labels, dtype=np.int64))


def read_pairs(raw: bytes, papers: dict[str, bytes], name: str) -> Examples:
    """Pairs of a table label, id1, id2 with a header, with the texts of `papers`.

    Raises ValueError naming the first line that is something else or whose paper is missing.
    """
    header, *lines = raw.removesuffix(b"\n").decode("utf-8", errors="replace").split("\n")
    if header.split("\t") != ["label", "id1", "id2"]:
        raise ValueError(f"{name} must begin with the columns label, id1, id2")
    texts: list[tuple[bytes, bytes]] = []
    labels: list[int] = []
    for number, line in enumerate(lines, 2):
        fields = line.split("\t")
        if len(fields) != 3 or fields[0] not in {"0", "1"}:
            raise ValueError(f"line {number} of {name} is not label, id1, id2")
        missing = [paper for paper in fields[1:] if paper not in papers]
        if missing:
            raise ValueError(f"line {number} of {name}: there is no paper {missing[0]!r}")
        labels.append(int(fields[0]))
        texts.append((papers[fields[1]], papers[fields[2]]))
    return Examples(texts, np.array(labels, dtype=np.int64))


def read_papers(folder: Path) -> dict[str, bytes]:
    """Plain text of every paper by its name, from the XML files of `papers_xml.tar.gz`.

    Raises ValueError when the archive is damaged.
    """
    path = find_file(folder, _PAPERS)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no {_PAPERS}")
    papers: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                stream = archive.extractfile(member)
                if stream is not None and member.name.endswith(".xml"):
                    papers[Path(member.name).stem] = plain_text(stream.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole tar.gz archive: {error}") from error
    return papers


def plain_text(xml: bytes) -> bytes:
    """The text of an XML file without its tags, with single spaces.

    The papers' own text was escaped before it was put into XML, so entities are resolved twice.
    """
    text = re.sub(r"<[^>]*>", " ", xml.decode("utf-8", errors="replace"))
    return " ".join(html.unescape(html.unescape(text)).split()).encode()
