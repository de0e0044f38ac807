"""The detector: integer thresholds, rows cut and topped up in the order of the stream, its rate."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseloom.hardware.config import MachineError, checked
from sparseloom.hardware.units.detector import (
    Detected,
    DetectorConfig,
    calibrated_thresholds,
    detect,
    integer_threshold,
)
from sparseloom.hardware.units.token_scheduler import schedule


def rows(found: Detected) -> list[list[int]]:
    """Kept keys of each query."""
    ends = found.offsets.tolist()
    return [found.keys[a:b].tolist() for a, b in pairwise(ends)]


@given(
    st.floats(-50, 50),
    st.one_of(st.floats(1e-3, 10), st.sampled_from([0.1, 0.2, 0.3, 0.7, 1.1])),
    st.one_of(st.none(), st.integers(-300, 300)),
)
def test_integers_decide_as_reals_do(theta: float, scale: float, exactly: int | None) -> None:
    """Also where theta is a score to the last bit."""
    if exactly is not None:
        theta = exactly * scale
    least = int(integer_threshold(theta, np.array(scale)))
    assert least * scale >= theta
    assert (least - 1) * scale < theta


def test_a_threshold_for_each_query() -> None:
    scale = np.array([0.5, 0.25, 3.0])
    assert integer_threshold(1.0, scale).tolist() == [2, 4, 1]
    with pytest.raises(MachineError, match="scale must be positive and finite"):
        integer_threshold(1.0, np.array([0.0]))
    with pytest.raises(MachineError, match="theta must be within 62 bits of score steps, got 1e"):
        integer_threshold(1e300, np.array([1.0]))


SCORES = np.array(
    [
        [5, 9, 1, 7, 3, 8],
        [0, 2, 1, 0, 4, 0],
        [6, 6, 6, 6, 6, 6],
        [0, 0, 0, 0, 0, 0],
    ]
)


def test_threshold_alone() -> None:
    found = detect(SCORES, 5)
    assert rows(found) == [[0, 1, 3, 5], [], [0, 1, 2, 3, 4, 5], []]
    assert found.dropped.tolist() == found.added.tolist() == [0, 0, 0, 0]
    assert rows(detect(SCORES, np.array([8, 2, 7, 0]))) == [[1, 5], [1, 4], [], [0, 1, 2, 3, 4, 5]]


def test_cap_and_top_up_go_by_position() -> None:
    """Three keys a row: the first three that reach 5, then the first ones that reach 1."""
    found = detect(SCORES, 5, second=1, keep=3)
    assert rows(found) == [[0, 1, 3], [1, 2, 4], [0, 1, 2], []]
    assert found.dropped.tolist() == [1, 0, 3, 0]
    assert found.added.tolist() == [0, 3, 0, 0]
    mixed = detect(SCORES, 8, second=3, keep=3)
    assert rows(mixed)[0] == [0, 1, 5], "the eight at the end stays, of the others the first"
    assert mixed.added.tolist() == [1, 1, 3, 0]
    assert rows(detect(SCORES, 5, keep=np.array([1, 3, 0, 2]))) == [[0], [], [], []]


def test_forbidden_pairs_are_neither_kept_nor_counted() -> None:
    allowed = np.tri(4, 6, 2, dtype=bool)
    found = detect(SCORES, 5, second=0, keep=3, allowed=allowed)
    assert rows(found) == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert found.dropped.tolist() == [0, 0, 2, 0]


@given(st.integers(0, 2**32), st.integers(0, 12), st.integers(-4, 8), st.integers(0, 6))
def test_against_a_stream(seed: int, keep: int, threshold: int, gap: int) -> None:
    random = np.random.default_rng(seed)
    scores, allowed = random.integers(-8, 8, (3, 12)), random.random((3, 12)) < 0.8
    found = detect(scores, threshold, second=threshold - gap, keep=keep, allowed=allowed)
    for i, row in enumerate(rows(found)):
        seen = [j for j in range(12) if allowed[i, j]]
        first = [j for j in seen if scores[i, j] >= threshold]
        later = [j for j in seen if threshold - gap <= scores[i, j] < threshold]
        taken = first[:keep]
        extra = later[: keep - len(taken)]
        assert row == sorted(taken + extra)
        assert found.dropped[i] == len(first) - len(taken)
        assert found.added[i] == len(extra)


def test_topped_up_rows_fill_the_array() -> None:
    """Equal rows take as many steps as each of them is long; those of a threshold take more."""
    random = np.random.default_rng(0)
    scores = random.integers(-2000, 2000, (64, 512)) + random.integers(-300, 300, (64, 1))
    first, second = calibrated_thresholds(scores, 0.1, spare=3)
    alone = detect(scores, first)
    share = alone.keys.size / scores.size
    assert 0.1 <= share < 0.101
    equal = detect(scores, first, second=second, keep=40)
    assert (np.diff(equal.offsets) == 40).all()
    assert schedule(equal.offsets, equal.keys).utilisation == 1
    assert schedule(alone.offsets, alone.keys).utilisation < 0.9


def test_calibrated_thresholds() -> None:
    scores = np.arange(100).reshape(4, 25)
    assert calibrated_thresholds(scores, 0.05) == (95, 90)
    assert calibrated_thresholds(scores, 1.0) == (0, 0)
    assert calibrated_thresholds(np.zeros((2, 3), int), 0.5) == (0, 0)
    with pytest.raises(MachineError, match=r"retention must be in \(0, 1\], got 0"):
        calibrated_thresholds(scores, 0)
    with pytest.raises(MachineError, match=r"spare must be at least 1, got 0\.5"):
        calibrated_thresholds(scores, 0.1, spare=0.5)
    with pytest.raises(MachineError, match="scores must not be empty"):
        calibrated_thresholds(scores[:0], 0.1)


def test_rates() -> None:
    """512 scores a cycle keep up with the array; 16 for each of four queries take eight times."""
    default, slow = DetectorConfig(), DetectorConfig(rate="columns")
    assert (default.scores_per_cycle, slow.scores_per_cycle) == (512, 64)
    assert DetectorConfig(rate="columns", parallel_queries=8).scores_per_cycle == 128
    assert default.cycles(4 * 2000) == 16 + 2
    assert slow.cycles(4 * 2000) == 125 + 2
    assert default.cycles(1) == 3
    assert default.cycles(0) == 0
    assert default.mask_bits(2000) == 2 * 4 * 2000
    assert default.mask_bits(2000, topped_up=False) == 4 * 2000


def test_what_is_refused() -> None:
    with pytest.raises(MachineError, match="second needs keep"):
        detect(SCORES, 5, second=1)
    with pytest.raises(MachineError, match="second must not be above threshold"):
        detect(SCORES, 5, second=6, keep=1)
    with pytest.raises(MachineError, match="keep must be at least 0, got -1"):
        detect(SCORES, 5, keep=-1)
    with pytest.raises(MachineError, match="rate"):
        checked(DetectorConfig, {"rate": "fast"}, "here")
