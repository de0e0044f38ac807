"""Time attention on a card: ours and PyTorch's, with the card's own peaks beside them.

The baseline is the fastest kernel of SDPA in the same run.  All contenders of a case take turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sparseloom.experiments.bench_cases import DTYPES, AttentionCase
from sparseloom.experiments.bench_contenders import Contender
from sparseloom.experiments.bench_rows import Ceiling, attention_row, refused_row
from sparseloom.experiments.gpu import contenders
from sparseloom.experiments.gpu.card import card_row, check_card
from sparseloom.experiments.gpu.clock import CudaClock, Ready, interleave
from sparseloom.experiments.gpu.goals import goals
from sparseloom.experiments.gpu.memory import Peak
from sparseloom.experiments.gpu.peaks import GpuPeaks, measure_peaks
from sparseloom.experiments.timing import Timing
from sparseloom.methods import costs

Say = Callable[[str], None]
Row = dict[str, Any]


def bench_cuda(
    cases: Sequence[AttentionCase],
    *,
    repeats: int = 15,
    seed: int = 0,
    progress: Say | None = None,
) -> list[Row]:
    """Rows of op "attention" for each case, the card and its peaks before, the goals behind.

    Args:
        cases: what to time, in order; `gpu_cases` has those that the backend is for.
        repeats: measured rounds per case.
        seed: draws tensors, masks and the untrained predictor.
        progress: called with a line per step.

    Raises:
        SparseloomError: no CUDA device.
    """
    check_card()
    say = progress or (lambda _: None)
    clock, table = CudaClock(), costs.table_of_card()
    say("peaks of this card")
    peaks = measure_peaks(clock, repeats=repeats)
    rows: list[Row] = [card_row(), {"record": "gpu peaks", **dataclasses.asdict(peaks)}]
    for case in cases:
        say(f"{case.describe()}: masks and tensors")
        rows += _case_rows(case, clock, peaks, table, repeats, seed, say)
        torch.cuda.empty_cache()
    return rows + goals(rows)


def _case_rows(
    case: AttentionCase,
    clock: CudaClock,
    peaks: GpuPeaks,
    table: costs.CostTable | None,
    repeats: int,
    seed: int,
    say: Say,
) -> list[Row]:
    found, memory, refused = contenders.contenders_of(case, contenders.makers_of(case, seed))
    with torch.inference_mode(not case.gradients):
        ready = {name: clock.prepare(contender.run) for name, contender in found.items()}
        times = interleave(
            ready, clock, repeats=repeats, progress=lambda step: say(f"{case.describe()}: {step}")
        )
    rows = rows_of(case, found, ready, times, memory, peaks, seed, table)
    return rows + [refused_row(case, name, note) for name, note in refused.items()]


def rows_of(
    case: AttentionCase,
    found: Mapping[str, Contender],
    ready: Mapping[str, Ready],
    times: Mapping[str, Timing],
    memory: Mapping[str, Peak],
    peaks: Ceiling,
    seed: int,
    table: costs.CostTable | None,
) -> list[Row]:
    """A row per contender, beside the fastest dense one."""
    baseline = fastest_dense(times)
    rows: list[Row] = []
    for name, contender in found.items():
        row = attention_row(case, name, contender, times, baseline, peaks, seed, table)
        row |= {
            "best_ms": times[name].best_ms,
            "timed_as": "graph" if ready[name].captured else "launches",
            "why_no_graph": ready[name].note,
            "peak_bytes": memory[name].total,
            "extra_bytes": memory[name].extra,
        }
        if contender.path == "select":
            row |= dict.fromkeys(("gflops", "peak_fraction", "gbytes_s"))
        else:
            row |= gathered(case, contender, times[name], peaks)
        if contender.path == "whole":
            row |= after_rule(row, table)
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def fastest_dense(times: Mapping[str, Timing]) -> str:
    """The kernel of SDPA with the least median.

    Raises:
        RuntimeError: none of them ran.
    """
    dense = [name for name in times if name in contenders.SDPA]
    if not dense:
        raise RuntimeError("no kernel of SDPA took this call, so there is nothing to compare with")
    return min(dense, key=lambda name: times[name].ms)


def gathered(case: AttentionCase, contender: Contender, time: Timing, peaks: Ceiling) -> Row:
    """How fast key and value rows come in, each counted once per query block that keeps it: most
    of it out of the cache, so it may exceed what the memory gives."""
    mask = contender.mask
    if mask is None or contender.path != "given":
        return {}
    shared = case.heads // mask.heads
    row_bytes = 2 * case.head_dim * DTYPES[case.dtype].itemsize
    rate = mask.nnz * shared * mask.block_size[1] * row_bytes / time.ms / 1e6
    return {"gathered_gbytes_s": rate, "gathered_fraction": rate / peaks.dram_gbytes_s}


def after_rule(row: Mapping[str, Any], table: costs.CostTable | None) -> Row:
    """What a sparsified model takes once the cost rule has chosen between this path and dense.

    Without a table of this card the rule has no say: it selects.
    """
    if table is None:
        return {"rule": "none", "rule_ms": row["ms"], "rule_over_dense": 1 / row["speedup"]}
    ms = row["ms"] if row["rule"] == "sparse" else row["baseline_ms"]
    return {"rule_ms": ms, "rule_over_dense": ms / row["baseline_ms"]}
