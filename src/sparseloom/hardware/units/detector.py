"""DOTA's detector: scores become kept keys by comparing integers with a threshold.

Low-precision scores stream out of the matrix unit and are compared as integers with a preset
threshold (DOTA, ASPLOS 2022; Liu et al., IEEE TC 2022, §6). A threshold alone leaves rows of
different lengths, on which the token-parallel array idles; so survivors are counted and, once a
row has its `keep` keys, dropped, and a row that has too few is topped up with keys above a second,
lower threshold. Both go by position: a stream cannot know what is still to come. Caps, the second
threshold and all rates are unpublished (defaults).

The rate must match the array, which gives 512 INT4 scores a cycle at 16 values a head; a detector
as wide as the array's columns for each query takes 64 with T = 4 (`rate: columns`) and would hold
the whole machine back.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64
from pydantic import Field

from sparseloom.hardware.config import MachineError, Section


class DetectorConfig(Section):
    """Comparators of one Lane."""

    parallel_queries: int = Field(default=4, ge=1)
    rate: Literal["array", "columns"] = "array"
    """Scores per cycle: as many as the array gives, or one per column and parallel query."""
    array_scores_per_cycle: int = Field(default=512, ge=1)
    columns: int = Field(default=16, ge=1)
    latency_cycles: int = Field(default=2, ge=0)
    """From a score to its place in the scheduler's buffers."""

    @property
    def scores_per_cycle(self) -> int:
        """Scores that are compared in one cycle."""
        if self.rate == "columns":
            return self.columns * self.parallel_queries
        return self.array_scores_per_cycle

    def cycles(self, scores: int) -> int:
        """From the first score in to the last one classified; 0 without scores."""
        busy = -(-scores // self.scores_per_cycle)
        return busy + self.latency_cycles if busy else 0

    def mask_bits(self, keys: int, *, topped_up: bool = True) -> int:
        """Storage for the outcome of one group: a bitmap, and one more for the second threshold."""
        return self.parallel_queries * keys * (2 if topped_up else 1)


class Detected(NamedTuple):
    """What is kept, row by row.

    offsets, keys: query i keeps `keys[offsets[i] : offsets[i + 1]]`, ascending.
    dropped: survivors of the first threshold beyond the cap.
    added: keys that only the second threshold let in.
    """

    offsets: Int64[np.ndarray, "rows_and_one"]
    keys: Int32[np.ndarray, "nnz"]
    dropped: Int64[np.ndarray, "rows"]
    added: Int64[np.ndarray, "rows"]


def integer_threshold(
    theta: float, scale: Float[np.ndarray, "*rows"]
) -> Int64[np.ndarray, "*rows"]:
    """The least integer score that stands for `theta` or more.

    Args:
        theta: on dequantised scores.
        scale: what one step of a score stands for: the query's scale times that of the keys.

    Raises:
        MachineError: a scale that is not positive, or a threshold beyond 62 bits.
    """
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise MachineError("scale must be positive and finite")
    found = np.ceil(theta / scale)
    if not (np.abs(found) < 2.0**62).all():
        raise MachineError(f"theta must be within 62 bits of score steps, got {theta}")
    # Division rounds; the comparison of the product is what is meant.
    found = np.where((found - 1) * scale >= theta, found - 1, found)
    found = np.where(found * scale < theta, found + 1, found)
    return found.astype(np.int64)


def calibrated_thresholds(
    scores: Int64[np.ndarray, "rows keys"], retention: float, *, spare: float = 2.0
) -> tuple[int, int]:
    """Thresholds that a share `retention`, and `spare` times as many, of these scores reach.

    Ties at a threshold all pass. The first one is the (1 - retention) quantile over all rows
    (default: the paper presets thresholds without saying how).

    Raises:
        MachineError: retention outside (0, 1], spare below 1, or no scores.
    """
    if not 0 < retention <= 1:
        raise MachineError(f"retention must be in (0, 1], got {retention}")
    if spare < 1:
        raise MachineError(f"spare must be at least 1, got {spare}")
    if scores.size == 0:
        raise MachineError("scores must not be empty")
    falling = np.sort(scores.reshape(-1))[::-1]
    counts = [int(np.ceil(share * scores.size)) for share in (retention, min(1, spare * retention))]
    first, second = (int(falling[count - 1]) for count in counts)
    return first, second


def detect(
    scores: Int64[np.ndarray, "rows keys"],
    threshold: int | Int64[np.ndarray, "rows"],
    *,
    second: int | Int64[np.ndarray, "rows"] | None = None,
    keep: int | Int64[np.ndarray, "rows"] | None = None,
    allowed: Bool[np.ndarray, "rows keys"] | None = None,
) -> Detected:
    """Classify the scores of some queries.

    Args:
        scores: integers.
        threshold: what reaches it survives; one, or one per row.
        second: with `keep`, rows with fewer survivors also take keys that reach this one, the
            first ones first. A row may stay short.
        keep: rows keep the first so many survivors; None keeps all.
        allowed: False where causality or padding forbids the pair.

    Raises:
        MachineError: a second threshold above the first or without `keep`, or `keep` below 0.
    """
    rows = scores.shape[0]
    first = _column(threshold, rows)
    passed = scores >= first
    may = np.full(scores.shape, True) if allowed is None else allowed
    passed &= may
    survivors = passed.sum(axis=1)
    added = np.zeros(rows, np.int64)
    if second is not None and keep is None:
        raise MachineError("second needs keep: how many keys a row is topped up to")
    kept = passed
    if keep is not None:
        most = _column(keep, rows)
        if most.size and int(most.min()) < 0:
            raise MachineError(f"keep must be at least 0, got {int(most.min())}")
        kept = passed & (np.cumsum(passed, axis=1) <= most)
        if second is not None:
            lower = _column(second, rows)
            if (lower > first).any():
                raise MachineError("second must not be above threshold")
            spare = (scores >= lower) & may & ~passed
            extra = spare & (np.cumsum(spare, axis=1) <= most - survivors[:, None])
            added = extra.sum(axis=1)
            kept = kept | extra
    counts = kept.sum(axis=1)
    return Detected(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        keys=np.nonzero(kept)[1].astype(np.int32),
        dropped=survivors - (counts - added),
        added=added,
    )


def _column(value: int | Int64[np.ndarray, "rows"], rows: int) -> Int64[np.ndarray, "rows 1"]:
    return np.broadcast_to(np.asarray(value, np.int64), rows)[:, None]
