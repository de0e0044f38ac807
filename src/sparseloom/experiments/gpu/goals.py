"""What the Triton backend is for, beside what the rows of one run say.

One long causal prompt, 32 heads of 128 in bf16, against the fastest kernel of SDPA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparseloom.experiments.gpu.contenders import OURS, WHOLE

SPEEDUPS = {8192: 2.0, 32768: 4.0, 131072: 6.0}
"""Least of the whole path at 95 % with blocks of 64 queries, by length."""
KERNEL_SHARE = 0.5
"""Least of SDPA's rate on kept pairs."""
SLOWER = 1.1
"""Most over dense, once the cost rule has chosen."""
GROWTH = 1.1
"""Most that memory may grow over what kept pairs grow by."""

Row = Mapping[str, Any]


def goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each goal that the rows can tell of: what was wanted and what was found."""
    timed = [row for row in rows if row.get("op") == "attention"]
    found = [*_speedups(timed), *_kernel(timed), *_rule(timed), *_memory(timed)]
    return [{"record": "goal", **one} for one in found]


def _speedups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        _least(f"whole path, 64x1 at 95%, {row['q_len']} tokens: times SDPA", row["speedup"], least)
        for length, least in SPEEDUPS.items()
        for row in _of(rows, WHOLE, q_len=length, sparsity=0.95, block_size=[64, 1])
    ]


def _kernel(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in _of(rows, OURS):
        dense = next(
            one
            for one in rows
            if one["contender"] == row["baseline"]
            and one["baseline_ms"] == row["baseline_ms"]
            and one["q_len"] == row["q_len"]
        )
        share = row["gflops"] / dense["gflops"]
        found.append(_least(f"kernel, {_where(row)}: of SDPA's rate", share, KERNEL_SHARE))
    return found


def _rule(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        _most(f"after the cost rule, {_where(row)}: over dense", row["rule_over_dense"], SLOWER)
        for row in _of(rows, WHOLE)
    ]


def _memory(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """From the shortest to the longest prompt of a block and sparsity."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in _of(rows, WHOLE):
        groups.setdefault((*row["block_size"], row["sparsity"], row["dtype"]), []).append(row)
    found: list[dict[str, Any]] = []
    for group in groups.values():
        short, long = (pick(group, key=lambda row: row["q_len"]) for pick in (min, max))
        if short is long:
            continue
        pairs = long["density"] * long["q_len"] ** 2 / (short["density"] * short["q_len"] ** 2)
        growth = long["peak_bytes"] / short["peak_bytes"] / pairs
        name = f"peak memory, {_where(long)} over {short['q_len']}: growth over that of kept pairs"
        found.append(_most(name, growth, GROWTH))
    return found


def _of(rows: Sequence[Row], contender: str, **keys: Any) -> list[Row]:
    return [
        row
        for row in rows
        if row["contender"] == contender and all(row[key] == want for key, want in keys.items())
    ]


def _where(row: Row) -> str:
    block = "x".join(map(str, row["block_size"]))
    return f"{block} at {row['sparsity']:.0%}, {row['q_len']} tokens"


def _least(name: str, value: float, wanted: float) -> dict[str, Any]:
    return {"name": name, "value": value, "wanted": wanted, "met": value >= wanted}


def _most(name: str, value: float, wanted: float) -> dict[str, Any]:
    return {"name": name, "value": value, "wanted": wanted, "met": value <= wanted}
