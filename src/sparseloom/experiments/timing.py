"""Time contenders fairly: interleaved in one process, medians, spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Timing:
    """Median time in milliseconds and the spread between the quartiles over the median."""

    ms: float
    spread: float
    repeats: int


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, repeats: int = 5, warmup: int = 1
) -> dict[str, Timing]:
    """Run every contender in turn, `repeats` times over, after `warmup` unmeasured rounds.

    Noise of the machine then falls on all of them alike.  Raises ValueError for repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warmup + repeats):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: _summary(np.array(times)) for name, times in seconds.items()}


def _summary(seconds: np.ndarray) -> Timing:
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return Timing(ms=float(middle * 1e3), spread=float((high - low) / middle), repeats=len(seconds))
