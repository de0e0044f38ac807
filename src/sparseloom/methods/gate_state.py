"""What the gate remembers of earlier tokens: the columns of full blocks, and where tokens are."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sparseloom.methods.base import LayerState
from sparseloom.methods.token_state import TokenState


class GateState(LayerState):
    """Columns of the full blocks, (batch, kv_heads, blocks, width), and cos and sin of all tokens.

    The keys of a block that is not full are in the key/value cache; their positions are needed to
    undo the model's rotation, now or after a crop.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.count = 0
        self.positions = TokenState()
        self.blocks: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return self.count

    def append(self, tokens: int, *rotary: Tensor) -> tuple[Tensor, ...]:
        """Add tokens with their cos and sin; returns those of all tokens."""
        self.count += tokens
        return self.positions.append(*rotary)

    def add_blocks(
        self, new: Float[Tensor, "batch kv_heads new_blocks width"]
    ) -> Float[Tensor, "batch kv_heads kv_blocks width"]:
        """Add the blocks after the known ones; the full ones stay.  Returns all."""
        found = new if self.blocks is None else torch.cat([self.blocks, new], 2)
        self.blocks = found[:, :, : self.count // self.block].detach()
        return found

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; a negative number drops that many from the end."""
        keep = max(0, self.count + length) if length < 0 else length
        self.count = min(self.count, keep)
        self.positions.crop(self.count)
        if self.blocks is not None:
            self.blocks = self.blocks[:, :, : self.count // self.block]

    def reorder(self, beams: Int64[Tensor, " batch"]) -> None:
        """Batch entry i becomes what entry `beams[i]` was."""
        self.positions.reorder(beams)
        if self.blocks is not None:
            self.blocks = self.blocks.index_select(0, beams.to(self.blocks.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch entry `repeats` times in a row."""
        self.positions.batch_repeat_interleave(repeats)
        if self.blocks is not None:
            self.blocks = self.blocks.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these batch entries stay."""
        self.positions.batch_select_indices(indices)
        if self.blocks is not None:
            self.blocks = self.blocks[indices.to(self.blocks.device)]
