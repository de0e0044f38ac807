"""`sparseloom reproduce`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sparseloom.cli.options import Data, Json, command_line
from sparseloom.cli.output import Column, Row, emit, number, progress_console, value

if TYPE_CHECKING:
    from sparseloom.experiments.reproduce import Table
    from sparseloom.results import ResultsFile


def reproduce(
    paper: Annotated[str | None, typer.Argument(help="Paper; without one, what there is.")] = None,
    table: Annotated[str | None, typer.Argument(help="Table or figure; default: all.")] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Make stored runs anew; one that was stopped goes on.")
    ] = False,
    size: Annotated[
        str, typer.Option("--size", help="With --run: small (two CPU cores) or paper (a GPU).")
    ] = "small",
    device: Annotated[
        str,
        typer.Option("--device", help="With --run: cpu or cuda, where the study has a run on it."),
    ] = "cpu",
    data: Data = None,
    stored: Annotated[
        Path, typer.Option("--results", help="Folder that holds the stored runs.")
    ] = Path("results"),
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the results to this file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also draw a page of figures to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Published numbers beside ours, the difference, and what is not modelled.

    Without a table, those whose stored runs are not there are left out, and named.
    """
    from sparseloom.experiments.reproduce import (
        DEVICES,
        SIZES,
        Request,
        find_tables,
        is_stored,
        missing_files,
    )
    from sparseloom.experiments.reproduce import reproduce as make
    from sparseloom.results import results, write_results

    if size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {size!r}")
    if device not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, got {device!r}")
    if not run and (size != "small" or device != "cpu"):
        raise ValueError(f"--size and --device belong to --run, got {size} and {device} without it")
    chosen = find_tables(paper, table)
    if run and device != "cpu" and table is None:
        chosen = [one for one in chosen if any(s.device == device for s in one.studies)]
    if paper is None:
        rows = [
            {"record": "table", "name": f"{one.paper} {one.name}", "title": one.title}
            for one in chosen
        ]
        found = results(rows, command=command_line())
        emit(found, as_json=as_json, columns=[("table", value("name")), ("", value("title"))])
        return
    progress = progress_console()
    request = Request(
        size=cast("Any", size), data=data, step=progress.print, device=cast("Any", device)
    )
    rows: list[Row] = []
    for one in chosen:
        absent = [] if run else missing_files(one, stored)
        if not run and not is_stored(one, stored) and len(chosen) > 1:
            progress.print(f"left out: {one.name}, which needs {' or '.join(absent)} in {stored}")
            continue
        rows += make(one, run=run, request=request, results=stored, command=command_line())
        if absent:
            progress.print(f"{one.name}: without {', '.join(absent)}, not in {stored}")
    found = results(rows, command=command_line())
    if out is not None:
        write_results(out, found)
    if html is not None:
        _draw(html, chosen, stored, found)
    columns: list[Column] = [
        ("table", value("table")),
        ("quantity", value("quantity")),
        ("published", _three("published")),
        ("ours", _three("ours")),
        ("difference", lambda row: _signed(row.get("difference"))),
        ("within", value("within")),
        ("basis", value("basis")),
    ]
    said = dict.fromkeys(str(line) for row in rows for line in row.get("assumptions") or [])
    said |= dict.fromkeys(str(row["note"]) for row in rows if row.get("note"))
    emit(found, as_json=as_json, columns=columns, notes=["", *(f"- {line}" for line in said)])


def _draw(page: Path, tables: Sequence[Table], stored: Path, found: ResultsFile) -> None:
    """The page of those tables that can be drawn and have what they need."""
    from sparseloom.experiments.reproduce import is_stored, stored_rows
    from sparseloom.report.reproduce import write_reproduce_page

    drawn = [one for one in tables if one.pictures is not None]
    sections = [
        section
        for one in drawn
        if one.pictures is not None and is_stored(one, stored)
        for section in one.pictures(stored_rows(one, stored) if one.studies else [])
    ]
    if not sections:
        names = ", ".join(one.name for one in tables)
        raise ValueError(f"--html: nothing to draw for {names}")
    write_reproduce_page(page, found, title=f"{tables[0].paper} beside ours", sections=sections)


def _three(key: str) -> Callable[[Row], object]:
    return lambda row: row[key] if isinstance(row.get(key), str) else number(key)(row)


def _signed(difference: float | None) -> str | None:
    return None if difference is None else f"{difference:+.1%}"
