"""What a backend of decoding is given, and what it gives back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from sparseloom.kernels.planes import PlaneCache

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    """Why no compiled backend can run this call, on whatever device (None: there may be one)."""
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    if call.query.dtype not in _FLOATS:
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
    return None


def _refused_planes(planes: PlaneCache) -> str | None:
    msb, lsb, value = planes.key_msb, planes.key_lsb, planes.value
    if value.dtype not in (torch.int8, *_FLOATS):
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
