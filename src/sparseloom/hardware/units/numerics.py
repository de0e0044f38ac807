"""What the datapath of SpAtten computes for one head: integers in, integers out.

Queries, keys and values are symmetric linear codes, one scale a head (SpAtten, HPCA 2021, §III-D).
Keys may come in two planes: the high one first, and for a row whose largest probability stays
below the threshold also the low one, and that row is computed anew, once. Scores are exact sums,
rounded once to 12 bits with a shift that is fixed for the head; probabilities are unsigned 12-bit
fractions; local value pruning keeps the values of the largest ones, ties by position, without
renormalising (§III-C); outputs are exact sums rounded once to 12 bits.

Unpublished, so choices of ours: the scales (largest magnitude of the head), the shift of the
scores (the smallest that saturates none of the head's), and 12 bits for queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from sparseloom.hardware.config import MachineError, Section
from sparseloom.hardware.units.multipliers import fitting_shift, rounded
from sparseloom.hardware.units.quantization import Codes, Integers, high_plane_only, quantize
from sparseloom.hardware.units.softmax import SoftmaxConfig, softmax
from sparseloom.hardware.units.topk import filter_pass, make_rng, quick_select

ON_CHIP_BITS = 12


class Datapath(Section):
    """Widths and pruning of one head."""

    query_bits: int = Field(default=12, ge=2, le=16)
    key_bits: tuple[int, int] | int = (8, 4)
    """`(high, low)`: progressive, the low plane fetched on demand; one number: static."""
    value_bits: int = Field(default=8, ge=2, le=12)
    score_bits: int = Field(default=ON_CHIP_BITS, ge=2, le=16)
    threshold: float = Field(default=0.1, ge=0, le=1)
    """The low plane is fetched for rows whose largest probability is below this."""
    value_keep: float = Field(default=1.0, gt=0, le=1)
    """Local value pruning: floor(value_keep · keys) values, at least one, take part."""
    midpoint: bool = False
    """Fill the missing low plane with half of a high step instead of zeros."""
    softmax: SoftmaxConfig = SoftmaxConfig()

    @field_validator("key_bits", mode="before")
    @classmethod
    def _from_yaml(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _planes(self) -> Datapath:
        high, low = self.planes
        if high < 2 or low < 0 or high + low > 16:
            raise ValueError(
                f"key_bits must be within 16 bits, 2 of them high, got {self.key_bits}"
            )
        return self

    @property
    def planes(self) -> tuple[int, int]:
        """Bits of the high and of the low key plane; the low one has none if keys are static."""
        return self.key_bits if isinstance(self.key_bits, tuple) else (self.key_bits, 0)


class Row(NamedTuple):
    """One query's results.

    probabilities: (n) codes, of 2**probability_bits, after the refetch if there was one.
    refetched: whether the low key plane was fetched and the row computed anew.
    value_ids: (kept) positions of the values that take part, ascending.
    output: (head_dim) codes of 12 bits.
    """

    probabilities: Integers
    refetched: bool
    value_ids: Integers
    output: Integers


class Head(NamedTuple):
    """All queries of one head; arrays of rows where `Row` has one.

    output: (rows, head_dim) in the units of the values.
    importance: (n) column sums of the probabilities: what cascade token pruning accumulates.
    head_importance: the sum of the magnitudes of the outputs: what cascade head pruning does.
    """

    probabilities: NDArray[np.float64]
    refetched: NDArray[np.bool_]
    value_ids: list[Integers]
    output: NDArray[np.float64]
    importance: NDArray[np.float64]
    head_importance: float


def attention_row(
    path: Datapath, query: Integers, keys: Codes, values: Codes, query_scale: float, shift: int
) -> Row:
    """One query against n keys and values.

    Args:
        path: widths and pruning.
        query: (head_dim) codes.
        keys: (n, head_dim) codes with both planes, n at least 1.
        values: (n, head_dim) codes.
        query_scale: what one step of the query stands for.
        shift: rounding of the scores, from `score_shift`.
    """
    _, low = path.planes
    scale = query_scale * keys.scale * 2.0**shift / np.sqrt(query.shape[0])

    def row(codes: Integers) -> Integers:
        scores = rounded(_product(codes, query), shift, path.score_bits)
        return softmax(path.softmax, scores, float(scale))

    first = high_plane_only(keys.codes, low, midpoint=path.midpoint) if low else keys.codes
    probabilities = row(first)
    one = 2**path.softmax.probability_bits
    refetched = bool(low) and int(probabilities.max()) < path.threshold * one
    if refetched:
        probabilities = row(keys.codes)
    ids = _largest(probabilities, value_count(path, len(probabilities)))
    align = ON_CHIP_BITS - values.bits  # values lie in the high bits of what is on chip
    sums = _product((values.codes[ids] << align).T, probabilities[ids])
    output = rounded(sums, path.softmax.probability_bits, ON_CHIP_BITS)
    return Row(probabilities, refetched, ids, output)


def attention_head(
    path: Datapath,
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    is_causal: bool = False,
) -> Head:
    """What the accelerator computes for a head.

    Args:
        path: widths and pruning.
        q: (rows, head_dim) floats.
        k, v: (n, head_dim) floats of the tokens that are alive, in order.
        is_causal: row i sees the first n - rows + i + 1 keys (aligned bottom-right).

    Raises:
        MachineError: shapes that do not fit, or causality with more rows than keys.
    """
    rows, n = q.shape[0], k.shape[0]
    if k.shape[1] != q.shape[1] or v.shape[0] != n or min(rows, n) < 1:
        raise MachineError(
            f"q, k and v must be (rows, d), (n, d) and (n, d), got {q.shape}, {k.shape}, {v.shape}"
        )
    if is_causal and rows > n:
        raise MachineError(f"is_causal needs at least as many keys as rows, got {n} and {rows}")
    queries, keys = quantize(q, path.query_bits), quantize(k, sum(path.planes))
    values = quantize(v, path.value_bits)
    shift = score_shift(path, queries.codes, keys.codes)
    one = 2**path.softmax.probability_bits
    probabilities = np.zeros((rows, n))
    refetched, value_ids = np.zeros(rows, np.bool_), list[Integers]()
    output = np.zeros((rows, v.shape[1]))
    for i in range(rows):
        seen = n - rows + i + 1 if is_causal else n
        row = attention_row(
            path,
            queries.codes[i],
            keys._replace(codes=keys.codes[:seen]),
            values._replace(codes=values.codes[:seen]),
            queries.scale,
            shift,
        )
        probabilities[i, :seen] = row.probabilities / one
        refetched[i] = row.refetched
        value_ids.append(row.value_ids)
        output[i] = row.output * values.scale / 2 ** (ON_CHIP_BITS - path.value_bits)
    importance = probabilities.sum(0)
    return Head(
        probabilities, refetched, value_ids, output, importance, float(np.abs(output).sum())
    )


def score_shift(path: Datapath, queries: Integers, keys: Integers) -> int:
    """The shift of the head's scores: the smallest at which none of them saturates.

    The high plane alone is up to one high step away from the keys, so it counts too.
    """
    _, low = path.planes
    planes = [keys, high_plane_only(keys, low, midpoint=path.midpoint)] if low else [keys]
    peak = max(int(np.abs(_product(plane, queries.T)).max(initial=0)) for plane in planes)
    return fitting_shift(peak, path.score_bits)


def value_count(path: Datapath, keys: int) -> int:
    """How many values take part: floor(value_keep · keys), and at least one."""
    return max(1, int(path.value_keep * keys + 1e-9))


def _largest(probabilities: Integers, k: int) -> Integers:
    """Positions of the k largest, as the top-k engine finds them (whatever its pivots)."""
    n = len(probabilities)
    threshold, n_equal, _, _ = quick_select(probabilities, 0, n, k, 16, make_rng(0))
    ids = np.zeros(n, np.int64)
    return ids[: filter_pass(probabilities, 0, n, threshold, n_equal, ids)]


def _product(a: Integers, b: Integers) -> Integers:
    """a @ b, exactly: in fp64, which is faster, since the sums stay far below 2**53."""
    return np.rint(a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
