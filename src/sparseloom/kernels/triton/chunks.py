"""Query blocks a few at a time: ranks of all of them would be as many as scores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseloom.kernels.triton.products import Pairs
from sparseloom.kernels.triton.select import Levels, Rows, scratch_bytes

RANK_BYTES = 1 << 26
"""Bytes of ranks at once, or one query block of each head: about what the second-level cache of a
large GPU holds, so that the passes of the selection do not read them from memory."""
_LINE = 16  # ranks of a row come in multiples of it


class Chunks:
    """Walks over the query blocks of a call in steps that share one buffer of ranks.

    Args:
        bits: width of the ranks.
        tile: key blocks that are searched together; None: whole rows.
        tiles: tiles of a row.
    """

    def __init__(self, pairs: Pairs, *, bits: int, tile: int | None = None, tiles: int = 1) -> None:
        self._pairs, self._bits, self._tile, self._tiles = pairs, bits, tile, tiles
        self._every = pairs.q.shape[:2]
        self.q_blocks = len(pairs.diagonal)
        dtype = torch.int16 if bits < 16 else torch.int32
        widest = self._stride(self.q_blocks)
        row = widest * dtype.itemsize + scratch_bytes(bits, tiles)
        heads = self._every[0] * self._every[1]
        self._together = min(self.q_blocks, max(1, RANK_BYTES // max(1, heads * row)))
        self.scratch_bytes = heads * self._together * row
        room = heads * self._together * widest
        self._room = torch.empty(room, dtype=dtype, device=pairs.q.device)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """First query block, one past the last, and their ranks to be filled in,
        (batch, heads, blocks, stride); nothing for blocks that see no key."""
        for first in range(0, self.q_blocks, self._together):
            last = min(first + self._together, self.q_blocks)
            shape = (*self._every, last - first, self._stride(last))
            if shape[-1]:
                yield first, last, self._room[: torch.Size(shape).numel()].view(shape)

    def rows(self, first: int, last: int, ranks: Tensor) -> Rows:
        """Some query blocks' ranks as rows to choose from."""
        ends = self.spread(self._pairs.visible[..., None], first, last).to(torch.int32)
        stride = ranks.shape[-1]
        tile = stride if self._tile is None else self._tile
        return Rows(ranks.view(-1, stride), ends, tile, self._tiles, self._bits)

    def spread(self, numbers: Tensor, first: int, last: int) -> Tensor:
        """Numbers of some query blocks, (batch or 1, q_blocks, n), for each head, flat."""
        some = numbers[:, None, first:last]
        return some.expand(*self._every, *some.shape[2:]).reshape(-1)

    def every_flag(self, ranks: Tensor) -> Levels:
        """Levels that keep every rank but 0."""
        none = torch.zeros(ranks[..., 0].numel(), dtype=torch.int32, device=ranks.device)
        return Levels(none, none)

    def _stride(self, last: int) -> int:
        """Key blocks that the query blocks before `last` see, in whole lines."""
        bq, bk = self._pairs.block_size
        q_len, kv_len = self._pairs.q.shape[2], self._pairs.k.shape[2]
        keys = kv_len
        if self._pairs.is_causal:
            keys = max(0, min(last * bq, q_len) + kv_len - q_len)
        return -(-keys // (bk * _LINE)) * _LINE
