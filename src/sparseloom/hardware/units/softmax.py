"""The softmax pipeline (SpAtten, HPCA 2021, §IV-F and Fig. 12): fp32 between 12-bit ends.

Dequantise (the scale holds 1/√D), exp as a Taylor series of 5th order on FMAs, accumulate in
`lanes` sums while the row waits in a FIFO, divide, quantise to unsigned fractions. The figure
neither subtracts the row's maximum nor reduces the range; without them the series is useless
beyond small scores, so both are done here (`subtract_max: false` leaves the maximum in).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sparseloom.hardware.config import MachineError, Section

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, the first with so few bits that its products with small integers are exact
# (Cody and Waite).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_LARGEST = 88.0
"""exp of it still fits in fp32."""


class SoftmaxConfig(Section):
    """Width, latencies in cycles (the authors' behavioural model) and numerics."""

    lanes: int = Field(default=8, ge=1)
    dequantize_cycles: int = Field(default=7, ge=0)
    exp_cycles: int = Field(default=21, ge=0)
    accumulate_cycles: int = Field(default=23, ge=0)
    divide_cycles: int = Field(default=29, ge=0)
    quantize_cycles: int = Field(default=7, ge=0)
    subtract_max: bool = True
    waits_for_max: bool = False
    """Whether exp starts only when the row is complete; else the sums are rescaled on the way."""
    probability_bits: int = Field(default=12, ge=2, le=16)


def row_cycles(config: SoftmaxConfig, scores: int) -> int:
    """Cycles that a row occupies each stage: `lanes` scores in a cycle."""
    return -(-scores // config.lanes)


def row_latency(config: SoftmaxConfig, scores: int) -> int:
    """Cycles from a row's first score to its first probability: the stages and one wait for the
    row's sum, and with `waits_for_max` another one.
    """
    stages = (
        config.dequantize_cycles
        + config.exp_cycles
        + config.accumulate_cycles
        + config.divide_cycles
        + config.quantize_cycles
    )
    return stages + row_cycles(config, scores) * (2 if config.waits_for_max else 1)


def operations_per_score(config: SoftmaxConfig) -> dict[str, int]:
    """Floating-point operations of one score, an FMA being one multiplication and one addition.

    1 multiplication dequantises, 1 and 2 FMAs reduce the range, 5 FMAs are the series, 1 addition
    accumulates, 1 division, 1 multiplication quantises; the maximum is 1 comparison, 1 addition.
    The rescaling of running sums and the scaling by 2**i touch one number a row, or only exponents.
    """
    maximum = int(config.subtract_max)
    return {"multiply": 10, "add": 8 + maximum, "compare": maximum, "divide": 1}


def exp_taylor(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """exp in fp32: x = i ln 2 + r with |r| <= ln 2 / 2, then five FMAs for exp(r), then 2**i.

    What the series leaves out is below r**6 / 720 · e**|r|, relatively 3.5e-6.

    Raises:
        MachineError: an x above 88, whose exp fp32 does not hold.
    """
    x = x.astype(np.float32)
    if x.size and float(x.max()) > _LARGEST:
        raise MachineError(
            f"scores must be at most {_LARGEST:.0f} where no maximum is subtracted, "
            f"got {float(x.max()):.4g}"
        )
    # Below 2**-126 results would be subnormal: they are zero to any quantiser.
    x = np.maximum(x, np.float32(-87.0))
    i = np.rint(x * _LOG2_E)
    r = _fma(-i, _LN2_LOW, _fma(-i, _LN2_HIGH, x))
    found = np.full_like(r, 1 / 120)
    for coefficient in (1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        found = _fma(found, r, np.float32(coefficient))
    return np.asarray(np.ldexp(found, i.astype(np.int32)))


def probabilities(
    config: SoftmaxConfig, scores: NDArray[np.int64], scale: float
) -> NDArray[np.float32]:
    """Probabilities of rows of scores (..., n) before they are quantised.

    Args:
        scores: integers; `scores * scale` are the logits, 1/√D included.
        scale: what one step of the scores stands for.
    """
    logits = scores.astype(np.float32) * np.float32(scale)
    if config.subtract_max:
        logits = logits - logits.max(-1, keepdims=True, initial=-np.inf)
    exps = exp_taylor(logits)
    return exps / _lane_sums(exps, config.lanes)


def softmax(config: SoftmaxConfig, scores: NDArray[np.int64], scale: float) -> NDArray[np.int64]:
    """Probabilities of rows of scores (..., n) as fractions of 2**probability_bits.

    Arguments as in `probabilities`. The largest code stands for what rounds to 1.
    """
    one = 2**config.probability_bits
    found = np.rint(probabilities(config, scores, scale) * np.float32(one))
    return np.minimum(found, one - 1).astype(np.int64)


def _fma(a: Any, b: Any, c: Any) -> NDArray[np.float32]:
    """a * b + c, rounded to fp32 once but for ties of the fp64 sum (the product is exact there)."""
    return np.asarray(np.float64(a) * np.float64(b) + np.float64(c), np.float32)


def _lane_sums(exps: NDArray[np.float32], lanes: int) -> NDArray[np.float32]:
    """Sums of rows in the order of the hardware: each lane its own, then a tree across lanes."""
    *rows, n = exps.shape
    padded = np.zeros((*rows, -(-n // lanes), lanes), np.float32)
    padded.reshape(*rows, -1)[..., :n] = exps
    sums = np.zeros((*rows, lanes), np.float32)
    for group in range(padded.shape[-2]):
        sums = sums + padded[..., group, :]
    while sums.shape[-1] > 1:
        if sums.shape[-1] % 2:
            sums = np.concatenate([sums, np.zeros((*rows, 1), np.float32)], -1)
        sums = sums[..., ::2] + sums[..., 1::2]
    return sums
