"""Gradients of sparse attention from the C++ library, for the cases of ``reference.backward``."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sparseloom.kernels.common import AttentionCall
from sparseloom.kernels.cpu import native
from sparseloom.kernels.cpu.tensors import TYPES, address, rows, view


def backward(
    call: AttentionCall,
    out: Float[Tensor, "batch heads q_len value_dim"],
    lse: Float[Tensor, "batch heads q_len"],
    grad_out: Float[Tensor, "batch heads q_len value_dim"],
    grad_lse: Float[Tensor, "batch heads q_len"] | None,
    grad_key_importance: Float[Tensor, "batch heads kv_len"] | None,
    grad_head_importance: Float[Tensor, "batch heads"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, of the dtype of the inputs.

    As in FlashAttention, the probabilities are made again from ``lse``, tile by tile, and the row
    sums of P ∘ dP are ``grad_out · out``, so ``out`` is used as it was rounded. Sums are fp32.

    Every call with the same arguments and the same number of threads gives the same bits; another
    number of threads may cut the heads differently, and then adds in another order.

    Raises:
        TypeError: the inputs are neither fp32, bf16 nor fp16.
    """
    query, key, value = call.query, call.key, call.value
    dtype = query.dtype
    if dtype not in TYPES:
        raise TypeError(f"query must be fp32, bf16 or fp16, got {dtype}")
    if grad_head_importance is not None:
        grad_out = grad_out.float() + out.sign().float() * grad_head_importance[..., None, None]
    # Addresses go to the library: these names keep the tensors behind them alive.
    tensors = [_typed(t) for t in (query, key, value, out, grad_out)]
    sums = [_fp32(t) for t in (lse, grad_lse, grad_key_importance)]
    grads = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    indices, offsets, padding = (
        None if t is None else t.contiguous()
        for t in (call.indices, call.offsets, call.key_padding)
    )
    mask = (1, 1, 1, 1) if offsets is None else (*offsets.shape[:2], *call.block_size)
    seed = 0 if call.seed is None else int(call.seed) % (1 << 64)
    native.library().backward(
        *((*view(t), TYPES[t.dtype]) for t in tensors),
        *(address(t) for t in sums),
        [t.data_ptr() for t in grads],
        [*query.shape[:2], key.shape[1], query.shape[2], *key.shape[2:], value.shape[3]],
        *(address(t) for t in (indices, offsets)),
        mask,
        address(padding),
        call.is_causal,
        call.scale,
        seed,
        round(call.dropout_p * (1 << 24)),
        0.0 if call.dropout_p == 1.0 else 1.0 / (1.0 - call.dropout_p),
        call.dropout_p > 0.0,
        torch.get_num_threads(),
    )
    return grads


def _typed(tensor: Tensor) -> Tensor:
    """The tensor in a type that the library reads, neighbouring dims adjacent."""
    return rows(tensor if tensor.dtype in TYPES else tensor.float())


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
