"""What parallel queries save on a trace: DOTA's scheduler on the masks that a run recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.units.token_scheduler import MAX_QUERIES, Dataflow, schedule
from sparseloom.trace import AttentionCall, Operator, Trace

VARIANTS: tuple[tuple[Dataflow, bool], ...] = (
    ("in_order", True),
    ("out_of_order", True),
    ("out_of_order", False),
)
"""Dataflows, and whether they split keys. Row by row is what they are compared to."""

_SUMS = ("kept", "union", "loads", "steps", "idle_slots")


class _Head(NamedTuple):
    """Rows of one mask head, and how many heads of how many sequences have them."""

    offsets: Int64[np.ndarray, "rows_and_one"]
    keys: Int32[np.ndarray, "nnz"]
    times: int


class _Call(NamedTuple):
    operator: Operator
    call: AttentionCall
    padding: Bool[np.ndarray, "_ kv_len"] | None
    heads: list[_Head]


def load_savings(
    trace: Trace,
    selection: str | None = None,
    *,
    parallel_queries: Sequence[int] = range(1, MAX_QUERIES + 1),
    variants: Sequence[tuple[Dataflow, bool]] = VARIANTS,
) -> list[dict[str, Any]]:
    """Key loads of each dataflow against the number of parallel queries, over all calls.

    Values are loaded in the order of the keys, so the ratios hold for both unless values are
    pruned further. Where a call has fewer queries, as while tokens are generated, all of the array
    works on those.

    Args:
        trace: a workload and its selections.
        selection: by name; None takes the only one.
        parallel_queries: numbers of queries that run side by side, 1 to 8.
        variants: dataflows, each with whether it splits keys.

    Returns:
        A row for each number of queries and each variant: `trace, selection, parallel_queries,
        dataflow, split`; the sums `kept` (loads row by row), `union` (the least loads possible),
        `loads`, `reloads`, `steps`, `idle_slots`; `density`; `load_ratio` (loads / kept),
        `union_ratio` (union / kept), `random_ratio` (what union_ratio would be with as many
        pairs kept at random), `utilisation` (kept / slots).

    Raises:
        MachineError: a call counts its kept keys without naming them.
    """
    chosen = trace.selection(selection)
    workload = trace.workload
    allowed = 0
    calls: list[_Call] = []
    for i, (operator, call) in enumerate(zip(workload.attention(), chosen.calls, strict=True)):
        if not call.knows_keys:
            raise MachineError(
                f"call {i} of selection {chosen.name!r} counts kept keys without naming them: "
                "sparseloom.trace.kept_keys.with_keys draws some"
            )
        padding = workload.padding_of(operator)
        allowed += int(workload.allowed_pairs(operator)[:, _alive(operator, call)].sum())
        calls.append(_Call(operator, call, padding, list(_heads(operator, call, padding))))
    rows: list[dict[str, Any]] = []
    for width in parallel_queries:
        for dataflow, split in variants:
            sums = sum((_sums(call, width, dataflow, split) for call in calls), np.zeros(5, int))
            found = dict(zip(_SUMS, sums.tolist(), strict=True))
            kept, idle = found["kept"], found["idle_slots"]
            density = kept / allowed if allowed else 1.0
            rows.append(
                {
                    "trace": workload.name,
                    "selection": chosen.name,
                    "parallel_queries": width,
                    "dataflow": dataflow,
                    "split": split,
                    **found,
                    "reloads": found["loads"] - found["union"],
                    "density": density,
                    "load_ratio": found["loads"] / kept if kept else 1.0,
                    "union_ratio": found["union"] / kept if kept else 1.0,
                    "random_ratio": random_union_ratio(density, width),
                    "utilisation": kept / (kept + idle) if kept else 1.0,
                }
            )
    return rows


def random_union_ratio(density: float, parallel_queries: int) -> float:
    """Union over kept pairs where each pair is kept at random: (1 - (1 - r)^T) / (T r)."""
    if density == 0:
        return 1.0
    return (1 - (1 - density) ** parallel_queries) / (parallel_queries * density)


def _sums(call: _Call, width: int, dataflow: Dataflow, split: bool) -> Int64[np.ndarray, "5"]:
    """The sums of one call, in the order of `_SUMS`."""
    width = min(width, call.operator.q_len)
    if call.call.mask is None:
        # Every query keeps what it may see: the last one of a group all that the others do.
        kept, union = (
            int(call.call.kept_pairs(call.operator, call.padding, group=group).sum())
            for group in (1, width)
        )
        loads = kept if dataflow == "row_by_row" else union
        return np.array([kept, union, loads, union, width * union - kept])
    found = np.zeros(len(_SUMS), np.int64)
    for head in call.heads:
        s = schedule(
            head.offsets, head.keys, parallel_queries=width, dataflow=dataflow, split=split
        )
        found += head.times * np.array([int(getattr(s, name).sum()) for name in _SUMS])
    return found


def _alive(operator: Operator, call: AttentionCall) -> Bool[np.ndarray, "heads"]:
    return np.ones(operator.heads, np.bool_) if call.heads_alive is None else call.heads_alive


def _heads(
    operator: Operator, call: AttentionCall, padding: Bool[np.ndarray, "_ kv_len"] | None
) -> Iterator[_Head]:
    """The rows of each head of the mask under causality and padding, and who shares them."""
    mask = call.mask
    if mask is None:
        return
    lines = 1 if padding is None else len(padding)
    sequences = max(mask.batch, lines)
    # Query head h reads mask head h · (mask heads) // heads.
    sharing = _alive(operator, call).reshape(mask.heads, -1).sum(axis=1)
    for b in range(sequences):
        valid = None if padding is None else padding[min(b, lines - 1)]
        for h in np.flatnonzero(sharing).tolist():
            offsets, keys = mask.query_keys(min(b, mask.batch - 1), h, valid)
            yield _Head(offsets, keys, int(sharing[h]) * operator.batch // sequences)
