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


def test_slow_contenders_sit_out() -> None:
    runs = {"slow": 0, "fast": 0}

    def slow() -> None:
        runs["slow"] += 1
        time.sleep(0.02)

    def fast() -> None:
        runs["fast"] += 1

    said: list[str] = []
    found = interleave({"slow": slow, "fast": fast}, repeats=4, limit_s=0.01, progress=said.append)
    assert runs == {"slow": 2, "fast": 5}
    assert (found["slow"].repeats, found["fast"].repeats) == (1, 4)
    assert said[:3] == ["slow, round 1 of 5", "fast, round 1 of 5", "slow, round 2 of 5"]
