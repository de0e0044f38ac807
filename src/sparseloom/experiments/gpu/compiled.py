"""All Triton kernels of the backend compiled for an architecture, without a card: what each takes.

A kernel that runs well keeps its loops free of spills, fits its shared memory, and gives the
tensor cores work; how fast it is on a card, none of this tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from sparseloom.errors import require

Row = dict[str, Any]


def kernel_rows(archs: Iterable[int], *, only: str = "") -> list[Row]:
    """A row per kernel, variant and architecture, and what compiled them before.

    Args:
        archs: compute capabilities times ten.
        only: a regular expression that the names must contain.

    Raises:
        ImportError: Triton is not installed.
        ValueError: an architecture is not known.
        RuntimeError: a kernel does not compile.
    """
    require("triton", extra="gpu")
    from sparseloom.kernels.triton.compile_report import assembler_version, reports_of

    reports = reports_of(archs=archs, only=only)
    compiler = {
        "record": "gpu compiler",
        "triton": metadata.version("triton"),
        "ptxas": assembler_version(),
    }
    return [compiler, *({"record": "gpu kernel", **dataclasses.asdict(one)} for one in reports)]


def spilled(row: Mapping[str, Any]) -> str:
    """Bytes that one thread spills, and how many of them in loops."""
    total = row["spill_store_bytes"] + row["spill_load_bytes"]
    return f"{total} ({row['loop_spill_bytes']} in loops)" if total else "0"


def tensor_cores(row: Mapping[str, Any]) -> str:
    """Kinds and operand types of the tensor-core instructions, tiles left out."""
    found: dict[str, None] = {}
    for instruction in row["tensor_cores"]:
        kind, _, *types = instruction.split(".")
        found[f"{kind} {types[1]}×{types[2]}→{types[0]}"] = None
    return ", ".join(found) + (" (serialized)" if row["serialized"] else "")


def markdown(rows: Sequence[Mapping[str, Any]], arch: int) -> str:
    """The kernels of an architecture as the lines of a Markdown table."""
    lines = [
        "| kernel | threads | registers | spilled bytes | shared memory | warps | tensor cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.get("record") == "gpu kernel" and row["arch"] == arch:
            cells = [
                row["name"], row["threads"], row["registers"], spilled(row),
                f"{row['shared_bytes'] / 1024:.1f} KiB", row["warps_per_multiprocessor"],
                tensor_cores(row) or "–",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
