"""Sliding windows: every query keeps its nearest keys, whatever they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, Selector
from sparseloom.methods.grid import budgets, keeps_all
from sparseloom.methods.settings import check_at_least, check_one_given, check_sparsity


@dataclass(frozen=True)
class SlidingWindow(Selector):
    """A window of keys around (causal: up to) each query, the same for all layers and heads.

    Causal windows end at the query.  Otherwise they lie around it, with the spare key of an even
    width on the left; a fixed window is cut off at the ends of the sequence, a growing one is
    moved inwards.  Padding is not looked at: windows are made of positions.

    Args:
        sparsity: share of the allowed pairs to drop, in [0, 1).  A fixed window takes the width
            whose density comes nearest to 1 - sparsity at the length at hand, the growing one
            follows ⌈(1 - sparsity)·allowed⌉ in every row.
        width: keys per query, instead of `sparsity`; fixed windows only.
        growing: let the width grow with the number of keys that a query may see.  Early queries
            then keep few keys and late ones many, at the density of the fixed window.
        minimum_keys: keys that a query keeps at least, if it may see as many.  With the value of
            a top-k method (16) a growing window has exactly that method's budget in every row.
    """

    name: ClassVar[str] = "window"

    sparsity: float | None = None
    width: int | None = None
    growing: bool = False
    minimum_keys: int = 1

    def __post_init__(self) -> None:
        check_one_given("sparsity", self.sparsity, "width", self.width)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.width is not None:
            check_at_least("width", self.width, 1)
            if self.growing:
                raise ValueError(f"width must be none for a growing window, got {self.width}")
        check_at_least("minimum_keys", self.minimum_keys, 1)

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The window of every query, shared by batch and heads."""
        q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
        start, stop = self.windows(q_len, kv_len, is_causal=inputs.is_causal)
        counts = stop - start
        ends = counts.cumsum(0)
        nnz = int(ends[-1])
        shift = (start - (ends - counts)).repeat_interleave(counts, output_size=nnz)
        mask = SparseMask(
            (torch.arange(nnz) + shift).to(torch.int32),
            torch.nn.functional.pad(ends, (1, 0))[None, None],
            q_len=q_len,
            kv_len=kv_len,
            validate=False,
        )
        return mask.to(inputs.query.device)

    def windows(self, q_len: int, kv_len: int, *, is_causal: bool) -> tuple[Tensor, Tensor]:
        """First key and one past the last key of each query, int64 (q_len,)."""
        position = torch.arange(q_len) + (kv_len - q_len)
        if is_causal:
            stop = (position + 1).clamp(min=0)
            if self.growing:
                return stop - self._budgets(stop), stop
            return (stop - self.width_at(kv_len, is_causal=True)).clamp(min=0), stop
        if self.growing:
            width = int(self._budgets(torch.tensor(kv_len)))
            start = (position - width // 2).clamp(0, kv_len - width)
            return start, start + width
        width = self.width_at(kv_len, is_causal=False)
        start = (position - width // 2).clamp(0, kv_len)
        return start, (position - width // 2 + width).clamp(0, kv_len)

    def width_at(self, kv_len: int, *, is_causal: bool) -> int:
        """Width of the fixed window over `kv_len` keys: the explicit one, or the one whose density
        over a whole sequence of that length is nearest to 1 - sparsity."""
        if self.width is not None:
            return min(self.width, kv_len if is_causal else 2 * kv_len - 1)
        assert self.sparsity is not None
        total = kv_len * (kv_len + 1) // 2 if is_causal else kv_len * kv_len
        wanted = (1.0 - self.sparsity) * total
        # Kept pairs: causal w·n - w(w-1)/2; around the query w·n less what the two ends cut off.
        if is_causal:
            root = (2 * kv_len + 1) ** 2 - 8 * wanted
            guess = ((2 * kv_len + 1) - math.sqrt(max(root, 0.0))) / 2
        else:
            guess = 2 * (kv_len - math.sqrt(max(kv_len * kv_len - wanted, 0.0)))
        most = kv_len if is_causal else 2 * kv_len - 1
        near = {min(max(1, math.floor(guess) + step), most) for step in (-1, 0, 1, 2)}
        width = min(sorted(near), key=lambda w: abs(_kept(w, kv_len, is_causal) - wanted))
        return min(max(width, self.minimum_keys), most)

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether the window of some row leaves a key out."""
        del q_len
        if self.width is not None:
            return self.width < kv_len
        assert self.sparsity is not None
        return not keeps_all(kv_len, self.sparsity, self.minimum_keys)

    def _budgets(self, allowed: Tensor) -> Tensor:
        assert self.sparsity is not None
        return budgets(allowed, self.sparsity, self.minimum_keys)


def _kept(width: int, kv_len: int, is_causal: bool) -> int:
    """Pairs of a fixed window over a whole sequence."""
    if is_causal:
        return width * kv_len - width * (width - 1) // 2
    left, right = width // 2, width - 1 - width // 2
    cut = left * (left + 1) // 2 + right * (right + 1) // 2
    return width * kv_len - cut
