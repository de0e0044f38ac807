"""`sparseloom bench`: times on this machine, and the cost rule that follows from them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseloom.cli.bench_calibrate import calibrate_rule
from sparseloom.cli.bench_cases import attention_cases, decode_rows
from sparseloom.cli.bench_cuda import bench_card
from sparseloom.cli.bench_table import COLUMNS, is_timed, peaks_line, write
from sparseloom.cli.options import Json, Seed, Threads, command_line, set_threads
from sparseloom.cli.output import emit, progress_console

if TYPE_CHECKING:
    from sparseloom.experiments.bench_cases import AttentionCase
    from sparseloom.mask import SparseMask


class Operation(StrEnum):
    """What can be timed."""

    attention = "attention"
    predict = "predict"
    decode = "decode"


class Device(StrEnum):
    """Where it is timed."""

    cpu = "cpu"
    cuda = "cuda"


def bench(
    operation: Annotated[Operation, typer.Argument(help="What to time.")] = Operation.attention,
    device: Annotated[
        Device,
        typer.Option(
            "--device",
            help="Where. The defaults for cuda, in brackets below, are a layer of a large model.",
        ),
    ] = Device.cpu,
    q_len: Annotated[
        list[int] | None,
        typer.Option(
            "--q-len",
            help="Queries; may be repeated; default: 2048, for decode 1 [8192, 32768, 131072].",
        ),
    ] = None,
    kv_len: Annotated[
        list[int] | None,
        typer.Option("--kv-len", help="Keys; default: as many as queries, for decode 32768."),
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", help="Query heads; default: 8 [32].")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", help="Key and value heads; default: as queries.")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option("--head-dim", help="Width of a head; default: 64 [128].")
    ] = None,
    block_size: Annotated[
        list[str] | None,
        typer.Option(
            "--block-size",
            help="Queries x keys; may be repeated; default: 1x1, 8x1, 64x64 [64x1, 128x1].",
        ),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            "--sparsity", help="Share dropped; may be repeated; default: 0.9 [0.9, 0.95, 0.99]."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16, float16; may be repeated; default: float32 [bfloat16].",
        ),
    ] = None,
    causal: Annotated[bool, typer.Option(help="Causal attention.")] = True,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            "--mask",
            help="random (default), model (what the built-in model keeps) or trace:DIR; may be "
            "repeated.",
        ),
    ] = None,
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
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", min=1, help="Measured rounds; default: 5 [15]."),
    ] = None,
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
        calibrate_rule(device.value, repeats or 5, seed=seed, as_json=as_json)
        return
    if device is Device.cuda:
        bench_card(
            operation.value, lengths=q_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            blocks=block_size, sparsities=sparsity, dtypes=dtype, causal=causal, pooling=pooling,
            gradients=gradients, repeats=repeats or 15, seed=seed, as_json=as_json, out=out,
            refused={"--kv-len": kv_len, "--mask": mask, "--backend": backend, "--memory": memory,
                     "--plot": plot},
        )  # fmt: skip
        return
    heads, head_dim, repeats = heads or 8, head_dim or 64, repeats or 5
    masks: dict[str, SparseMask] = {}
    cases: list[AttentionCase] = []
    with progress_console().status(operation.value) as status:
        if operation is Operation.decode:
            rows = decode_rows(
                q_len or [1], kv_len or [32768], heads, kv_heads, head_dim, kept, value_keep,
                repeats, seed, status.update,
            )  # fmt: skip
        else:
            cases = attention_cases(
                q_len or [2048], kv_len, heads, kv_heads, head_dim,
                block_size or ["1x1", "8x1", "64x64"], sparsity or [0.9], dtype or ["float32"],
                causal, mask or ["random"], pooling, gradients, masks,
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
    files = write(found, out, plot)
    notes = ["", *peaks_line(rows), *(study.rule_lines(cases, seed) if cases else []), *files]
    emit(found, as_json=as_json, columns=COLUMNS, notes=notes, only=is_timed)
