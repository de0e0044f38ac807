"""What steps of generation read of the cache of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Int64
from torch import Tensor

from sparseloom.kernels import DecodeStats

Step: TypeAlias = tuple[DecodeStats, Int64[Tensor, "batch kv_heads"] | None]
"""What the rows of a step read, and the keys of each key/value head where its queries differ."""


class StepShape(NamedTuple):
    """What the steps of a layer have in common, as long as batch and cache keep their form."""

    heads: tuple[int, int, int]  # batch, key/value heads, query heads of each
    head_dim: int
    value_dim: int
    element_size: int
    key_bits: tuple[int, int]
    value_bits: int
    progressive: bool

    @property
    def dense_bytes(self) -> int:
        """Of a token's keys and values in the model's type."""
        return self.heads[1] * (self.head_dim + self.value_dim) * self.element_size


@dataclass
class CacheReads:
    """What steps of generation read of the cache of one layer; see `LayerStats`."""

    steps: int = 0
    key_high_bytes: float = 0.0
    key_low_bytes: float = 0.0
    value_bytes: float = 0.0
    index_bytes: int = 0
    dense_cache_bytes: int = 0
    rows: int = 0
    low_rows: int = 0

    def add(self, sums: StepSums) -> None:
        """Take in what some steps read."""
        self.key_high_bytes += sums.key_high_bytes
        self.key_low_bytes += sums.key_low_bytes
        self.value_bytes += sums.value_bytes
        self.rows += sums.rows
        self.low_rows += sums.low_rows


class StepSums(NamedTuple):
    """Sums over some steps: pairs, multiply-accumulates, bytes and rows; see `LayerStats`."""

    kept: int
    attention_macs: int
    key_high_bytes: float
    key_low_bytes: float
    value_bytes: float
    rows: int
    low_rows: int

    @property
    def cache_bytes(self) -> int:
        """Of keys and values."""
        return int(self.key_high_bytes + self.key_low_bytes + self.value_bytes)


def sum_steps(shape: StepShape, steps: Sequence[Step]) -> StepSums:
    """What steps of one shape read: summed up all at once, because each is so little."""
    keys, values, low = (
        torch.stack(each)[..., 0].unflatten(2, shape.heads[1:])  # (steps, B, KV, G)
        for each in zip(*(stats for stats, _ in steps), strict=True)
    )
    high = keys.amax(-1)  # queries that share a key/value head read the same keys, or none
    unions = [union for _, union in steps]
    if any(union is not None for union in unions):  # or each its own
        pairs = zip(high, unions, strict=True)
        high = torch.stack([same if union is None else union for same, union in pairs])
    fetched = high * low.any(-1) if shape.progressive else high
    low_bytes = int(fetched.sum()) * shape.head_dim * shape.key_bits[1] / 8
    kept, rows = int(keys.sum()), int((keys > 0).sum())
    again = int((keys * low).sum()) if shape.progressive else 0
    read = int(values.sum(-1).minimum(high).sum())
    return StepSums(
        kept=kept,
        attention_macs=(kept + again) * shape.head_dim + int(values.sum()) * shape.value_dim,
        key_high_bytes=int(high.sum()) * shape.head_dim * shape.key_bits[0] / 8,
        key_low_bytes=low_bytes,
        value_bytes=read * shape.value_dim * shape.value_bits / 8,
        rows=rows,
        low_rows=int(low.sum()) if shape.progressive else rows * (low_bytes > 0),
    )


def union_of(
    lists: Int64[Tensor, "batch list_heads kept"] | None, heads: tuple[int, int, int], kv_len: int
) -> Int64[Tensor, "batch kv_heads"] | None:
    """Keys that each key/value head reads for any of its queries; None where they have one list."""
    batch, kv_heads, group = heads
    if lists is None or group == 1 or lists.shape[1] <= kv_heads:
        return None
    read = lists.new_zeros((batch, kv_heads, kv_len + 1), dtype=torch.bool)
    read.scatter_(2, lists.where(lists >= 0, kv_len).view(batch, kv_heads, -1), True)
    return read[..., :kv_len].sum(-1)
