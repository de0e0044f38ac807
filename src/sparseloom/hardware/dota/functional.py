"""What a Lane computes for one head, in the order in which its scheduler issues keys.

Queries, keys and values are FX16 codes, one scale each; scores are exact integer sums. They are
dequantised to FP32 for scaling and softmax, and the probabilities requantised to FX16 before the
product with the values. O = (Q·Kᵀ)·V: only the intermediate is touched out of order, so outputs
appear row by row without a crossbar (Liu et al., IEEE TC 2022, §6).

Unpublished, so choices of ours: one scale for each matrix, exponentials summed in fixed point (30
fractional bits, so that no order of arrival changes the sum), probabilities as multiples of
1 / (2**15 - 1), outputs rounded once to the codes of values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.dota.config import DotaConfig
from sparseloom.hardware.units.composed_multiplier import fitting
from sparseloom.hardware.units.multipliers import fitting_shift, rounded
from sparseloom.hardware.units.quantization import quantize
from sparseloom.hardware.units.token_scheduler import Issued, schedule
from sparseloom.trace import MaskArrays

_FRACTION = 30  # bits behind the point where exponentials are summed


class Head(NamedTuple):
    """One head's results.

    output: in the units of the values; zeros where a query keeps nothing.
    multiplications: of the array, both products.
    key_loads: vectors read for the first of them.
    """

    output: Float64[np.ndarray, "q_len value_dim"]
    multiplications: int
    key_loads: int


def attend(
    config: DotaConfig,
    query: Float[np.ndarray, "q_len head_dim"],
    key: Float[np.ndarray, "kv_len head_dim"],
    value: Float[np.ndarray, "kv_len value_dim"],
    mask: MaskArrays,
    *,
    sequence: int = 0,
    head: int = 0,
    scale: float | None = None,
    softmax: bool = True,
) -> Head:
    """Attention of one head on the pairs that a mask keeps.

    Args:
        config: the machine; its scheduler decides the order.
        query, key, value: finite.
        mask: kept pairs; its causality is applied.
        sequence, head: which of the mask.
        scale: of the scores; default 1/√head_dim.
        softmax: False gives the two products alone, O = (Q·Kᵀ)·V, the scores rounded to FX16.

    Raises:
        MachineError: sizes that do not fit the mask, values that are not finite, sums beyond the
            accumulators.
    """
    if (len(query), len(key), len(value)) != (mask.q_len, mask.kv_len, mask.kv_len):
        raise MachineError(
            f"query, key and value must have {mask.q_len}, {mask.kv_len} and {mask.kv_len} rows, "
            f"got {len(query)}, {len(key)} and {len(value)}"
        )
    bits = config.rmmu.base_bits
    codes = [quantize(np.asarray(x, np.float64), bits) for x in (query, key, value)]
    q, k, v = codes
    parallel = min(config.detector.parallel_queries, mask.q_len)
    offsets, keys = mask.query_keys(sequence, head)
    order = schedule(
        offsets,
        keys,
        parallel_queries=parallel,
        dataflow=config.scheduler.dataflow,
        split=config.scheduler.split,
        record=True,
    ).issued
    assert order is not None
    rows, at = _pairs(order, parallel)
    wide = config.rmmu.accumulator_bits
    scores = fitting(np.einsum("pd,pd->p", q.codes[rows], k.codes[at]), wide, "a score")
    if softmax:
        step = np.float32(q.scale * k.scale * (query.shape[1] ** -0.5 if scale is None else scale))
        weights = _softmax(scores.astype(np.float32) * step, rows, mask.q_len, bits)
        unit, divisor = v.scale, 2 ** (bits - 1) - 1
    else:
        shift = fitting_shift(int(np.abs(scores).max(initial=0)), bits)
        weights = rounded(scores, shift, bits)
        unit = v.scale * q.scale * k.scale * 2.0**shift * (1.0 if scale is None else scale)
        divisor = 1
    sums = np.zeros((mask.q_len, value.shape[1]), np.int64)
    np.add.at(sums, rows, weights[:, None] * v.codes[at])
    sums = fitting(sums, wide, "an output")
    output = np.rint(sums / divisor) * unit
    return Head(output, rows.size * (query.shape[1] + value.shape[1]), order.key.size)


def _pairs(
    order: Issued, parallel: int
) -> tuple[Int64[np.ndarray, "pairs"], Int64[np.ndarray, "pairs"]]:
    """Row and key of every pair, in the order of issue."""
    served = (order.served[:, None] >> np.arange(parallel)) & 1 == 1
    load, query = np.nonzero(served)
    rows = order.group[load].astype(np.int64) * parallel + query
    return rows, order.key[load].astype(np.int64)


def _softmax(
    scores: Float[np.ndarray, "pairs"], rows: Int64[np.ndarray, "pairs"], q_len: int, bits: int
) -> Int64[np.ndarray, "pairs"]:
    """Codes of the probabilities; scores of a row may arrive in any order."""
    largest = np.full(q_len, -np.inf, np.float32)
    np.maximum.at(largest, rows, scores)
    powers = np.exp((scores - largest[rows]).astype(np.float64)).astype(np.float32)
    fixed = np.rint(powers.astype(np.float64) * 2.0**_FRACTION).astype(np.int64)
    sums = np.zeros(q_len, np.int64)
    np.add.at(sums, rows, fixed)
    whole = (sums / 2.0**_FRACTION).astype(np.float32)
    high = 2 ** (bits - 1) - 1
    return np.rint((powers / whole[rows]).astype(np.float64) * high).astype(np.int64)
