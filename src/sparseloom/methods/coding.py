"""Codes of the predictor: integer-valued fp32 numbers, their scales, and gradients through both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparseloom.quantize import code_range, quantization_scale

BITS = (2, 4, 8, 32)
"""Widths of codes; 32 is no quantisation."""
_SAMPLE = 1 << 17  # numbers that a scale is estimated from, about


class Coded(NamedTuple):
    """Numbers as codes times scale: integer-valued codes, or the numbers themselves at 32 bits."""

    codes: Tensor
    scale: Tensor

    @property
    def values(self) -> Tensor:
        """The numbers."""
        return self.codes * self.scale


def to_codes(value: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of value / scale in fp32, symmetric, rounded half to even.

    Rounding passes the gradient straight through; values beyond the last code's rounding range
    get none.
    """
    return _Codes.apply(value / scale, code_range(bits)[1])


def row_scale(value: Float[Tensor, "*rows width"], bits: int) -> Float[Tensor, "*rows 1"]:
    """One scale per row, from the row itself: the maximum, or at 2 bits the least squared error."""
    return quantization_scale(value, bits, granularity="row")


def column_scale(value: Float[Tensor, "rows columns"], bits: int) -> Float[Tensor, " columns"]:
    """One scale per column: the maximum, or at 2 bits the least squared error."""
    return quantization_scale(value, bits, granularity="column").reshape(-1)


def fixed_scale(value: Float[Tensor, "n groups width"], bits: int) -> Float[Tensor, " groups"]:
    """One scale per group for all tokens to come, from a sample of the `n` at hand.

    Least squared error at 2 and 4 bits, where a few outliers would otherwise waste the codes; the
    maximum at 8.
    """
    step = max(1, value.numel() // _SAMPLE)
    rows = value.detach()[::step].float().transpose(0, 1).flatten(1)
    clip = "max" if bits == 8 else "mse"
    return quantization_scale(rows, bits, granularity="row", clip=clip).reshape(-1)


class _Codes(torch.autograd.Function):
    """Round and clip to [-most, most]; the gradient ignores the rounding and obeys the clipping."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, most: int) -> Tensor:
        ctx.most = most
        ctx.save_for_backward(value)
        return value.round().clamp_(-most, most)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (value,) = ctx.saved_tensors
        return grad.masked_fill(value.abs() > ctx.most + 0.5, 0.0), None
