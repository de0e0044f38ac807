"""New rows of a quantised cache in C++: codes, split into planes, written where they are kept."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from sparseloom.kernels.cpu import native
from sparseloom.kernels.cpu.cached import FLOATS, NO_TENSOR, cached, factors


def can_store(x: Tensor, scale: Tensor, low_bits: int) -> bool:
    """Whether `store` takes numbers and a scale like these."""
    return (
        x.is_cpu
        and x.dtype in FLOATS
        and x.stride(-1) == 1
        and scale.dtype == torch.float32
        and scale.shape[2:] == (1, 1)
        and low_bits <= 4
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.compiler.is_compiling()
        and native.missing_reason() is None
    )


def store(
    x: Float[Tensor, "batch heads new dim"],
    scale: Float[Tensor, "#batch #heads 1 1"],
    bits: int,
    high: Integer[Tensor, "batch heads new dim"],
    low: UInt8[Tensor, "batch heads new packed"] | None = None,
    low_bits: int = 0,
) -> bool:
    """Write the codes of `x`, as `quantize`, `split_planes` and `pack_nibbles` make them.

    Args:
        x: what `can_store` allows.
        scale: of the codes.
        bits: of a code, both planes together.
        high: int8 or int16, written.
        low: written; None for one plane.
        low_bits: of them in the low plane, up to 4.

    Returns:
        False where a number is not finite or exceeds the range of codes: what was written then
        means nothing.
    """
    done: bool = native.library().store(
        tuple(x.shape),
        cached(x),
        factors(scale),
        (bits, low_bits),
        cached(high),
        NO_TENSOR if low is None else cached(low),
    )
    return done
