"""DOTA's five benchmarks: sizes, masks of a given retention, and the retentions that sweeps found.

The paper's retentions per benchmark are unpublished. DOTA-C loses less than 0.5 % and DOTA-A less
than 1.5 %: where a sweep of ours is stored for a benchmark, its C and A are the smallest retentions
tried that stay within these bounds; elsewhere they are defaults, and everything that needs them is
a scenario.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparseloom.experiments.reproduce.rows import Row
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    PredictorShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)

SIGMA, BITS = 0.25, 4
ELSA_RETENTION = 0.2
BOUNDS = {"C": 0.005, "A": 0.015}
"""Loss of each case: points of accuracy over 100, or perplexity over the dense one, minus 1."""


@dataclass(frozen=True)
class Benchmark:
    """Sizes of one benchmark, and the shares of pairs that DOTA-C and DOTA-A keep by default."""

    name: str
    layers: int
    heads: int
    hidden: int
    head_dim: int
    ffn: int
    length: int
    conservative: float
    aggressive: float
    sequences: int = 1
    is_causal: bool = False
    task: str = ""
    """The task of ours whose sweep tells its retentions."""

    def shape(self) -> ModelShape:
        """The sizes of the model."""
        return ModelShape(
            layers=self.layers,
            hidden_size=self.hidden,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            intermediate_size=self.ffn,
            is_causal=self.is_causal,
        )


BENCHMARKS = (
    Benchmark("SQuAD", 24, 16, 1024, 64, 4096, 384, 0.10, 0.05),
    Benchmark("Image", 1, 8, 128, 8, 128, 1024, 0.05, 0.03, task="lra-image"),
    Benchmark("Text", 4, 4, 256, 64, 1024, 2000, 0.05, 0.01, task="lra-text"),
    Benchmark("Retrieval", 4, 4, 128, 32, 512, 4000, 0.05, 0.02, sequences=2, task="lra-retrieval"),
    Benchmark("LM", 12, 12, 768, 64, 3072, 1024, 0.10, 0.05, is_causal=True),
)


@dataclass(frozen=True)
class Retention:
    """The share of pairs that a case keeps on a benchmark, and where it comes from.

    Args:
        share: kept over allowed pairs.
        sparsity: of the contender that it was found with; None: a default.
        said: where it comes from, as an assumption.
        loss, upper: of that contender, with its one-sided 95 % bound.
        projection: σ of its predictor, which the machine is charged for.
    """

    share: float
    sparsity: float | None
    said: str
    loss: float | None = None
    upper: float | None = None
    projection: float = SIGMA

    @property
    def found(self) -> bool:
        """Whether a sweep found it."""
        return self.sparsity is not None


def loss_of(row: Row) -> tuple[float, float]:
    """Loss of a contender and its one-sided 95 % bound, as `BOUNDS` counts them.

    Bits per byte become perplexity over the dense one, minus 1; shares stay what they are.
    """
    if row["metric"] in ("bits_per_byte", "bits_per_token"):
        return 2.0 ** row["loss"] - 1, 2.0 ** row["loss_upper95"] - 1
    return row["loss"], row["loss_upper95"]


def search(rows: Sequence[Row], task: str, case: str) -> Retention | None:
    """The smallest retention tried on a task that stays within the bound of a case.

    Contenders are dynamic sparse attention in INT4 with single keys, the selection that the
    machine makes. The loss itself decides; its bound is told with it.

    Args:
        rows: of any sweeps that are stored.
        task: whose.
        case: "C" or "A".

    Returns:
        None where no such sweep is there or nothing stays within the bound.
    """
    tried = [one for one in rows if one.get("task") == task and _is_contender(one)]
    within = [one for one in tried if loss_of(one)[0] <= BOUNDS[case]]
    if not within:
        return None
    best = min(within, key=lambda one: (one["density"], one["loss"]))
    loss, upper = loss_of(best)
    least = min(one["density"] for one in tried)
    end = ", the smallest that was tried" if best["density"] == least else ""
    what = "perplexity per byte" if best["metric"] == "bits_per_byte" else best["metric"]
    where = _where(best)
    said = (
        f"{task}: DOTA-{case} keeps {best['density']:.3g}, found by our sweep{where}: loses "
        f"{loss:.2%} of {what} (at most {upper:.2%} at 95 %){end}"
    )
    projection = best["settings"]["projection"]
    if projection != SIGMA:
        said += f"; with a predictor of σ = {projection:g}"
    return Retention(best["density"], best["sparsity"], said, loss, upper, projection)


def _is_contender(row: Row) -> bool:
    settings: dict[str, Any] = row.get("settings") or {}
    return (
        row.get("method") == "dynamic"
        and row.get("loss") is not None
        and settings.get("bits") == BITS
        and list(settings.get("block_size", ())) == [1, 1]
    )


def _where(row: Row) -> str:
    study: dict[str, Any] = row.get("study") or {}
    if not study:
        return ""
    return f" on a model of size {study.get('size')!r} at {study.get('length')} tokens"


def has_sweep(rows: Sequence[Row], task: str) -> bool:
    """Whether a sweep of a task is stored."""
    return any(one.get("task") == task and _is_contender(one) for one in rows)


def retention(rows: Sequence[Row], benchmark: Benchmark, case: str) -> Retention:
    """The retention of a published benchmark: found by a sweep, else the default."""
    found = search(rows, benchmark.task, case) if benchmark.task else None
    if found is not None:
        return found
    share = benchmark.conservative if case == "C" else benchmark.aggressive
    why = "no sweep of ours is stored"
    if benchmark.task and has_sweep(rows, benchmark.task):
        why = f"no retention that our sweep tried stays within {BOUNDS[case]:.1%}"
    looser = search(rows, benchmark.task, "A") if benchmark.task and case == "C" else None
    if looser is not None and looser.share > share:
        # A tighter bound cannot do with less than a looser one needs.
        said = f"{benchmark.name}: DOTA-C keeps what DOTA-A needs: {why}"
        return Retention(looser.share, None, said, projection=looser.projection)
    return Retention(
        share,
        None,
        f"{benchmark.name}: DOTA-{case} keeps {share:g}, our default, chosen with the published "
        f"ratios in view: {why}",
    )


def row_counts(length: int, share: float, *, is_causal: bool = False) -> np.ndarray:
    """Keys per query (length) that keep this share of the allowed pairs, to the pair.

    Rows differ by at most one key from the share of their own length.
    """
    allowed = np.arange(1, length + 1) if is_causal else np.full(length, length)
    ends = np.floor(share * np.cumsum(allowed) + 0.5).astype(np.int64)
    return np.minimum(np.diff(ends, prepend=0), allowed)


def even_mask(length: int, share: float, *, is_causal: bool = False) -> MaskArrays:
    """A mask of evenly spaced keys that keeps this share; one head, shared by all."""
    counts = row_counts(length, share, is_causal=is_causal)
    allowed = np.arange(1, length + 1) if is_causal else np.full(length, length)
    rank = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    spacing = np.repeat(allowed, counts)
    keys = (2 * rank + 1) * spacing // (2 * np.repeat(counts, counts))
    return _one_head(keys, counts, length, is_causal=is_causal)


def random_mask(length: int, share: float, *, is_causal: bool = False, seed: int = 0) -> MaskArrays:
    """A mask of keys drawn without replacement, as many as in `even_mask`: queries share keys by
    chance alone, which is the least that a scheduler can hope for."""
    random = np.random.default_rng(seed)
    counts = row_counts(length, share, is_causal=is_causal)
    allowed = np.arange(1, length + 1) if is_causal else np.full(length, length)
    rows = [
        np.sort(random.choice(int(n), int(k), replace=False))
        for n, k in zip(allowed, counts, strict=True)
    ]
    return _one_head(np.concatenate(rows), counts, length, is_causal=is_causal)


def _one_head(keys: np.ndarray, counts: np.ndarray, length: int, *, is_causal: bool) -> MaskArrays:
    offsets = np.concatenate([[0], np.cumsum(counts)]).reshape(1, 1, -1)
    return MaskArrays(
        keys.astype(np.int32), offsets.astype(np.int64), (1, 1), length, length, is_causal
    )


def benchmark_trace(
    benchmark: Benchmark,
    shares: dict[str, float] | None = None,
    *,
    layers: int | None = None,
    batch: int | None = None,
    drawn: bool = False,
    projection: float = SIGMA,
) -> Trace:
    """The benchmark with DOTA-F (everything), -C and -A as selections.

    Args:
        benchmark: whose sizes.
        shares: kept pairs by case, for others than the defaults; of "ELSA" without a predictor.
        layers: instead of the benchmark's.
        batch: sequences instead of the benchmark's.
        drawn: masks are drawn at random instead of spaced evenly.
        projection: σ of the predictor.
    """
    shape = benchmark.shape()
    if layers is not None:
        shape = shape.model_copy(update={"layers": layers})
    count = batch if batch is not None else benchmark.sequences
    operators = transformer_operators(shape, q_len=benchmark.length, batch=count)
    predictor = PredictorShape(head_dim=round(projection * benchmark.head_dim), bits=BITS)
    selections = {"F": Selection("F", (AttentionCall(),) * shape.layers)}
    make = random_mask if drawn else even_mask
    used = shares or {"C": benchmark.conservative, "A": benchmark.aggressive}
    for name, share in used.items():
        mask = make(benchmark.length, share, is_causal=benchmark.is_causal)
        call = AttentionCall(mask=mask, predictor=None if name == "ELSA" else predictor)
        selections[name] = Selection(name, (call,) * shape.layers)
    return Trace(Workload(shape, operators, name=benchmark.name), selections)
