"""Time contenders fairly: interleaved in one process, medians, spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and best time in ms, and the spread between the quartiles over the median."""

    ms: float
    spread: float
    repeats: int
    best_ms: float


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    limit_s: float = math.inf,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Run every contender in turn, `repeats` times over, after `warmup` unmeasured rounds.

    Noise of the machine then falls on all of them alike.

    Args:
        contenders: what to run, by name.
        repeats: measured rounds.
        warmup: rounds before them.
        limit_s: a contender that has been measured for this many seconds sits out the rest.
        progress: told each round and contender before it runs.

    Raises:
        ValueError: repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warmup + repeats):
        for name, contender in contenders.items():
            if sum(seconds[name]) > limit_s:
                continue
            if progress is not None:
                progress(f"{name}, round {round_ + 1} of {warmup + repeats}")
            began = time.perf_counter()
            contender()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: summary(times) for name, times in seconds.items()}


def summary(times: Sequence[float]) -> Timing:
    """Median, spread and best of times in seconds."""
    seconds = np.array(times)
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return Timing(
        ms=float(middle * 1e3),
        spread=float((high - low) / middle),
        repeats=len(seconds),
        best_ms=float(seconds.min() * 1e3),
    )
