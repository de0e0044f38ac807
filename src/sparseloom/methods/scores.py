"""Scores of all (query, key) pairs, made a few query rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

CPU_CHUNK = 1 << 21
"""Scores that exist at once on a CPU (8 MiB in fp32, about a cache); one block row at least."""
DEVICE_CHUNK = 1 << 26
"""The same on other devices (256 MiB)."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores in fp32, on demand: `rows(start, stop, keys)` gives the queries start … stop - 1
    against the first `keys` keys, as (batch, heads, stop - start, keys).

    The tensor that `rows` returns belongs to the caller, which may write into it.
    """

    batch: int
    heads: int
    q_len: int
    kv_len: int
    device: torch.device
    rows: Callable[[int, int, int], Tensor]

    @classmethod
    def of(cls, scores: Scores | Float[Tensor, "batch heads q_len kv_len"]) -> Scores:
        """Scores that are given as one tensor, or as they are."""
        if isinstance(scores, Scores):
            return scores
        whole = scores.detach()

        def rows(start: int, stop: int, keys: int) -> Tensor:
            return whole[:, :, start:stop, :keys].to(torch.float32, copy=True)

        return cls(*whole.shape, device=whole.device, rows=rows)

    @classmethod
    def from_query_key(
        cls,
        query: Float[Tensor, "batch heads q_len head_dim"],
        key: Float[Tensor, "batch kv_heads kv_len head_dim"],
        scale: float,
    ) -> Scores:
        """q·k·scale; query head h reads key head h * kv_heads // heads."""
        batch, heads, q_len, _ = query.shape
        kv_heads, kv_len = key.shape[1:3]
        if heads % kv_heads:
            raise ValueError(f"query must have a multiple of {kv_heads} heads, got {heads}")
        grouped = query.detach().float().unflatten(1, (kv_heads, heads // kv_heads))
        keys_first = key.detach().float().transpose(-1, -2)  # (B, Hkv, D, S)

        def rows(start: int, stop: int, keys: int) -> Tensor:
            some = grouped[:, :, :, start:stop].flatten(2, 3)  # (B, Hkv, G * R, D)
            with torch.autocast(query.device.type, enabled=False):
                scores = some @ keys_first[..., :keys]
            return scores.view(batch, heads, stop - start, keys).mul_(scale)

        return cls(batch, heads, q_len, kv_len, query.device, rows)

    def chunks(self, block_rows: int = 1) -> Iterator[tuple[int, int]]:
        """Query ranges (start, stop) of whole blocks of `block_rows` queries (`row_chunks`)."""
        return row_chunks(
            self.q_len, self.batch * self.heads * self.kv_len, block_rows, self.device
        )


def row_chunks(
    q_len: int, row_size: int, block_rows: int, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Query ranges of whole blocks of queries, of which each query takes `row_size` numbers, within
    the memory bounds above."""
    limit = CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
    step = max(1, limit // max(1, row_size * block_rows)) * block_rows
    for start in range(0, q_len, step):
        yield start, min(start + step, q_len)
