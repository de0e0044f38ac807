"""ELSA's search and attention in its own number formats (Ham et al., ISCA 2021, §III and §IV).

Queries, keys and values are fixed point, exponentials floating point with few bits from a table of
32 entries, and no maximum is subtracted first.  Unpublished, so choices of ours: the place of the
point in a norm, the width of a cosine, table entries in the middle of their interval, sums without
rounding, and a scale 1/√head_dim that is part of the exponential's factor.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from sparseloom.hardware.a3_algorithm import FixedPoint, quantise
from sparseloom.hardware.elsa.config import Numbers
from sparseloom.hashing import Hasher, cosine_table, hamming, pack


class Similarity(NamedTuple):
    """What the candidate selectors compare, in units of norm and cosine.

    values (q_len, kv_len): norm of the key times the cosine of the estimated angle.
    largest (q_len): the longest key that each query may see, times 1.0.
    """

    values: Int64[np.ndarray, "q_len kv_len"]
    largest: Int64[np.ndarray, "q_len"]

    @property
    def normalised(self) -> Float64[np.ndarray, "q_len kv_len"]:
        """The similarity over the longest key's norm: what is compared with t."""
        return self.values / np.maximum(self.largest, 1)[:, None]


def operands(numbers: Numbers) -> FixedPoint:
    """The format of queries, keys, values and outputs."""
    return FixedPoint(numbers.integer_bits, numbers.fraction_bits)


def quantised(hasher: Hasher, numbers: Numbers) -> Hasher:
    """The hash with directions of a sign and a few fraction bits, as integers."""
    number = FixedPoint(1, numbers.hash_fraction_bits)
    factors = tuple(quantise(factor, number).astype(np.float64) for factor in hasher.factors)
    return Hasher(hasher.dim, hasher.bits, factors, hasher.form)


def similarity(
    query: Float[np.ndarray, "q_len head_dim"],
    key: Float[np.ndarray, "kv_len head_dim"],
    visible: Bool[np.ndarray, "q_len kv_len"],
    *,
    hasher: Hasher,
    bias: float,
    numbers: Numbers,
) -> Similarity:
    """Hashes, norms and the table of cosines, in the machine's formats.

    Products of fixed-point numbers are exact here, as they are in 64-bit floating point.
    """
    directions = quantised(hasher, numbers)
    q, k = (quantise(part, operands(numbers)).astype(np.float64) for part in (query, key))
    distance = hamming(pack(directions.signs(q)), pack(directions.signs(k)))
    table = cosine_table(hasher.bits, bias)
    one = 1 << numbers.cosine_fraction_bits
    cosines = np.rint(table * one).astype(np.int64)
    lengths = np.sqrt((k * k).sum(axis=1)) / (1 << numbers.fraction_bits)
    norms = np.rint(lengths * (1 << numbers.norm_fraction_bits)).astype(np.int64)
    norms = np.minimum(norms, (1 << numbers.norm_bits) - 1)
    largest = np.where(visible, norms, 0).max(axis=1, initial=0)
    return Similarity(norms * cosines[distance], largest * one)


def level_of(found: Similarity, visible: Bool[np.ndarray, "q_len kv_len"], share: float) -> float:
    """The threshold t that lets `share` of the visible pairs of a head through, ties included."""
    seen = found.normalised[visible]
    if not seen.size or share >= 1.0:
        return -np.inf
    keep = max(1, int(np.ceil(share * seen.size - 1e-6)))
    kth = float(np.partition(seen, seen.size - keep)[seen.size - keep])
    return float(np.nextafter(kth, -np.inf))


def candidates(
    found: Similarity, visible: Bool[np.ndarray, "q_len kv_len"], level: float
) -> Bool[np.ndarray, "q_len kv_len"]:
    """The keys whose similarity exceeds t times the longest key's norm."""
    return visible & (found.normalised > level)


def exponentials(
    scores: Int64[np.ndarray, "*rows"], numbers: Numbers, *, scale: float
) -> Float64[np.ndarray, "*rows"]:
    """e^(scale · score) as the machine's floating point has it.

    `scores` have 2 · fraction_bits behind the point.  The power of two is split off; the rest
    looks up a mantissa.  What is too small becomes 0, what is too large the largest number.
    """
    entries = 1 << numbers.table_bits
    middle = (np.arange(entries) + 0.5) / entries
    mantissas = np.rint(2.0**middle * (1 << numbers.mantissa_bits)) / (1 << numbers.mantissa_bits)
    power = scores * (scale * np.log2(np.e) / 4.0**numbers.fraction_bits)
    whole = np.floor(power)
    entry = np.floor((power - whole) * entries).astype(np.int64)
    largest = (1 << (numbers.exponent_bits - 1)) - 1
    found = np.ldexp(mantissas[entry], np.clip(whole, -largest - 1, largest).astype(np.int64))
    return np.where(whole < -largest, 0.0, found)


def reciprocals(
    totals: Float64[np.ndarray, "*rows"], numbers: Numbers
) -> Float64[np.ndarray, "*rows"]:
    """1 / total from a table over the leading bits of the mantissa; 0 of 0."""
    entries = 1 << numbers.table_bits
    middle = 1.0 + (np.arange(entries) + 0.5) / entries
    table = np.rint(2.0 / middle * (1 << numbers.mantissa_bits)) / (1 << numbers.mantissa_bits)
    half, power = np.frexp(totals)  # half in [0.5, 1)
    entry = np.clip(np.floor((2.0 * half - 1.0) * entries), 0, entries - 1).astype(np.int64)
    # 1 / (m · 2^(power − 1)) = (2 / m) · 2^−power
    return np.where(totals > 0.0, np.ldexp(table[entry], -power), 0.0)


def attend(
    query: Float[np.ndarray, "q_len head_dim"],
    key: Float[np.ndarray, "kv_len head_dim"],
    value: Float[np.ndarray, "kv_len value_dim"],
    kept: Bool[np.ndarray, "q_len kv_len"],
    *,
    numbers: Numbers,
    scale: float,
) -> Float64[np.ndarray, "q_len value_dim"]:
    """The attention modules' and the division's output over the kept keys.

    A query that keeps nothing gives zeros.
    """
    q, k, v = (quantise(part, operands(numbers)) for part in (query, key, value))
    e = np.where(kept, exponentials(q @ k.T, numbers, scale=scale), 0.0)
    weighted = (e @ v.astype(np.float64)) / (1 << numbers.fraction_bits)
    out = weighted * reciprocals(e.sum(axis=1), numbers)[:, None]
    return quantise(out, operands(numbers)) / float(1 << numbers.fraction_bits)
