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


def to_codes(value: Tensor, scale: Tensor, bits: int, twos_complement: bool = False) -> Tensor:
    """Codes of value / scale in fp32, rounded half to even; symmetric, or with the one more
    negative code of two's complement (at 2 bits {-2, -1, 0, 1} instead of {-1, 0, 1}).

    Rounding passes the gradient straight through; values beyond the last code's rounding range
    get none.
    """
    return _Codes.apply(value / scale, *code_range(bits, twos_complement=twos_complement))


def row_scale(
    value: Float[Tensor, "*rows width"], bits: int, twos_complement: bool = False
) -> Float[Tensor, "*rows 1"]:
    """One scale per row, from the row itself: the maximum, or at 2 bits the least squared error."""
    return quantization_scale(value, bits, granularity="row", twos_complement=twos_complement)


def column_scale(
    value: Float[Tensor, "rows columns"], bits: int, twos_complement: bool = False
) -> Float[Tensor, " columns"]:
    """One scale per column: the maximum, or at 2 bits the least squared error."""
    scale = quantization_scale(value, bits, granularity="column", twos_complement=twos_complement)
    return scale.reshape(-1)


def fixed_scale(
    value: Float[Tensor, "n groups width"], bits: int, twos_complement: bool = False
) -> Float[Tensor, " groups"]:
    """One scale per group for all tokens to come, from a sample of the `n` at hand.

    Least squared error at 2 and 4 bits, where a few outliers would otherwise waste the codes; the
    maximum at 8.
    """
    step = max(1, value.numel() // _SAMPLE)
    rows = value.detach()[::step].float().transpose(0, 1).flatten(1)
    clip = "max" if bits == 8 else "mse"
    scale = quantization_scale(
        rows, bits, granularity="row", clip=clip, twos_complement=twos_complement
    )
    return scale.reshape(-1)


class _Codes(torch.autograd.Function):
    """Round and clip to [low, high]; the gradient ignores the rounding and obeys the clipping."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: int, high: int) -> Tensor:
        ctx.range = low, high
        ctx.save_for_backward(value)
        return value.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (value,) = ctx.saved_tensors
        low, high = ctx.range
        outside = (value < low - 0.5) | (value > high + 0.5)
        return grad.masked_fill(outside, 0.0), None, None
