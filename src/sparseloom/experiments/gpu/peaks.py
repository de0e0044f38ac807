"""What the card reaches at most in large products of PyTorch and in a copy, measured.

Power and temperature decide what a card can hold, so the yardstick is taken in the same run as what
it is held against.  Inputs are random: products of zeros take less power and run faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparseloom.experiments.gpu.clock import CudaClock, interleave

SIZE = 8192
COPIED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class GpuPeaks:
    """Medians of one device.

    Attributes:
        gflops: fp32 products as PyTorch computes them by default, without TF32.
        bf16_gflops, fp16_gflops: products with fp32 sums.
        int8_gops: products of bytes with int32 sums.
        dram_gbytes_s: a copy, bytes read and written counted.
    """

    gflops: float
    bf16_gflops: float
    fp16_gflops: float
    int8_gops: float
    dram_gbytes_s: float

    def of(self, dtype: torch.dtype) -> float:
        """GFLOP/s of products in `dtype`."""
        halves = {torch.bfloat16: self.bf16_gflops, torch.float16: self.fp16_gflops}
        return halves.get(dtype, self.gflops)


def measure_peaks(
    clock: CudaClock,
    *,
    repeats: int = 15,
    size: int = SIZE,
    copied: int = COPIED_BYTES,
    device: str = "cuda",
) -> GpuPeaks:
    """Peaks of products of `size` × `size` and of a copy of `copied` bytes."""
    runs: dict[str, Callable[[], object]] = {
        name: _product(dtype, size, device)
        for name, dtype in (
            ("float32", torch.float32),
            ("bfloat16", torch.bfloat16),
            ("float16", torch.float16),
        )
    }
    a, b = (
        torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2)
    )
    # What is multiplied from the right lies column by column, as int8 products ask for.
    runs["int8"] = lambda: torch._int_mm(a, b.t())
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs["copy"] = lambda: target.copy_(source)
    with torch.inference_mode():
        ready = {name: clock.prepare(run) for name, run in runs.items()}
        times = interleave(ready, clock, repeats=repeats)
    rate = {name: 2 * size**3 / time.ms / 1e6 for name, time in times.items()}
    return GpuPeaks(
        gflops=rate["float32"],
        bf16_gflops=rate["bfloat16"],
        fp16_gflops=rate["float16"],
        int8_gops=rate["int8"],
        dram_gbytes_s=2 * copied / times["copy"].ms / 1e6,
    )


def _product(dtype: torch.dtype, size: int, device: str) -> Callable[[], object]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out)
