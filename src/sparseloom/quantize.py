"""Symmetric linear quantisers, straight-through fake quantisation, and bit planes.

A value ``x`` becomes the integer code ``round(x / scale)``, clamped to the codes of ``bits`` bits,
and stands for ``code * scale``; the zero point is 0. Ties round to the even code.

The predictors of Dynamic Sparse Attention (Liu et al., IEEE TC 2022) run in INT2, INT4 or INT8;
the paper names the widths but not the format, so the format is a choice of this library: codes
from ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1``, ternary {-1, 0, 1} at 2 bits, and with
``twos_complement`` one more negative code. SpAtten (HPCA 2021, §III-D) splits wider codes into
high and low bits and reads the low ones only where they matter: ``split_planes``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Integer
from torch import Tensor

Granularity: TypeAlias = Literal["tensor", "matrix", "row", "column"]
"""What shares a scale: all values; the last two dimensions; the last one; the one before it."""
Clip: TypeAlias = Literal["max", "mse"]

MAX_BITS = 16

# The search for the scale of least squared error tries scales below the one that clips nothing:
# seven octaves cover outliers of 128 times the useful range, and the steps of 12 % are narrower
# than the valley of the error; halving them six times then finds its bottom to 0.2 %.
_OCTAVES, _STEPS_PER_OCTAVE, _HALVINGS = 7, 6, 6
_FEW = 256  # values that share a scale, up to which its search is dense


class Quantized(NamedTuple):
    """Integer codes and what they stand for: ``codes * scale``.

    Args:
        codes: int8 up to 8 bits, else int16.
        scale: positive, with the dimensions of ``codes`` and 1 where it is shared.
        bits: width of the codes.
    """

    codes: Integer[Tensor, "*shape"]
    scale: Float[Tensor, "*scale_shape"]
    bits: int

    def dequantize(self) -> Float[Tensor, "*shape"]:
        """The values that the codes stand for, in the type of ``scale``."""
        return self.codes * self.scale


def code_range(bits: int, *, twos_complement: bool = False) -> tuple[int, int]:
    """Lowest and highest code: symmetric, or with the extra negative code of two's complement.

    Raises:
        ValueError: ``bits`` is not in [2, 16].
    """
    if not 2 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be in [2, {MAX_BITS}], got {bits}")
    high = 2 ** (bits - 1) - 1
    return (-high - 1 if twos_complement else -high), high


def quantization_scale(
    x: Float[Tensor, "*shape"],
    bits: int,
    *,
    granularity: Granularity = "tensor",
    clip: Clip | None = None,
    twos_complement: bool = False,
) -> Float[Tensor, "*scale_shape"]:
    """The scale that ``quantize`` would use, with 1 in the dimensions that share it.

    Args:
        x: values, finite.
        bits: 2 to 16.
        granularity: ``"tensor"`` one scale; ``"matrix"`` one for each matrix of the last two
            dimensions (one head of ``(batch, heads, length, width)``); ``"row"`` one for each
            vector along the last dimension; ``"column"`` one for each along the one before it.
        clip: ``"max"``, the smallest scale that clips nothing; ``"mse"``, the scale of least
            squared error (exact for ternary codes, a search for the others).
            Default: ``"mse"`` at 2 bits, where the largest value would round most others to
            zero, else ``"max"``.
        twos_complement: also use the code ``-2**(bits-1)``.

    Returns:
        Positive scales, fp32 (fp64 for fp64 values). Where all values are zero the scale is 1.

    Raises:
        ValueError: a NaN or an infinity in ``x``, or an unknown option.
    """
    low, high = code_range(bits, twos_complement=twos_complement)
    if clip is None:
        clip = "mse" if bits == 2 else "max"
    if clip not in ("max", "mse"):
        raise ValueError(f'clip must be "max" or "mse", got {clip!r}')
    wide = _wide(x.detach())
    groups = _groups(wide, granularity)
    if groups.shape[-1] == 0:
        scale = groups.new_ones((*groups.shape[:-1], 1))
    else:
        top = _top(groups, low, high)
        # A NaN or an infinity reaches the top of its group: no pass over x is needed to see it.
        if not torch.compiler.is_compiling() and not bool(top.isfinite().all()):
            _refuse_not_finite(x)
        # All-zero groups, and values so small that the division underflows.
        top = torch.where(top > 0, top, 1.0)
        if clip == "max":
            scale = top
        elif (low, high) == (-1, 1):
            scale = _best_ternary(groups, top)
        else:
            scale = _best_scale(groups, top, low, high)
    return _ungroup(scale, x.dim(), granularity)


def quantize(
    x: Float[Tensor, "*shape"],
    bits: int,
    *,
    granularity: Granularity = "tensor",
    clip: Clip | None = None,
    twos_complement: bool = False,
    scale: Float[Tensor, "*scale_shape"] | None = None,
) -> Quantized:
    """Codes of ``x``; options as in ``quantization_scale``.

    Args:
        x: values, finite, of any floating type; codes are computed in fp32 (fp64 for fp64).
        bits: 2 to 16.
        granularity, clip, twos_complement: see ``quantization_scale``.
        scale: use this one, broadcast to ``x``, and clamp what lies outside. For scales fixed
            beforehand; ``granularity`` and ``clip`` then have no effect.

    Raises:
        ValueError: a NaN or an infinity in ``x``, a scale that is not positive, an unknown option.
    """
    low, high = code_range(bits, twos_complement=twos_complement)
    if scale is None:
        scale = quantization_scale(
            x, bits, granularity=granularity, clip=clip, twos_complement=twos_complement
        )
    elif not torch.compiler.is_compiling():
        if not bool((scale > 0).all()) or not bool(scale.isfinite().all()):
            raise ValueError("scale must be positive and finite")
        if not bool(x.isfinite().all()):
            _refuse_not_finite(x)
    codes = (_wide(x.detach()) / scale).round().clamp(low, high)
    return Quantized(codes.to(_storage(bits)), scale, bits)


def dequantize(quantized: Quantized) -> Float[Tensor, "*shape"]:
    """The values that the codes stand for."""
    return quantized.dequantize()


def fake_quantize(
    x: Float[Tensor, "*shape"],
    bits: int,
    *,
    granularity: Granularity = "tensor",
    clip: Clip | None = None,
    twos_complement: bool = False,
    scale: Float[Tensor, "*scale_shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """``dequantize(quantize(x))`` in the type of ``x``, with a straight-through gradient.

    The gradient of a value is 1 if its rounded code lies within the range of codes and 0 if it
    was clipped, which happens only with ``clip="mse"`` or a given ``scale``; with ``clip="max"``
    every gradient is 1. The scale is a constant. Options and errors as in ``quantize``.
    """
    quantized = quantize(
        x,
        bits,
        granularity=granularity,
        clip=clip,
        twos_complement=twos_complement,
        scale=scale,
    )
    values = quantized.dequantize().to(x.dtype)
    if not x.requires_grad:
        return values
    low, high = code_range(bits, twos_complement=twos_complement)
    rounded = (_wide(x.detach()) / quantized.scale).round()
    through = x * ((rounded >= low) & (rounded <= high))
    # Adding zero keeps the values bit for bit those of dequantize(quantize(x)).
    return values + (through - through.detach())


def split_planes(
    codes: Integer[Tensor, "*shape"], msb_bits: int, lsb_bits: int
) -> tuple[Integer[Tensor, "*shape"], Integer[Tensor, "*shape"]]:
    """High and low bits of signed codes: ``codes = msb * 2**lsb_bits + lsb``, exactly.

    The low plane is unsigned, so the high plane alone is the code rounded down. The widths of
    SpAtten (HPCA 2021, §III-D) are 4+4, 6+4, 8+4, 10+4 and 12+4.

    Args:
        codes: signed integers that fit in ``msb_bits + lsb_bits`` bits.
        msb_bits: width of the signed high plane, from 1.
        lsb_bits: width of the low plane, from 1; together at most 16.

    Returns:
        ``(msb, lsb)`` in the smallest of int8 and int16 that holds them: ``lsb`` is in
        ``[0, 2**lsb_bits)``.

    Raises:
        ValueError: a width is not allowed, or a code does not fit.
    """
    total = msb_bits + lsb_bits
    if msb_bits < 1 or lsb_bits < 1 or total > MAX_BITS:
        raise ValueError(
            f"msb_bits and lsb_bits must be at least 1 and together at most {MAX_BITS}, "
            f"got {msb_bits} and {lsb_bits}"
        )
    high = 2 ** (total - 1) - 1
    if not torch.compiler.is_compiling():
        outside = (codes < -high - 1) | (codes > high)
        if bool(outside.any()):
            place = tuple(outside.nonzero()[0].tolist())
            raise ValueError(
                f"codes must be in [{-high - 1}, {high}] for {msb_bits}+{lsb_bits} bits, "
                f"got {int(codes[place])} at {place}"
            )
    whole = codes.to(torch.int32)
    msb, lsb = whole >> lsb_bits, whole & ((1 << lsb_bits) - 1)
    # The low plane has no sign bit of its own: 8 unsigned bits do not fit in int8.
    return msb.to(_storage(msb_bits)), lsb.to(_storage(lsb_bits + 1))


def join_planes(
    msb: Integer[Tensor, "*shape"], lsb: Integer[Tensor, "*shape"], lsb_bits: int
) -> Integer[Tensor, "*shape"]:
    """The codes that ``split_planes`` split, as int32.

    Raises:
        ValueError: ``lsb_bits`` is not in [1, 15].
    """
    if not 1 <= lsb_bits < MAX_BITS:
        raise ValueError(f"lsb_bits must be in [1, {MAX_BITS - 1}], got {lsb_bits}")
    return (msb.to(torch.int32) << lsb_bits) | lsb.to(torch.int32)


# ----------------------------------------------------------------------------- private


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _storage(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32


def _groups(x: Tensor, granularity: Granularity) -> Tensor:
    """The values that share a scale along the last dimension."""
    needed = {"tensor": 0, "row": 1, "matrix": 2, "column": 2}
    if granularity not in needed:
        allowed = ", ".join(f'"{name}"' for name in needed)
        raise ValueError(f"granularity must be one of {allowed}, got {granularity!r}")
    if x.dim() < needed[granularity]:
        raise ValueError(
            f'granularity "{granularity}" needs at least {needed[granularity]} dimensions, '
            f"got shape {tuple(x.shape)}"
        )
    if granularity == "tensor":
        return x.reshape(-1)
    if granularity == "matrix":
        return x.flatten(-2)
    return x.mT if granularity == "column" else x


def _ungroup(scale: Tensor, dims: int, granularity: Granularity) -> Tensor:
    if granularity == "tensor":
        return scale.reshape((1,) * dims)
    if granularity == "matrix":
        return scale[..., None]
    return scale.mT if granularity == "column" else scale


def _top(groups: Tensor, low: int, high: int) -> Tensor:
    """The smallest scale that clips nothing."""
    if low == -high:
        return groups.abs().amax(-1, keepdim=True) / high
    return torch.maximum(groups.amax(-1, keepdim=True) / high, groups.amin(-1, keepdim=True) / low)


def _best_ternary(groups: Tensor, top: Tensor) -> Tensor:
    """Scale of least squared error for codes {-1, 0, 1}.

    With the ``n`` largest magnitudes coded ±1 the best scale is their mean ``s / n`` and lowers
    the error by ``s**2 / n``. The best ``n`` is the one that rounding to the nearest code gives,
    since any other coding at that scale has a larger error.
    """
    sums = (groups / top).abs().sort(dim=-1, descending=True).values.cumsum(-1)
    count = torch.arange(1, groups.shape[-1] + 1, device=groups.device, dtype=groups.dtype)
    n = (sums * sums / count).argmax(-1, keepdim=True)
    scale = sums.gather(-1, n) / count[n] * top
    return torch.where(scale > 0, scale, top)


def _best_scale(groups: Tensor, top: Tensor, low: int, high: int) -> Tensor:
    """Scale of least squared error: a geometric search that narrows down around the best.

    The error of few values has many valleys, one for each way to round them, so there the search
    is dense and every trial moves to the bottom of its valley (least squares for its codes).
    """
    few = groups.shape[-1] <= _FEW
    steps = _STEPS_PER_OCTAVE * (min(max(high // 8, 4), 16) if few else 1)
    values = groups / top  # so that the squares neither overflow nor underflow
    log_scale = torch.zeros_like(top)  # to the base 2, relative to top

    def codes_at(log_scale: Tensor) -> Tensor:
        return (values / log_scale.exp2()).round().clamp(low, high)

    def error_at(log_scale: Tensor) -> Tensor:
        codes = codes_at(log_scale)
        return (values - codes * log_scale.exp2()).square().sum(-1, keepdim=True)

    def bottom(log_scale: Tensor) -> Tensor:
        codes = codes_at(log_scale)
        fit = (values * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True)
        return torch.where(fit > 0, fit.log2(), log_scale)  # no code but 0: not a number

    error = error_at(log_scale)

    def consider(trial: Tensor) -> None:
        nonlocal log_scale, error
        trial = bottom(trial) if few else trial
        trial_error = error_at(trial)
        log_scale = torch.where(trial_error < error, trial, log_scale)
        error = torch.minimum(trial_error, error)

    for step in range(_OCTAVES * steps + 1):
        consider(torch.full_like(top, -step / steps))
    for halving in range(1, _HALVINGS + 1):
        width = 0.5**halving / steps
        centre = log_scale
        consider(centre - width)
        consider(centre + width)
    scale = log_scale.exp2() * top
    return torch.where(scale > 0, scale, top)


def _refuse_not_finite(x: Tensor) -> None:
    place = tuple((~x.isfinite()).nonzero()[0].tolist())
    raise ValueError(f"x must be finite, got {float(x[place])} at {place}")
