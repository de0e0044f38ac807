"""`sparseloom bench` and `sparseloom reproduce`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sparseloom.cli.options import Data, Json, Seed, Threads, command_line, set_threads
from sparseloom.cli.output import (
    Column,
    Row,
    emit,
    number,
    percent,
    progress_console,
    value,
)


class Operation(StrEnum):
    """What can be timed."""

    attention = "attention"


def bench(
    operation: Annotated[Operation, typer.Argument(help="What to time.")] = Operation.attention,
    q_len: Annotated[list[int], typer.Option("--q-len", help="Queries; may be repeated.")] = [2048],  # noqa: B006
    kv_len: Annotated[
        int | None, typer.Option("--kv-len", help="Keys; default: as many as queries.")
    ] = None,
    heads: Annotated[int, typer.Option("--heads", help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", help="Key and value heads; default: as queries.")
    ] = None,
    head_dim: Annotated[int, typer.Option("--head-dim", help="Width of a head.")] = 64,
    block_size: Annotated[
        list[str], typer.Option("--block-size", help="Queries x keys; may be repeated.")
    ] = ["1x1", "8x1", "64x64"],  # noqa: B006
    sparsity: Annotated[
        list[float], typer.Option("--sparsity", help="Share dropped; may be repeated.")
    ] = [0.9],  # noqa: B006
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16 or float16.")
    ] = "float32",
    causal: Annotated[bool, typer.Option(help="Causal attention.")] = True,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", help="May be repeated; default: all usable.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured rounds.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the results to this file.")
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time sparse attention against dense SDPA: interleaved rounds, medians, share of the peak."""
    from sparseloom.experiments.bench import AttentionCase, bench_attention
    from sparseloom.results import results, write_results

    set_threads(threads)
    cases = [
        AttentionCase(
            q_len=length,
            kv_len=kv_len or length,
            heads=heads,
            kv_heads=kv_heads or heads,
            head_dim=head_dim,
            block_size=_block_size(block),
            sparsity=share,
            dtype=dtype,
            causal=causal,
        )
        for length in q_len
        for block in block_size
        for share in sparsity
    ]
    console = progress_console()
    with console.status(operation.value) as status:
        rows = bench_attention(
            cases, backends=backend, repeats=repeats, seed=seed, progress=status.update
        )
    found = results(rows, command=command_line())
    if out is not None:
        write_results(out, found)
    columns: list[Column] = [
        ("tokens", lambda row: f"{row['q_len']}×{row['kv_len']}"),
        ("block", lambda row: "×".join(map(str, row["block_size"]))),
        ("path", value("path")),
        ("kernel", value("contender")),
        ("density", percent("density")),
        ("ms", number("ms", 2)),
        ("spread", percent("spread")),
        ("speed-up", _speedup),
        ("GFLOP/s", number("gflops", 1)),
        ("of peak", percent("peak_fraction")),
        ("GB/s", number("gbytes_s", 2)),
        ("why not", value("note")),
    ]
    emit(found, as_json=as_json, columns=columns)


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


def _block_size(text: str) -> tuple[int, int]:
    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"--block-size must be like 8x1 or 64x64, got {text!r}")
    return int(words[0]), int(words[1])


def _speedup(row: Row) -> str | None:
    return None if row.get("speedup") is None else f"{row['speedup']:.2f}×"


def _three(key: str) -> Callable[[Row], object]:
    return lambda row: row[key] if isinstance(row.get(key), str) else number(key)(row)


def _signed(difference: float | None) -> str | None:
    return None if difference is None else f"{difference:+.1%}"
