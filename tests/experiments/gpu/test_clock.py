"""Timing on a device, with a device whose clock is ours."""

from __future__ import annotations

import pytest

from sparseloom.experiments.gpu.clock import CudaClock, interleave


def test_work_is_warmed_up_on_a_side_stream_and_captured(cuda) -> None:
    clock = CudaClock(cuda)
    ready = clock.prepare(lambda: cuda.work(3.0), warmup=2)
    assert cuda.log == ["wait", "side stream", "run", "run", "main stream", "wait"]
    assert (ready.captured, ready.note) == (True, None)
    # The graph's kernels alone: not what it takes to start them.
    assert clock.seconds(ready, 4) == pytest.approx(3e-3)
    assert cuda.log[-4:] == ["replay"] * 4


def test_what_cannot_be_captured_is_launched_and_told(cuda) -> None:
    clock = CudaClock(cuda)
    ready = clock.prepare(lambda: cuda.work(3.0, waits=True), warmup=1)
    assert not ready.captured
    assert ready.note == "operation not permitted when stream is capturing"
    assert cuda.capturing is None
    assert clock.seconds(ready, 2) == pytest.approx(3.5e-3)


def test_errors_of_the_work_itself_are_not_swallowed(cuda) -> None:
    def broken() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CudaClock(cuda).prepare(broken)


def test_contenders_take_turns_and_short_ones_start_often(cuda) -> None:
    clock = CudaClock(cuda)
    work = {
        "short": clock.prepare(lambda: cuda.work(0.5)),
        "long": clock.prepare(lambda: cuda.work(5.0)),
    }
    cuda.log.clear()
    said: list[str] = []
    times = interleave(work, clock, repeats=3, sample_s=2e-3, progress=said.append)
    # One start each to see how long it takes; then 4 short ones of 0.5 ms and a long one, by turns.
    assert len(cuda.log) == 2 + 3 * (4 + 1)
    assert said == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]
    assert times["short"].ms == pytest.approx(0.5)
    assert (times["long"].ms, times["long"].repeats) == (pytest.approx(5.0), 3)
    assert times["long"].spread == 0


def test_the_median_counts(cuda) -> None:
    lengths = iter([1.0, 1.0, 9.0, 2.0, 3.0])  # the first tells how often to start
    clock = CudaClock(cuda)
    clock.seconds = lambda ready, count: next(lengths) / 1e3  # type: ignore[method-assign]
    times = interleave({"one": clock.prepare(lambda: None)}, clock, repeats=4)
    assert times["one"].ms == pytest.approx(2.5)
    assert times["one"].best_ms == pytest.approx(1.0)
    assert times["one"].spread == pytest.approx((4.5 - 1.75) / 2.5)


def test_at_least_one_round(cuda) -> None:
    with pytest.raises(ValueError, match="repeats must be 1 or more, got 0"):
        interleave({}, CudaClock(cuda), repeats=0)
