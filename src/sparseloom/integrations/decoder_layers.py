"""The parts of decoder layers.

Two layouts, both pre-norm (norm, attention, residual, norm, feed-forward, residual): GPT-2's, with
one map for queries, keys and values, and Llama's, with rotary positions and often fewer heads of
keys and values than of queries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparseloom.integrations import _compat
from sparseloom.integrations.prunable import (
    FourProjections,
    Heads,
    PrunableLayer,
    Rotary,
    all_heads,
    holders,
    is_plain,
)

_LLAMA_LAYERS = (
    *("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
)
_GPT2_LAYERS = ("GPT2Block",)


@dataclass(frozen=True, kw_only=True)
class FusedProjections(PrunableLayer):
    """A layer with one map for queries, keys and values (transformers' `Conv1D`: input first).

    Attributes:
        fused, out: the maps.
    """

    fused: nn.Module
    out: nn.Module

    def split(
        self, entered: Float[Tensor, "batch tokens width"], heads: Heads, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        del rotary
        fused: Any = self.fused
        shape = (3, self.heads, self.head_dim)
        if heads is not None and is_plain(fused):
            weight = fused.weight.unflatten(1, shape).index_select(2, heads).flatten(1)
            bias = fused.bias.unflatten(0, shape).index_select(1, heads).flatten()
            found = F.linear(entered, weight.T, bias).unflatten(-1, (3, -1, self.head_dim))
        else:
            found = fused(entered).unflatten(-1, shape)
            found = found if heads is None else found.index_select(-2, heads)
        query, key, value = found.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def merge(
        self, context: Float[Tensor, "batch tokens heads head_dim"], heads: Heads
    ) -> Float[Tensor, "batch tokens width"]:
        """The output projection."""
        out: Any = self.out
        if heads is None:
            return out(context.flatten(2))
        if not is_plain(out):
            return out(all_heads(context, heads, self.heads).flatten(2))
        weight = out.weight.unflatten(0, (self.heads, self.head_dim)).index_select(0, heads)
        return F.linear(context.flatten(2), weight.flatten(0, 1).T, out.bias)


def decoder_layers(model: nn.Module, attentions: list[nn.Module]) -> list[PrunableLayer]:
    """The layers that hold these attention modules, in the same order.

    Raises:
        NotImplementedError: layers of another layout than GPT-2's or Llama's.
    """
    holder = holders(model, _attention_of)
    found: list[PrunableLayer] = []
    for attention in attentions:
        layer = holder.get(id(attention))
        if layer is None:
            raise NotImplementedError(
                f"prompt: {type(model).__name__} cannot be shortened: known are the layers of "
                f"GPT-2, Llama, Mistral and Qwen, and not those around {type(attention).__name__}"
            )
        found.append(
            _gpt2(layer, attention) if hasattr(layer, "attn") else _llama(layer, attention)
        )
    return found


def _attention_of(layer: Any) -> list[nn.Module]:
    names = {kind.__name__ for kind in type(layer).__mro__}
    if names & set(_LLAMA_LAYERS):
        return [layer.self_attn]
    return [layer.attn] if names & set(_GPT2_LAYERS) else []


def _gpt2(layer: Any, attention: Any) -> PrunableLayer:
    def finish(projected: Tensor, states: Tensor) -> Tensor:
        states = attention.resid_dropout(projected) + states
        return states + layer.mlp(layer.ln_2(states))

    return FusedProjections(
        module=layer,
        fused=attention.c_attn,
        out=attention.c_proj,
        heads=attention.num_heads,
        kv_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=_compat.scale_of(attention, attention.head_dim, None),
        is_causal=True,
        inner=layer.mlp.c_fc.nf,
        matrices=2,
        dropout=lambda: float(attention.attn_dropout.p) if attention.training else 0.0,
        enter=layer.ln_1,
        finish=finish,
        as_tuple=_compat.MAJOR < 5,
    )


def _llama(layer: Any, attention: Any) -> PrunableLayer:
    apply = _rotation(attention)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]

    def turn(query: Tensor, key: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        assert rotary is not None
        query, key = (
            part if norm is None else norm(part)
            for part, norm in zip((query, key), norms, strict=True)
        )
        return apply(query, key, *rotary)

    def finish(projected: Tensor, states: Tensor) -> Tensor:
        states = states + projected
        return states + layer.mlp(layer.post_attention_layernorm(states))

    config = attention.config
    return FourProjections(
        module=layer,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        out=attention.o_proj,
        turn=turn,
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=attention.head_dim,
        scale=float(attention.scaling),
        is_causal=True,
        inner=layer.mlp.down_proj.in_features,
        matrices=3,
        dropout=lambda: float(attention.attention_dropout) if attention.training else 0.0,
        enter=layer.input_layernorm,
        finish=finish,
        as_tuple=False,
    )


def _rotation(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The model's own rotation: it stands beside its attention."""
    homes = (sys.modules[kind.__module__] for kind in type(attention).__mro__)
    found = (getattr(home, "apply_rotary_pos_emb", None) for home in homes)
    return next(function for function in found if function is not None)
