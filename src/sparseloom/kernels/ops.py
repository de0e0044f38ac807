"""The two torch operators behind ``attention``: forward and its derivative, for every backend.

As operators with fake implementations they are single nodes for ``torch.compile``, which
neither looks into the backends nor at the values of the index lists. The mask travels as its
tensors. ``BACKENDS`` are modules with

    unavailable() -> str | None                                   # on this machine
    unsupported(call, *, lse, importance, grad) -> str | None     # this call
    profitable(call) -> bool                                      # should "auto" take it?
    forward(call, *, lse, importance) -> ForwardResult
    backward(call, out, lse, grads…) -> (query, key, value gradients)   # if HAS_BACKWARD

imported on first use; a new one is a file, its name in ``BACKENDS`` (in the order in which "auto"
asks them) and a branch in ``load``. The derivative of the derivative is not registered; plain
autograd through ``reference.forward`` has it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparseloom.errors import unknown_name
from sparseloom.kernels.common import AttentionCall, accumulation_dtype

BACKENDS = ("cpu", "triton", "flex", "reference")


def load(backend: str) -> ModuleType:
    """The module of a backend, imported on first use."""
    # Import statements rather than importlib, which torch.compile does not trace.
    if backend == "reference":
        from sparseloom.kernels import reference as module
    elif backend == "cpu":
        from sparseloom.kernels import cpu as module
    elif backend == "triton":
        from sparseloom.kernels.triton import backend as module
    elif backend == "flex":
        from sparseloom.kernels import flex as module
    else:
        raise unknown_name("backend", backend, BACKENDS)
    return module


@torch.library.custom_op("sparseloom::attention", mutates_args=())
def attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    offsets: Tensor | None,
    key_padding: Tensor | None,
    seed: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    lse: bool,
    importance: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(out, lse, key_importance, head_importance)``; outputs not asked for are empty."""
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        indices=indices,
        offsets=offsets,
        block_size=(block_q, block_k),
        key_padding=key_padding,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
    )
    # The operator has one precision rule (see api): autocast must not change it from inside.
    with torch.autocast(query.device.type, enabled=False):
        result = load(backend).forward(call, lse=lse, importance=importance)
    dtype = accumulation_dtype(query.dtype)
    extras = (result.lse, result.key_importance, result.head_importance)
    none = [query.new_empty(0, dtype=dtype) if t is None else t.contiguous() for t in extras]
    return result.out.contiguous(), none[0], none[1], none[2]


@attention_op.register_fake
def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, importance, _ = rest[-3:]
    batch, heads, q_len, _ = query.shape
    dtype = accumulation_dtype(query.dtype)
    return (
        query.new_empty(batch, heads, q_len, value.shape[3]),
        query.new_empty((batch, heads, q_len) if lse else 0, dtype=dtype),
        query.new_empty((batch, heads, key.shape[2]) if importance else 0, dtype=dtype),
        query.new_empty((batch, heads) if importance else 0, dtype=dtype),
    )


@torch.library.custom_op("sparseloom::attention_backward", mutates_args=())
def attention_backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    offsets: Tensor | None,
    key_padding: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_key_importance: Tensor | None,
    grad_head_importance: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        indices=indices,
        offsets=offsets,
        block_size=(block_q, block_k),
        key_padding=key_padding,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
    )
    with torch.autocast(query.device.type, enabled=False):
        grads = load(backend).backward(
            call, out, lse, grad_out, grad_lse, grad_key_importance, grad_head_importance
        )
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@attention_backward_op.register_fake
def _attention_backward_fake(
    query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, block_q, block_k, is_causal, scale, dropout_p, lse, importance, backend = inputs
    ctx.save_for_backward(*tensors, output[0], output[1])
    ctx.settings = (block_q, block_k, is_causal, scale, dropout_p, backend)
    ctx.lse, ctx.importance = lse, importance


def _differentiate(
    ctx: Any, grad_out: Tensor, grad_lse: Tensor, grad_keys: Tensor, grad_heads: Tensor
) -> tuple[Tensor | None, ...]:
    if not ctx.lse:
        raise RuntimeError(
            "sparseloom::attention must be called with lse=True where gradients are needed"
        )
    grads = attention_backward_op(
        *ctx.saved_tensors,
        grad_out,
        grad_lse,
        grad_keys if ctx.importance else None,
        grad_heads if ctx.importance else None,
        *ctx.settings,
    )
    return (*grads, *(None,) * 12)


attention_op.register_autograd(_differentiate, setup_context=_setup_context)
