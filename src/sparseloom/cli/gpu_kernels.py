"""`sparseloom info --gpu-kernels`: what the compiler makes of the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparseloom.cli.options import command_line
from sparseloom.cli.output import Column, emit, progress_console, value


def show_gpu_kernels(archs: Sequence[int], *, as_json: bool, out: Path | None) -> None:
    """Compile all kernels, show what each takes, and write it where it was asked for."""
    from sparseloom.experiments.gpu.compiled import kernel_rows, spilled, tensor_cores
    from sparseloom.results import results, write_results

    with progress_console().status("compiling the kernels of the Triton backend"):
        rows = kernel_rows(archs)
    found = results(rows, command=command_line())
    if out is not None:
        write_results(out, found)
    columns: list[Column] = [
        ("kernel", value("name")),
        ("arch", lambda row: f"sm_{row['arch']}"),
        ("threads", value("threads")),
        ("registers", value("registers")),
        ("spilled bytes", spilled),
        ("shared bytes", value("shared_bytes")),
        ("warps", value("warps_per_multiprocessor")),
        ("tensor cores", tensor_cores),
    ]
    compiler = rows[0]
    notes = ["", f"Triton {compiler['triton']}, ptxas {compiler['ptxas']}; no card was used"]
    notes += [str(out)] if out is not None else []
    emit(
        found,
        as_json=as_json,
        columns=columns,
        notes=notes,
        only=lambda row: row.get("record") == "gpu kernel",
    )
