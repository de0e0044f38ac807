"""Attention within blocks, or between each block and one other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseloom.methods.settings import check_at_least
from sparseloom.methods.static import StaticPattern


@dataclass(frozen=True)
class BlockLocal(StaticPattern):
    """Attention within blocks: "local attention" of the Long Range Arena, and BlockBERT.

    With `blocks` = m and `shifts` it is blockwise self-attention (Qiu et al., 2020): each group of
    heads sends block b of the queries to block (b + shift) mod m of the keys; (0, 0, 1) is two
    thirds of the heads within blocks and one third between neighbours.  In causal models a token
    whose block would lie ahead sees itself.

    Args:
        block: tokens per block.
        blocks: number of blocks, instead of `block`: they then grow with the input.
        shifts: one per group of heads, groups of equal size as far as the heads allow.
    """

    name: ClassVar[str] = "blocklocal"

    block: int = 50
    blocks: int | None = None
    shifts: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        check_at_least("block", self.block, 1)
        if self.blocks is not None:
            check_at_least("blocks", self.blocks, 1)
        if not self.shifts:
            raise ValueError("shifts must hold at least one number, got ()")
        for shift in self.shifts:
            check_at_least("shifts", shift, 0)

    def unit(self, kv_len: int) -> int:
        """Tokens per block."""
        return self.block if self.blocks is None else max(1, -(-kv_len // self.blocks))

    def keeps(
        self, query: Tensor, key: Tensor, *, units: int, heads: int, layer: int, is_causal: bool
    ) -> Tensor:
        """One block of keys for each block of queries."""

        def shifted(shift: int) -> Tensor:
            wanted = (query + shift) % units
            return key == (torch.where(wanted > query, query, wanted) if is_causal else wanted)

        if len(self.shifts) == 1:
            return shifted(self.shifts[0])
        groups = [self.shifts[head * len(self.shifts) // heads] for head in range(heads)]
        return torch.stack([shifted(shift) for shift in groups])
