"""One fixed-point multiplier made of smaller ones, as in DOTA's processing elements.

Operands are cut into a high half, which keeps the sign, and a low half without one; four products
of half the width are shifted and added, and so on down to 2 bits. The same small multipliers do
several narrow products in one cycle, and add those up inside (DOTA, ASPLOS 2022; Liu et al., IEEE
TC 2022, §6; the paper shows FX4 made of INT2). Codes are two's complement; everything is exact.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from sparseloom.hardware.config import MachineError

SMALLEST_BITS = 2
WIDTHS = (2, 4, 8, 16)
"""Operand widths: INT2, INT4, INT8 and FX16."""


def product(
    a: Int64[np.ndarray, "*shape"], b: Int64[np.ndarray, "*shape"], bits: int
) -> Int64[np.ndarray, "*shape"]:
    """Products of signed codes of `bits` bits, of 2-bit products alone.

    Raises:
        MachineError: bits is not 2, 4, 8 or 16, or an operand does not fit in them.
    """
    if bits not in WIDTHS:
        raise MachineError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {bits}")
    fitting(a, bits, "a")
    fitting(b, bits, "b")
    return _composed(a, b, bits, a_signed=True, b_signed=True)


def product_sum(
    streamed: Int64[np.ndarray, "*sets depth"],
    stationary: Int64[np.ndarray, "*sets depth"],
    bits: int,
    sum_bits: int,
) -> Int64[np.ndarray, "*sets"]:
    """Products along the last axis, added inside the multiplier to sums of `sum_bits` bits.

    Raises:
        MachineError: operands or a sum that do not fit.
    """
    sums = np.asarray(product(streamed, stationary, bits).sum(axis=-1))
    return fitting(sums, sum_bits, "a sum in the multiplier")


def fitting(
    values: Int64[np.ndarray, "*shape"], bits: int, name: str
) -> Int64[np.ndarray, "*shape"]:
    """The values, if signed words of `bits` bits hold them.

    Raises:
        MachineError: one does not fit; the message gives it.
    """
    limit = 1 << (bits - 1)
    outside = (values < -limit) | (values >= limit)
    if outside.any():
        raise MachineError(
            f"{name} must fit in {bits} bits, [{-limit}, {limit - 1}], got {values[outside][0]}"
        )
    return values


def _composed(
    a: Int64[np.ndarray, "*shape"],
    b: Int64[np.ndarray, "*shape"],
    bits: int,
    *,
    a_signed: bool,
    b_signed: bool,
) -> Int64[np.ndarray, "*shape"]:
    if bits == SMALLEST_BITS:
        return _smallest(a, b, a_signed=a_signed, b_signed=b_signed)
    half = bits // 2
    low = (1 << half) - 1
    # An arithmetic shift keeps the sign of a signed operand; an unsigned one has none to keep.
    a_high, a_low, b_high, b_low = a >> half, a & low, b >> half, b & low
    high = _composed(a_high, b_high, half, a_signed=a_signed, b_signed=b_signed)
    cross = _composed(a_high, b_low, half, a_signed=a_signed, b_signed=False)
    cross = cross + _composed(a_low, b_high, half, a_signed=False, b_signed=b_signed)
    rest = _composed(a_low, b_low, half, a_signed=False, b_signed=False)
    return (high << bits) + (cross << half) + rest


def _smallest(
    a: Int64[np.ndarray, "*shape"],
    b: Int64[np.ndarray, "*shape"],
    *,
    a_signed: bool,
    b_signed: bool,
) -> Int64[np.ndarray, "*shape"]:
    """Four AND gates: the high bit of a signed operand weighs -2, of an unsigned one 2."""
    a_weight, b_weight = -2 if a_signed else 2, -2 if b_signed else 2
    a_high, a_low, b_high, b_low = (a >> 1) & 1, a & 1, (b >> 1) & 1, b & 1
    return (
        a_weight * b_weight * (a_high & b_high)
        + a_weight * (a_high & b_low)
        + b_weight * (a_low & b_high)
        + (a_low & b_low)
    )
