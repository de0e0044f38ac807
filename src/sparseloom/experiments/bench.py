"""Time attention on this machine: every backend and a whole method against dense SDPA.

Contenders of one case run interleaved in one process; each row carries its median, its spread, and
what it reached of the machine's own peak, measured here with one matrix product and one copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseloom.experiments.timing import Timing, interleave
from sparseloom.kernels import attention, available_backends
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, DynamicSparse, Predictor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One attention call: query (1, heads, q_len, head_dim), key, value (1, kv_heads, kv_len, …).

    `sparsity` is the share of allowed key blocks that each query block drops.
    """

    q_len: int = 2048
    kv_len: int = 2048
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    block_size: tuple[int, int] = (1, 1)
    sparsity: float = 0.9
    dtype: str = "float32"
    causal: bool = True

    def __post_init__(self) -> None:
        sizes = {"q_len": self.q_len, "kv_len": self.kv_len, "heads": self.heads}
        sizes |= {"kv_heads": self.kv_heads, "head_dim": self.head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.causal and self.q_len > self.kv_len:
            raise ValueError(
                f"q_len must not exceed kv_len in causal attention, got {self.q_len} and "
                f"{self.kv_len}"
            )


@dataclass(frozen=True, slots=True)
class Peak:
    """What this machine reaches: one large matrix product (GFLOP/s) and one large copy (GB/s)."""

    gflops: float
    gbytes_s: float


def measure_peak(dtype: torch.dtype, *, size: int = 1024, repeats: int = 5) -> Peak:
    """Peak of a `size`³ matrix product in `dtype` and of copying 128 MiB, medians."""
    a = torch.randn(size, size).to(dtype)
    b = torch.randn(size, size).to(dtype)
    source = torch.zeros(32 * 2**20, dtype=torch.float32)
    target = torch.empty_like(source)
    times = interleave(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, repeats=repeats
    )
    moved = 2 * source.numel() * source.element_size()
    return Peak(
        gflops=2 * size**3 / times["product"].ms / 1e6, gbytes_s=moved / times["copy"].ms / 1e6
    )


def random_mask(case: AttentionCase, seed: int) -> SparseMask:
    """Each query block keeps ⌈(1 − sparsity)·allowed⌉ random key blocks and always its last."""
    bq, bk = case.block_size
    rows, columns = -(-case.q_len // bq), -(-case.kv_len // bk)
    generator = np.random.default_rng(seed)
    kept: list[np.ndarray] = []
    for row in [row for _ in range(case.heads) for row in range(rows)]:
        allowed = columns
        if case.causal:
            last_query = min((row + 1) * bq, case.q_len) - 1
            allowed = (last_query + case.kv_len - case.q_len) // bk + 1
        count = math.ceil((1 - case.sparsity) * allowed)
        chosen = generator.choice(allowed - 1, count - 1, replace=False) if count > 1 else []
        kept.append(np.sort(np.append(chosen, allowed - 1)))
    counts = torch.tensor([len(row) for row in kept]).view(1, case.heads, rows)
    ends = counts.flatten().cumsum(0).view(1, case.heads, rows)
    offsets = torch.cat([ends[..., :1] - counts[..., :1], ends], dim=-1)
    indices = torch.from_numpy(np.concatenate(kept)).to(torch.int32)
    return SparseMask(
        indices, offsets, block_size=case.block_size, q_len=case.q_len, kv_len=case.kv_len
    )


def bench_attention(
    cases: Sequence[AttentionCase],
    *,
    backends: Sequence[str] | None = None,
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the results schema, op "attention"; the baseline is dense SDPA.

    Args:
        cases: what to time, in order.
        backends: kernels for path "given" (the mask is there); default: all usable ones.
        repeats: measured rounds per case, after one that is not.
        seed: draws tensors, masks and the untrained predictor of path "whole" (prediction,
            selection and attention; the time does not depend on what the predictor learned).
        progress: called with a line per case.

    A backend that does not take a case leaves a row with `record` and the reason as `note`.

    Raises:
        ValueError: an unknown or unusable backend.
    """
    usable = available_backends()
    chosen = [name for name, reason in usable.items() if reason is None and name != "dense"]
    for name in backends or ():
        if usable.get(name, "") is not None or name == "dense":
            reason = usable.get(name) or "it is not a kernel for masks"
            raise ValueError(f"backend {name!r} cannot be timed: {reason} (usable: {chosen})")
    chosen = list(backends or chosen)
    peaks: dict[str, Peak] = {}
    rows: list[dict[str, Any]] = []
    for case in cases:
        if progress is not None:
            progress(_describe(case))
        if case.dtype not in peaks:
            peaks[case.dtype] = measure_peak(DTYPES[case.dtype])
        rows += _bench_case(case, chosen, repeats, seed, peaks[case.dtype])
    return rows


def _bench_case(
    case: AttentionCase, backends: list[str], repeats: int, seed: int, peak: Peak
) -> list[dict[str, Any]]:
    query, key, value, hidden = _tensors(case, seed)
    mask = random_mask(case, seed)
    grouped = case.heads != case.kv_heads

    def dense() -> object:
        if case.causal and case.q_len != case.kv_len:
            return attention(query, key, value, is_causal=True, enable_gqa=grouped, backend="dense")
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=case.causal, enable_gqa=grouped
        )

    def given(backend: str) -> Callable[[], object]:
        return lambda: attention(
            query, key, value, mask, is_causal=case.causal, enable_gqa=grouped, backend=backend
        )

    contenders: dict[str, Callable[[], object]] = {"sdpa": dense}
    notes: dict[str, str] = {}
    masks: dict[str, SparseMask | None] = dict.fromkeys(backends, mask)
    for name in backends:
        try:
            given(name)()
        except (ValueError, NotImplementedError, RuntimeError) as error:
            notes[name] = " ".join(str(error).split())
            continue
        contenders[name] = given(name)
    if case.q_len == case.kv_len:
        method = _untrained(case, seed)
        inputs = AttentionInputs(
            query=query, key=key, value=value, layer=0, is_causal=case.causal, key_padding=None,
            scale=case.head_dim**-0.5, hidden_states=hidden, rotary=None, past=None,
        )  # fmt: skip
        masks["dynamic"] = method.select(inputs)
        contenders["dynamic"] = lambda: attention(
            query, key, value, method.select(inputs), is_causal=case.causal, enable_gqa=grouped
        )
    with torch.inference_mode():
        times = interleave(contenders, repeats=repeats)
    masks["sdpa"] = None
    return [
        *(_row(case, name, masks[name], time, times["sdpa"], peak, seed)
          for name, time in times.items()),
        *({"record": "refused", "contender": name, "block_size": list(case.block_size),
           "q_len": case.q_len, "kv_len": case.kv_len, "note": note}
          for name, note in notes.items()),
    ]  # fmt: skip


def _row(
    case: AttentionCase,
    contender: str,
    mask: SparseMask | None,
    time: Timing,
    dense: Timing,
    peak: Peak,
    seed: int,
) -> dict[str, Any]:
    full = SparseMask.full(case.q_len, case.kv_len) if mask is None else mask
    pairs = int(full.kept_pairs(is_causal=case.causal).sum()) * (case.heads // full.heads)
    width = DTYPES[case.dtype].itemsize
    moved = width * case.head_dim * 2 * (case.heads * case.q_len + case.kv_heads * case.kv_len)
    if mask is not None:
        moved += 4 * mask.nnz
    gflops = 4 * case.head_dim * pairs / time.ms / 1e6
    return {
        "op": "attention",
        "path": "whole" if contender == "dynamic" else "given",
        "contender": contender,
        "q_len": case.q_len,
        "kv_len": case.kv_len,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "block_size": list(case.block_size),
        "sparsity": 0.0 if mask is None else case.sparsity,
        "density": full.density(is_causal=case.causal),
        "dtype": case.dtype,
        "causal": case.causal,
        "ms": time.ms,
        "spread": time.spread,
        "baseline": "sdpa",
        "baseline_ms": dense.ms,
        "speedup": dense.ms / time.ms,
        "gflops": gflops,
        "gbytes_s": moved / time.ms / 1e6,
        "peak_gflops": peak.gflops,
        "peak_gbytes_s": peak.gbytes_s,
        "peak_fraction": gflops / peak.gflops,
        "seed": seed,
    }


def _tensors(case: AttentionCase, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return (
        draw(1, case.heads, case.q_len, case.head_dim),
        draw(1, case.kv_heads, case.kv_len, case.head_dim),
        draw(1, case.kv_heads, case.kv_len, case.head_dim),
        draw(1, case.q_len, case.heads * case.head_dim),
    )


def _untrained(case: AttentionCase, seed: int) -> DynamicSparse:
    method = DynamicSparse(sparsity=case.sparsity, block_size=case.block_size, rotary=False)
    predictor = Predictor.for_shape(
        layers=1,
        hidden_size=case.heads * case.head_dim,
        heads=case.heads,
        head_dim=case.head_dim,
        projection=method.projection,
        bits=method.bits,
        seed=seed,
    )
    return DynamicSparse(
        sparsity=case.sparsity, block_size=case.block_size, rotary=False, predictor=predictor.eval()
    )


def _describe(case: AttentionCase) -> str:
    block = "×".join(map(str, case.block_size))
    return (
        f"{case.q_len}×{case.kv_len} tokens, {case.heads} heads, blocks {block}, "
        f"{case.sparsity:.0%} sparse, {case.dtype}"
    )
