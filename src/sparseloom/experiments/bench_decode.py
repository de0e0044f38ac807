"""Time one step of decoding on this machine against dense SDPA in fp32.

Decoding reads every byte of the cache once, so each row carries the bytes that its contender has
to read, what it reached of them per second, and what the memory of this machine gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseloom.experiments.timing import Timing, interleave
from sparseloom.kernels import DecodeOutput, PlaneCache, decode_attention
from sparseloom.kernels.cpu import native
from sparseloom.kernels.cpu.peaks import Peaks, measure_peaks


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """One step: query (1, heads, q_len, head_dim), cache (1, kv_heads, kv_len, head_dim).

    `kept` is the share of the keys in the lists of the progressive contenders, the same number at
    random for each key head, and `value_keep` the share of those whose values are read. Their keys
    have `msb_bits` and 4 bits, their values 8. Whether rows fetch the low bits is not left to the
    random numbers: in one contender no row does, in the other all do.
    """

    kv_len: int = 32768
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    q_len: int = 1
    kept: float = 0.28
    value_keep: float = 0.2
    msb_bits: int = 8

    def __post_init__(self) -> None:
        sizes = {"kv_len": self.kv_len, "heads": self.heads, "kv_heads": self.kv_heads}
        sizes |= {"head_dim": self.head_dim, "q_len": self.q_len}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        for name, share in (("kept", self.kept), ("value_keep", self.value_keep)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share}")


@dataclass(frozen=True, slots=True)
class _Contender:
    run: Callable[[], object]
    dtype: str
    bytes_read: int
    facts: dict[str, Any]


def bench_decode(
    cases: Sequence[DecodeCase],
    *,
    repeats: int = 30,
    seed: int = 0,
    peaks: Peaks | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the results schema, op "decode"; the baseline is SDPA in fp32.

    Contenders: "sdpa" in fp32 and bf16; "cpu", the C++ backend, with the same caches and with an
    INT8 cache; "progressive", with bit planes, lists of kept keys and local value pruning, where
    no row fetches the low bits, and "progressive+low", where all rows do.

    Args:
        cases: what to time, in order.
        repeats: measured rounds per case, after one that is not.
        seed: draws tensors and lists.
        peaks: the machine's own; measured if None.
        progress: called with a line per case.

    Without the C++ backend its contenders leave rows with `record` and the reason as `note`.
    """
    peaks = measure_peaks() if peaks is None else peaks
    rows: list[dict[str, Any]] = []
    for case in cases:
        if progress is not None:
            progress(
                f"{case.q_len} of {case.kv_len} tokens, {case.heads} heads on {case.kv_heads}, "
                f"{case.kept:.0%} of the keys, {case.value_keep:.0%} of their values"
            )
        rows += _bench_case(case, repeats, seed, peaks)
    return rows


def _bench_case(case: DecodeCase, repeats: int, seed: int, peaks: Peaks) -> list[dict[str, Any]]:
    with torch.inference_mode():
        contenders = _contenders(case, seed)
        reason, refused = native.missing_reason(), []
        if reason is not None:
            refused = [name for name in contenders if not name.startswith("sdpa")]
        times = interleave(
            {name: c.run for name, c in contenders.items() if name not in refused},
            repeats=repeats,
        )
    return [
        *(_row(case, name, contenders[name], time, times["sdpa"], peaks, seed)
          for name, time in times.items()),
        *({"record": "refused", "operation": "decode", "contender": name, "q_len": case.q_len,
           "kv_len": case.kv_len, "note": reason} for name in refused),
    ]  # fmt: skip


