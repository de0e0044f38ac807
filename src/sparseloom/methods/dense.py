"""Dense attention, as the method that leaves nothing out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, Selector


@dataclass(frozen=True)
class Dense(Selector):
    """Keeps every pair: the baseline of every comparison.  Selecting is never worthwhile."""

    name: ClassVar[str] = "dense"

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The full mask, shared by batch and heads."""
        q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
        return SparseMask.full(q_len, kv_len, device=inputs.query.device)

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Never: dense attention runs without a mask."""
        del q_len, kv_len
        return False
