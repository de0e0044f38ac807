"""`sparseloom entropy`: how spread out each head's attention is, and how much it moves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sparseloom.cli.options import Data, Json, Model, TaskName, Threads, command_line, set_threads
from sparseloom.cli.output import Column, emit, number, value


def entropy(
    model: Model = "stdlib",
    task: TaskName = "stdlib",
    data: Data = None,
    limit: Annotated[
        int, typer.Option("--limit", min=2, help="Texts that the model reads, dense.")
    ] = 16,
    every: Annotated[
        int,
        typer.Option("--every", min=1, help="Look at every so many query rows: 4 is every fourth."),
    ] = 4,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also draw a page of all heads to this file.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Entropy of the attention of every head: which heads a static mask suits, and which not."""
    from sparseloom.models import load_model
    from sparseloom.results import results
    from sparseloom.tasks import get_task
    from sparseloom.training.entropy_statistics import entropy_statistics

    set_threads(threads)
    scorer = get_task(task)
    scorer.load(data)
    loaded = load_model(model, head=scorer.head, classes=scorer.classes)
    heads = entropy_statistics(loaded.model, scorer.inputs(loaded, limit=limit), every=every)
    told = {"record": "entropy", "model": model, "data": task}
    found = results(
        [{**told, **dataclasses.asdict(head)} for head in heads], command=command_line()
    )
    notes: list[str] = []
    if html is not None:
        from sparseloom.report.entropy import write_entropy_page

        write_entropy_page(html, found)
        notes = ["", f"{html}  open it in a browser"]
    columns: list[Column] = [
        ("layer", value("layer")),
        ("head", value("head")),
        ("entropy", number("entropy")),
        ("of the mean row", number("mean_entropy")),
        ("decided by the input", number("mutual")),
        ("effective keys", number("effective_keys", 1)),
    ]
    emit(found, as_json=as_json, columns=columns, notes=notes)
