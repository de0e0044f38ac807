"""The calls that the options of `sparseloom bench` describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseloom.experiments.bench_cases import AttentionCase
    from sparseloom.mask import SparseMask


def attention_cases(
    q_lens: Sequence[int],
    kv_lens: Sequence[int] | None,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    blocks: Sequence[str],
    sparsities: Sequence[float],
    dtypes: Sequence[str],
    causal: bool,
    sources: Sequence[str],
    poolings: Sequence[str],
    gradients: bool,
    masks: dict[str, SparseMask],
) -> list[AttentionCase]:
    """Every combination; masks out of traces are put into `masks`, with cases of their sizes."""
    from sparseloom.experiments.bench_cases import AttentionCase
    from sparseloom.experiments.bench_masks import trace_masks

    cases: list[AttentionCase] = []
    common: dict[str, Any] = {"head_dim": head_dim, "gradients": gradients}
    for source in sources:
        kind, _, folder = source.partition(":")
        if kind == "trace" and folder:
            for name, (mask, is_causal) in trace_masks(Path(folder)).items():
                masks[f"trace {name}"] = mask
                cases += [
                    AttentionCase(
                        q_len=mask.q_len,
                        kv_len=mask.kv_len,
                        heads=mask.heads,
                        kv_heads=mask.heads,
                        block_size=mask.block_size,
                        sparsity=1 - mask.density(is_causal=is_causal),
                        dtype=dtype,
                        causal=is_causal,
                        mask=f"trace {name}",
                        pooling=pooling,
                        **common,
                    )
                    for dtype in dtypes
                    for pooling in poolings
                ]
            continue
        if source not in ("random", "model"):
            raise ValueError(f"--mask must be random, model or trace:DIR, got {source!r}")
        cases += [
            AttentionCase(
                q_len=length,
                kv_len=keys,
                heads=heads,
                kv_heads=kv_heads or heads,
                block_size=block_size(block),
                sparsity=share,
                dtype=dtype,
                causal=causal,
                mask=source,
                pooling=pooling,
                **common,
            )
            for pooling in poolings
            for length in q_lens
            for keys in kv_lens or [length]
            for block in blocks
            for share in sparsities
            for dtype in dtypes
        ]
    return cases


def decode_rows(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    kept: float,
    value_keep: float,
    repeats: int,
    seed: int,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One step of decoding for every number of queries and keys."""
    from sparseloom.experiments.bench import peaks_row
    from sparseloom.experiments.bench_decode import DecodeCase, bench_decode
    from sparseloom.kernels.cpu.peaks import measure_peaks

    cases = [
        DecodeCase(
            kv_len=keys,
            heads=heads,
            kv_heads=kv_heads or heads,
            head_dim=head_dim,
            q_len=queries,
            kept=kept,
            value_keep=value_keep,
        )
        for queries in q_lens
        for keys in kv_lens
    ]
    progress("peaks of this machine")
    peaks = measure_peaks()
    rows = bench_decode(cases, repeats=repeats, seed=seed, peaks=peaks, progress=progress)
    return [peaks_row(peaks), *rows]


def block_size(text: str) -> tuple[int, int]:
    """A block like 8x1.

    Raises:
        ValueError: it is not like that.
    """
    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"--block-size must be like 8x1 or 64x64, got {text!r}")
    return int(words[0]), int(words[1])
