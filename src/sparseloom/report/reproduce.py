"""The page of `sparseloom reproduce --html`: pictures of a paper's figures, and all rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparseloom.report.html import Section, write_report
from sparseloom.results import ResultsFile


def write_reproduce_page(
    path: Path, results: ResultsFile, *, title: str, sections: Sequence[Section]
) -> None:
    """Write the page; it appears whole or not at all."""
    rows = [row.model_dump() for row in results.rows]
    judged = [row for row in rows if row.get("within") is not None]
    summary = [f"{len(rows)} published numbers and statements beside ours."]
    if judged:
        good = sum(bool(row["within"]) for row in judged)
        summary.append(f"{good} of the {len(judged)} that have a tolerance are within it.")
    said = dict.fromkeys(line for row in rows for line in row.get("assumptions") or [])
    said |= dict.fromkeys(str(row["note"]) for row in rows if row.get("note"))
    write_report(
        path,
        title=title,
        summary=summary,
        results={**results.model_dump(by_alias=True), "rows": rows},
        sections=sections,
        notes=list(said),
        template="reproduce",
    )
