"""Sparse Sinkhorn attention: a learned permutation brings a second block of keys to each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from sparseloom.methods.attender import (
    NEVER,
    LayerWeights,
    WeightedAttender,
    grouped_key,
    grouped_value,
    refuse_cache,
    refuse_causal,
)
from sparseloom.methods.base import AttentionInputs, AttentionShape
from sparseloom.methods.settings import check_at_least


class SortNet(nn.Module):
    """A linear map from the sum of a block's keys to a score for each place; shared by heads."""

    def __init__(self, head_dim: int, blocks: int, generator: torch.Generator) -> None:
        super().__init__()
        matrix = torch.empty(head_dim, blocks)
        self.places = nn.Parameter(nn.init.xavier_uniform_(matrix, generator=generator))


@dataclass(frozen=True)
class Sinkhorn(WeightedAttender):
    """Sparse Sinkhorn attention (Tay et al., ICML 2020).

    Keys are cut into blocks.  A sorting network gives each block a score for each place, Gumbel
    noise is added in training, and Sinkhorn normalisation of rows and columns turns the scores into
    a nearly doubly stochastic matrix R.  Block i of the queries attends to its own keys and, apart,
    to the mixture Σ_j R_ij K_j; the two outputs are added, as in the code of the method's first
    author for the Long Range Arena, or one softmax runs over both (`joint`).  A mixed key counts
    with the share of it that is no padding.  Not causal.

    Args:
        block: tokens per block.
        iterations: of rows and columns; 0 is a softmax over the blocks, without noise.
        temperature: the scores (and noise) are divided by it.
        joint: one softmax over own and sorted keys.
        weights: the sorting network of every layer.
    """

    name: ClassVar[str] = "sinkhorn"
    depends_on: ClassVar[tuple[str, ...]] = ("head_dim", "max_length")

    block: int = 50
    iterations: int = 7
    temperature: float = 0.75
    joint: bool = False
    weights: LayerWeights | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_at_least("block", self.block, 1)
        check_at_least("iterations", self.iterations, 0)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def make_layer(self, sizes: Mapping[str, int], generator: torch.Generator) -> SortNet:
        """A sorting network for as many blocks as `max_length` tokens have."""
        return SortNet(sizes["head_dim"], -(-sizes["max_length"] // self.block), generator)

    def attend(
        self, inputs: AttentionInputs, *, dropout_p: float = 0.0
    ) -> Float[Tensor, "batch heads q_len value_dim"]:
        """Attention to the own and to the sorted block; dropout on the probabilities."""
        why = "its blocks are sorted by all tokens"
        refuse_causal(self.name, inputs, why)
        refuse_cache(self.name, inputs, why)
        layer = self.layer_module(inputs)
        assert isinstance(layer, SortNet)
        batch, _, length, _ = inputs.query.shape
        extra = -length % self.block
        blocks, most = (length + extra) // self.block, layer.places.shape[1]
        if blocks > most:
            raise ValueError(
                f"inputs must have at most {most} blocks of {self.block} tokens, what sinkhorn's "
                f"sorting network was made for, got {blocks}"
            )
        real = torch.arange(length + extra, device=inputs.query.device) < length
        real = real.expand(batch, -1)
        if inputs.key_padding is not None:
            real = real & functional.pad(inputs.key_padding, (0, extra))
        mask = real[:, None].unflatten(2, (blocks, self.block))  # (B, 1, N, b)
        q, k, v = (
            functional.pad(x, (0, 0, 0, extra)).unflatten(2, (blocks, self.block))
            for x in (inputs.query, grouped_key(inputs), grouped_value(inputs))
        )  # (B, H, N, b, D)
        k, v = (x * mask[..., None] for x in (k, v))
        r = self.permutation(k, layer)
        share = (r @ mask.to(r.dtype)).clamp(min=1e-9)  # (B, H, N, b), of no padding
        sorted_k, sorted_v = (
            (r @ x.flatten(3)).unflatten(3, x.shape[3:]) / share[..., None] for x in (k, v)
        )
        scores = q @ k.transpose(-1, -2) * inputs.scale
        scores = scores.masked_fill(~mask[..., None, :], NEVER)
        other = q @ sorted_k.transpose(-1, -2) * inputs.scale + share.log()[..., None, :]

        def weighted(x: Tensor) -> Tensor:
            return functional.dropout(x.softmax(-1), dropout_p, training=dropout_p > 0)

        if self.joint:
            out = weighted(torch.cat([scores, other], -1)) @ torch.cat([v, sorted_v], -2)
        else:
            out = weighted(scores) @ v + weighted(other) @ sorted_v
        out = out.flatten(2, 3)[:, :, :length]
        if inputs.query_padding is not None:
            out = out * inputs.query_padding[:, None, :, None]
        return out

    def permutation(self, key: Tensor, layer: SortNet) -> Tensor:
        """R (batch, heads, place, block) from keys (batch, heads, block, tokens, head_dim)."""
        blocks = key.shape[2]
        scores = key.sum(3) @ layer.places[:, :blocks].to(key.dtype)  # (B, H, block, place)
        scores = scores.transpose(-1, -2)
        if not self.iterations:
            return scores.softmax(-1)
        if layer.training:
            uniform = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
            scores = scores - (-uniform.log()).log()
        return sinkhorn(scores / self.temperature, self.iterations)

    def macs(self, shape: AttentionShape) -> int:
        """4·n·b·d + 2·n·N·d + N²·d per head, N = n/b blocks: two attentions within blocks, mixing
        keys and values, and the sorting network."""
        blocks = -(-shape.kv_len // self.block)
        n = blocks * self.block
        one = 4 * n * self.block + 2 * n * blocks + blocks * blocks
        return shape.batch * shape.heads * one * shape.head_dim


def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """exp(scores) with rows, then columns, brought to sum one, again and again."""
    for _ in range(iterations):
        scores = scores.log_softmax(-1)
        scores = scores.log_softmax(-2)
    return scores.exp()
