"""The parts of an encoder layer, for those who run it in another way than transformers does.

Two layouts: BERT's (`BertLayer`, `RobertaLayer` …) and DistilBERT's (`TransformerBlock`).  Both are
post-norm: attention, residual and norm, feed-forward, residual and norm.  Each projection can run
on some of the heads only, by slicing its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sparseloom.integrations import _compat

_BERT_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer")
_DISTILBERT_LAYERS = ("TransformerBlock",)

Heads = Int64[Tensor, " chosen"] | None
"""The heads to compute, ascending; None = all."""


@dataclass(frozen=True)
class EncoderLayer:
    """One layer of an encoder, taken apart.

    Attributes:
        module: the layer itself.
        query, key, value, out: the four projections.
        heads, head_dim: of the attention.
        inner: width inside the feed-forward.
        dropout: of the attention probabilities; the module is asked whether it is training.
        join: (projected attention output, layer input) → input of the feed-forward.
        feed_forward: → the layer's output.
        as_tuple: whether the layer returns a tuple (transformers 4.x).
    """

    module: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module
    heads: int
    head_dim: int
    inner: int
    dropout: nn.Module
    join: Callable[[Tensor, Tensor], Tensor]
    feed_forward: Callable[[Tensor], Tensor]
    as_tuple: bool

    def split(
        self, states: Float[Tensor, "batch tokens width"], heads: Heads
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of some heads, each (batch, heads, tokens, head_dim)."""
        parts = (self.query, self.key, self.value)
        return tuple(self._rows(part, states, heads) for part in parts)  # pyright: ignore[reportReturnType]

    def merge(
        self, context: Float[Tensor, "batch tokens heads head_dim"], heads: Heads
    ) -> Float[Tensor, "batch tokens width"]:
        """The output projection, on the columns of some heads."""
        flat = context.flatten(2)
        if heads is None:
            return self.out(flat)
        if not isinstance(self.out, nn.Linear) or not _is_plain(self.out):
            full = context.new_zeros(*context.shape[:2], self.heads, self.head_dim)
            return self.out(full.index_copy(2, heads, context).flatten(2))
        weight = self.out.weight.unflatten(1, (self.heads, self.head_dim))
        return F.linear(flat, weight.index_select(1, heads).flatten(1), self.out.bias)

    def _rows(self, part: nn.Module, states: Tensor, heads: Heads) -> Tensor:
        shape = (self.heads if heads is None else heads.numel(), self.head_dim)
        if heads is None:
            found = part(states)
        elif isinstance(part, nn.Linear) and _is_plain(part):
            weight = part.weight.unflatten(0, (self.heads, self.head_dim))
            bias = part.bias
            if bias is not None:
                bias = bias.unflatten(0, (self.heads, self.head_dim)).index_select(0, heads)
                bias = bias.flatten()
            found = F.linear(states, weight.index_select(0, heads).flatten(0, 1), bias)
        else:
            found = part(states).unflatten(-1, (self.heads, self.head_dim))
            found = found.index_select(-2, heads).flatten(-2)
        return found.unflatten(-1, shape).transpose(1, 2)


def encoder_layers(model: nn.Module, attentions: list[nn.Module]) -> list[EncoderLayer]:
    """The layers that hold these attention modules, in the same order.

    Raises:
        NotImplementedError: layers of another layout than BERT's or DistilBERT's.
    """
    holder = {id(own): layer for layer in model.modules() for own in _attention_of(layer)}
    found: list[EncoderLayer] = []
    for attention in attentions:
        layer = holder.get(id(attention))
        if layer is None:
            raise NotImplementedError(
                f"{type(model).__name__}: shortening the sequence knows the layers of BERT, "
                f"RoBERTa and DistilBERT, and not those around {type(attention).__name__}"
            )
        found.append(_parts(layer, attention))
    return found


def _attention_of(layer: nn.Module) -> list[nn.Module]:
    names = {kind.__name__ for kind in type(layer).__mro__}
    attention: Any = getattr(layer, "attention", None)
    if names & set(_BERT_LAYERS):
        return [attention.self]
    if names & set(_DISTILBERT_LAYERS) and hasattr(attention, "q_lin"):
        return [attention]
    return []


def _parts(layer: Any, attention: Any) -> EncoderLayer:
    if hasattr(attention, "q_lin"):

        def add_and_norm(projected: Tensor, states: Tensor) -> Tensor:
            return layer.sa_layer_norm(projected + states)

        def two_layers(states: Tensor) -> Tensor:
            return layer.output_layer_norm(layer.ffn.ff_chunk(states) + states)

        return EncoderLayer(
            module=layer,
            query=attention.q_lin,
            key=attention.k_lin,
            value=attention.v_lin,
            out=attention.out_lin,
            heads=attention.n_heads,
            head_dim=attention.dim // attention.n_heads,
            inner=layer.ffn.lin1.out_features,
            dropout=attention.dropout,
            join=add_and_norm,
            feed_forward=two_layers,
            as_tuple=_compat.MAJOR < 5,
        )
    if getattr(attention, "position_embedding_type", "absolute") != "absolute":
        raise NotImplementedError(
            f"position_embedding_type {attention.position_embedding_type!r} adds a position bias "
            "to the scores, which is not supported; only 'absolute' is"
        )
    after = layer.attention.output

    def drop_add_and_norm(projected: Tensor, states: Tensor) -> Tensor:
        return after.LayerNorm(after.dropout(projected) + states)

    return EncoderLayer(
        module=layer,
        query=attention.query,
        key=attention.key,
        value=attention.value,
        out=after.dense,
        heads=attention.num_attention_heads,
        head_dim=attention.attention_head_size,
        inner=layer.intermediate.dense.out_features,
        dropout=attention.dropout,
        join=drop_add_and_norm,
        feed_forward=layer.feed_forward_chunk,
        as_tuple=_compat.MAJOR < 5,
    )


def _is_plain(part: nn.Linear) -> bool:
    """Whether its weight is all that it computes with (no adapter, no hook of the user's)."""
    hooks = part._forward_hooks or part._forward_pre_hooks
    return type(part) is nn.Linear and not hooks and torch.is_tensor(part.weight)
