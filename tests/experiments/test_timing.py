"""Interleaved timing: order, warm-up, medians."""

from __future__ import annotations

import time

import pytest

from sparseloom.experiments.timing import interleave


def test_contenders_take_turns_and_warm_up_is_not_measured() -> None:
    order: list[str] = []
    found = interleave(
        {name: lambda name=name: order.append(name) for name in "ab"}, repeats=3, warmup=2
    )
    assert order == ["a", "b"] * 5
    assert {name: timing.repeats for name, timing in found.items()} == {"a": 3, "b": 3}


def test_the_median_ignores_one_slow_round() -> None:
    pauses = iter([0.0, 0.0, 0.0, 0.2, 0.0])
    found = interleave({"x": lambda: time.sleep(next(pauses))}, repeats=5, warmup=0)
    assert found["x"].ms < 100


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be 1 or more, got 0"):
        interleave({}, repeats=0)
