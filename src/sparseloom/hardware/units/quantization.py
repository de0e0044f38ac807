"""Symmetric linear quantisation and bit planes in numpy: the codes of `sparseloom.quantize`.

Scales are static, one for each (layer, head) matrix, from its largest magnitude; the published
design leaves their granularity open (SpAtten, HPCA 2021, §III-D).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseloom.hardware.config import MachineError

MAX_BITS = 16
Integers = NDArray[np.int64]


class Codes(NamedTuple):
    """Signed integers that stand for `codes * scale`."""

    codes: Integers
    scale: float
    bits: int


def quantize(x: NDArray[Any], bits: int, *, scale: float | None = None) -> Codes:
    """Two's complement codes of one matrix, without -2**(bits-1): round(x / scale), halves to even.

    Args:
        x: finite values; fp64 stays fp64, everything else is computed in fp32.
        bits: 2 to 16.
        scale: a fixed one, beyond which values saturate. Default: the largest magnitude gets the
            largest code; 1 if all values are zero.

    Raises:
        MachineError: bits out of range, values that are not finite, a scale that is not positive.
    """
    if not 2 <= bits <= MAX_BITS:
        raise MachineError(f"bits must be in [2, {MAX_BITS}], got {bits}")
    if not np.isfinite(x).all():
        raise MachineError("x must be finite")
    wide = x if x.dtype == np.float64 else x.astype(np.float32)
    high = 2 ** (bits - 1) - 1
    if scale is None:
        step = np.abs(wide).max(initial=0.0) / wide.dtype.type(high)
        scale = float(step) if step > 0 else 1.0
    elif not (scale > 0 and np.isfinite(scale)):
        raise MachineError(f"scale must be positive and finite, got {scale}")
    codes = np.clip(np.rint(wide / wide.dtype.type(scale)), -high, high)
    return Codes(codes.astype(np.int64), scale, bits)


def split_planes(codes: Integers, lsb_bits: int) -> tuple[Integers, Integers]:
    """High plane (signed) and low plane (unsigned): `codes == (high << lsb_bits) | low`."""
    _check(lsb_bits)
    return codes >> lsb_bits, codes & ((1 << lsb_bits) - 1)


def join_planes(high: Integers, low: Integers, lsb_bits: int) -> Integers:
    """The codes that `split_planes` split."""
    _check(lsb_bits)
    return (high << lsb_bits) | low


def high_plane_only(codes: Integers, lsb_bits: int, *, midpoint: bool = False) -> Integers:
    """What codes are worth before their low plane is fetched: rounded down, the low bits zero.

    `midpoint` puts half of a high step there instead, which has no bias.
    """
    high, low = split_planes(codes, lsb_bits)
    return join_planes(high, np.full_like(low, (1 << lsb_bits) >> 1 if midpoint else 0), lsb_bits)


def _check(lsb_bits: int) -> None:
    if not 1 <= lsb_bits < MAX_BITS:
        raise MachineError(f"lsb_bits must be in [1, {MAX_BITS - 1}], got {lsb_bits}")
