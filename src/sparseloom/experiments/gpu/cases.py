"""What is timed on a card: one long prompt through the attention of a layer of a large model."""

from __future__ import annotations

from collections.abc import Sequence

from sparseloom.experiments.bench_cases import AttentionCase

HEADS, HEAD_DIM, DTYPE = 32, 128, "bfloat16"
LENGTHS = (8192, 32768, 131072)
SPARSITIES = (0.9, 0.95, 0.99)
BLOCKS = ((64, 1), (128, 1))
"""Queries that share their keys fill a tile of the tensor cores; keys are chosen one by one."""


def gpu_cases(
    *,
    lengths: Sequence[int] = LENGTHS,
    blocks: Sequence[tuple[int, int]] = BLOCKS,
    sparsities: Sequence[float] = SPARSITIES,
    dtypes: Sequence[str] = (DTYPE,),
    heads: int = HEADS,
    kv_heads: int | None = None,
    head_dim: int = HEAD_DIM,
    causal: bool = True,
    gradients: bool = False,
    pooling: str = "mass",
) -> list[AttentionCase]:
    """Every combination, a length and its dtype after the other."""
    return [
        AttentionCase(
            q_len=length,
            kv_len=length,
            heads=heads,
            kv_heads=kv_heads or heads,
            head_dim=head_dim,
            block_size=block,
            sparsity=sparsity,
            dtype=dtype,
            causal=causal,
            gradients=gradients,
            pooling=pooling,
        )
        for length in lengths
        for dtype in dtypes
        for block in blocks
        for sparsity in sparsities
    ]
