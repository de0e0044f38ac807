"""`sparseloom search`: the settings of a pruning method that compute least within a bound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseloom.cli.options import (
    Data,
    Json,
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
    number,
    percent,
    progress_console,
    settings_text,
    value,
)


def search(
    method: Annotated[str, typer.Argument(help="What is searched: spatten.")] = "spatten",
    model: Model = "minilm",
    task: TaskName = "sts-b",
    loss: Annotated[
        float,
        typer.Option("--loss", min=0.0, help="Points (hundredths) of the metric to lose at most."),
    ] = 1.0,
    trials: Annotated[
        int,
        typer.Option("--trials", min=1, help="Settings to try, earlier ones in --out included."),
    ] = 40,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Items to score; default: all.")
    ] = 1000,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder that keeps the trials, to go on later, and the results."
        ),
    ] = None,
    data: Data = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Search the settings of a pruning method that compute least while quality stays in a bound."""
    from sparseloom.experiments import search as study
    from sparseloom.methods import format_method

    set_threads(threads)
    found = study.search(
        model,
        task,
        method=method,
        loss=loss,
        trials=trials,
        limit=limit,
        data=data,
        out=out,
        seed=seed,
        command=command_line(),
        console=progress_console(),
    )
    columns: list[Column] = [
        ("", lambda row: "best" if row["best"] else None),
        ("settings", settings_text),
        ("MACs left", percent("macs_left")),
        ("tokens", percent("tokens_alive")),
        ("heads", percent("heads_alive")),
        ("metric", value("metric")),
        ("value", number("value", 4)),
        ("dense", number("dense_value", 4)),
        ("points lost", number("loss", 2)),
        ("at most (95 %)", number("loss_upper95", 2)),
    ]
    said = (
        f"no setting tried lost at most {loss:g} points: more --trials, or fine-tune with pruning"
        if found.best is None
        else f"--method {format_method(found.best)}"
    )
    rows = found.results.model_dump()["rows"]
    notes = [
        "",
        f"{len(rows)} settings {rows[0]['note']}; shown: none computes and loses less",
        said,
    ]
    if out is not None:
        notes.append(str(out / "search.json"))
    emit(found.results, as_json=as_json, columns=columns, notes=notes, only=_on_the_front)


def _on_the_front(row: Row) -> bool:
    return bool(row["pareto"] or row["best"])
