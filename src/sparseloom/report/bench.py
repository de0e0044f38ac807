"""The report of `sparseloom bench`: figures and all rows on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseloom.report.figures import bench_curve, bench_figure, peak_figure
from sparseloom.report.html import Section, write_report
from sparseloom.results import ResultsFile


def write_bench_report(path: Path, results: ResultsFile) -> None:
    """Write the page; what the figures show depends on what varies."""
    rows = [row.model_dump() for row in results.rows]
    timed = [row for row in rows if row.get("op")]
    sparse = [row for row in timed if row.get("mask") is not None]
    axes = [axis for axis in ("sparsity", "q_len") if len({row[axis] for row in sparse}) > 1]
    sections = [
        Section(
            "Times as fast as dense SDPA in fp32",
            "Interleaved rounds in one process; medians.  Above the rule is faster than dense.",
            tuple(bench_figure(timed, axis) for axis in axes or ["q_len"]) if sparse else (),
        ),
        Section(
            "Share of the machine's arithmetic peak",
            "Operations on kept pairs per second over multiply-adds in registers per second.",
            (peak_figure(timed),),
        ),
    ]
    write_report(
        path,
        title=f"sparseloom bench {timed[0]['op'] if timed else ''}",
        summary=_summary(sparse),
        results={**results.model_dump(by_alias=True), "rows": rows},
        sections=sections,
        notes=_notes(rows),
        template="bench",
    )


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fastest row of each path."""
    lines: list[str] = []
    for path, what in (("given", "mask given"), ("whole", "prediction and selection included")):
        found = [row for row in rows if row["path"] == path and row.get("speedup")]
        if found:
            best = max(found, key=lambda row: row["speedup"])
            lines.append(
                f"{what}: up to {best['speedup']:.1f} times as fast as SDPA fp32 "
                f"({bench_curve(best, 'q_len')}, {best['q_len']} tokens)."
            )
    return lines


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    left_out = {
        f"{row['contender']}, {'×'.join(map(str, row['block_size']))}: {row['note']}"
        for row in rows
        if row.get("record") == "refused"
    }
    return ["Other programs on this machine disturb the times.", *sorted(left_out)]
