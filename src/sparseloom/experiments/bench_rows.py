"""One timed contender as a row of the results file: what it computed, how fast, of which peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from sparseloom.experiments.bench_cases import DTYPES, AttentionCase
from sparseloom.experiments.bench_contenders import Contender, untrained
from sparseloom.experiments.timing import Timing
from sparseloom.methods import DynamicSparse, costs


@runtime_checkable
class Ceiling(Protocol):
    """What a device reaches at most."""

    @property
    def dram_gbytes_s(self) -> float:
        """GB/s of its memory."""
        ...

    def of(self, dtype: torch.dtype) -> float:
        """GFLOP/s of products in a dtype."""
        ...


def attention_row(
    case: AttentionCase,
    name: str,
    contender: Contender,
    times: Mapping[str, Timing],
    baseline: str,
    peaks: Ceiling,
    seed: int,
    table: costs.CostTable | None = None,
) -> dict[str, Any]:
    """The row of a contender of `case`, beside the time of `baseline`.

    Operations are those on kept pairs; bytes are those of each input, index and output once.

    Args:
        case: what was computed.
        name: the contender, a key of `times`.
        contender: what it kept.
        times: of all contenders.
        baseline: what the speed-up is over.
        peaks: of the device.
        seed: of the untrained predictor, whose settings the row tells.
        table: what the cost rule goes by; default: that of this processor.
    """
    time, dense, mask = times[name], times[baseline], contender.mask
    allowed = case.heads * case.shape.allowed_pairs
    pairs = allowed
    if mask is not None:
        pairs = int(mask.kept_pairs(is_causal=case.causal).sum()) * (case.heads // mask.heads)
    dtype = DTYPES.get(contender.dtype, torch.float32)
    moved = dtype.itemsize * case.head_dim * 2
    moved *= case.heads * case.q_len + case.kv_heads * case.kv_len
    if mask is not None:
        moved += 4 * mask.nnz
    # Two products forward; backward computes the scores anew and four more.
    products = 7 if case.gradients else 2
    gflops = 2 * products * case.head_dim * pairs / time.ms / 1e6
    peak = peaks.of(dtype)
    return {
        "op": "attention",
        "path": contender.path,
        "passes": "forward+backward" if case.gradients else "forward",
        "contender": name,
        "q_len": case.q_len,
        "kv_len": case.kv_len,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "block_size": None if mask is None else list(mask.block_size),
        "sparsity": 0.0 if mask is None else case.sparsity,
        "density": pairs / allowed,
        "mask": None if mask is None else case.mask,
        "dtype": contender.dtype,
        "causal": case.causal,
        "ms": time.ms,
        "spread": time.spread,
        "repeats": time.repeats,
        "baseline": baseline,
        "baseline_ms": dense.ms,
        "speedup": dense.ms / time.ms,
        "gflops": gflops,
        "gbytes_s": moved / time.ms / 1e6,
        "peak_gflops": peak,
        "peak_gbytes_s": peaks.dram_gbytes_s,
        "peak_fraction": gflops / peak,
        "seed": seed,
    } | (_settings(case, seed, table) if contender.path in ("whole", "select") else {})


def refused_row(case: AttentionCase, name: str, note: str) -> dict[str, Any]:
    """The row of a contender that does not take the case."""
    return {
        "record": "refused",
        "contender": name,
        "block_size": list(case.block_size),
        "q_len": case.q_len,
        "kv_len": case.kv_len,
        "dtype": case.dtype,
        "note": note,
    }


def _settings(case: AttentionCase, seed: int, table: costs.CostTable | None) -> dict[str, Any]:
    """How it selects, and what the cost rule would do, had it a say here."""
    method = untrained(case, seed)
    settings = {"projection": method.projection, "bits": method.bits, "pooling": method.pooling}
    return settings | _rule(case, method, table)


def _rule(
    case: AttentionCase, method: DynamicSparse, table: costs.CostTable | None
) -> dict[str, Any]:
    found = costs.forecast(method, case.shape, case.dtype, table)
    if found is None:
        return {"rule": "dense", "rule_ratio": None}
    verdict = "sparse" if found.ratio <= costs.MARGIN else "dense"
    return {"rule": verdict, "rule_ratio": found.ratio}
