"""DOTA's scheduler: which key is loaded when, for a few queries that run side by side.

A Lane works on `parallel_queries` queries together, one PE group for each. In a step every group
takes at most one key; a key that several of them take in the same step is loaded once (DOTA,
ASPLOS 2022; Liu et al., IEEE TC 2022, §6). Three dataflows:

- `row_by_row`: nothing is shared, every kept pair loads its key;
- `in_order`: in step s each query takes its s-th key; equal ones share a load;
- `out_of_order`: keys wait in 2**T - 1 buffers named by the set of queries that need them. A step
  scans the buffers, the largest sets first, and pops a key wherever all queries of the set are
  still free in this step. If queries stay free, with `split` the buffer that covers most of them
  (of those the smallest set) serves the ones that are free, and its key waits on in the buffer of
  the others, to be loaded again; without `split` those groups idle.

The authors' scheduler is in an appendix that we could not read: the buffers and T = 4 are
published, the order of the scan and the rule for splitting are a reconstruction (default). Sets of
equal size are scanned in the order of their names, '1100' before '1010', query 0 first.

What always holds: every kept pair is served exactly once, steps >= the longest row, and loads >=
the union of the group's keys. Without `split` loads equal the union; with it steps equal the
longest row, and in rare cases more is loaded than in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.units.issue_queue import IssueQueue, IssueTiming, issue_timing
from sparseloom.hardware.units.token_buffers import (
    IN_ORDER,
    OUT_OF_ORDER,
    ROW_BY_ROW,
    make_buffers,
    run_groups,
)

Dataflow = Literal["out_of_order", "in_order", "row_by_row"]

MAX_QUERIES = 8
"""255 buffers; the paper chose 4 queries and 15 buffers."""

_DATAFLOWS: dict[Dataflow, int] = {
    "out_of_order": OUT_OF_ORDER,
    "in_order": IN_ORDER,
    "row_by_row": ROW_BY_ROW,
}


class Issued(NamedTuple):
    """Every load in the order of its issue; the values are loaded in the same order again.

    group, step: of the group's steps, from 0.
    key: what is loaded.
    served: the queries that take it, as bits: 1 << t for query t of the group.
    """

    group: Int32[np.ndarray, "all_loads"]
    step: Int32[np.ndarray, "all_loads"]
    key: Int32[np.ndarray, "all_loads"]
    served: Int32[np.ndarray, "all_loads"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """What each group of `parallel_queries` consecutive queries costs; the last may be ragged.

    Args:
        parallel_queries: T, the PE groups.
        loads: key vectors read from the buffer; as many value vectors follow.
        steps: issue steps, in each of which every PE group takes at most one key.
        idle_slots: PE groups without work, summed over steps: T * steps - kept.
        reloads: loads beyond the first of each key.
        kept: (query, key) pairs served.
        union: different keys of the group: the least loads possible.
        issued: the loads one by one, if they were recorded.
        timing: cycles through the issue queue, if one was given.
    """

    parallel_queries: int
    loads: Int64[np.ndarray, "groups"]
    steps: Int64[np.ndarray, "groups"]
    idle_slots: Int64[np.ndarray, "groups"]
    reloads: Int64[np.ndarray, "groups"]
    kept: Int64[np.ndarray, "groups"]
    union: Int64[np.ndarray, "groups"]
    issued: Issued | None = None
    timing: IssueTiming | None = None

    @property
    def load_ratio(self) -> float:
        """Loads over those row by row; 1 where nothing is kept."""
        kept = int(self.kept.sum())
        return int(self.loads.sum()) / kept if kept else 1.0

    @property
    def utilisation(self) -> float:
        """Slots with work over all slots; 1 where nothing is kept."""
        slots = self.parallel_queries * int(self.steps.sum())
        return int(self.kept.sum()) / slots if slots else 1.0


def schedule(
    offsets: Int64[np.ndarray, "rows_and_one"],
    keys: Int32[np.ndarray, "nnz"],
    *,
    parallel_queries: int = 4,
    dataflow: Dataflow = "out_of_order",
    split: bool = True,
    record: bool = False,
    queue: IssueQueue | None = None,
) -> Schedule:
    """Schedule the rows of one head.

    Args:
        offsets: query i keeps `keys[offsets[i] : offsets[i + 1]]`; may begin anywhere in `keys`.
        keys: ascending and different within a row.
        parallel_queries: T, 1 to 8.
        dataflow: see the module.
        split: whether a key may serve some of its queries now and be loaded again for the others
            (out of order only).
        record: also give every load.
        queue: also give the cycles that the array takes behind this queue.

    Raises:
        MachineError: T out of range, an unknown dataflow, offsets or keys that are no rows.
    """
    if not 1 <= parallel_queries <= MAX_QUERIES:
        raise MachineError(
            f"parallel_queries must be in [1, {MAX_QUERIES}], got {parallel_queries}"
        )
    if dataflow not in _DATAFLOWS:
        raise MachineError(f"dataflow must be one of {', '.join(_DATAFLOWS)}, got {dataflow!r}")
    highest = _check_rows(offsets, keys)
    rows, width = offsets.size - 1, parallel_queries
    starts = np.arange(0, rows, width)
    kept = offsets[np.minimum(starts + width, rows)] - offsets[starts]
    counts = np.zeros((3, starts.size), np.int64)
    issued = np.zeros((4, int(kept.sum()) if record else 0), np.int32)
    buffers = make_buffers(width, highest + 1, int(kept.max(initial=0)) if record else 0)
    code = _DATAFLOWS[dataflow]
    made = run_groups(offsets, keys, width, code, split, buffers, counts, issued)
    loads, steps, union = counts
    return Schedule(
        parallel_queries=width,
        loads=loads,
        steps=steps,
        idle_slots=width * steps - kept,
        reloads=loads - union,
        kept=kept,
        union=union,
        issued=Issued(*issued[:, :made]) if record else None,
        timing=None if queue is None else issue_timing(steps, union, queue),
    )


def _check_rows(offsets: Int64[np.ndarray, "rows_and_one"], keys: Int32[np.ndarray, "nnz"]) -> int:
    """The highest key, -1 without any."""
    if offsets.size == 0 or offsets[0] < 0 or offsets[-1] > keys.size:
        ends = (int(offsets[0]), int(offsets[-1])) if offsets.size else ()
        raise MachineError(f"offsets must lie in [0, {keys.size}] (the keys), got {ends}")
    falling = np.flatnonzero(np.diff(offsets) < 0)
    if falling.size:
        raise MachineError(f"offsets must not fall, but do after row {int(falling[0])}")
    first, last = int(offsets[0]), int(offsets[-1])
    used = keys[first:last]
    if used.size and int(used.min()) < 0:
        raise MachineError(f"keys must be at least 0, got {int(used.min())}")
    ascending = np.diff(used) > 0
    starts = offsets[1:-1] - first
    ascending[starts[(starts > 0) & (starts < used.size)] - 1] = True
    if not ascending.all():
        at = first + int(np.flatnonzero(~ascending)[0]) + 1
        raise MachineError(f"keys must ascend within a row, but do not at position {at}")
    return int(used.max(initial=-1))
