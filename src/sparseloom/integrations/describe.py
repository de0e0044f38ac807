"""What a model looks like: its shape and its attention modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparseloom.methods.base import Method
from sparseloom.methods.generation import Generating
from sparseloom.methods.learned import MethodShape
from sparseloom.trace.schema import ModelShape


def describe(model: nn.Module) -> ModelShape:
    """The shape of a Hugging Face model.

    Raises:
        NotImplementedError: the model is of a kind that `sparsify` does not support.
        TypeError: not a Hugging Face model.
    """
    config, modules = config_of(model), attention_modules(model)
    first = modules[0]
    heads = int(config.num_attention_heads)
    head_dim = getattr(first, "head_dim", None) or getattr(first, "attention_head_size", None)
    causal = getattr(first, "is_causal", None)
    return ModelShape(
        layers=len(modules),
        hidden_size=int(config.hidden_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim or config.hidden_size // heads),
        intermediate_size=_intermediate_size(config),
        vocab_size=int(getattr(config, "vocab_size", None) or 0),
        is_causal=bool(getattr(first, "is_decoder", True) if causal is None else causal),
        rotary=any("RotaryEmbedding" in type(module).__name__ for module in model.modules()),
        family=str(config.model_type),
        gated_ffn=any(name.endswith((".gate_proj", ".gate_up_proj"))
                      for name, _ in model.named_modules()),
    )  # fmt: skip


def chooses_in_cache(method: Method, shape: ModelShape) -> bool:
    """Whether the method chooses what each step reads of this model's cache.

    Otherwise, if it prunes, the sequence itself gets shorter.
    """
    shortens = getattr(method, "prompt", "whole") == "shorten"
    return shape.is_causal and isinstance(method, Generating) and not shortens


def method_shape(model: nn.Module) -> MethodShape:
    """What a method's weights are made for; raises as `describe`.

    `max_length` is 0 where the configuration names no longest input.
    """
    shape = describe(model)
    config = config_of(model)
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 0)
    return MethodShape(
        layers=shape.layers,
        hidden_size=shape.hidden_size,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_length=int(longest or 0),
        rotary=shape.rotary,
        is_causal=shape.is_causal,
    )


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a model, one per layer, in order.

    Raises:
        NotImplementedError: encoder-decoder or cross-attention models, shared layers, hybrids:
            wherever layers and attention modules are not one to one.
        TypeError: not a Hugging Face model.
    """
    config, name = config_of(model), type(model).__name__
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        raise NotImplementedError(
            f"{name} has cross-attention, which is not supported; encoders and decoder-only "
            "models are"
        )
    found = [module for module in model.modules() if _computes_attention(module)]
    layers = getattr(config, "num_hidden_layers", None)
    if not found or len(found) != layers:
        raise NotImplementedError(
            f"{name} is not supported: it has {len(found)} attention modules for "
            f"{'an unknown number of' if layers is None else layers} layers, and each layer must "
            "have its own"
        )
    order = [getattr(module, "layer_idx", None) for module in found]
    numbers = [index for index in order if isinstance(index, int)]
    if len(numbers) == len(found):
        found = [module for _, module in sorted(zip(numbers, found, strict=True), key=_first)]
    return found


def config_of(model: nn.Module) -> Any:
    """The configuration of a Hugging Face model, or a TypeError."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise TypeError(f"model must be a Hugging Face model, got {type(model).__name__}")
    return config


def _computes_attention(module: nn.Module) -> bool:
    """Whether a module computes attention itself; the wrappers around those do not count."""
    if "Attention" not in type(module).__name__:
        return False
    return isinstance(getattr(module, "layer_idx", None), int) or hasattr(module, "is_causal")


def _intermediate_size(config: Any) -> int:
    for name in ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim"):
        size = getattr(config, name, None)
        if size:
            return int(size)
    return 4 * int(config.hidden_size)


def _first(pair: tuple[int, nn.Module]) -> int:
    return pair[0]
