"""Longformer: a window around each token, and tokens that see and are seen by all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseloom.methods.settings import check_at_least
from sparseloom.methods.static import StaticPattern


@dataclass(frozen=True)
class Longformer(StaticPattern):
    """The pattern of Longformer (Beltagy et al., 2020): |i - j| ≤ window/2, and global tokens.

    Query, key and value projections are the model's for all pairs.  The original has a second set
    for the global tokens, which starts as a copy of the first; a method sees no projections, so
    that set is not here, and the pattern with shared projections is where the original starts from.

    Args:
        window: keys around each query, half on either side (and the query itself).
        global_tokens: first units that see all and are seen by all: 1 for a [CLS].
        dilation: distance between the window's keys.
        block: tokens per unit; all other numbers then count blocks.
    """

    name: ClassVar[str] = "longformer"

    window: int = 512
    global_tokens: int = 1
    dilation: int = 1
    block: int = 1

    def __post_init__(self) -> None:
        check_at_least("window", self.window, 1)
        check_at_least("global_tokens", self.global_tokens, 0)
        check_at_least("dilation", self.dilation, 1)
        check_at_least("block", self.block, 1)

    def unit(self, kv_len: int) -> int:
        """The block."""
        return self.block

    def keeps(
        self, query: Tensor, key: Tensor, *, units: int, heads: int, layer: int, is_causal: bool
    ) -> Tensor:
        """Window and global units, the same in every head and layer."""
        apart = query - key
        near = apart.abs() <= self.window // 2 * self.dilation
        if self.dilation > 1:
            near = near & (apart % self.dilation == 0)
        return near | (query < self.global_tokens) | (key < self.global_tokens)
