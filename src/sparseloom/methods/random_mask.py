"""Random keys: what any selection has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, Selector
from sparseloom.methods.selection import Scores, keeps_all, topk_mask
from sparseloom.methods.settings import check_at_least, check_sparsity

_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class RandomMask(Selector):
    """Keys drawn at random in each layer, head and row, as many as top-k would keep.

    The draw is a hash of (seed, layer, head, query position, key), so it is the same on every
    device, for every batch entry, and whether tokens come at once or one by one.

    Args:
        sparsity: share of the allowed keys to drop, in [0, 1).
        seed: another seed, another mask.
        minimum_keys: keys that a query keeps at least.
    """

    name: ClassVar[str] = "random"

    sparsity: float = 0.9
    seed: int = 0
    minimum_keys: int = 16

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_at_least("seed", self.seed, 0)
        check_at_least("minimum_keys", self.minimum_keys, 1)

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The mask of the query heads; shared by the batch where there is no padding."""
        _, heads, q_len, _ = inputs.query.shape
        kv_len, device = inputs.key.shape[2], inputs.query.device
        batch = 1 if inputs.key_padding is None else inputs.key_padding.shape[0]
        head = mix(torch.arange(heads, device=device) + mix_int(self.seed, inputs.layer))

        def rows(start: int, stop: int, keys: int) -> Tensor:
            position = torch.arange(start, stop, device=device) + (kv_len - q_len)
            row = mix(head[:, None] + position)  # (H, R)
            drawn = mix(row[..., None] + torch.arange(keys, device=device))  # (H, R, K)
            return (drawn >> 8).float().expand(batch, -1, -1, -1)  # 24 bits: exact in fp32

        return topk_mask(
            Scores(batch, heads, q_len, kv_len, device, rows),
            sparsity=self.sparsity,
            minimum_keys=self.minimum_keys,
            is_causal=inputs.is_causal,
            key_padding=inputs.key_padding,
        )

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether the budget of a row that sees all keys leaves one out."""
        del q_len
        return not keeps_all(kv_len, self.sparsity, self.minimum_keys)


def mix(value: Tensor) -> Tensor:
    """A 32-bit integer hash (xorshift-multiply), in int64 that never overflows."""
    value = value & _WORD
    value = ((value ^ (value >> 16)) * 0x21F0AAAD) & _WORD
    value = ((value ^ (value >> 15)) * 0x735A2D97) & _WORD
    return value ^ (value >> 15)


def mix_int(seed: int, layer: int) -> Tensor:
    """A hash of a seed and a layer's number."""
    return mix(mix(torch.tensor(seed)) + layer)
