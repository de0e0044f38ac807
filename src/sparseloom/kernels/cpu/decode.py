"""Decoding in C++: the call as it has been checked, what of it runs here, and running it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from sparseloom.kernels.cpu import native
from sparseloom.kernels.cpu.cached import FLOATS, NO_TENSOR, cached, factors
from sparseloom.kernels.planes import PlaneCache


class DecodeCall(NamedTuple):
    """One ``decode_attention`` call, checked but for the values of ``keep``.

    Where ``planes`` is given, ``key`` and ``value`` only have the shapes of what it holds.
    """

    query: Float[Tensor, "batch heads q_len head_dim"]
    key: Float[Tensor, "batch kv_heads kv_len head_dim"]
    value: Float[Tensor, "batch kv_heads kv_len value_dim"]
    planes: PlaneCache | None
    keep: Int[Tensor, "batch keep_heads kept"] | None
    value_keep: float | None
    progressive: float | None
    renormalise: bool
    is_causal: bool
    key_padding: Bool[Tensor, "batch kv_len"] | None
    scale: float
    return_importance: bool
    return_stats: bool

    @property
    def kv_len(self) -> int:
        """Number of keys in the cache."""
        return self.key.shape[2]


class DecodeResult(NamedTuple):
    """What was asked for; the rest is None."""

    out: Float[Tensor, "batch heads q_len value_dim"]
    key_importance: Float[Tensor, "batch heads kv_len"] | None = None
    head_importance: Float[Tensor, "batch heads"] | None = None
    keys_read: Int64[Tensor, "batch heads q_len"] | None = None
    values_read: Int64[Tensor, "batch heads q_len"] | None = None
    refetched: Bool[Tensor, "batch heads q_len"] | None = None


def refusal(call: DecodeCall) -> str | None:
    """Why this call cannot run here (None: it can)."""
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    if not call.query.is_cpu:
        return f"the tensors are on {call.query.device}"
    if call.query.dtype not in FLOATS:
        return f"it computes in fp32, not for {call.query.dtype}"
    planes = call.planes
    if planes is not None:
        reason = _refused_planes(planes)
        if reason is not None:
            return reason
        key, value = planes.key_scale, planes.value
    else:
        key, value = call.key, call.value
    if torch.is_grad_enabled() and (
        call.query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return "it has no gradients (torch.no_grad() turns them off)"
    if call.kv_len >= 1 << 31:
        return f"kv_len must be less than 2**31, got {call.kv_len}"
    return native.missing_reason()


def _refused_planes(planes: PlaneCache) -> str | None:
    msb, lsb, value = planes.key_msb, planes.key_lsb, planes.value
    if value.dtype not in (torch.int8, *FLOATS):
        return f"values must be int8, fp32, bf16 or fp16, got {value.dtype}"
    if msb.dtype not in (torch.int8, torch.int16):
        return f"the high plane must be int8 or int16, got {msb.dtype}"
    if lsb is not None:
        if lsb.dtype != torch.uint8:
            return f"the low plane must have at most 4 bits, got {planes.lsb_bits}"
        if msb.shape[3] % 2:
            return f"head_dim must be even with two planes, got {msb.shape[3]}"
    if _varies_twice(planes.key_scale):
        return "key_scale must not vary along the tokens and along the dimensions"
    if planes.value_scale is not None and _varies_twice(planes.value_scale):
        return "value_scale must not vary along the tokens and along the dimensions"
    return None


def _varies_twice(scale: Tensor) -> bool:
    shape = scale.shape
    return shape[2] != 1 and shape[3] != 1


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
