"""Time attention on this machine: every kernel, PyTorch's own ways and a whole method against SDPA.

Contenders of one case run interleaved in one process; each row carries its median, its spread, and
what it reached of the machine's own peaks, measured in the same process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sparseloom.experiments.bench_cases import DTYPES, AttentionCase
from sparseloom.experiments.bench_contenders import (
    BASELINE,
    Contender,
    contenders_of,
    draw_tensors,
    inputs_of,
    kernels_and_peers,
    untrained,
)
from sparseloom.experiments.bench_masks import model_mask, random_mask
from sparseloom.experiments.bench_rows import attention_row, refused_row
from sparseloom.experiments.timing import Timing, interleave
from sparseloom.kernels.cpu.peaks import Peaks, measure_peaks
from sparseloom.mask import SparseMask
from sparseloom.methods import costs

__all__ = [
    "AttentionCase",
    "bench_attention",
    "bench_predict",
    "mask_of",
    "peaks_row",
    "rule_lines",
]

LIMIT_S = 20.0
"""Measured seconds after which a slow contender sits out the remaining rounds."""

Say = Callable[[str], None]


def bench_attention(
    cases: Sequence[AttentionCase],
    *,
    backends: Sequence[str] | None = None,
    repeats: int = 5,
    seed: int = 0,
    memory: bool = False,
    masks: Mapping[str, SparseMask] | None = None,
    progress: Say | None = None,
) -> list[dict[str, Any]]:
    """Rows of the results schema, op "attention"; the baseline is dense SDPA in fp32.

    Args:
        cases: what to time, in order.
        backends: kernels and peers ("masked", "csr") for path "given" (the mask is there);
            default: all of them.
        repeats: measured rounds per case, after two that are not.
        seed: draws tensors, masks and the untrained predictor of path "whole" (prediction,
            selection and attention; the time does not depend on what the predictor learned).
        memory: also measure each contender's peak memory, in a process of its own.
        masks: those of the cases whose `mask` is a name in here.
        progress: called with a line per step.

    A backend that does not take a case leaves a row with `record` and the reason as `note`.

    Raises:
        ValueError: an unknown or unusable backend.
    """
    chosen = _names(backends)
    say = progress or (lambda _: None)
    say("peaks of this machine")
    peaks = measure_peaks()
    rows: list[dict[str, Any]] = [peaks_row(peaks)]
    for case in cases:
        say(f"{case.describe()}: mask and tensors")
        mask = mask_of(case, seed, masks)
        found, refused = contenders_of(case, mask, chosen, seed)
        times = _timed(case, found, repeats, say)
        timed = [
            attention_row(case, name, found[name], times, BASELINE, peaks, seed)
            | ({} if memory is False else _memory(case, name, found[name], seed, say))
            for name in found
        ]
        rows += timed
        rows += [refused_row(case, name, note) for name, note in refused.items()]
    return rows


def bench_predict(
    cases: Sequence[AttentionCase],
    *,
    repeats: int = 5,
    seed: int = 0,
    progress: Say | None = None,
) -> list[dict[str, Any]]:
    """Rows of op "predict": prediction and selection alone, beside dense SDPA in fp32."""
    say = progress or (lambda _: None)
    say("peaks of this machine")
    peaks = measure_peaks()
    rows: list[dict[str, Any]] = [peaks_row(peaks)]
    for case in cases:
        if case.q_len != case.kv_len:
            raise ValueError(f"predict takes as many queries as keys, got {case.q_len} and others")
        say(case.describe())
        found = contenders_of(dataclasses.replace(case, mask="none"), _nothing(case), (), seed)[0]
        method = untrained(case, seed)
        inputs = inputs_of(case, draw_tensors(case, seed))
        with torch.inference_mode():
            mask = method.select(inputs)
        found["select"] = Contender(lambda m=method, i=inputs: m.select(i), mask, "select", "int4")
        times = _timed(case, found, repeats, say)
        row = attention_row(case, "select", found["select"], times, BASELINE, peaks, seed)
        ops = 2 * method.prediction_macs(case.shape)
        row |= {
            "op": "predict",
            "gflops": ops / row["ms"] / 1e6,
            "peak_gflops": peaks.int8_gops or peaks.gflops,
            "width": method.predictor.width if method.predictor is not None else None,
        }
        row["peak_fraction"] = row["gflops"] / row["peak_gflops"]
        dense = attention_row(case, BASELINE, found[BASELINE], times, BASELINE, peaks, seed)
        rows += [dense | {"op": "predict"}, row]
    return rows


def mask_of(
    case: AttentionCase, seed: int, masks: Mapping[str, SparseMask] | None = None
) -> SparseMask:
    """The mask that a case names.

    Raises:
        ValueError: there is none of that name, or none of that size.
    """
    if masks is not None and case.mask in masks:
        return masks[case.mask]
    if case.mask == "random":
        return random_mask(
            case.q_len,
            case.kv_len,
            heads=case.heads,
            block_size=case.block_size,
            sparsity=case.sparsity,
            is_causal=case.causal,
            seed=seed,
        )
    if case.mask == "model":
        return model_mask(
            case.q_len, heads=case.heads, block_size=case.block_size, sparsity=case.sparsity
        )
    raise ValueError(f"mask must be random, model or one that is given, got {case.mask!r}")


def peaks_row(peaks: Peaks) -> dict[str, Any]:
    """The peaks as a row of the results file."""
    return {"record": "peaks", **dataclasses.asdict(peaks)}


def rule_lines(cases: Sequence[AttentionCase], seed: int = 0) -> list[str]:
    """What the cost rule says of these calls, in sentences."""
    table = costs.table_in_use()
    if table is None:
        return ["cost rule: without the CPU backend a sparsified model runs dense"]
    lines = [f"cost rule: times of {table.cpu}, {table.tier}, {table.threads} threads"]
    for case in dict.fromkeys(dataclasses.replace(c, mask="random", sparsity=0.9) for c in cases):
        least = costs.crossover(untrained(case, seed), case.shape, case.dtype)
        block = "×".join(map(str, case.block_size))
        when = "always runs dense" if least is None else f"selects from {least:.0%} sparse"
        what = f"{case.q_len} × {case.kv_len} tokens, {block}, {case.dtype}"
        lines.append(f"  dynamic, {what}{', causal' if case.causal else ''}: {when}")
    return lines


def _names(backends: Sequence[str] | None) -> list[str]:
    known = kernels_and_peers()
    usable = [name for name, reason in known.items() if reason is None]
    for name in backends or ():
        if name not in usable:
            reason = known.get(name) or "it is not a kernel for masks"
            raise ValueError(f"backend {name!r} cannot be timed: {reason} (usable: {usable})")
    return list(backends or usable)


def _timed(
    case: AttentionCase, found: Mapping[str, Contender], repeats: int, say: Say
) -> dict[str, Timing]:
    def told(step: str) -> None:
        say(f"{case.describe()}: {step}")

    with torch.inference_mode(not case.gradients):
        return interleave(
            {name: contender.run for name, contender in found.items()},
            repeats=repeats,
            limit_s=LIMIT_S,
            progress=told,
        )


def _memory(
    case: AttentionCase, name: str, contender: Contender, seed: int, say: Say
) -> dict[str, Any]:
    from sparseloom.experiments.bench_memory import peak_bytes

    say(f"{case.describe()}: memory of {name}")
    found = peak_bytes(case, name, seed) if case.mask in ("random", "model") else None
    if found is None:
        return {}
    out = case.heads * case.q_len * case.head_dim * DTYPES[contender.dtype].itemsize
    made = out * (4 if case.gradients else 1)
    if contender.path == "whole" and contender.mask is not None:
        mask = contender.mask
        made += mask.indices.nbytes + mask.offsets.nbytes
    return {"peak_bytes": found, "extra_bytes": max(0, found - made)}


def _nothing(case: AttentionCase) -> SparseMask:
    return SparseMask.full(case.q_len, case.kv_len)
