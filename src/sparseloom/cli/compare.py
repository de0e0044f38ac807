"""`sparseloom demo` and `sparseloom compare`: quality, speed and cost of methods side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseloom.cli.options import (
    Data,
    Json,
    Methods,
    Model,
    Seed,
    TaskName,
    Threads,
    command_line,
    set_threads,
)
from sparseloom.cli.output import (
    Column,
    Row,
    emit,
    format_number,
    number,
    percent,
    progress_console,
    settings_text,
    value,
)

if TYPE_CHECKING:
    from sparseloom.results import ResultsFile

DEFAULT_METHODS = ("oracle:sparsity=0.9", "window:sparsity=0.9")


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path(
        "sparseloom-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="One sparsity and less text: under a minute.")
    ] = False,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Train the predictor anew instead of the shipped one.")
    ] = False,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The main job on the built-in model and text: quality, speed, cost, and a report."""
    from sparseloom.experiments.demo import run_demo

    set_threads(threads)
    results = run_demo(
        out,
        quick=quick,
        adapt=adapt,
        seed=seed,
        command=command_line(),
        console=progress_console(),
    )
    files = [f"{out / 'report.html'}  open it in a browser", f"{out / 'results.json'}"]
    _show(results, as_json=as_json, notes=["", *files])


def compare(
    model: Model = "stdlib",
    task: TaskName = "stdlib",
    method: Methods = None,
    data: Data = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Items to score; default: all.")
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option("--machine", help="Accelerator to cost a pass on; may be repeated."),
    ] = None,
    diagnose: Annotated[
        bool, typer.Option(help="Measure prediction accuracy against the oracle.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the results to this file.")
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Score, time and cost methods on one model and one task; dense is always among them."""
    from sparseloom.experiments import compare as study
    from sparseloom.results import write_results

    set_threads(threads)
    done = study.compare(
        model,
        task,
        list(method or DEFAULT_METHODS),
        data=data,
        limit=limit,
        machines=machine or (),
        seed=seed,
        diagnose=diagnose,
        command=command_line(),
        console=progress_console(),
    )
    if out is not None:
        write_results(out, done.results)
    _show(done.results, as_json=as_json, notes=[] if out is None else ["", str(out)])


def _show(results: ResultsFile, *, as_json: bool, notes: list[str]) -> None:
    rows: list[Row] = json.loads(results.to_json())["rows"]
    machines = sorted({name for row in rows for name in row.get("cycles") or {}})
    metric = str(rows[0]["metric"]).replace("_", " ") if rows else "value"
    columns: list[Column] = [
        ("method", value("method")),
        ("settings", settings_text),
        ("density", percent("density")),
        (metric, number("value", 4)),
        ("difference", _difference),
        ("MACs", number("macs")),
        ("attention ms", number("attention_ms", 1)),
        ("model ms", number("model_ms", 1)),
        ("speed-up", _speedup),
        ("cost rule", value("rule")),
        ("oracle's mass", _mass),
        *((f"cycles {name}", _cycles(name)) for name in machines),
    ]
    said = sorted({str(row["note"]) for row in rows if row.get("note")})
    emit(results, as_json=as_json, columns=columns, notes=[*said, *notes])


def _difference(row: Row) -> str | None:
    if row["method"] == "dense" or row.get("dense_value") is None:
        return None
    return f"{row['value'] - row['dense_value']:+.4f}"


def _speedup(row: Row) -> str | None:
    dense, ours = row.get("dense_model_ms"), row.get("model_ms")
    return f"{dense / ours:.2f}×" if dense and ours else None


def _mass(row: Row) -> str | None:
    ours, best = row.get("retained_mass"), row.get("oracle_mass")
    if not ours or not best:
        return None
    return f"≥ {min(a / b for a, b in zip(ours, best, strict=True)):.1%}"


def _cycles(name: str) -> Callable[[Row], object]:
    return lambda row: format_number((row.get("cycles") or {}).get(name))
