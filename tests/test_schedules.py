"""The rule that spreads a pruning ratio over layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparseloom.schedules import kept_counts, ratio_schedule


def test_twelve_layers_by_hand() -> None:
    # Two of twelve are left alone; r_avg = 0.5 · 12/10 = 0.6, from 0.3 to 0.9 in nine steps.
    kept = ratio_schedule(12, 0.5)
    assert kept.tolist() == pytest.approx([1, 1, *(0.7 - 0.6 * j / 9 for j in range(10))])


def test_front_layers_of_24_are_rounded_up() -> None:
    assert (ratio_schedule(24, 0.5) == 1).sum() == 4
    assert (ratio_schedule(24, 0.9, front=0.3) == 1).sum() == 8
    # 0.25 · 12 is 3 and not 4, whatever the last bit says.
    assert (ratio_schedule(12, 0.9, front=0.25) == 1).sum() == 3


@settings(deadline=None)
@given(st.integers(1, 48), st.floats(0.25, 1.0), st.floats(0.0, 0.2))
def test_mean_and_order(layers: int, keep: float, front: float) -> None:
    pruned = layers - math.ceil(front * layers - 1e-9)
    assume(pruned and (1 - keep) * layers / pruned <= 0.95)
    kept = ratio_schedule(layers, keep, front)
    assert kept.mean() == pytest.approx(keep)
    assert (np.diff(kept) <= 1e-12).all()
    assert kept.min() >= 0.05 - 1e-9
    assert (kept[: layers - pruned] == 1).all()


def test_a_start_of_zero_ends_at_twice_the_mean() -> None:
    kept = ratio_schedule(10, 0.8, front=0, start_ratio=0.0)
    assert (kept[0], kept[-1]) == pytest.approx((1.0, 0.6))


def test_r_end_stays_below_its_limit_without_moving_the_mean() -> None:
    kept = ratio_schedule(12, 0.35)
    assert kept[-1] == pytest.approx(0.05)
    assert kept.mean() == pytest.approx(0.35)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5), "layers must be at least 1, got 0"),
        ((12, 0.0), r"keep must be in \(0, 1\], got 0.0"),
        ((12, 0.5, 1.0), r"front must be in \[0, 1\), got 1.0"),
        ((12, 0.1), "keep must be at least 0.208 with 10 layers, got 0.1"),
        ((1, 0.5), "keep must be 1 where no layer prunes, got 0.5"),
    ],
)
def test_arguments_out_of_range(arguments: tuple[int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratio_schedule(*arguments)


def test_a_start_beyond_the_mean_would_rise() -> None:
    with pytest.raises(ValueError, match="start_ratio must be in"):
        ratio_schedule(12, 0.5, start_ratio=0.7)


def test_counts_are_floored_and_never_zero() -> None:
    assert kept_counts(np.array([1.0, 0.9, 0.7, 0.2, 0.1]), 1024).tolist() == [
        1024,
        921,
        716,
        204,
        102,
    ]
    assert kept_counts(np.array([0.9, 0.05]), 10).tolist() == [9, 1]
