"""What the vector PE computes, block by block: latches, compacted probabilities, integer softmax.

The order is that of the cycle model: for a query tile, tiles of 32 rows of K (whole ones, then
packed pieces), 32 dimensions at a time into the latches; then the softmax of the row, merged run by
run (`sparseloom.softermax`); then the same tiles of V. Runs of different regions stay apart here,
as their tags of the maximum do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.static_dense.config import StaticDenseConfig
from sparseloom.region_model import RunWork, low_codes, operand_codes, run_work
from sparseloom.regions import TILE_KEYS, TILE_QUERIES, Region
from sparseloom.softermax import SoftermaxFormat, add_run, empty_rows, normalize, score_codes

_LOG2E = float(np.log2(np.e))


class Computed(NamedTuple):
    """output: sums of 8-bit products; multiplies: of the array; tiles: of work; largest_sum: that
    a latch held, without its sign."""

    output: Int64[np.ndarray, "q_len value_dim"]
    multiplies: int
    tiles: int
    largest_sum: int


class _Array:
    """The array: products of blocks into latches of so many bits."""

    def __init__(self, config: StaticDenseConfig) -> None:
        self.vector = config.vector
        self.multiplies = self.tiles = self.largest = 0

    def multiply(
        self, rows: Int64[np.ndarray, "queries inner"], weights: Int64[np.ndarray, "inner columns"]
    ) -> Int64[np.ndarray, "queries columns"]:
        """A tile's product, `vector_width` of the inner dimension at a time.

        Raises:
            MachineError: a sum that a latch does not hold.
        """
        found = np.zeros((rows.shape[0], weights.shape[1]), np.int64)
        step = self.vector.vector_width
        for first in range(0, rows.shape[1], step):
            found += rows[:, first : first + step] @ weights[first : first + step]
            self.hold(found)
        self.multiplies += TILE_QUERIES * rows.shape[1] * weights.shape[1]
        return found

    def hold(self, sums: Int64[np.ndarray, "_ _"]) -> None:
        """Refuse what the latches cannot hold."""
        self.largest = max(self.largest, int(np.abs(sums).max(initial=0)))
        if self.largest >= 1 << self.vector.latch_bits - 1:
            raise MachineError(
                f"sums must fit into latches of {self.vector.latch_bits} bits, got {self.largest}"
            )


def compute(
    config: StaticDenseConfig,
    query: Int64[np.ndarray, "q_len head_dim"],
    key: Int64[np.ndarray, "kv_len head_dim"],
    value: Int64[np.ndarray, "kv_len value_dim"],
    regions: Sequence[Region],
    factor: float,
    *,
    n_valid: int | None = None,
    form: SoftermaxFormat | None = None,
    softmax: bool = True,
) -> Computed:
    """One head on the vector PE.

    Args:
        config: the machine file; its latches and its power sum.
        query, key, value: codes of 8 bits.
        regions: of the head, in order of priority.
        factor: what one step of a score is worth in units of the exponent e.
        n_valid: keys before the padding; all by default.
        form: widths of the softmax; by default with the machine's power sum.
        softmax: False multiplies the scores with the values as they are; they must fit into 8 bits.

    Returns:
        Its output is worth the scale of the values / 2^output_fraction per step; without softmax,
        the product of the three scales.

    Raises:
        MachineError: more keys than the buffers hold at a time, or a number beyond its format.
    """
    most = config.chunk_tiles(query.shape[1], value.shape[1]) * TILE_KEYS
    if len(key) > most:
        raise MachineError(
            f"kv_len must be at most {most}, what the buffers hold at a time, got {len(key)}"
        )
    if form is None:
        form = SoftermaxFormat(sum_integer=config.softmax.power_sum_integer_bits)
    array, valid = _Array(config), len(key) if n_valid is None else n_valid
    output = np.zeros((len(query), value.shape[1]), np.int64)
    for works in run_work(regions, len(query), len(key), n_valid):
        if not works:
            continue
        # Whole tiles first, then the pieces that share tiles.
        works = sorted(works, key=_is_packed)
        shift = [work.region.low_precision_shift for work in works]
        keys, values = (
            [
                low_codes(operand_codes(x, work, valid), low)
                for work, low in zip(works, shift, strict=True)
            ]
            for x in (key, value)
        )
        rows = [low_codes(query[works[0].queries], low) for low in shift]
        slots = _slots(works)
        scores = _scores(array, rows, keys, slots)
        if softmax:
            weights = _probabilities(form, works, scores, factor)
        else:
            weights = [np.where(w.allowed, s, 0) for w, s in zip(works, scores, strict=True)]
            largest = max(int(np.abs(one).max(initial=0)) for one in weights)
            if largest > 127:
                raise MachineError(f"scores must fit into 8 bits without softmax, got {largest}")
        output[works[0].queries] = _outputs(array, weights, values, slots)
    return Computed(output, array.multiplies, array.tiles, array.largest)


def _is_packed(work: RunWork) -> bool:
    return work.region.segment > 1 or bool(work.region.pattern)


def _slots(works: Sequence[RunWork]) -> list[tuple[int, int]]:
    """Where each run lies among the rows of work: whole runs begin a tile, pieces are packed."""
    found, at = list[tuple[int, int]](), 0
    for work in works:
        if not _is_packed(work):
            at = -(-at // TILE_KEYS) * TILE_KEYS
        found.append((at, at + work.keys.size))
        at = found[-1][1]
        if not _is_packed(work):
            at = -(-at // TILE_KEYS) * TILE_KEYS
    return found


def _laid_out(
    parts: Sequence[Int64[np.ndarray, "_ dim"]], slots: Sequence[tuple[int, int]]
) -> Int64[np.ndarray, "rows dim"]:
    """Runs in their slots, zeros between them, to whole tiles."""
    rows = -(-slots[-1][1] // TILE_KEYS) * TILE_KEYS
    found = np.zeros((rows, parts[0].shape[1]), np.int64)
    for part, (first, last) in zip(parts, slots, strict=True):
        found[first:last] = part
    return found


def _scores(
    array: _Array,
    rows: Sequence[Int64[np.ndarray, "queries dim"]],
    keys: Sequence[Int64[np.ndarray, "_ dim"]],
    slots: Sequence[tuple[int, int]],
) -> list[Int64[np.ndarray, "queries _"]]:
    """Scores of every run, tile by tile."""
    laid = _laid_out(keys, slots)
    # Queries in fewer bits are those of the run that a tile belongs to.
    owner = np.zeros(len(laid), np.int64)
    for i, (first, last) in enumerate(slots):
        owner[first:last] = i
    found = np.zeros((rows[0].shape[0], len(laid)), np.int64)
    for first in range(0, len(laid), TILE_KEYS):
        span = slice(first, first + TILE_KEYS)
        found[:, span] = array.multiply(rows[owner[first]], laid[span].T)
        array.tiles += 1
    return [found[:, first:last] for first, last in slots]


def _probabilities(
    form: SoftermaxFormat,
    works: Sequence[RunWork],
    scores: Sequence[Int64[np.ndarray, "queries _"]],
    factor: float,
) -> list[Int64[np.ndarray, "queries _"]]:
    """Codes of every run's probabilities: maxima and sums merged, then shifted and divided."""
    state, kept = empty_rows(form, scores[0].shape[0]), []
    for work, sums in zip(works, scores, strict=True):
        codes = score_codes(form, sums * (factor * _LOG2E) + np.log2(work.counts))
        state, powers = add_run(form, state, codes, work.allowed)
        kept.append(powers)
    return [normalize(form, state, powers) for powers in kept]


def _outputs(
    array: _Array,
    weights: Sequence[Int64[np.ndarray, "queries _"]],
    values: Sequence[Int64[np.ndarray, "_ dim"]],
    slots: Sequence[tuple[int, int]],
) -> Int64[np.ndarray, "queries _"]:
    """Probabilities, as compact as they lie, times the values of the same rows."""
    laid = _laid_out(values, slots)
    compact = _laid_out([one.T for one in weights], slots).T
    found = np.zeros((compact.shape[0], laid.shape[1]), np.int64)
    for first in range(0, len(laid), TILE_KEYS):
        span = slice(first, first + TILE_KEYS)
        found += array.multiply(compact[:, span], laid[span])
        array.hold(found)
    return found


def quantised(x: Float[np.ndarray, "tokens dim"]) -> tuple[Int64[np.ndarray, "tokens dim"], float]:
    """Codes of 8 bits with one scale for the head, which clips nothing."""
    scale = float(np.abs(x).max(initial=0)) / 127 or 1.0
    return np.rint(x / scale).astype(np.int64), scale
