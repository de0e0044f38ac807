"""What calibration keeps of attention: how much each tile of queries × keys holds, and matters."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from sparseloom.methods.attender import grouped_key, grouped_value
from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.learned import allowed_rows
from sparseloom.methods.scores import row_chunks
from sparseloom.regions import TILE_KEYS, TILE_QUERIES

SEGMENTS = (2, 4, 8)
"""Keys per segment that coarse regions may have."""


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
        for b in range(len(query)):
            one = _entry(call, b)
            for first, last in row_chunks(q_len, heads * kv_len, bq, query.device):
                seen = last if call.is_causal else kv_len
                allowed = allowed_rows(one, torch.arange(first, last, device=query.device))[0]
                if one.query_padding is not None:
                    allowed = allowed & one.query_padding[0, first:last, None]
                allowed = allowed[..., :seen]
                hidden, rows = ~allowed, np.s_[:, first:last]
                scores = (query[b][rows] @ key[b][:, :seen].mT).mul_(call.scale)
                scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
                p = torch.softmax(scores, -1).masked_fill_(hidden, 0.0)  # (H, R, K)
                slope = gradient[b][rows] @ value[b][:, :seen].mT
                slope.sub_((p * slope).sum(-1, keepdim=True)).mul_(p).abs_()
                place = np.s_[
                    call.layer, :, first // bq : -(-last // bq), : -(-seen // self.tile[1])
                ]
                mass = self._sums(p)
                self.mass[place] += mass
                self.saliency[place] += self._sums(slope)
                for i, size in enumerate(SEGMENTS):
                    self.even[i][place] += mass - 0.5 * self._sums(_apart(p, allowed, size))

    def _sums(
        self, x: Float[Tensor, "heads rows keys"]
    ) -> Float[np.ndarray, "heads q_tiles k_tiles"]:
        """Sums of tiles."""
        bq, bk = self.tile
        by_key = _split(x, bk).sum(-1)
        return _split(by_key.mT, bq).sum(-1).mT.cpu().numpy()


def _split(x: Tensor, size: int) -> Tensor:
    """(…, n) to (…, parts, size), the last part filled up with zeros."""
    short = -x.shape[-1] % size
    return (functional.pad(x, (0, short)) if short else x).unflatten(-1, (-1, size))


def _apart(
    p: Float[Tensor, "heads rows keys"], allowed: Bool[Tensor, "1 rows keys"], size: int
) -> Float[Tensor, "heads rows keys"]:
    """|p - P_J/|J|| of each allowed key, J its segment of `size`, and P_J the mass of that."""
    segments, there = _split(p, size), _split(allowed, size)
    mean = segments.sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return (segments - mean).abs_().mul_(there).flatten(-2)[..., : p.shape[-1]]


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
