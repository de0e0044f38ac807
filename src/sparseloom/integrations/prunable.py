"""A Transformer layer taken apart, for those who run it in another way than transformers does.

Between its parts tokens and heads can leave: each projection runs on some of the heads only, by
slicing its weights, and what follows the attention runs on the tokens that stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Heads = Int64[Tensor, " chosen"] | None
"""The heads to compute, ascending; None = all."""

Rotary = tuple[Tensor, Tensor] | None
"""cos and sin of the tokens at hand, (batch or 1, tokens, rotary_dim)."""


@dataclass(frozen=True, kw_only=True)
class PrunableLayer(ABC):
    """One layer.

    Attributes:
        module: the layer itself.
        heads, kv_heads, head_dim: of the attention.
        scale: of its scores.
        is_causal: whether a query sees the keys before it alone.
        inner: width inside the feed-forward.
        matrices: of the feed-forward, of `inner` times the model's width each.
        dropout: probability in the attention; 0 where the module is not training.
        enter: what happens to the layer's input before the projections (the norm of pre-norm).
        finish: (projected attention output, layer input) → the layer's output.
        as_tuple: whether the layer returns a tuple.
    """

    module: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    is_causal: bool
    inner: int
    matrices: int
    dropout: Callable[[], float]
    enter: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor, Tensor], Tensor]
    as_tuple: bool

    @property
    def slices(self) -> bool:
        """Whether heads can be cut out: not where several share their keys and values."""
        return self.heads == self.kv_heads

    @abstractmethod
    def split(
        self, entered: Float[Tensor, "batch tokens width"], heads: Heads, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of some heads, each (batch, heads, tokens, head_dim)."""

    @abstractmethod
    def merge(
        self, context: Float[Tensor, "batch tokens heads head_dim"], heads: Heads
    ) -> Float[Tensor, "batch tokens width"]:
        """The output projection, on the columns of some heads."""


def unrotated(query: Tensor, key: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Queries and keys of a model without rotary positions."""
    del rotary
    return query, key


@dataclass(frozen=True, kw_only=True)
class FourProjections(PrunableLayer):
    """A layer with a linear map each for queries, keys, values and output.

    Attributes:
        query, key, value, out: these maps.
        turn: (queries, keys, rotary positions) → what the scores are made of.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module
    turn: Callable[[Tensor, Tensor, Rotary], tuple[Tensor, Tensor]] = unrotated

    def split(
        self, entered: Float[Tensor, "batch tokens width"], heads: Heads, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        query, key, value = (
            self._rows(part, entered, heads) for part in (self.query, self.key, self.value)
        )
        return *self.turn(query, key, rotary), value

    def merge(
        self, context: Float[Tensor, "batch tokens heads head_dim"], heads: Heads
    ) -> Float[Tensor, "batch tokens width"]:
        """The output projection."""
        flat = context.flatten(2)
        if heads is None:
            return self.out(flat)
        if not isinstance(self.out, nn.Linear) or not is_plain(self.out):
            return self.out(all_heads(context, heads, self.heads).flatten(2))
        weight = self.out.weight.unflatten(1, (self.heads, self.head_dim))
        return F.linear(flat, weight.index_select(1, heads).flatten(1), self.out.bias)

    def _rows(self, part: nn.Module, states: Tensor, heads: Heads) -> Tensor:
        if heads is None:
            found = part(states)
        elif isinstance(part, nn.Linear) and is_plain(part):
            weight = part.weight.unflatten(0, (self.heads, self.head_dim))
            bias = part.bias
            if bias is not None:
                bias = bias.unflatten(0, (self.heads, self.head_dim)).index_select(0, heads)
                bias = bias.flatten()
            found = F.linear(states, weight.index_select(0, heads).flatten(0, 1), bias)
        else:
            found = part(states).unflatten(-1, (self.heads, self.head_dim))
            found = found.index_select(-2, heads).flatten(-2)
        return found.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def all_heads(
    context: Float[Tensor, "batch tokens some head_dim"], heads: Int64[Tensor, " some"], total: int
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """The outputs of some heads among zeros for the others."""
    full = context.new_zeros(*context.shape[:2], total, context.shape[-1])
    return full.index_copy(2, heads, context)


def is_plain(part: nn.Module) -> bool:
    """Whether its weight is all that it computes with (no adapter, no hook of the user's)."""
    hooks = part._forward_hooks or part._forward_pre_hooks
    return type(part) in (nn.Linear, Conv1D) and not hooks and torch.is_tensor(part.weight)


def holders(
    model: nn.Module, attention_of: Callable[[nn.Module], list[nn.Module]]
) -> dict[int, nn.Module]:
    """From the id of an attention module to the layer that holds it."""
    return {id(own): layer for layer in model.modules() for own in attention_of(layer)}
