"""Codes of the predictor: integer-valued fp32 numbers, their scales, and gradients through both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparseloom.quantize import quantize

BITS = (2, 4, 8, 32)
"""Widths of codes; 32 is no quantisation."""
_SAMPLE = 1 << 20  # numbers that a scale is estimated from, about


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

    Rounding passes the gradient straight through; clipped values get none.
    """
    most = {2: 1, 4: 7, 8: 127}[bits]
    return _RoundThrough.apply((value / scale).clamp(-most, most))


def row_scale(value: Float[Tensor, "*rows width"], bits: int) -> Float[Tensor, "*rows 1"]:
    """One scale per row, from the row itself: the maximum, or at 2 bits the least squared error."""
    clip = "mse" if bits == 2 else "max"
    flat = quantize(value.detach().reshape(-1, value.shape[-1]), bits, granularity="row", clip=clip)
    return flat.scale.reshape(*value.shape[:-1], 1)


def column_scale(value: Float[Tensor, "rows columns"], bits: int) -> Float[Tensor, " columns"]:
    """One scale per column, of the least squared error."""
    return quantize(value.detach(), bits, granularity="column", clip="mse").scale.reshape(-1)


def fixed_scale(value: Float[Tensor, "n groups width"], bits: int) -> Float[Tensor, " groups"]:
    """One scale per group for all tokens to come, from a sample of `n` of them.

    Least squared error at 2 and 4 bits, where a few outliers would otherwise waste the codes; the
    maximum at 8.
    """
    step = max(1, value.numel() // _SAMPLE)
    rows = value.detach()[::step].float().transpose(0, 1).flatten(1)
    clip = "max" if bits == 8 else "mse"
    return quantize(rows, bits, granularity="row", clip=clip).scale.reshape(-1)


class _RoundThrough(torch.autograd.Function):
    """Round half to even; the gradient passes as if it did not round."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        del ctx
        return value.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return grad
