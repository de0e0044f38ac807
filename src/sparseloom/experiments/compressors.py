"""xz and an order-6 context mixture on the corpus of the built-in model, to set beside it.

    python -m sparseloom.experiments.compressors

Each compressor reads the held-out half alone, and after the training half that the model saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress

from sparseloom.experiments.study_command import run_command
from sparseloom.tasks.compressors import context_mixture_bits_per_byte, xz_bits_per_byte
from sparseloom.tasks.language_modelling import StdlibBitsPerByte

_ORDER = 6


def compress_stdlib(
    *, table_bits: int = 24, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Rows of the results schema: bits per byte of the held-out half, with and without training.

    `table_bits` sizes the context mixture: 2^24 buckets of 64 bytes are 1 GB.  `progress` is told
    the bytes it has read.
    """
    task = StdlibBitsPerByte().load()
    held_out, train = task.text("held_out"), task.text("train")
    rows: list[dict[str, Any]] = []
    for after in (b"", train):
        seen = {"train_bytes": len(after)}
        rows.append(_row("xz -9", xz_bits_per_byte(held_out, after), seen))
        mixed = context_mixture_bits_per_byte(
            held_out, after, order=_ORDER, table_bits=table_bits, progress=progress
        )
        settings = {**seen, "order": _ORDER, "table_bits": table_bits}
        rows.append(_row("context mixture", mixed, settings))
    note = "; ".join(task.notes())
    return [{**row, "items": len(held_out), "note": note} for row in rows]


def _row(name: str, value: float, settings: dict[str, int]) -> dict[str, Any]:
    return {
        "model": name,
        "task": StdlibBitsPerByte.name,
        "method": "compressor",
        "settings": settings,
        "metric": StdlibBitsPerByte.metric,
        "value": value,
    }


@dataclass(frozen=True, slots=True)
class Settings:
    """What the study can vary: 2 to the power of `table_bits` counters of the context mixture."""

    table_bits: int = 24


def run_study(settings: Settings) -> list[dict[str, Any]]:
    """Rows of the study, under a progress bar."""
    with Progress() as progress:
        task = progress.add_task("context mixture", total=None)
        return compress_stdlib(
            table_bits=settings.table_bits,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def main() -> None:
    """Command line of the study."""
    run_command(
        "compressors", __doc__, Settings(), lambda settings, *_: run_study(settings),
        keeps=False, reads=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
