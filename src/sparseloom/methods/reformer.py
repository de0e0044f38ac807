"""Reformer: attention among tokens that locality-sensitive hashing puts together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from sparseloom.methods.attender import (
    NEVER,
    DrawCounter,
    LayerWeights,
    WeightedAttender,
    grouped_value,
    refuse_cache,
)
from sparseloom.methods.base import AttentionInputs, AttentionShape
from sparseloom.methods.settings import check_at_least

_SELF = -5e4  # a token's score with itself: chosen only where nothing else may be


class ReformerLayer(DrawCounter):
    """The seed of one layer's hashes; nothing is learned."""

    seed: Tensor

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("seed", torch.randint(1 << 40, (), generator=generator))

    def rotations(self, *shape: int) -> Tensor:
        """Gaussian rotations of this call: new in each training call, fixed in evaluation."""
        generator = torch.Generator().manual_seed(int(self.seed) + self.advance())
        return torch.randn(*shape, generator=generator)


@dataclass(frozen=True)
class Reformer(WeightedAttender):
    """LSH attention (Kitaev et al., ICLR 2020, section 2), with shared queries and keys.

    The model's keys are not used: keys are the queries at unit length, the scores q·k̂ times
    scale·√head_dim, which is 1 in most models (so in the authors' Trax and in transformers).  Each
    round hashes the queries by argmax [xR; -xR], sorts by (bucket, position), cuts the order into
    chunks and lets each chunk attend to itself and the one before, the first to the last.  A token
    attends to itself only where there is nothing else.  Rounds are combined by the softmax of their
    log-normalisers.  Padding is sorted behind all tokens and never attended to.  In causal calls no
    later token is attended to, but which earlier ones are depends on all tokens, since later ones
    take part in the sorting: so it is in the definition.

    Args:
        rounds: hashing rounds.
        bucket_size: tokens per chunk; there are as many buckets as chunks, an even number, so
            inputs are padded to a multiple of two chunks.
        buckets: even number of buckets, instead of `bucket_size`: the chunks then grow with the
            input, as those of the Long Range Arena do (10).
        weights: seeds of every layer's hashes.
    """

    name: ClassVar[str] = "reformer"

    rounds: int = 8
    bucket_size: int = 64
    buckets: int | None = None
    weights: LayerWeights | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_at_least("rounds", self.rounds, 1)
        check_at_least("bucket_size", self.bucket_size, 1)
        if self.buckets is not None and (self.buckets < 2 or self.buckets % 2):
            raise ValueError(f"buckets must be an even number of at least 2, got {self.buckets}")

    def make_layer(self, sizes: Mapping[str, int], generator: torch.Generator) -> ReformerLayer:
        """A seed."""
        return ReformerLayer(generator)

    def chunks(self, length: int) -> tuple[int, int]:
        """Chunks (and buckets) for an input, and tokens in each."""
        if self.buckets is not None:
            return self.buckets, -(-length // self.buckets)
        return 2 * -(-length // (2 * self.bucket_size)), self.bucket_size

    def attend(
        self, inputs: AttentionInputs, *, dropout_p: float = 0.0
    ) -> Float[Tensor, "batch heads q_len value_dim"]:
        """Attention within the sorted chunks of every round; dropout on its probabilities."""
        refuse_cache(self.name, inputs, "its keys are the queries, which a cache does not hold")
        layer = self.layer_module(inputs)
        assert isinstance(layer, ReformerLayer)
        batch, _, length, head_dim = inputs.query.shape
        chunks, width = self.chunks(length)
        extra = chunks * width - length
        query = functional.pad(inputs.query, (0, 0, 0, extra))
        value = functional.pad(grouped_value(inputs), (0, 0, 0, extra))
        real = torch.arange(length + extra, device=query.device) < length
        real = real.expand(batch, -1)
        if inputs.key_padding is not None:
            real = real & functional.pad(inputs.key_padding, (0, extra))

        order = self._order(query.detach(), real, layer, chunks)  # (B, H, R, N)
        scale = inputs.scale * math.sqrt(head_dim)
        wide = torch.promote_types(query.dtype, torch.float32)
        q, v = (_sorted(x, order).unflatten(3, (chunks, width)) for x in (query, value))
        k = functional.normalize(q.to(wide), dim=-1).to(q.dtype)
        where = order.unflatten(3, (chunks, width))  # positions, (B, H, R, C, W)
        k, v = (torch.cat([x, x.roll(1, 3)], 4) for x in (k, v))
        keys_at = torch.cat([where, where.roll(1, 3)], 4)[..., None, :]
        scores = (q @ k.transpose(-1, -2)).to(wide) * scale  # (B, H, R, C, W, 2W)
        queries_at = where[..., None]
        scores = scores.masked_fill(queries_at == keys_at, _SELF)
        keep = real[:, None, None].expand(order.shape).gather(3, order).unflatten(3, (chunks, -1))
        keep = torch.cat([keep, keep.roll(1, 3)], 4)[..., None, :]
        if inputs.is_causal:
            keep = keep & (keys_at <= queries_at)
        scores = scores.masked_fill(~keep, NEVER)
        total = scores.logsumexp(-1, keepdim=True)
        weights = functional.dropout((scores - total).exp(), dropout_p, training=dropout_p > 0)
        out = (weights.to(v.dtype) @ v).flatten(3, 4)
        back = order.argsort(3)
        out, total = _sorted_rounds(out, back), _sorted_rounds(total.flatten(3, 4), back)
        out = (out * total.softmax(2).to(out.dtype)).sum(2)[:, :, :length]
        if inputs.query_padding is not None:
            out = out * inputs.query_padding[:, None, :, None]
        return out

    def macs(self, shape: AttentionShape) -> int:
        """R·(2·n·2c·d + n·d·b/2) per head: two products over two chunks, and b/2 rotations."""
        chunks, width = self.chunks(shape.kv_len)
        length = chunks * width
        one = 2 * length * 2 * width * shape.head_dim + length * shape.head_dim * chunks // 2
        return shape.batch * shape.heads * self.rounds * one

    def _order(
        self, query: Tensor, real: Tensor, layer: ReformerLayer, buckets: int
    ) -> Int64[Tensor, "batch heads rounds length"]:
        """Positions in the order of (bucket, position), padding last."""
        heads, head_dim, length = query.shape[1], query.shape[3], query.shape[2]
        turn = layer.rotations(heads, self.rounds, head_dim, buckets // 2)
        turned = torch.einsum("bhnd,hrdk->bhrnk", query.float(), turn.to(query.device))
        bucket = torch.cat([turned, -turned], -1).argmax(-1)
        bucket = bucket.masked_fill(~real[:, None, None], buckets)
        return (bucket * length + torch.arange(length, device=query.device)).argsort(-1)


def _sorted(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows of (B, H, N, D) in the order of each round, (B, H, R, N, D)."""
    rounds = order.shape[2]
    return _sorted_rounds(tensor[:, :, None].expand(-1, -1, rounds, -1, -1), order)


def _sorted_rounds(tensor: Tensor, order: Tensor) -> Tensor:
    return tensor.gather(3, order[..., None].expand(*order.shape, tensor.shape[-1]))
