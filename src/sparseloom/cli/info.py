"""`sparseloom info`: what is installed here, what can run, and what cannot and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseloom.cli.gpu_kernels import show_gpu_kernels
from sparseloom.cli.options import Json, command_line
from sparseloom.cli.output import Column, emit, value

if TYPE_CHECKING:
    from sparseloom.results import ResultsFile


def info(
    gpu_kernels: Annotated[
        bool,
        typer.Option(
            "--gpu-kernels",
            help="Instead: compile the Triton kernels, for cards that need not be there (minutes).",
        ),
    ] = False,
    arch: Annotated[
        list[int] | None,
        typer.Option("--arch", help="With --gpu-kernels: 80 or 90; may be repeated; default: 90."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="With --gpu-kernels: also write them to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Versions, CPU features, the backends available and why others are not, names that exist."""
    if gpu_kernels:
        show_gpu_kernels(arch or [90], as_json=as_json, out=out)
        return
    if arch or out:
        raise ValueError("--arch and --out belong to --gpu-kernels")
    from sparseloom import hardware
    from sparseloom.kernels import available_backends
    from sparseloom.methods import method_names
    from sparseloom.models import BUILT_IN
    from sparseloom.results import results
    from sparseloom.tasks import task_names

    rows: list[dict[str, Any]] = [_library()]
    rows += [
        {"record": "backend", "name": name, "usable": reason is None, "note": reason or ""}
        for name, reason in available_backends().items()
    ]
    names = {
        "method": method_names(),
        "task": task_names(),
        "model": BUILT_IN,
        "machine": hardware.list_machines(),
    }
    rows += [
        {"record": kind, "name": name, "usable": True, "note": ""}
        for kind, listed in names.items()
        for name in listed
    ]
    found = results(rows, command=command_line())
    columns: list[Column] = [
        ("", value("record")),
        ("name", value("name")),
        ("usable", value("usable")),
        ("why not", value("note")),
    ]
    if not as_json:
        _describe(found, rows[0])
    emit(found, as_json=as_json, columns=columns)


def _library() -> dict[str, Any]:
    """The compiled library: which of its tiers runs and how it was built, or why it is missing."""
    import torch

    from sparseloom.kernels.cpu import native

    row: dict[str, Any] = {"record": "library", "name": "C++", "usable": True, "note": ""}
    reason = native.missing_reason()
    if reason is not None:
        return row | {"usable": False, "note": reason}
    return row | {
        "tier": native.active_tier(),
        "tiers": list(native.available_tiers()),
        "threads": torch.get_num_threads(),
        "compiler": native.library().compiler,
        "path": native.library().__file__,
    }


def _library_line(row: dict[str, Any]) -> str:
    if not row["usable"]:
        return f"missing: {row['note']}"
    tiers = ", ".join(row["tiers"])
    return f"{row['tier']} (of {tiers}), {row['threads']} threads, built with {row['compiler']}"


def _describe(found: ResultsFile, library: dict[str, Any]) -> None:
    machine = found.machine
    facts = {
        "cpu": f"{machine.cpu}, {machine.threads} threads",
        "isa": " ".join(machine.isa),
        "gpu": machine.gpu or "none",
        "C++ library": _library_line(library),
        **found.versions,
    }
    for key, fact in facts.items():
        typer.echo(f"{key:13} {fact}")
    typer.echo()


def show_version(wanted: bool | None) -> None:
    """Print the version and leave, when `--version` was given."""
    if wanted:
        from sparseloom import __version__

        typer.echo(f"sparseloom {__version__}")
        raise typer.Exit
