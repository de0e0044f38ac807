"""The page of `sparseloom simulate all`: every accelerator on one trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseloom.hardware.comparison import Run
from sparseloom.report.html import Section, write_report
from sparseloom.report.machine_figures import parts_figure, roofline_figure, speed_figure
from sparseloom.results import ResultsFile


def write_comparison_report(
    path: Path, results: ResultsFile, runs: Sequence[Run], notes: Sequence[str]
) -> None:
    """Write the page.

    Args:
        path: of the HTML file; it appears whole or not at all.
        results: one row per run, in the same order.
        runs: at one size and as published, with those that a machine refuses.
        notes: what the table rests on.
    """
    rows = [row.model_dump() for row in results.rows]
    write_report(
        path,
        title="Every accelerator on one trace",
        summary=_summary(rows),
        results={**results.model_dump(by_alias=True), "rows": rows},
        sections=_sections(rows, runs),
        notes=[line.removeprefix("- ") for line in notes],
        template="simulate_all",
    )


def _sections(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> list[Section]:
    pairs = list(zip(rows, runs, strict=True))
    sized = [
        (row, run)
        for row, run in pairs
        if run.report is not None and run.configuration == "one size"
    ]
    shown, names = [row for row, _ in sized], [_name(row) for row, _ in sized]
    found = [
        Section(
            "Times as fast as the dense baseline, at one size",
            "Time of the ideal dense array over each run's time; longer is faster. A bar in a row "
            "of unknown or unequal accuracy is no comparison: its name says so.",
            (speed_figure(shown, names),),
        )
    ]
    spent = [(name, run) for name, (_, run) in zip(names, sized, strict=True) if run.energy]
    if spent:
        found.append(
            Section(
                "Energy by component, at one size",
                "Scaled to the node of the comparison where a machine's own is another; tables "
                "differ between machines, so read which one each row names.",
                (
                    parts_figure(
                        [name for name, _ in spent],
                        [run.energy or {} for _, run in spent],
                        "energy",
                        "J",
                    ),
                ),
            )
        )
    done = [(row, run) for row, run in pairs if run.report is not None]
    text = "Lines are what the arrays and the memory of a machine allow, dots what was done."
    figure = roofline_figure([row for row, _ in done], [_name(row) for row, _ in done])
    found.append(Section("Roofline, at one size and as published", text, (figure,)))
    return found


def _name(row: dict[str, Any]) -> str:
    parts = [row["accelerator"], row["selection"]]
    if row["configuration"] != "one size":
        parts.append(row["configuration"])
    elif row["comparison"]:
        parts.append("no comparison")
    return " · ".join(parts)


def _summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    sized = [row for row in rows if row["configuration"] == "one size" and "seconds" in row]
    like = [row for row in sized[1:] if not row["comparison"]]
    lines = [
        f"{row['accelerator']} on {row['selection']}: "
        f"{row['times_as_fast_as_dense']:.3g}× as fast as the dense baseline of one size."
        for row in like
    ]
    unlike = len(sized) - 1 - len(like)
    if unlike:
        lines.append(
            f"{unlike} of {len(sized) - 1} runs at one size are no comparison with the dense "
            "baseline, because their accuracy is another or unknown."
        )
    refused = sum("seconds" not in row for row in rows)
    if refused:
        lines.append(f"{refused} runs were refused by their machine; the table says why.")
    return lines
