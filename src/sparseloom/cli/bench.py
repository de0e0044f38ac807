"""`sparseloom bench`: times on this machine, and the cost rule that follows from them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseloom.cli.options import Json, Seed, Threads, command_line, set_threads
from sparseloom.cli.output import Column, Row, emit, number, percent, progress_console, value

if TYPE_CHECKING:
    from sparseloom.experiments.bench_cases import AttentionCase
    from sparseloom.mask import SparseMask
    from sparseloom.results import ResultsFile


class Operation(StrEnum):
    """What can be timed."""

    attention = "attention"
    predict = "predict"
    decode = "decode"


def bench(
    operation: Annotated[Operation, typer.Argument(help="What to time.")] = Operation.attention,
    q_len: Annotated[
        list[int] | None,
        typer.Option("--q-len", help="Queries; may be repeated; default: 2048, for decode 1."),
    ] = None,
    kv_len: Annotated[
        list[int] | None,
        typer.Option("--kv-len", help="Keys; default: as many as queries, for decode 32768."),
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
        list[str], typer.Option("--dtype", help="float32, bfloat16, float16; may be repeated.")
    ] = ["float32"],  # noqa: B006
    causal: Annotated[bool, typer.Option(help="Causal attention.")] = True,
    mask: Annotated[
        list[str],
        typer.Option(
            "--mask",
            help="random, model (what the built-in model keeps) or trace:DIR; may be repeated.",
        ),
    ] = ["random"],  # noqa: B006
    pooling: Annotated[
        list[str],
        typer.Option(
            "--pooling",
            help="How prediction ranks key blocks: mass, max, mean; may be repeated.",
        ),
    ] = ["mass"],  # noqa: B006
    gradients: Annotated[bool, typer.Option("--gradients", help="Forward and backward.")] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            help="Kernels, and PyTorch's own: masked (SDPA with a boolean mask), csr "
            "(torch.sparse); may be repeated; default: all usable.",
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Peak memory too, each in a process of its own.")
    ] = False,
    kept: Annotated[
        float, typer.Option("--kept", help="decode: share of the keys in the lists of kept ones.")
    ] = 0.28,
    value_keep: Annotated[
        float, typer.Option("--value-keep", help="decode: share of those whose values are read.")
    ] = 0.2,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured rounds.")] = 5,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Instead: measure what the cost rule goes by (minutes)."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the results to this .json or .csv.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also write figures to this .html.")
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time attention, prediction or decoding against dense SDPA, beside this machine's peaks."""
    from sparseloom.experiments import bench as study
    from sparseloom.results import results

    set_threads(threads)
    if calibrate:
        _calibrate(repeats, seed=seed, as_json=as_json)
        return
    masks: dict[str, SparseMask] = {}
    cases: list[AttentionCase] = []
    with progress_console().status(operation.value) as status:
        if operation is Operation.decode:
            rows = _decode(
                q_len or [1], kv_len or [32768], heads, kv_heads, head_dim, kept, value_keep,
                repeats, seed, status.update,
            )  # fmt: skip
        else:
            cases = _cases(
                q_len or [2048], kv_len, heads, kv_heads, head_dim, block_size, sparsity, dtype,
                causal, mask, pooling, gradients, masks,
            )  # fmt: skip
            if operation is Operation.predict:
                rows = study.bench_predict(
                    cases, repeats=repeats, seed=seed, progress=status.update
                )
            else:
                rows = study.bench_attention(
                    cases, backends=backend, repeats=repeats, seed=seed, memory=memory,
                    masks=masks, progress=status.update,
                )  # fmt: skip
    found = results(rows, command=command_line())
    files = _write(found, out, plot)
    notes = ["", *_peaks(rows), *(study.rule_lines(cases, seed) if cases else []), *files]
    emit(found, as_json=as_json, columns=_COLUMNS, notes=notes, only=_is_timed)


def _cases(
    q_lens: Sequence[int],
    kv_lens: Sequence[int] | None,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    blocks: Sequence[str],
    sparsities: Sequence[float],
    dtypes: Sequence[str],
    causal: bool,
    sources: Sequence[str],
    poolings: Sequence[str],
    gradients: bool,
    masks: dict[str, SparseMask],
) -> list[AttentionCase]:
    """Every combination; masks out of traces are put into `masks`, with cases of their sizes."""
    from sparseloom.experiments.bench_cases import AttentionCase
    from sparseloom.experiments.bench_masks import trace_masks

    cases: list[AttentionCase] = []
    common: dict[str, Any] = {"head_dim": head_dim, "gradients": gradients}
    for source in sources:
        kind, _, folder = source.partition(":")
        if kind == "trace" and folder:
            for name, (mask, is_causal) in trace_masks(Path(folder)).items():
                masks[f"trace {name}"] = mask
                cases += [
                    AttentionCase(
                        q_len=mask.q_len,
                        kv_len=mask.kv_len,
                        heads=mask.heads,
                        kv_heads=mask.heads,
                        block_size=mask.block_size,
                        sparsity=1 - mask.density(is_causal=is_causal),
                        dtype=dtype,
                        causal=is_causal,
                        mask=f"trace {name}",
                        pooling=pooling,
                        **common,
                    )
                    for dtype in dtypes
                    for pooling in poolings
                ]
            continue
        if source not in ("random", "model"):
            raise ValueError(f"--mask must be random, model or trace:DIR, got {source!r}")
        cases += [
            AttentionCase(
                q_len=length,
                kv_len=keys,
                heads=heads,
                kv_heads=kv_heads or heads,
                block_size=_block_size(block),
                sparsity=share,
                dtype=dtype,
                causal=causal,
                mask=source,
                pooling=pooling,
                **common,
            )
            for pooling in poolings
            for length in q_lens
            for keys in kv_lens or [length]
            for block in blocks
            for share in sparsities
            for dtype in dtypes
        ]
    return cases


