"""What the fixed patterns share: a rule for (query, key) units, made into a mask and kept."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, Selector


class StaticPattern(Selector):
    """A pattern of positions: it looks at no query or key.

    Patterns are rules for units, blocks of `unit(kv_len)` tokens (1 is fine-grained).  Where the
    queries of a call begin inside a unit (decoding), the same pairs are kept token by token.
    Masks are made on the CPU and kept for the next call of the same sizes.
    """

    @abstractmethod
    def unit(self, kv_len: int) -> int:
        """Tokens per unit."""

    @abstractmethod
    def keeps(
        self, query: Tensor, key: Tensor, *, units: int, heads: int, layer: int, is_causal: bool
    ) -> Tensor:
        """Which units of keys each unit of queries keeps.

        Args:
            query, key: unit numbers, (rows, 1) and (1, units).
            units: of the whole sequence.
            heads: query heads.
            layer: the layer's number.
            is_causal: later units need not be left out here.

        Returns:
            (rows, units), or (heads, rows, units) where heads differ.
        """

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The pattern, shared by the batch, and by heads where they do not differ."""
        shape = inputs.shape
        sizes = (shape.q_len, shape.kv_len, shape.heads, inputs.layer, shape.is_causal)
        return _mask(self, *sizes).to(inputs.query.device)

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether a bidirectional call would leave a pair out."""
        if q_len < 1 or kv_len < 1:
            return False
        size = self.unit(kv_len)
        units = -(-kv_len // size)
        first = max(0, (kv_len - q_len) // size)
        some = torch.tensor([units - 1, first, (first + units - 1) // 2])
        # One row that leaves something out is enough; all are asked only where these do not.
        return any(not self._all_kept(rows, units) for rows in (some, torch.arange(first, units)))

    def _all_kept(self, rows: Tensor, units: int) -> bool:
        kept = self.keeps(
            rows[:, None], torch.arange(units)[None], units=units, heads=2, layer=0, is_causal=False
        )
        return bool(kept.all())


@lru_cache(maxsize=64)
def _mask(
    pattern: StaticPattern, q_len: int, kv_len: int, heads: int, layer: int, is_causal: bool
) -> SparseMask:
    size, shift = pattern.unit(kv_len), kv_len - q_len
    units = -(-kv_len // size)
    if shift % size or shift < 0:  # queries begin inside a unit
        positions = torch.arange(shift, kv_len)
        rows, columns, block = positions.clamp(min=0) // size, torch.arange(kv_len) // size, (1, 1)
        later = torch.arange(kv_len) > positions[:, None]
    else:
        rows, columns, block = torch.arange(shift // size, units), torch.arange(units), (size, size)
        later = columns > rows[:, None]
    keep = pattern.keeps(
        rows[:, None], columns[None], units=units, heads=heads, layer=layer, is_causal=is_causal
    )
    if is_causal:
        keep = keep & ~later
    return SparseMask.from_block_bool(
        keep if keep.dim() == 2 else keep[None], block_size=block, q_len=q_len, kv_len=kv_len
    )
