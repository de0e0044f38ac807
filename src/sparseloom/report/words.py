"""A text drawn once per layer: pruned tokens fade out, importance is a shade behind the others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseloom.methods import Method
from sparseloom.report.html import Section, write_report
from sparseloom.results import ResultsFile

Row = Mapping[str, Any]

_LONGEST = 300  # characters of a text that is quoted


class Word(NamedTuple):
    """One token in one layer.

    Attributes:
        gap, text: what stands before it, and itself.
        alive: whether the layer reads it.
        shade: of the largest importance in this layer the square root of its share, in [0, 1]; a
            few tokens, [CLS] among them, would leave the others white without the root.
        rank: among those alive, from 1; 0 where it is not.
        new: whether the model wrote it.
    """

    gap: str
    text: str
    alive: bool
    shade: float
    rank: int
    new: bool


class Line(NamedTuple):
    """One layer: its number from 1, its words and its heads."""

    number: int
    words: tuple[Word, ...]
    heads: tuple[bool, ...]

    @property
    def tokens_alive(self) -> int:
        """Words that the layer reads."""
        return sum(word.alive for word in self.words)

    @property
    def heads_alive(self) -> int:
        """Heads that it computes."""
        return sum(self.heads)


def lines(row: Row) -> list[Line]:
    """The picture of one explained text (a row of `sparseloom explain`)."""
    found: list[Line] = []
    written = len(row["tokens"]) - row.get("written", 0)
    for number, layer in enumerate(row["layers"], 1):
        alive = [i for i, stays in enumerate(layer["alive"]) if stays]
        order = sorted(alive, key=lambda i: -layer["importance"][i])
        ranks = {token: rank for rank, token in enumerate(order, 1)}
        largest = max((layer["importance"][i] for i in alive), default=0.0) or 1.0
        words = tuple(
            Word(
                gap,
                text,
                i in ranks,
                math.sqrt(max(layer["importance"][i], 0.0) / largest) if i in ranks else 0.0,
                ranks.get(i, 0),
                i >= written,
            )
            for i, (gap, text) in enumerate(zip(row["gaps"], row["tokens"], strict=True))
        )
        found.append(Line(number, words, tuple(layer["heads"])))
    return found


def in_words(row: Row) -> str:
    """What the picture shows, for those who cannot see it."""
    drawn = lines(row)
    counts = ", ".join(f"{line.tokens_alive}" for line in drawn)
    heads = ", ".join(f"{line.heads_alive}" for line in drawn)
    return (
        f"Of {len(row['tokens'])} tokens the layers read {counts}; of {len(drawn[0].heads)} heads "
        f"they compute {heads}. The last layer reads: {_left(drawn[-1])}"
    )


def outcome(row: Row) -> str:
    """One sentence: what the whole and the pruned model answer."""
    if row["answer"] == "embedding":
        return f"The embedding of the pruned model has a cosine of {row['similarity']:.3f} with " \
            "that of the whole one."  # fmt: skip
    whole, pruned = (_answer(row["answer"], row[key]) for key in ("dense", "sparse"))
    same = row["dense"][0][0] == row["sparse"][0][0] and row["answer"] != "score"
    name = {"class": "Class", "score": "Score", "next token": "Next token"}[row["answer"]]
    return f"{name}: dense {whole}; pruned {pruned}{' (the same)' if same else ''}."


def write_words_page(path: Path, results: ResultsFile) -> None:
    """Write the page of `sparseloom explain`; it appears whole or not at all."""
    rows = [row.model_dump() for row in results.rows]
    decodes = any(row.get("written") for row in rows)
    write_report(
        path,
        title=f"What {rows[0]['model']} still reads",
        summary=_summary(rows),
        results={**results.model_dump(by_alias=True), "rows": rows},
        sections=[
            Section(f"{number}. {_short(row['text'])}", outcome(row), html=_drawing(row))
            for number, row in enumerate(rows, 1)
        ],
        notes=[
            f"Method: {Method.from_dict({'method': rows[0]['method'], **rows[0]['settings']})}",
            "Importance: attention probability received so far, summed over queries, heads and "
            "layers (Wang, Zhang, Han: SpAtten, HPCA 2021). It is what the next layer ranks by; "
            "the shade is the square root of its share of the largest.",
            *(
                ["The prompt is read whole. Shown is the step after it, which reads the cache with "
                 "one new token, underlined."] if decodes else []
            ),
        ],
        template="words",
    )  # fmt: skip


def _left(line: Line) -> str:
    """The words that a layer reads, dots between those that did not stand together."""
    found, gone = "", False
    for word in line.words:
        if word.alive:
            text = word.text.replace("↵\n", " ")
            found += (" … " if gone and found else "" if gone else word.gap) + text
        gone = not word.alive
    found = re.sub(r"… (?:… )+", "… ", " ".join(found.split()))
    return found if len(found) <= _LONGEST else found[:_LONGEST] + " …"


def _summary(rows: Sequence[Row]) -> list[str]:
    found = [
        "Each line is the text as one layer reads it. Pruned tokens fade out; the stronger the "
        "shade, the more attention a token has received so far."
    ]
    kept = [line.tokens_alive / len(line.words) for row in rows for line in lines(row)]
    found.append(f"Over all layers {sum(kept) / len(kept):.0%} of the tokens are read.")
    judged = [row for row in rows if row["answer"] in ("class", "next token")]
    if len(judged) > 1:
        same = sum(row["dense"][0][0] == row["sparse"][0][0] for row in judged)
        found.append(f"The pruned model answers as the whole one in {same} of {len(judged)} texts.")
    return found


def _drawing(row: Row) -> str:
    from sparseloom.report.html import environment

    template = environment().get_template("drawing.html.j2")
    return template.render(lines=lines(row), words=in_words(row))


def _answer(kind: str, best: Sequence[Sequence[Any]]) -> str:
    label, number = best[0]
    return f"{number:.3f}" if kind == "score" else f"“{label}” ({number:.1%})"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:77] + "…"
