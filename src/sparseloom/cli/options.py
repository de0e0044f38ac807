"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print results as JSON (schema sparseloom/results/1).")
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; default: all cores.")
]
Model: TypeAlias = Annotated[
    str, typer.Option("--model", help="Hugging Face folder or hub name, or: stdlib, minilm.")
]
TaskName: TypeAlias = Annotated[str, typer.Option("--task", help="What the model is scored on.")]
Data: TypeAlias = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of the task's data; default: $SPARSELOOM_DATA."),
]
Methods: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--method", help="As dynamic:sparsity=0.9,block_size=8x1; may be repeated."),
]


typed: ContextVar[Sequence[str]] = ContextVar("typed")
"""The words of the running command, set where it starts."""


def command_line() -> str:
    """The command as it was typed, for the results file."""
    return shlex.join(["sparseloom", *typed.get(sys.argv[1:])])


def set_threads(threads: int | None) -> None:
    """Limit torch to `threads` CPU threads; None leaves its default."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
