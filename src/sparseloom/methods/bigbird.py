"""BigBird: blocks of a window, global blocks at both ends, and random blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseloom.methods.random_mask import mix, mix_int
from sparseloom.methods.settings import check_at_least
from sparseloom.methods.static import StaticPattern


@dataclass(frozen=True)
class BigBird(StaticPattern):
    """BigBird (Zaheer et al., NeurIPS 2020), its block form.

    Each block of queries keeps the window of blocks around it, the global blocks at both ends
    (whose queries keep everything), and random blocks among the others: never one twice, never one
    that is kept already, drawn once from (seed, layer, head, row) and for each head apart.  In
    causal models the random blocks are earlier ones, and only the first blocks are global, since
    the last ones move while text is generated.

    Args:
        block: tokens per block.
        window: blocks of the window, the query's own in the middle.
        global_blocks: at each end.
        random_blocks: per block of queries, or as many as there are.
        seed: another seed, other random blocks.
    """

    name: ClassVar[str] = "bigbird"

    block: int = 64
    window: int = 3
    global_blocks: int = 1
    random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("block", self.block, 1)
        check_at_least("window", self.window, 1)
        check_at_least("global_blocks", self.global_blocks, 0)
        check_at_least("random_blocks", self.random_blocks, 0)
        check_at_least("seed", self.seed, 0)
        if self.window % 2 == 0:
            raise ValueError(f"window must be an odd number of blocks, got {self.window}")

    def unit(self, kv_len: int) -> int:
        """The block."""
        return self.block

    def keeps(
        self, query: Tensor, key: Tensor, *, units: int, heads: int, layer: int, is_causal: bool
    ) -> Tensor:
        """Window, global and random blocks of every head."""
        # Where queries begin inside a block, rows and columns repeat: draw for the blocks alone.
        rows, columns = query[:, 0], key[0]
        kept = self._blocks(units, heads, layer, is_causal)
        return kept[:, rows][:, :, columns]

    def _blocks(self, units: int, heads: int, layer: int, is_causal: bool) -> Tensor:
        """(heads, units, units), True = kept."""
        key = torch.arange(units)
        query = key[:, None]
        ends = self.global_blocks
        kept = ((query - key).abs() <= self.window // 2) | (query < ends) | (key < ends)
        if not is_causal:
            kept = kept | (query >= units - ends) | (key >= units - ends)
        others = ~kept & (key < query) if is_causal else ~kept
        head = mix(torch.arange(heads) + mix_int(self.seed, layer))
        drawn = mix(mix(head[:, None, None] + query) + key)  # (H, units, units)
        drawn = torch.where(others, drawn, torch.iinfo(torch.int64).max)
        count = min(self.random_blocks, units)
        chosen = torch.zeros_like(drawn, dtype=torch.bool)
        chosen.scatter_(-1, drawn.argsort(dim=-1, stable=True)[..., :count], True)
        return kept | (chosen & others)
