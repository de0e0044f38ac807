"""The time of a generation step: its rows, and what is stored."""

from __future__ import annotations

from pathlib import Path

from sparseloom.experiments.generation_time import time_rows
from sparseloom.results import read_results

ROOT = Path(__file__).parents[2]


def test_rows_of_a_short_run() -> None:
    rows = time_rows(kv_len=40, heads=2, head_dim=8, shares=(0.9, 0.5), repeats=1)
    assert [row["contender"] for row in rows] == [
        "dense", "dense with its cache", "spatten", "spatten, all low bits",
    ]  # fmt: skip
    assert rows[0]["speedup"] == 1.0
    assert all(row["ms"] > 0 and row["layers"] == 2 and row["kv_len"] == 40 for row in rows)


def test_stored_times_are_what_was_aimed_at_and_what_the_docs_say() -> None:
    """At 8192 keys, pruned as in the published trace: at least three times less than dense."""
    stored = read_results(ROOT / "results/spatten_generation_time.json").rows
    rows = {row["contender"]: row for row in (one.model_dump() for one in stored)}
    dense, ours, low = (rows[name] for name in ("dense", "spatten", "spatten, all low bits"))
    assert dense["kv_len"] == 8192
    assert ours["speedup"] >= 3
    text = (ROOT / "docs/methods.md").read_text("utf-8")
    assert f"{ours['ms']:.1f} ms against {dense['ms']:.1f} ms" in text
    assert f"{ours['speedup']:.1f}×; {low['speedup']:.1f}× where every row" in text
