"""Decoding in C++: what of it runs here, and running it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseloom.kernels import decode_call
from sparseloom.kernels.cpu import native
from sparseloom.kernels.cpu.cached import NO_TENSOR, cached, factors
from sparseloom.kernels.decode_call import DecodeCall, DecodeResult


def refusal(call: DecodeCall) -> str | None:
    """Why this call cannot run here (None: it can)."""
    if not call.query.is_cpu:
        return f"the tensors are on {call.query.device}"
    return decode_call.refusal(call) or native.missing_reason()


def decode(call: DecodeCall) -> DecodeResult | int:
    """Run a call that ``refusal`` does not refuse.

    Returns:
        The result, or the flat index of the first entry of ``keep`` that names no key.
    """
    query, planes, keep = call.query, call.planes, call.keep
    (batch, heads, q_len, head_dim), (kv_heads, kv_len) = query.shape, call.key.shape[1:3]
    value_dim = call.value.shape[3]
    # Whatever `cached` copies has to stay alive during the call.
    query = _dense(query)
    key_low, low_bits, fill = None, 0, 0
    key_scale = value_scale = None
    if planes is None:
        key, value = _dense(call.key), _dense(call.value)
    else:
        key, value = _dense(planes.key_msb), _dense(planes.value)
        key_low = None if planes.key_lsb is None else _dense(planes.key_lsb)
        low_bits, fill = planes.lsb_bits, planes.fill
        key_scale, value_scale = _fp32(planes.key_scale), _fp32(planes.value_scale)
    if keep is not None:
        if keep.dtype not in (torch.int64, torch.int32):
            keep = keep.to(torch.int64)
        keep = keep.contiguous()
    padding = None if call.key_padding is None else _dense(call.key_padding)

    if value_dim == head_dim and query.is_contiguous():
        out = torch.empty_like(query)  # the cheaper of the two
    else:
        out = query.new_empty((batch, heads, q_len, value_dim))
    key_importance = head_importance = keys_read = values_read = refetched = None
    if call.return_importance:
        key_importance = query.new_zeros((batch, heads, kv_len), dtype=torch.float32)
        head_importance = query.new_empty((batch, heads), dtype=torch.float32)
    if call.return_stats:
        keys_read = query.new_empty((batch, heads, q_len), dtype=torch.int64)
        values_read = torch.empty_like(keys_read)
        refetched = torch.empty_like(keys_read, dtype=torch.bool)
    wrong: int = native.library().decode(
        (batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim),
        cached(query),
        cached(key),
        NO_TENSOR if key_low is None else cached(key_low),
        cached(value),
        factors(key_scale),
        factors(value_scale),
        (0, False, 0, 0)
        if keep is None
        else (keep.data_ptr(), keep.dtype == torch.int64, keep.shape[1], keep.shape[2]),
        (0, 0) if padding is None else (padding.data_ptr(), padding.stride(0)),
        (low_bits, fill),
        call.scale,
        -1.0 if call.value_keep is None else call.value_keep,
        -1.0 if call.progressive is None else call.progressive,
        call.renormalise,
        call.is_causal,
        (
            out.data_ptr(), _address(key_importance), _address(head_importance),
            _address(keys_read), _address(values_read), _address(refetched),
        ),
        torch.get_num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        return wrong
    return DecodeResult(
        out, key_importance, head_importance, keys_read, values_read, refetched
    )  # fmt: skip


def _fp32(scale: Tensor | None) -> Tensor | None:
    return scale if scale is None or scale.dtype == torch.float32 else scale.float()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy with a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
