"""How long the inputs of the SpAtten benchmarks are, in WordPiece tokens.

    python -m sparseloom.experiments.lengths

SpAtten (HPCA 2021, §V-A) sets the input length of a BERT benchmark to the average length of the
task's dev set, and prints none. Here the dev sets on disk are tokenised with BERT's uncased
WordPiece vocabulary (the one in the packaged MiniLM): [CLS] first [SEP], or [CLS] first [SEP]
second [SEP], cut at BERT's 512 positions. The table that the benchmarks use is
`trace/spatten_benchmarks.yaml`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparseloom.experiments.study_command import NoSettings, run_command
from sparseloom.tasks.data import find_data, read_text

POSITIONS = 512

Text = tuple[str, ...]
"""One sentence, or the two of a pair."""


@dataclass(frozen=True, slots=True)
class DevSet:
    """Where a task's dev set lies, and how its inputs are read from the text of the file."""

    task: str
    folder: str
    file: str
    read: Callable[[str], Iterator[Text]]
    split: str = "dev"


def _columns(*names: str | int, header: bool = True) -> Callable[[str], Iterator[Text]]:
    """Reads columns of a tab-separated file, quotation marks being ordinary characters."""

    def read(text: str) -> Iterator[Text]:
        lines = [line.split("\t") for line in text.lstrip("\ufeff").splitlines() if line]
        head = lines[0] if header else []
        at = [name if isinstance(name, int) else head.index(name) for name in names]
        for line in lines[1:] if header else lines:
            yield tuple(line[i] for i in at)

    return read


def _comma_separated(text: str) -> Iterator[Text]:
    for row in csv.reader(io.StringIO(text, newline="")):
        yield row[0], row[1]


def _squad(answerable: bool) -> Callable[[str], Iterator[Text]]:
    """Question and context; v1.1 has no questions without an answer."""

    def read(text: str) -> Iterator[Text]:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    if question["answers"] or not answerable:
                        yield question["question"], paragraph["context"]

    return read


_MNLI = "1,000 pairs of the dev set, punctuation set apart"
_HALF = "half of the v2.0 dev set (6,078 questions)"

DEV_SETS = (
    DevSet("cola", "glue/CoLA", "dev.tsv", _columns(3, header=False)),
    DevSet("mnli-m", "glue/MNLI", "mnli_matched_1k.tsv", _columns(1, 2, header=False), _MNLI),
    DevSet("mnli-mm", "glue/MNLI", "mnli_mismatched_1k.tsv", _columns(1, 2, header=False), _MNLI),
    DevSet("mrpc", "glue/MRPC", "dev.tsv", _columns("#1 String", "#2 String")),
    DevSet("qnli", "glue/QNLI", "dev.tsv", _columns("question", "sentence")),
    DevSet("rte", "glue/RTE", "dev.tsv", _columns("sentence1", "sentence2")),
    DevSet("sst-2", "glue/SST-2", "dev.tsv", _columns("sentence")),
    DevSet("sts-b", "glue/STS-B", "stsb-en-dev.csv", _comma_separated),
    DevSet("squad1", "squad2", "dev-v2.0.json", _squad(answerable=True), f"answerable, {_HALF}"),
    DevSet("squad2", "squad2", "dev-v2.0.json", _squad(answerable=False), _HALF),
)
"""QQP is not among the data sets that the library knows where to look for."""


def measure(
    sets: Iterable[DevSet], count: Callable[[Sequence[Text]], Sequence[int]], data: Path | None
) -> list[dict[str, Any]]:
    """One row per dev set: mean, median and largest length in tokens.

    Args:
        sets: what to measure; `DEV_SETS` for all.
        count: tokens of each input, special ones included.
        data: folder of the data sets; default SPARSELOOM_DATA.

    Raises:
        FileNotFoundError: a data set is missing.
        ValueError: a file is not what it should be, or empty.
    """
    rows: list[dict[str, Any]] = []
    for one in sets:
        text = read_text(find_data(one.folder, data, files=(one.file,)), one.file)
        try:
            inputs = list(one.read(text))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{one.folder}/{one.file} cannot be read: {error}") from error
        if not inputs:
            raise ValueError(f"{one.folder}/{one.file} holds no inputs")
        whole = np.asarray(count(inputs))
        lengths = np.minimum(whole, POSITIONS)
        rows.append(
            {
                "record": "benchmark_length",
                "benchmark": one.task,
                "split": one.split,
                "inputs": len(inputs),
                "mean_tokens": float(lengths.mean()),
                "median_tokens": float(np.median(lengths)),
                "largest_tokens": int(whole.max()),
                "cut": int((whole > POSITIONS).sum()),
            }
        )
    return rows


def wordpiece_counter() -> Callable[[Sequence[Text]], list[int]]:
    """Counts tokens with BERT's uncased vocabulary, from the packaged MiniLM.

    Raises ImportError, naming the extra to install, where the package is absent.
    """
    from tokenizers import Tokenizer

    from sparseloom.models.minilm import minilm_folder

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(inputs: Sequence[Text]) -> list[int]:
        single = [text[0] if len(text) == 1 else text for text in inputs]
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(single)]

    return count


def main() -> None:
    """Command line of the measurement."""
    run_command(
        "lengths", __doc__, NoSettings(),
        lambda _settings, _out, data: measure(DEV_SETS, wordpiece_counter(), data),
        stored=lambda _: Path("results/benchmark_lengths.json"), keeps=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
