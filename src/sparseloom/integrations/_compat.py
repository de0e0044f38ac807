"""What differs between transformers 4.56 and 5.x, in one place.

- mask functions receive `cache_position` before 5.3, `q_length` and `q_offset` after;
- GPT-2 of 4.x passes `is_causal=False` whenever it also passes a mask, and no `scaling`;
- BERT and RoBERTa of 4.x do not follow the attention interface: their self-attention gets an
  instance-level `forward` for as long as a model is sparsified.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VERSION: str = transformers.__version__
MAJOR = int(VERSION.split(".")[0])

# Families of 4.x whose self-attention has BERT's layout (query, key, value; absolute positions).
_BERT_LAYOUT = ("BertSelfAttention", "RobertaSelfAttention", "XLMRobertaSelfAttention",
                "CamembertSelfAttention", "ElectraSelfAttention")  # fmt: skip


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register an attention function and the mask function that goes with it, once.

    Both are needed: without the mask function transformers passes no mask at all and padding and
    causality are lost silently (transformers issue 45811).  `torch.compile` does not look into
    them: choosing pairs depends on values and counting has side effects.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if name not in AttentionInterface().valid_keys():
        AttentionMaskInterface.register(name, torch.compiler.disable(mask))
        AttentionInterface.register(name, torch.compiler.disable(attention))


def follows_interface(model: nn.Module) -> bool:
    """Whether every attention of the model goes through transformers' AttentionInterface."""
    return bool(getattr(model, "_supports_attention_backend", False))


def query_span(arguments: dict[str, Any]) -> tuple[int, int]:
    """(number of new queries, position of the first), from a mask function's keywords.

    Raises:
        NotImplementedError: the offset is a tensor, the sign of a static cache (5.x).
    """
    position = arguments.get("cache_position")
    if position is not None:
        return position.shape[0], int(position[0])
    offset = arguments.get("q_offset", 0)
    if isinstance(offset, Tensor):
        raise NotImplementedError(STATIC_CACHE)
    return int(arguments["q_length"]), int(offset)


STATIC_CACHE = (
    "past_key_values: a static cache is not supported, its unfilled slots would be attended; "
    "use a DynamicCache (the default of generate, without cache_implementation='static')"
)


def is_causal(module: nn.Module, given: bool | None) -> bool:
    """Whether this attention is causal: what the call says, else what the module says."""
    own = getattr(module, "is_causal", None)
    if own is None:
        own = getattr(module, "is_decoder", True)
    if given is None or (MAJOR < 5 and own):  # 4.x says False whenever it passes a mask
        return bool(own)
    return bool(given)


def scale_of(module: nn.Module, head_dim: int, given: float | None) -> float:
    """The factor on the scores; GPT-2 of 4.x leaves it to the attention function."""
    if given is not None:
        return float(given)
    scale = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scale /= int(getattr(module, "layer_idx", 0)) + 1
    return scale


def has_bert_layout(module: nn.Module) -> bool:
    """Whether `module` is a self-attention of 4.x that `bert_forward` can stand in for."""
    return MAJOR < 5 and any(kind.__name__ in _BERT_LAYOUT for kind in type(module).__mro__)


def bert_forward(attention: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward` for BERT's self-attention of 4.x that calls an attention function.

    Same arguments and results as the replaced one; refuses what it does not compute.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool | None = False,
        cache_position: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        if encoder_hidden_states is not None:
            raise NotImplementedError("encoder_hidden_states: cross-attention is not supported")
        if self.position_embedding_type != "absolute":
            raise NotImplementedError(
                f"position_embedding_type {self.position_embedding_type!r} adds a position bias "
                "to the scores, which is not supported; only 'absolute' is"
            )
        heads, width = self.num_attention_heads, self.attention_head_size

        def split(states: Tensor) -> Tensor:
            return states.unflatten(-1, (heads, width)).transpose(1, 2)  # (B, H, L, D)

        query, key, value = (
            split(project(hidden_states)) for project in (self.query, self.key, self.value)
        )
        if past_key_values is not None:
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            extra = {"cache_position": cache_position}
            key, value = cache.update(key, value, self.layer_idx, extra)
        out, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            head_mask=head_mask,
            output_attentions=output_attentions,
        )
        return out.flatten(-2), None

    return forward


def captured(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a closure holds, by name (transformers builds mask functions so)."""
    if not inspect.isfunction(function):
        return {}
    return dict(inspect.getclosurevars(function).nonlocals)