def _contenders(case: DecodeCase, seed: int) -> dict[str, _Contender]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, case.head_dim, generator=generator)

    grouped = case.heads != case.kv_heads
    query, key, value = (
        draw(case.heads, case.q_len), draw(case.kv_heads, case.kv_len),
        draw(case.kv_heads, case.kv_len),
    )  # fmt: skip
    mask = None
    if case.q_len > 1:
        mask = torch.ones(case.q_len, case.kv_len, dtype=torch.bool)
        mask = mask.tril(case.kv_len - case.q_len)
    count = max(1, int(case.kept * case.kv_len))
    keep = torch.stack([
        torch.randperm(case.kv_len, generator=generator)[:count].sort().values
        for _ in range(case.kv_heads)
    ])[None]  # fmt: skip

    def sdpa(*tensors: Tensor) -> Callable[[], object]:
        return lambda: F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=grouped)

    def ours(query: Tensor, cache: Any, **options: Any) -> Callable[[], object]:
        return lambda: decode_attention(query, cache, enable_gqa=grouped, backend="cpu", **options)

    elements = 2 * key.numel()
    wide = (query, key, value)
    half = (query.bfloat16(), key.bfloat16(), value.bfloat16())
    int8 = PlaneCache.from_tensors(key, value, lsb_bits=0, int8_values=True)
    planes = PlaneCache.from_tensors(key, value, msb_bits=case.msb_bits, int8_values=True)
    contenders = {
        "sdpa": _Contender(sdpa(*wide), "float32", 4 * elements, {}),
        "sdpa bfloat16": _Contender(sdpa(*half), "bfloat16", 2 * elements, {}),
        "cpu": _Contender(ours(query, wide[1:]), "float32", 4 * elements, {}),
        "cpu bfloat16": _Contender(ours(half[0], half[1:]), "bfloat16", 2 * elements, {}),
        "cpu int8": _Contender(ours(query, int8), "int8", elements, {}),
    }
    for name, threshold in (("progressive", 0.0), ("progressive+low", 1.0)):
        options: dict[str, Any] = {
            "keep": keep,
            "value_keep": case.value_keep,
            "progressive": threshold,
        }
        # The reference counts what is read, so that the counts are there without the library.
        result = decode_attention(query, planes, enable_gqa=grouped, return_stats=True, **options)
        assert isinstance(result, DecodeOutput)
        assert result.stats is not None
        contenders[name] = _Contender(
            ours(query, planes, **options),
            "int8",
            _progressive_bytes(case, planes, keep, result.stats.values_read, threshold > 0),
            {
                "kept": case.kept,
                "value_keep": case.value_keep,
                "key_bits": [planes.msb_bits, planes.lsb_bits],
                "refetched": float(result.stats.refetched.float().mean()),
                "sparsity": 1 - case.kept,
            },
        )
    return contenders


def _progressive_bytes(
    case: DecodeCase, planes: PlaneCache, keep: Tensor, values_read: Tensor, low: bool
) -> int:
    """Lists, planes of the kept keys, and values; each row reads its own values."""
    per_key = case.head_dim * planes.key_msb.element_size()
    if low and planes.key_lsb is not None:
        per_key += planes.key_lsb.shape[3]
    keys = keep.numel() * (per_key + keep.element_size())
    return keys + int(values_read.sum()) * case.head_dim * planes.value.element_size()


def _row(
    case: DecodeCase,
    name: str,
    contender: _Contender,
    time: Timing,
    baseline: Timing,
    peaks: Peaks,
    seed: int,
) -> dict[str, Any]:
    gbytes_s = contender.bytes_read / time.ms / 1e6
    return {
        "op": "decode",
        "path": "given",
        "contender": name,
        "q_len": case.q_len,
        "kv_len": case.kv_len,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "sparsity": 0.0,
        **contender.facts,
        "dtype": contender.dtype,
        "causal": True,
        "ms": time.ms,
        "spread": time.spread,
        "baseline": "sdpa",
        "baseline_ms": baseline.ms,
        "speedup": baseline.ms / time.ms,
        "bytes_read": contender.bytes_read,
        "gbytes_s": gbytes_s,
        "peak_gbytes_s": peaks.dram_gbytes_s,
        "peak_fraction": gbytes_s / peaks.dram_gbytes_s,
        "seed": seed,
    }
