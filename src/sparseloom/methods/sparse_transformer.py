"""The factorised patterns of the Sparse Transformer: strided and fixed."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparseloom.methods.settings import check_at_least, check_choice
from sparseloom.methods.static import StaticPattern

Parts = Literal["merged", "layers", "heads"]
_PARTS = ("merged", "layers", "heads")


class _Factorised(StaticPattern):
    """Two parts, merged in one head, alternating by layer, or on two halves of the heads.

    A query always sees itself, also in the part that would leave it out.
    """

    stride: int
    block: int
    parts: Parts
    global_tokens: int

    def __post_init__(self) -> None:
        check_at_least("stride", self.stride, 1)
        check_at_least("block", self.block, 1)
        check_choice("parts", self.parts, _PARTS)
        check_at_least("global_tokens", self.global_tokens, 0)

    def unit(self, kv_len: int) -> int:
        """The block."""
        return self.block

    def keeps(
        self, query: Tensor, key: Tensor, *, units: int, heads: int, layer: int, is_causal: bool
    ) -> Tensor:
        """The union of both parts, the layer's part, or both over the heads."""
        first, second = self._both(query, key)
        everyone = (query == key) | (query < self.global_tokens) | (key < self.global_tokens)
        if self.parts == "merged":
            return first | second | everyone
        if self.parts == "layers":
            return (second if layer % 2 else first) | everyone
        if heads < 2:
            raise ValueError(
                f"parts must be 'merged' or 'layers' in a model of {heads} head, got 'heads'"
            )
        half = -(-heads // 2)
        chosen = [first] * half + [second] * (heads - half)
        return torch.stack([part | everyone for part in chosen])

    @abstractmethod
    def _both(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Strided(_Factorised):
    """Strided attention of the Sparse Transformer (Child et al., 2019, section 4.2).

    Part 1 keeps the last `stride` positions and the query's own, part 2 every position at a
    multiple of `stride` from it.  In bidirectional models both look ahead as well: |i - j| ≤
    stride, and (i - j) mod stride = 0.

    Args:
        stride: l, about the root of the length.
        block: tokens per unit; all other numbers then count blocks.
        parts: `"merged"` in one head, alternating by `"layers"`, or on the first and second half of
            the `"heads"`.
        global_tokens: first units that see and are seen by all, for a [CLS].
    """

    name: ClassVar[str] = "strided"

    stride: int = 128
    block: int = 1
    parts: Parts = "merged"
    global_tokens: int = 0

    def _both(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        apart = query - key
        return apart.abs() <= self.stride, apart % self.stride == 0


@dataclass(frozen=True)
class Fixed(_Factorised):
    """Fixed attention of the Sparse Transformer (Child et al., 2019, section 4.2).

    Part 1 keeps the positions of the query's own stretch of `stride`, part 2 the last `columns`
    positions of every stretch, which sum it up.  The defaults are those that the Long Range Arena
    takes from the paper's text model; its code masks the future in encoders too and also keeps the
    first position of each stretch, which this does not.

    Args:
        stride: l, positions per stretch.
        columns: c, positions at the end of each stretch that all queries see.
        block: tokens per unit; all other numbers then count blocks.
        parts: `"merged"` in one head, alternating by `"layers"`, or on the first and second half of
            the `"heads"`.
        global_tokens: first units that see and are seen by all, for a [CLS].
    """

    name: ClassVar[str] = "fixed"

    stride: int = 128
    columns: int = 32
    block: int = 1
    parts: Parts = "merged"
    global_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("columns", self.columns, 1)
        if self.columns > self.stride:
            raise ValueError(
                f"columns must be at most the stride of {self.stride}, got {self.columns}"
            )

    def _both(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        own = query // self.stride == key // self.stride
        return own, (key % self.stride >= self.stride - self.columns).expand_as(own)
