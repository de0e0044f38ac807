"""`sparseloom trace`: what ran, and what each method kept of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    emit,
    number,
    percent,
    progress_console,
    value,
)

if TYPE_CHECKING:
    from sparseloom.methods import Method
    from sparseloom.models import LoadedModel
    from sparseloom.tasks import Task
    from sparseloom.trace import Trace

DEFAULT_METHODS = ("oracle:sparsity=0.9",)
_QUALITY = ("metric", "value", "dense_value", "items")


def trace(
    out: Annotated[Path, typer.Option("--out", help="Folder of the trace.")],
    model: Model = "stdlib",
    method: Methods = None,
    task: TaskName = "stdlib",
    data: Data = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="A text file instead of the task's sample.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens at most; default: the model's.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=0, help="Tokens to generate after the text.")
    ] = 0,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Also store queries, keys and values.")
    ] = False,
    score: Annotated[
        int | None,
        typer.Option(
            "--score",
            min=1,
            help="Also score dense and each method on so many items of --task, so that "
            "`simulate all` shows accuracy beside cycles.",
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="Also write generation as a CSV file of SpAtten's authors."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in --out.")
    ] = False,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Record one pass: the operators, and what each method keeps of every attention."""
    from sparseloom.experiments.compare import with_predictor
    from sparseloom.integrations import record
    from sparseloom.methods import Calibrated, DynamicSparse, parse_method
    from sparseloom.models import load_model
    from sparseloom.results import results
    from sparseloom.tasks import get_task
    from sparseloom.trace import Trace
    from sparseloom.trace.summary import shares

    if out.exists() and not overwrite:
        raise FileExistsError(f"--out {out} exists: choose another folder or pass --overwrite")
    import torch

    torch.manual_seed(seed)
    set_threads(threads)
    methods = [parse_method(words) for words in method or DEFAULT_METHODS]
    if csv is not None and (len(methods) > 1 or not new_tokens):
        raise ValueError(
            "--csv needs one --method and --new-tokens: a file has one selection of generation, "
            f"got {len(methods)} and {new_tokens}"
        )
    if score is not None and text is not None:
        raise ValueError("--score takes the items of --task, and --text has none: leave one out")
    if csv is not None and csv.exists() and not overwrite:
        raise FileExistsError(f"--csv {csv} exists: choose another file or pass --overwrite")
    scorer: Task | None = None
    calibrates = any(
        (isinstance(one, Calibrated) and one.needs_calibration)
        or (isinstance(one, DynamicSparse) and one.needs_thresholds)
        for one in methods
    )
    if score is not None or calibrates:
        scorer = get_task(task)
        scorer.load(data)
    if scorer is None or score is None:
        loaded = load_model(model)
    else:
        loaded = load_model(model, head=scorer.head, classes=scorer.classes)
    methods = [with_predictor(chosen, loaded, scorer, seed=seed) for chosen in methods]
    inputs = _inputs(loaded, task=task, data=data, text=text, length=length)
    recorded: Trace | None = None
    console = progress_console()
    for chosen in methods:
        with console.status(f"recording {chosen}"):
            one = record(loaded.model, chosen, inputs, tensors=tensors, new_tokens=new_tokens)
        if recorded is None:
            recorded = one
        else:
            recorded = Trace(
                recorded.workload, {**recorded.selections, **one.selections}, recorded.tensors
            )
    assert recorded is not None
    if scorer is not None and score is not None:
        with console.status("scoring"):
            recorded = _scored(recorded, loaded, methods, scorer, score)
    recorded.save(out, overwrite=overwrite)
    if csv is not None:
        recorded.to_spatten_csv(csv)
    allowed = sum(int(pairs.sum()) for pairs in recorded.allowed_pairs())
    rows: list[dict[str, Any]] = []
    for name in recorded.selections:
        kept = sum(int(pairs.sum()) for pairs in recorded.kept_pairs(name))
        rows.append(
            {
                "record": "trace",
                "model": model,
                "trace": str(out),
                "selection": name,
                "density": kept / allowed if allowed else 0.0,
                "kept_pairs": kept,
                "allowed_pairs": allowed,
                "operators": len(recorded.workload.operators),
                "attention_calls": len(recorded.workload.attention()),
                **shares(recorded.workload, recorded.selection(name)),
                **_quality(recorded, name),
                "seed": seed,
            }
        )
    columns: list[Column] = [
        ("selection", value("selection")),
        ("density", percent("density")),
        (scorer.metric if scorer else "value", number("value", 4)),
        ("dense", number("dense_value", 4)),
        ("tokens alive", percent("tokens_alive")),
        ("heads alive", percent("heads_alive")),
        ("values read", percent("values_read")),
        ("rows with low bits", percent("low_rows")),
        ("kept pairs", number("kept_pairs")),
        ("attention calls", value("attention_calls")),
        ("operators", value("operators")),
    ]
    emit(
        results(rows, command=command_line()),
        as_json=as_json,
        columns=columns,
        notes=["", f"{out}  cost it with: sparseloom simulate dota_asplos_2022 {out}"],
    )


def _scored(
    recorded: Trace, loaded: LoadedModel, methods: list[Method], scorer: Task, items: int
) -> Trace:
    """The trace with the quality of each selection, measured on the same items as dense."""
    from sparseloom.integrations import sparsify

    dense = scorer.score(loaded, limit=items)
    selections = dict(recorded.selections)
    for name, method in zip(recorded.selections, methods, strict=True):
        with sparsify(loaded.model, method, when="always"):
            found = scorer.score(loaded, limit=items)
        quality = {
            "metric": scorer.metric,
            "value": float(found.value),
            "dense_value": float(dense.value),
            "items": found.items,
        }
        selections[name] = replace(selections[name], quality=quality)
    return replace(recorded, selections=selections)


def _quality(recorded: Trace, name: str) -> dict[str, Any]:
    quality = recorded.selections[name].quality
    return {key: quality[key] for key in _QUALITY if key in quality}


def _inputs(
    loaded: LoadedModel, *, task: str, data: Path | None, text: Path | None, length: int | None
) -> dict[str, Any]:
    """One sequence for the model: the start of a text file, or the task's sample."""
    import torch

    from sparseloom.tasks import get_task

    longest = min(length or loaded.context, loaded.context)
    if text is None:
        scorer = get_task(task)
        scorer.load(data)
        sample = scorer.sample(loaded)
        return {key: tensor[:, :longest] for key, tensor in sample.items()}
    raw = text.read_bytes()
    if not raw:
        raise ValueError(f"--text {text} is empty")
    if loaded.tokenizer is None:
        tokens = torch.tensor([list(raw[:longest])])
        return {"input_ids": tokens}
    encoded = loaded.tokenizer(
        raw.decode("utf-8", errors="replace"),
        truncation=True,
        max_length=longest,
        return_tensors="pt",
    )
    return {key: encoded[key] for key in ("input_ids", "attention_mask") if key in encoded}
