"""`sparseloom bench --device cuda`: which options a card takes, what is shown of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseloom.cli.bench_cases import block_size
from sparseloom.cli.bench_table import block, is_timed, write
from sparseloom.cli.options import command_line
from sparseloom.cli.output import Column, Row, emit, number, percent, progress_console, value


def bench_card(
    operation: str,
    *,
    lengths: Sequence[int] | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    blocks: Sequence[str] | None,
    sparsities: Sequence[float] | None,
    dtypes: Sequence[str] | None,
    causal: bool,
    pooling: Sequence[str],
    gradients: bool,
    repeats: int,
    seed: int,
    as_json: bool,
    out: Path | None,
    refused: Mapping[str, object],
) -> None:
    """Time attention on the current CUDA device; None stands for what the backend is made for.

    Raises:
        ValueError: an operation or option that is for CPUs.
        SparseloomError: no CUDA device.
    """
    from sparseloom.experiments.gpu import cases as gpu
    from sparseloom.experiments.gpu.bench import bench_cuda
    from sparseloom.experiments.gpu.card import check_card
    from sparseloom.results import results

    if operation != "attention":
        raise ValueError(
            f"--device cuda times attention, prediction and selection as rows of it, got "
            f"{operation!r}"
        )
    for name, given in refused.items():
        if given:
            raise ValueError(f"{name} is for --device cpu, got {given!r}")
    check_card()
    chosen = [
        case
        for rule in pooling
        for case in gpu.gpu_cases(
            lengths=lengths or gpu.LENGTHS,
            blocks=[block_size(text) for text in blocks] if blocks else gpu.BLOCKS,
            sparsities=sparsities or gpu.SPARSITIES,
            dtypes=dtypes or (gpu.DTYPE,),
            heads=heads or gpu.HEADS,
            kv_heads=kv_heads,
            head_dim=head_dim or gpu.HEAD_DIM,
            causal=causal,
            gradients=gradients,
            pooling=rule,
        )
    ]
    with progress_console().status(operation) as status:
        rows = bench_cuda(chosen, repeats=repeats, seed=seed, progress=status.update)
    found = results(rows, command=command_line())
    files = write(found, out, None)
    notes = ["", *card_lines(rows), *goal_lines(rows), *files]
    emit(found, as_json=as_json, columns=COLUMNS, notes=notes, only=is_timed)


def card_lines(rows: Sequence[Row]) -> list[str]:
    """The card and its peaks, a line each."""
    card = next(row for row in rows if row.get("record") == "card")
    peaks = next(row for row in rows if row.get("record") == "gpu peaks")
    rates = [
        f"{peaks[key] / 1e3:,.0f} {text}"
        for key, text in (
            ("bf16_gflops", "TFLOP/s bf16"),
            ("fp16_gflops", "TFLOP/s fp16"),
            ("int8_gops", "TOP/s int8"),
        )
    ]
    rates.append(f"{peaks['dram_gbytes_s'] / 1e3:.2f} TB/s memory")
    software = [f"driver {card['driver']}", f"CUDA {card['cuda']}", f"cuDNN {card['cudnn']}"]
    return [f"{card['name']}, {', '.join(software)}", f"peaks in this run: {', '.join(rates)}"]


def goal_lines(rows: Sequence[Row]) -> list[str]:
    """Each goal and whether it was met."""
    return [
        f"{'yes' if row['met'] else 'NO':4} {row['value']:8.2f} (goal {row['wanted']:g})  "
        f"{row['name']}"
        for row in rows
        if row.get("record") == "goal"
    ]


def _thousandth(key: str) -> Any:
    return lambda row: None if row.get(key) is None else f"{row[key] / 1e3:.2f}"


COLUMNS: list[Column] = [
    ("tokens", value("q_len")),
    ("block", block),
    ("sparsity", percent("sparsity")),
    ("dtype", value("dtype")),
    ("path", value("path")),
    ("contender", value("contender")),
    ("ms", number("ms", 3)),
    ("spread", percent("spread")),
    ("timed as", value("timed_as")),
    ("times SDPA", number("speedup", 3)),
    ("TFLOP/s", _thousandth("gflops")),
    ("of peak", percent("peak_fraction")),
    ("TB/s gathered", _thousandth("gathered_gbytes_s")),
    (
        "peak MiB",
        lambda row: None if "peak_bytes" not in row else f"{row['peak_bytes'] / 2**20:.0f}",
    ),
    ("cost rule", value("rule")),
    ("over dense", number("rule_over_dense", 3)),
    ("why not", value("note")),
]
