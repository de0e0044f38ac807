"""What a method that prunes left of one attention call, for those who observe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sparseloom.integrations.stored import Stored
from sparseloom.kernels import DecodeStats
from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, Survivors
from sparseloom.methods.generation import Reading


@dataclass(frozen=True, eq=False)
class Kept:
    """What was left in one call, on the whole input.

    Attributes:
        mask: the pairs that were computed, of the whole input; None = all.
        tokens: (batch, kv_len), those that a cascade had left; None = all, or no cascade.
        heads: (batch, heads), the same.
        measured: whether the call's probabilities count for what is pruned later.
        value_counts: (batch, heads, q_len), values read, where they are fewer than the keys.
        key_bits: widths of the two planes in which the keys lay; None = not quantised.
        value_bits: width of the values; None = not quantised.
        threshold: of progressive quantisation; None = all bits were read at once.
        low_rows: (batch, heads, q_len), whether the row fetched the low plane.
        places: (batch, tokens), where in the input the tokens of a shortened call stand; None =
            the call was not shortened.
        head_places: which heads a call has that computed some of them only.
    """

    mask: SparseMask | None = None
    tokens: Bool[Tensor, "batch kv_len"] | None = None
    heads: Bool[Tensor, "batch heads"] | None = None
    measured: bool = False
    value_counts: Int64[Tensor, "batch heads q_len"] | None = None
    key_bits: tuple[int, int] | None = None
    value_bits: int | None = None
    threshold: float | None = None
    low_rows: Bool[Tensor, "batch heads q_len"] | None = None
    places: Int64[Tensor, "batch tokens"] | None = None
    head_places: Int64[Tensor, " some"] | None = None


@runtime_checkable
class KeptObserver(Protocol):
    """An observer that is also told what a pruning method left, before the call itself."""

    def on_kept(self, kept: Kept) -> None:
        """Belongs to the `on_attention` that follows."""
        ...


def kept_of_survivors(
    survivors: Survivors,
    *,
    measured: bool,
    places: Int64[Tensor, "batch tokens"],
    head_places: Int64[Tensor, " some"] | None,
    head_tokens: Bool[Tensor, "batch heads length"] | None = None,
) -> Kept:
    """What a layer of a shortened model computed: every pair of the tokens that are left.

    `head_tokens` are those of each head, where tokens leave between the heads.
    """
    tokens, heads = survivors.tokens, survivors.heads
    assert tokens is not None
    assert heads is not None
    pairs = tokens[:, None, :, None] & tokens[:, None, None, :]
    if head_tokens is not None:
        pairs = head_tokens[..., :, None] & head_tokens[..., None, :]
    elif not bool((heads == heads[:1]).all()):
        pairs = pairs & heads[:, :, None, None]
    order = torch.arange(tokens.shape[1], device=places.device).expand(len(tokens), -1)
    return Kept(
        mask=None if bool(pairs.all()) else SparseMask.from_bool(pairs),
        tokens=tokens,
        heads=heads,
        measured=measured,
        places=None if torch.equal(places, order) else places,
        head_places=head_places,
    )


def kept_of_step(
    reading: Reading,
    inputs: AttentionInputs,
    stats: DecodeStats,
    stored: Stored,
    *,
    cascades: bool,
    measured: bool,
) -> Kept:
    """What one step of generation read.

    Args:
        reading: what the method asked for.
        inputs: the call.
        stats: what its rows read.
        stored: the cache.
        cascades: whether what is pruned is gone for the rest of the step.
        measured: see `Kept`.
    """
    batch, kv_len = inputs.query.shape[0], inputs.key.shape[2]
    device = inputs.query.device
    if reading.keep is None:
        pairs = torch.ones(batch, 1, kv_len, dtype=torch.bool, device=device)
    else:
        heads = reading.keep.shape[1]
        pairs = torch.zeros(batch, heads, kv_len + 1, dtype=torch.bool, device=device)
        listed = reading.keep.where(reading.keep >= 0, kv_len)
        pairs = pairs.scatter_(2, listed, True)[..., :kv_len]
    if inputs.key_padding is not None:
        pairs = pairs & inputs.key_padding[:, None]
    fewer = bool((stats.values_read < stats.keys_read).any())
    return Kept(
        mask=SparseMask.from_bool(pairs[:, :, None]),
        tokens=pairs.any(1) if cascades else None,
        heads=stats.keys_read[..., 0] > 0 if cascades else None,
        measured=measured,
        value_counts=stats.values_read if fewer else None,
        key_bits=stored.key_bits,
        value_bits=stored.value_bits,
        threshold=reading.progressive,
        low_rows=None if reading.progressive is None else stats.refetched,
    )


def whole(kept: Kept, tensor: Tensor) -> Tensor:
    """Rows of a shortened call, (batch, heads, tokens, dim), in their places among zeros."""
    if kept.head_places is not None and kept.heads is not None:
        full = tensor.new_zeros(tensor.shape[0], kept.heads.shape[1], *tensor.shape[2:])
        tensor = full.index_copy(1, kept.head_places, tensor)
    if kept.places is None or kept.tokens is None:
        return tensor
    left = kept.tokens.sum(1)  # a sequence's tokens stand in front, others fill its row up
    real = torch.arange(kept.places.shape[1], device=left.device) < left[:, None]
    rows = tensor * real[:, None, :, None]
    places = kept.places[:, None, :, None].expand_as(rows)
    full = tensor.new_zeros(*tensor.shape[:2], kept.tokens.shape[1], tensor.shape[3])
    return full.scatter_add(2, places, rows)
