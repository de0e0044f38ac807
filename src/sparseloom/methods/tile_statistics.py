"""What calibration keeps of attention: how much each tile of queries × keys holds, and matters."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sparseloom.methods.attender import grouped_key, grouped_value
from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.learned import allowed_rows
from sparseloom.regions import TILE_KEYS, TILE_QUERIES

SEGMENTS = (2, 4, 8)
"""Keys per segment that coarse regions may have."""

_AT_ONCE = 1 << 24  # probabilities held at a time


@dataclass
class TileStatistics:
    """Sums over calibration inputs of one length, for each layer, head and tile.

    With p the probabilities of an input, g = ∂z/∂p and z its label margin:

    Attributes:
        length: tokens of the inputs.
        is_causal: whether later keys are hidden.
        tile: (queries, keys) of a tile.
        mass: Σ p over the pairs of a tile.
        saliency: Σ |p·(g - Σ_k p_k g_k)| = Σ |∂z/∂s|, s the score before the softmax.
        even: for segments of 2, 4 and 8 keys Σ (P_J - ½ Σ_{j∈J} |p_j - P_J/|J||), P_J the mass of
            a segment: the mass that a coarse region keeps where it belongs.
        inputs: how many were summed up.
    """

    length: int
    is_causal: bool
    layers: int
    heads: int
    tile: tuple[int, int] = (TILE_QUERIES, TILE_KEYS)
    inputs: int = 0
    mass: Float[np.ndarray, "layers heads q_tiles k_tiles"] = field(init=False)
    saliency: Float[np.ndarray, "layers heads q_tiles k_tiles"] = field(init=False)
    even: Float[np.ndarray, "3 layers heads q_tiles k_tiles"] = field(init=False)

    def __post_init__(self) -> None:
        grid = (-(-self.length // self.tile[0]), -(-self.length // self.tile[1]))
        self.mass = np.zeros((self.layers, self.heads, *grid))
        self.saliency = np.zeros_like(self.mass)
        self.even = np.zeros((len(SEGMENTS), *self.mass.shape))

    @property
    def evenness(self) -> Float[np.ndarray, "3 layers heads q_tiles k_tiles"]:
        """η: how well coarse regions preserve a tile, weighted by mass; 1 is even in segments."""
        return self.even / np.maximum(self.mass, np.finfo(np.float64).tiny)

    @torch.no_grad()
    def add(
        self, call: AttentionInputs, gradient: Float[Tensor, "batch heads q_len value_dim"]
    ) -> None:
        """Take in one attention call without a cache.

        Args:
            call: inputs, of at most `length` tokens.
            gradient: ∂z/∂o of the attention output.

        Raises:
            ValueError: the call is longer, or has fewer queries than keys.
        """
        heads, q_len = call.query.shape[1:3]
        kv_len = call.key.shape[2]
        if q_len != kv_len or kv_len > self.length:
            raise ValueError(
                f"calibration calls must have as many queries as keys, at most {self.length}, got "
                f"{q_len} and {kv_len}"
            )
        key, value = grouped_key(call).float(), grouped_value(call).float()
        query, gradient = call.query.float(), gradient.float()
        bq = self.tile[0]
        step = max(bq, _AT_ONCE // (heads * kv_len) // bq * bq)
        for b in range(len(query)):
            one = _entry(call, b)
            real = one.query_padding
            for first in range(0, q_len, step):
                rows = torch.arange(first, min(first + step, q_len), device=query.device)
                allowed = allowed_rows(one, rows)[0]  # (1, R, K)
                if real is not None:
                    allowed = allowed & real[0, rows, None]
                scores = query[b][:, rows] @ key[b].transpose(-1, -2) * call.scale
                scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
                p = torch.softmax(scores, -1).masked_fill(~allowed, 0.0)  # (H, R, K)
                g = gradient[b][:, rows] @ value[b].transpose(-1, -2)
                slope = (p * (g - (p * g).sum(-1, keepdim=True))).abs()
                place = np.s_[call.layer, :, first // bq : -(-int(rows[-1] + 1) // bq)]
                self._sum(self.mass, place, p)
                self._sum(self.saliency, place, slope)
                for i, size in enumerate(SEGMENTS):
                    self._sum(self.even[i], place, _even(p, allowed, size))

    def _sum(self, into: np.ndarray, place: tuple[int, slice, slice], x: Tensor) -> None:
        """Add the tile sums of (heads, rows, keys); `place` is the layer and its query tiles."""
        bq, bk = self.tile
        rows, keys = -x.shape[1] % bq, -x.shape[2] % bk
        tiles = functional.pad(x, (0, keys, 0, rows)).unflatten(2, (-1, bk)).unflatten(1, (-1, bq))
        sums = tiles.sum((2, 4)).cpu().numpy()
        into[place][:, :, : sums.shape[2]] += sums


def _even(p: Tensor, allowed: Tensor, size: int) -> Tensor:
    """P_J - ½ Σ |p - P_J/|J||, spread over the keys of each segment J of `size`."""
    short = -p.shape[-1] % size
    segments = functional.pad(p, (0, short)).unflatten(-1, (-1, size))
    there = functional.pad(allowed, (0, short)).unflatten(-1, (-1, size))
    mean = segments.sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    apart = (segments - mean).abs() * there
    return (segments - 0.5 * apart).flatten(-2)[..., : p.shape[-1]]


def _entry(call: AttentionInputs, b: int) -> AttentionInputs:
    padding = None if call.key_padding is None else call.key_padding[b : b + 1]
    return AttentionInputs(
        query=call.query[b : b + 1],
        key=call.key[b : b + 1],
        layer=call.layer,
        is_causal=call.is_causal,
        scale=call.scale,
        key_padding=padding,
    )
