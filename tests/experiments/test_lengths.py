"""Lengths of dev sets: every file format by hand, with a tokenizer that splits at spaces."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from sparseloom.experiments.lengths import DEV_SETS, Text, measure


def words(inputs: Sequence[Text]) -> list[int]:
    """[CLS] and a [SEP] after each text."""
    return [1 + sum(len(text.split()) + 1 for text in one) for one in inputs]


FILES = {
    "glue/CoLA/dev.tsv": 'x\t1\t\tOne "two.\nx\t0\t*\tOne two three.\n',
    "glue/MRPC/dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\ta b\tc\n",
    "glue/STS-B/stsb-en-dev.csv": '"a, b",c d,5.0\n',
    "glue/MNLI/mnli_matched_1k.tsv": "neutral\ta\tb c d\n",
}
EXPECTED = {"cola": (2, 4.5), "mrpc": (1, 6.0), "sts-b": (1, 7.0), "mnli-m": (1, 7.0)}


def test_tables(tmp_path: Path) -> None:
    for name, text in FILES.items():
        file = tmp_path / f"{name}.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(text.encode()))
    chosen = [one for one in DEV_SETS if one.task in EXPECTED]
    rows = measure(chosen, words, tmp_path)
    assert {r["benchmark"]: (r["inputs"], r["mean_tokens"]) for r in rows} == EXPECTED


def test_squad_with_and_without_unanswerable_questions(tmp_path: Path) -> None:
    questions = [
        {"question": "who ?", "answers": [{"text": "a"}]},
        {"question": "who else was it ?", "answers": []},
    ]
    data = {"data": [{"paragraphs": [{"context": " ".join("c" * 600), "qas": questions}]}]}
    (tmp_path / "squad2").mkdir()
    (tmp_path / "squad2" / "dev-v2.0.json").write_text(json.dumps(data), encoding="utf-8")
    first, second = measure([one for one in DEV_SETS if "squad" in one.task], words, tmp_path)
    assert (first["inputs"], second["inputs"]) == (1, 2)
    # Longer than BERT's positions: cut, and counted.
    assert (first["mean_tokens"], first["largest_tokens"], first["cut"]) == (512.0, 605, 1)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "glue" / "CoLA").mkdir(parents=True)
    (tmp_path / "glue" / "CoLA" / "dev.tsv").write_text("only one column\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"glue/CoLA/dev\.tsv cannot be read"):
        measure(DEV_SETS[:1], words, tmp_path)
