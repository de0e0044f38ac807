"""Time work on a CUDA device: as a captured graph where it can be one, between two events.

A graph starts all its kernels at once, so that what Python and the driver take to start them does
not count; what a graph cannot hold (it waits for the device, say) is started kernel by kernel, and
told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparseloom.experiments.timing import Timing, summary

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ready:
    """Work that is warmed up and can be started again and again.

    Attributes:
        start: starts it once.
        captured: it is a graph.
        note: why it is not.
    """

    start: Callable[[], object]
    captured: bool
    note: str | None = None


class CudaClock:
    """Prepares and times work on the current CUDA device.

    Args:
        cuda: `torch.cuda`, or what stands for it in a test.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda

    def prepare(self, run: Run, *, warmup: int = 3) -> Ready:
        """Run it a few times on a stream of its own, as graphs ask for, and capture it."""
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(warmup):
                run()
        self.cuda.current_stream().wait_stream(stream)
        self.cuda.synchronize()
        graph = self.cuda.CUDAGraph()
        try:
            with self.cuda.graph(graph):
                run()
        except RuntimeError as error:
            self.cuda.synchronize()
            return Ready(run, False, " ".join(str(error).split())[:200])
        return Ready(graph.replay, True)

    def seconds(self, ready: Ready, count: int) -> float:
        """Seconds that one of `count` starts in a row takes on the device."""
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        begin.record()
        for _ in range(count):
            ready.start()
        end.record()
        self.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / count


def interleave(
    work: Mapping[str, Ready],
    clock: CudaClock,
    *,
    repeats: int = 15,
    sample_s: float = 2e-3,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Time everything in turn, `repeats` rounds over, so that clocks and heat do not favour any.

    Args:
        work: what to start, by name.
        clock: what it is timed with.
        repeats: measured rounds, after one that is not.
        sample_s: one measurement starts the work as often as it takes to last so long.
        progress: told each round.

    Raises:
        ValueError: repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    counts = {
        name: max(1, math.ceil(sample_s / max(clock.seconds(ready, 1), 1e-7)))
        for name, ready in work.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(repeats):
        if progress is not None:
            progress(f"round {round_ + 1} of {repeats}")
        for name, ready in work.items():
            seconds[name].append(clock.seconds(ready, counts[name]))
    return {name: summary(times) for name, times in seconds.items()}
