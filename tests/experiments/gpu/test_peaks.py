"""Peaks and memory: what is counted, with clocks and allocators that are not a card's."""

from __future__ import annotations

import pytest
import torch

from sparseloom.experiments.gpu.clock import CudaClock, Ready
from sparseloom.experiments.gpu.memory import Peak, call_with_peak
from sparseloom.experiments.gpu.peaks import GpuPeaks, measure_peaks

SIZE, COPIED = 64, 4096


class Scripted(CudaClock):
    """Runs everything once on the CPU, and says that it took so many µs, in order."""

    def __init__(self, times: tuple[float, ...]) -> None:
        super().__init__()
        self.times, self.order = iter(times), {}

    def prepare(self, run, *, warmup: int = 3) -> Ready:
        run()
        ready = Ready(run, captured=True)
        self.order[id(ready)] = next(self.times)
        return ready

    def seconds(self, ready: Ready, count: int) -> float:
        return self.order[id(ready)] * 1e-6


def test_rates_are_operations_over_time() -> None:
    clock = Scripted((40.0, 2.0, 1.0, 0.5, 8.0))
    peaks = measure_peaks(clock, repeats=2, size=SIZE, copied=COPIED, device="cpu")
    operations = 2 * SIZE**3
    assert peaks.gflops == pytest.approx(operations / 40e-6 / 1e9)
    assert peaks.of(torch.float32) == peaks.of(torch.float64) == peaks.gflops
    assert peaks.of(torch.bfloat16) == pytest.approx(operations / 2e-6 / 1e9)
    assert peaks.of(torch.float16) == pytest.approx(operations / 1e-6 / 1e9)
    assert peaks.int8_gops == pytest.approx(operations / 0.5e-6 / 1e9)
    assert peaks.dram_gbytes_s == pytest.approx(2 * COPIED / 8e-6 / 1e9)


def test_a_dtype_has_its_own_peak() -> None:
    peaks = GpuPeaks(1.0, 2.0, 3.0, 4.0, 5.0)
    found = [peaks.of(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert found == [1.0, 2.0, 3.0]


class Allocator:
    """An allocator with 100 bytes in use before the call."""

    def __init__(self) -> None:
        self.used = self.peak = 100
        self.synchronized = 0

    def synchronize(self) -> None:
        self.synchronized += 1

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.used

    def memory_allocated(self) -> int:
        return self.used

    def max_memory_allocated(self) -> int:
        return self.peak


def test_memory_of_a_call_is_above_what_was_there() -> None:
    cuda = Allocator()
    cuda.peak = 10_000  # of something earlier

    def run() -> None:
        cuda.used, cuda.peak = 130, 175  # 75 at the peak, of which a result of 30 stays

    assert call_with_peak(run, cuda) == Peak(75, 30)
    assert Peak(75, 30).extra == 45
    assert cuda.synchronized == 2
