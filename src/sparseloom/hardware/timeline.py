"""Timelines as Chrome trace events, which ui.perfetto.dev and chrome://tracing open.

Stages are slices on one track per kind of work; where a run kept events, only their window is
shown, and below it every unit has a track. Times are in microseconds: at 1 GHz a cycle is 0.001.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparseloom.files import fresh_file

if TYPE_CHECKING:
    from sparseloom.hardware.report import Events, Stage

_IDLE = 0


class Slice(NamedTuple):
    """A unit does `code` from cycle `start` up to `end`, for `tag` (−1: for nothing in particular).

    `unit` and `code` number the names of `Events`.
    """

    unit: int
    code: int
    start: int
    end: int
    tag: int


def slices(events: Events) -> list[Slice]:
    """What the units did, cut off at the window's ends; idle time is left out.

    Ordered by unit and time; intervals that touch and say the same are one.
    """
    first, last = events.window
    rows = events.intervals[np.lexsort((events.intervals[:, 2], events.intervals[:, 0]))]
    found: list[Slice] = []
    for unit, code, start, end, tag in rows.tolist():
        start, end = max(start, first), min(end, last)
        if code == _IDLE or end <= start:
            continue
        before = found[-1] if found else None
        if before is not None and before[:2] == (unit, code) and before[3:] == (start, tag):
            found[-1] = before._replace(end=end)
        else:
            found.append(Slice(unit, code, start, end, tag))
    return found


def trace_events(
    machine: str, clock_ghz: float, stages: Sequence[Stage], events: Events | None = None
) -> list[dict[str, Any]]:
    """Chrome trace events of a run: metadata that names the tracks, and complete slices."""
    window = None if events is None else events.window
    found = list(_stages(machine, clock_ghz, stages, window))
    if events is not None:
        process = 1 + max((_process(stage.sequence) for stage in stages), default=0)
        found += _units(machine, clock_ghz, events, process)
    return found


def write(
    path: str | PathLike[str],
    machine: str,
    clock_ghz: float,
    stages: Sequence[Stage],
    events: Events | None = None,
) -> None:
    """Write one JSON file, gzip-compressed where its name ends in .gz; whole or not at all."""
    found = trace_events(machine, clock_ghz, stages, events)
    data: dict[str, Any] = {"displayTimeUnit": "ns", "traceEvents": found}
    if events is not None:
        data["otherData"] = {
            "window_cycles": "{}:{}".format(*events.window),
            "intervals_dropped": str(events.dropped),
        }
    text = json.dumps(data).encode()
    with fresh_file(path) as fresh:
        fresh.write_bytes(gzip.compress(text, mtime=0) if Path(path).suffix == ".gz" else text)


def _stages(
    machine: str, clock_ghz: float, stages: Sequence[Stage], window: tuple[int, int] | None
) -> Iterator[dict[str, Any]]:
    """One slice per stage, on one track per kind of work and one process per sequence.

    With a window, what lies outside is cut off.
    """
    components = list(dict.fromkeys(stage.component for stage in stages))
    for sequence in dict.fromkeys(stage.sequence for stage in stages):
        process = _process(sequence)
        yield _named("process_name", process, 0, f"{machine}, sequence {sequence}")
        for i, component in enumerate(components):
            yield _named("thread_name", process, i, component)
    now = 0.0
    for stage in stages:
        start, end = now, now + stage.cycles
        now = end
        if window is not None:
            start, end = max(start, window[0]), min(end, window[1])
            if end <= start:
                continue
        place = "" if stage.layer is None else f" {stage.layer}"
        facts: dict[str, Any] = {"cycles": stage.cycles, "step": stage.step, **stage.facts}
        if stage.stall_cycles > 0:
            facts[f"stalled for {stage.stall_cause}"] = stage.stall_cycles
        yield {
            "name": f"{stage.component}{place}",
            "cat": stage.component,
            **_times(start, end, clock_ghz),
            "pid": _process(stage.sequence),
            "tid": _thread(_process(stage.sequence), components.index(stage.component)),
            "args": facts,
        }


def _units(
    machine: str, clock_ghz: float, events: Events, process: int
) -> Iterator[dict[str, Any]]:
    """One slice per interval, on one track per unit."""
    yield _named("process_name", process, 0, f"{machine}, units")
    for i, unit in enumerate(events.units):
        yield _named("thread_name", process, i, unit)
        yield {
            "name": "thread_sort_index",
            "ph": "M",
            "pid": process,
            "tid": _thread(process, i),
            "args": {"sort_index": i},
        }
    for one in slices(events):
        facts: dict[str, Any] = {"cycles": one.end - one.start, "from_cycle": one.start}
        if one.tag >= 0:
            facts[events.tags] = one.tag
        yield {
            "name": events.causes[one.code],
            "cat": "unit",
            **_times(one.start, one.end, clock_ghz),
            "pid": process,
            "tid": _thread(process, one.unit),
            "args": facts,
        }


def _times(start: float, end: float, clock_ghz: float) -> dict[str, Any]:
    per_us = clock_ghz * 1e3
    return {"ph": "X", "ts": start / per_us, "dur": (end - start) / per_us}


def _named(kind: str, process: int, track: int, name: str) -> dict[str, Any]:
    thread = _thread(process, track)
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _process(sequence: int) -> int:
    return sequence + 1


def _thread(process: int, track: int) -> int:
    """Perfetto mixes up threads 0, and threads of one number in several processes."""
    return process * 10_000 + track
