"""`sparseloom simulate all`: every accelerator on one trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseloom.cli.options import command_line
from sparseloom.cli.output import Column, Row, emit, number, progress_console, value

if TYPE_CHECKING:
    from sparseloom.hardware.comparison import Budget, Run


def simulate_all(
    traces: Sequence[str],
    *,
    selections: Sequence[str] | None,
    fidelity: str,
    seed: int,
    within: float,
    html: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """One table: attention of each trace on every accelerator, at one size and as published."""
    from sparseloom.hardware import comparison as study
    from sparseloom.results import results, write_results
    from sparseloom.trace.sources import open_trace

    if within < 0:
        raise ValueError(f"--within must be at least 0, got {within}")
    chosen = study.load_comparison()
    opened = [(source, open_trace(source, "attention")) for source in dict.fromkeys(traces)]
    rows: list[dict[str, Any]] = []
    done: list[Run] = []
    console = progress_console()
    with console.status("") as status:
        for source, trace in opened:
            found: list[Run] = []
            for run in study.runs(chosen, trace, selections, fidelity=fidelity, seed=seed):
                status.update(f"{run.accelerator.name}, {source} {run.selection}")
                found.append(run)
            rows += study.rows(found, chosen.budget, trace=source, within=within)
            done += found
    made = results(rows, command=command_line())
    notes = said(rows, chosen.budget, within)
    if out is not None:
        write_results(out, made)
    if html is not None:
        from sparseloom.report.simulate_all import write_comparison_report

        write_comparison_report(html, made, done, notes)
    files = [str(file) for file in (out, html) if file is not None]
    emit(made, as_json=as_json, columns=_columns(rows), notes=["", *notes, *files])


def said(rows: Sequence[dict[str, Any]], budget: Budget, within: float) -> list[str]:
    """What a reader must know to judge the table, as sentences."""
    from sparseloom.hardware.comparison import SCALING

    lines = [
        f"- one size: {budget.multipliers} multipliers, {budget.gbytes_per_second:g} GB/s, "
        f"{budget.clock_ghz:g} GHz; {SCALING.format(node=budget.node_nm)}",
        "- a multiplier counts once, whatever its width: the column of operands says how wide",
        "- attention alone; a selection of another method is costed as if the machine had found it",
        "- two rows may be compared where they compute the same, or where their accuracies are "
        + ("equal" if within == 0 else f"known and within {within:g}")
        + "; one whose accuracy is unknown compares with nothing that computes otherwise",
    ]
    refused = {
        (row["accelerator"], row["configuration"], row["selection"]): row["reason"]
        for row in rows
        if row.get("record") == "refused"
    }
    lines += [
        f"- {name}, {size}, cannot run {selection}: {reason}"
        for (name, size, selection), reason in refused.items()
    ]
    assumed: dict[str, dict[str, None]] = {}
    for row in rows:
        if "assumptions" in row:
            assumed.setdefault(row["accelerator"], {}).update(dict.fromkeys(row["assumptions"]))
    for name, sentences in assumed.items():
        lines += [f"{name}:", *(f"- {sentence}" for sentence in sentences)]
    return lines


def _columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    several = len({row["trace"] for row in rows}) > 1
    metrics = {row["metric"] for row in rows if row.get("metric")}
    metric = metrics.pop().replace("_", " ") if len(metrics) == 1 else "accuracy"
    return [
        ("trace", value("trace") if several else value("")),
        ("accelerator", value("accelerator")),
        ("configuration", value("configuration")),
        ("selection", value("selection")),
        ("computes", value("computes")),
        (metric, _accuracy),
        ("fidelity", value("fidelity")),
        ("cycles", _cycles),
        ("time", _time),
        ("against dense", _times),
        ("comparison", value("comparison")),
        ("energy", _energy),
        ("area mm²", number("area_at_node_mm2", 2)),
        ("size", _size),
        ("operands", value("operands")),
    ]


def _accuracy(row: Row) -> str:
    found = row.get("value")
    return "unknown" if found is None else f"{found:.4f}"


def _cycles(row: Row) -> object:
    return "cannot run it, see below" if row.get("record") == "refused" else number("cycles")(row)


def _time(row: Row) -> str | None:
    seconds = row.get("seconds")
    return None if seconds is None else f"{seconds * 1e3:.4g} ms"


def _times(row: Row) -> str | None:
    times = row.get("times_as_fast_as_dense")
    return None if times is None else f"{times:.3g}× as fast"


def _energy(row: Row) -> str | None:
    joules = row.get("energy_at_node_j")
    return f"{joules * 1e3:.4g} mJ" if joules else None


def _size(row: Row) -> str:
    if row.get("multipliers") is None:
        return f"{row['node_nm']} nm"
    return (
        f"{row['multipliers']:,.0f} multipliers, {row['gbytes_per_second']:,.0f} GB/s, "
        f"{row['node_nm']} nm"
    )
