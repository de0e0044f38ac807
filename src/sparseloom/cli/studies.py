"""`sparseloom reproduce`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sparseloom.cli.options import Data, Json, command_line
from sparseloom.cli.output import Column, Row, emit, number, value


def reproduce(
    paper: Annotated[str | None, typer.Argument(help="Paper; without one, what there is.")] = None,
    table: Annotated[str | None, typer.Argument(help="Table or figure; default: all.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Make stored runs anew.")] = False,
    data: Data = None,
    stored: Annotated[
        Path, typer.Option("--results", help="Folder that holds the stored runs.")
    ] = Path("results"),
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the results to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Published numbers beside ours, the difference, and what is not modelled."""
    from sparseloom.experiments.reproduce import find_tables
    from sparseloom.experiments.reproduce import reproduce as make
    from sparseloom.results import results, write_results

    chosen = find_tables(paper, table)
    if paper is None:
        rows = [
            {"record": "table", "name": f"{one.paper} {one.name}", "title": one.title}
            for one in chosen
        ]
        found = results(rows, command=command_line())
        emit(found, as_json=as_json, columns=[("table", value("name")), ("", value("title"))])
        return
    rows = [row for one in chosen for row in make(one, run=run, data=data, results=stored)]
    found = results(rows, command=command_line())
    if out is not None:
        write_results(out, found)
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


def _three(key: str) -> Callable[[Row], object]:
    return lambda row: row[key] if isinstance(row.get(key), str) else number(key)(row)


def _signed(difference: float | None) -> str | None:
    return None if difference is None else f"{difference:+.1%}"
