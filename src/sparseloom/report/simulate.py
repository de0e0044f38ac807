"""The page of `sparseloom simulate`: what each run took, and where it went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseloom.hardware.report import Report
from sparseloom.report.html import Section, write_report
from sparseloom.report.machine_figures import (
    parts_figure,
    roofline_figure,
    speed_figure,
    timeline_figure,
    unit_cycles_figure,
)
from sparseloom.results import ResultsFile


def write_simulate_report(path: Path, results: ResultsFile, reports: Sequence[Report]) -> None:
    """Write the page.

    Args:
        path: of the HTML file; it appears whole or not at all.
        results: one row per report, in the same order.
        reports: the runs.
    """
    rows = [row.model_dump() for row in results.rows]
    names = run_names(rows)
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    write_report(
        path,
        title=f"Simulated: {machines[0] if len(machines) == 1 else f'{len(machines)} machines'}",
        summary=_summary(rows, names),
        results={**results.model_dump(by_alias=True), "rows": rows},
        sections=_sections(rows, reports, names),
        notes=_notes(rows),
        template="simulate",
    )


def run_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What tells a run from the others: machine, trace and selection, where they differ.

    A machine that appears with several settings shows the start of its hash.
    """
    keys = [key for key in ("machine", "trace", "selection") if len({row[key] for row in rows}) > 1]
    settings = {(row["machine"], row["config_hash"]) for row in rows}
    several = len(settings) > len({machine for machine, _ in settings})
    found: list[str] = []
    for row in rows:
        parts = [Path(row[key]).name if key == "trace" else row[key] for key in keys]
        if several:
            parts.insert(1 if "machine" in keys else 0, row["config_hash"][:6])
        found.append(" · ".join(parts or [row["machine"]]))
    return found


def _sections(
    rows: list[dict[str, Any]], reports: Sequence[Report], names: list[str]
) -> list[Section]:
    found: list[Section] = []
    if len(rows) > 1:
        found.append(
            Section(
                "Times as fast as the first run",
                "Time of the first run on the same trace over each run's time; longer is faster.",
                (speed_figure(rows, names),),
            )
        )
    energy = [report.energy for report in reports]
    if any(sum(parts.values()) for parts in energy):
        found.append(
            Section(
                "Energy by component",
                f"Counted actions times the named tables ({_listed(rows, 'energy_table')}).",
                (parts_figure(names, energy, "energy", "J"),),
            )
        )
    # One machine has one area, however many runs it makes.
    machines = {
        (row["machine"], row["config_hash"]): report
        for row, report in zip(rows, reports, strict=True)
        if report.total_area
    }
    if machines:
        areas = [report.area for report in machines.values()]
        titles = [report.machine for report in machines.values()]
        text = "Of the whole machine at its own node; shares say nothing about activity."
        found.append(Section("Area by module", text, (parts_figure(titles, areas, "area", "mm²"),)))
    found.append(
        Section(
            "Roofline",
            "Operations per byte against operations per second, a multiply-accumulate counting as "
            "two.  Lines are what the machine's arrays and memory allow, dots are what was done.",
            (roofline_figure(rows, names),),
        )
    )
    for name, report in zip(names, reports, strict=True):
        if report.unit_cycles:
            text = "Every unit's cycles by what it did; they add up to the cycles simulated."
            title = f"What the units did: {name}"
            found.append(Section(title, text, (unit_cycles_figure(report),)))
        if report.events is not None:
            start, end = report.events.window
            end = min(end, int(report.events.intervals[:, 3].max(initial=start + 1)))
            dropped = report.events.dropped
            text = "The state that fills most of each cell; `--timeline` shows every interval." + (
                f"  {dropped} intervals did not fit into the log." if dropped else ""
            )
            title = f"Cycles {start} to {end}: {name}"
            found.append(Section(title, text, (timeline_figure(report),)))
    return found


def _summary(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    lines: list[str] = []
    for row, name in list(zip(rows, names, strict=True))[:8]:
        energy = sum(row["energy_j"].values())
        text = f"{name}: {row['cycles']:,} cycles, {row['seconds'] * 1e3:.4g} ms"
        text += f", {energy * 1e3:.4g} mJ" if energy else ""
        stalls = sorted(row["stalls"].items(), key=lambda item: -item[1])
        if stalls and row["fidelity"] == "cycle":
            text += f"; most stalled unit-cycles: {stalls[0][0]} ({stalls[0][1]:,})"
        lines.append(text + ".")
    if len(rows) > len(lines):
        lines.append(f"… and {len(rows) - len(lines)} more in the table.")
    return lines


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    several = len({row["machine"] for row in rows}) > 1
    found: dict[str, None] = {}
    for row in rows:
        for sentence in row["assumptions"]:
            found[f"{row['machine']}: {sentence}" if several else sentence] = None
    return list(found)


def _listed(rows: list[dict[str, Any]], key: str) -> str:
    return "; ".join(dict.fromkeys(row[key] for row in rows))
