"""Stages as Chrome trace events. Times are in microseconds: at 1 GHz a cycle is 0.001."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseloom.hardware.report import Stage


def events(machine: str, clock_ghz: float, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """One slice per stage, on one track per kind of work and one process per sequence."""
    components = list(dict.fromkeys(stage.component for stage in stages))
    sequences = list(dict.fromkeys(stage.sequence for stage in stages))
    found: list[dict[str, Any]] = []
    for sequence in sequences:
        name = f"{machine}, sequence {sequence}"
        found.append(_named("process_name", sequence, 0, name))
        found += [_named("thread_name", sequence, i, c) for i, c in enumerate(components)]
    now = 0.0
    per_us = clock_ghz * 1e3
    for stage in stages:
        place = "" if stage.layer is None else f" {stage.layer}"
        facts: dict[str, Any] = {"cycles": stage.cycles, "step": stage.step, **stage.facts}
        if stage.stall_cycles > 0:
            facts[f"stalled for {stage.stall_cause}"] = stage.stall_cycles
        found.append(
            {
                "name": f"{stage.component}{place}",
                "cat": stage.component,
                "ph": "X",
                "ts": now / per_us,
                "dur": stage.cycles / per_us,
                "pid": stage.sequence,
                "tid": components.index(stage.component),
                "args": facts,
            }
        )
        now += stage.cycles
    return found


def write(
    path: str | PathLike[str], machine: str, clock_ghz: float, stages: Sequence[Stage]
) -> None:
    """Write the events as one JSON file, whole or not at all."""
    data = {"displayTimeUnit": "ns", "traceEvents": events(machine, clock_ghz, stages)}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        fresh.write_text(json.dumps(data), encoding="utf-8")
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