def _decode(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    kept: float,
    value_keep: float,
    repeats: int,
    seed: int,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One step of decoding for every number of queries and keys."""
    from sparseloom.experiments.bench import peaks_row
    from sparseloom.experiments.bench_decode import DecodeCase, bench_decode
    from sparseloom.kernels.cpu.peaks import measure_peaks

    cases = [
        DecodeCase(
            kv_len=keys,
            heads=heads,
            kv_heads=kv_heads or heads,
            head_dim=head_dim,
            q_len=queries,
            kept=kept,
            value_keep=value_keep,
        )
        for queries in q_lens
        for keys in kv_lens
    ]
    progress("peaks of this machine")
    peaks = measure_peaks()
    rows = bench_decode(cases, repeats=repeats, seed=seed, peaks=peaks, progress=progress)
    return [peaks_row(peaks), *rows]


def _calibrate(repeats: int, *, seed: int, as_json: bool) -> None:
    from sparseloom.experiments.calibrate import calibrate, table_rows
    from sparseloom.methods import costs
    from sparseloom.results import results

    with progress_console().status("calibrate") as status:
        table, checks = calibrate(
            command=command_line(), repeats=repeats, seed=seed, progress=status.update
        )
    path = costs.save_table(table)
    columns: list[Column] = [
        ("tokens", value("q_len")),
        ("block", _block),
        ("sparsity", percent("sparsity")),
        ("dtype", value("dtype")),
        ("dense ms", number("dense_ms", 3)),
        ("expected", number("dense_expected_ms", 3)),
        ("select ms", number("select_ms", 3)),
        ("expected", number("select_expected_ms", 3)),
        ("attend ms", number("attend_ms", 3)),
        ("expected", number("attend_expected_ms", 3)),
        ("sparse/dense", number("ratio", 2)),
        ("expected", number("expected_ratio", 2)),
        ("rule", value("rule")),
    ]
    found = results(table_rows(table) + checks, command=command_line())
    emit(
        found,
        as_json=as_json,
        columns=columns,
        notes=["", f"{path}  used from now on with {table.threads} threads of this processor"],
        only=lambda row: row.get("record") == "cost check",
    )


def _write(found: ResultsFile, out: Path | None, plot: Path | None) -> list[str]:
    from sparseloom.results import write_results

    if out is not None and out.suffix == ".csv":
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_csv([row for row in _rows(found) if _is_timed(row)]), encoding="utf-8")
    elif out is not None:
        write_results(out, found)
    if plot is not None:
        from sparseloom.report.bench import write_bench_report

        write_bench_report(plot, found)
    return [str(file) for file in (out, plot) if file is not None]


def _csv(rows: Sequence[Row]) -> str:
    """All rows, lists as 8x1; one line each."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: "x".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()}
        )
    return text.getvalue()


def _rows(found: ResultsFile) -> list[Row]:
    return json.loads(found.to_json())["rows"]


def _is_timed(row: Row) -> bool:
    return "op" in row or row.get("record") == "refused"


def _peaks(rows: Sequence[Row]) -> list[str]:
    """The machine's peaks in a line."""
    found = next((row for row in rows if row.get("record") == "peaks"), None)
    if found is None:
        return []
    parts = [
        f"{found[key]:,.0f} {text}" if found[key] >= 10 else f"{found[key]:.1f} {text}"
        for key, text in (
            ("gflops", "GFLOP/s fp32"),
            ("bf16_gflops", "GFLOP/s bf16"),
            ("int8_gops", "GOP/s int8"),
            ("dram_gbytes_s", "GB/s memory"),
            ("l2_gbytes_s", "GB/s second-level cache"),
        )
        if found[key] is not None
    ]
    how = f"in registers, {found['tier']}" if found["source"] == "registers" else "torch's product"
    return [f"peaks with {found['threads']} threads ({how}): {', '.join(parts)}"]


def _block_size(text: str) -> tuple[int, int]:
    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"--block-size must be like 8x1 or 64x64, got {text!r}")
    return int(words[0]), int(words[1])


def _block(row: Row) -> str | None:
    block = row.get("block_size")
    return None if block is None else "×".join(map(str, block))


def _speedup(row: Row) -> str | None:
    return None if row.get("speedup") is None else f"{row['speedup']:.2f}×"


def _mebibytes(row: Row) -> str | None:
    extra = row.get("extra_bytes")
    return None if extra is None else f"{extra / 2**20:.1f}"


_COLUMNS: list[Column] = [
    ("tokens", lambda row: f"{row['q_len']}×{row['kv_len']}"),
    ("block", _block),
    ("sparsity", percent("sparsity")),
    ("mask", value("mask")),
    ("dtype", value("dtype")),
    ("path", value("path")),
    ("contender", value("contender")),
    ("pooling", value("pooling")),
    ("density", percent("density")),
    ("ms", number("ms", 2)),
    ("spread", percent("spread")),
    ("speed-up", _speedup),
    ("GFLOP/s", number("gflops", 1)),
    ("of peak", percent("peak_fraction")),
    ("GB/s", number("gbytes_s", 2)),
    ("extra MiB", _mebibytes),
    ("cost rule", value("rule")),
    ("why not", value("note")),
]
