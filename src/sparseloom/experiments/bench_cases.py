"""What one row of the benchmark is about."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparseloom.methods import AttentionShape
from sparseloom.methods.pooling import POOLINGS
from sparseloom.methods.settings import check_choice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One attention call: query (1, heads, q_len, head_dim), key, value (1, kv_heads, kv_len, …).

    `sparsity` is the share of allowed key blocks that each query block drops; `mask` says where
    the mask comes from: "random", "model", or "trace:NAME" of a selection; `gradients` asks for
    forward and backward; `pooling` is how the whole path and prediction rank key blocks.
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
    mask: str = "random"
    gradients: bool = False
    pooling: str = "mass"

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
        check_choice("pooling", self.pooling, POOLINGS)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.causal and self.q_len > self.kv_len:
            raise ValueError(
                f"q_len must not exceed kv_len in causal attention, got {self.q_len} and "
                f"{self.kv_len}"
            )
        if self.mask == "model" and (not self.causal or self.q_len != self.kv_len):
            raise ValueError("mask 'model' is causal, of as many queries as keys")

    @property
    def shape(self) -> AttentionShape:
        """The sizes as methods see them; hidden states are as wide as all heads."""
        return AttentionShape(
            batch=1,
            heads=self.heads,
            kv_heads=self.kv_heads,
            q_len=self.q_len,
            kv_len=self.kv_len,
            head_dim=self.head_dim,
            hidden_size=self.heads * self.head_dim,
            is_causal=self.causal,
        )

    def describe(self) -> str:
        """The case in a few words."""
        block = "×".join(map(str, self.block_size))
        return (
            f"{self.q_len}×{self.kv_len} tokens, {self.heads} heads, blocks {block}, "
            f"{self.sparsity:.0%} sparse, {self.dtype}"
            + (", with gradients" if self.gradients else "")
        )
