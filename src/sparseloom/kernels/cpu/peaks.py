"""What this machine reaches at most: arithmetic in registers, and reading memory.

The yardstick of `sparseloom bench`. With the compiled library the loops run in the active tier's
own instructions; without it one large matrix product of PyTorch and one large copy stand in,
which reach less than the hardware can.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sparseloom.kernels.cpu import native

_SECONDS = 0.03  # of one measurement
_KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
_LARGEST = 1 << 30


@dataclass(frozen=True, slots=True)
class Peaks:
    """Best of a few measurements with `threads` threads; None where there is no instruction.

    Attributes:
        source: "registers" (loops in the instructions of `tier`) or "torch" (a product, a copy).
        gflops: fp32 multiply-adds, counted as two operations.
        bf16_gflops: bf16 products with fp32 sums (AVX512_BF16 or AMX).
        int8_gops: products of bytes with int32 sums (VNNI or AMX).
        dram_gbytes_s: reading an array that is larger than the caches.
        l2_gbytes_s: reading an array of half of each core's second-level cache.
    """

    source: str
    tier: str | None
    threads: int
    gflops: float
    bf16_gflops: float | None
    int8_gops: float | None
    dram_gbytes_s: float
    l2_gbytes_s: float | None

    def of(self, dtype: torch.dtype) -> float:
        """GFLOP/s of products in `dtype`; fp16 is computed in fp32, as is bf16 where it must."""
        bf16 = self.bf16_gflops if dtype == torch.bfloat16 else None
        return self.gflops if bf16 is None else bf16


def measure_peaks(*, repeats: int = 5, threads: int | None = None) -> Peaks:
    """The peaks with `threads` threads (default: torch's), each the best of `repeats`."""
    threads = torch.get_num_threads() if threads is None else threads
    if native.missing_reason() is not None:
        return _with_torch(repeats, threads)
    rates = {name: _arithmetic(kind, repeats, threads) for name, kind in _KINDS.items()}
    assert rates["float32"] is not None
    return Peaks(
        source="registers",
        tier=native.active_tier(),
        threads=threads,
        gflops=rates["float32"],
        bf16_gflops=rates["bfloat16"],
        int8_gops=rates["int8"],
        dram_gbytes_s=_read(_dram_bytes(), repeats, threads, shared=True),
        l2_gbytes_s=_read(_cache_bytes(2, 1 << 20) // 2 * threads, repeats, threads, shared=False),
    )


def _arithmetic(kind: int, repeats: int, threads: int) -> float | None:
    library = native.library()
    each = library.peak_ops(kind)
    if not each:
        return None
    count = _enough(lambda count: library.peak_arithmetic(kind, count, threads), 1 << 12)
    best = min(library.peak_arithmetic(kind, count, threads) for _ in range(repeats))
    return each * count * threads / best / 1e9


def _read(size: int, repeats: int, threads: int, *, shared: bool) -> float:
    library = native.library()
    size = size // (512 * threads) * 512 * threads
    memory = torch.zeros(size, dtype=torch.uint8)

    def run(rounds: int) -> float:
        return library.peak_read(memory.data_ptr(), size, rounds, threads, shared)

    rounds = _enough(run, 1)
    return size * rounds / min(run(rounds) for _ in range(repeats)) / 1e9


def _enough(run: Callable[[int], float], count: int) -> int:
    """A count that takes about as long as one measurement should, on a machine at rest."""
    while (took := min(run(count) for _ in range(3))) < _SECONDS / 4:
        count *= 4
    return max(1, round(count * _SECONDS / took))


def _dram_bytes() -> int:
    """An array of which the last cache holds little, within reason."""
    return min(_LARGEST, max(256 << 20, 2 * _cache_bytes(3, 32 << 20)))


def _cache_bytes(level: int, otherwise: int) -> int:
    """Size of the first core's cache of a level, as Linux tells."""
    file = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
    try:
        text = file.read_text("ascii").strip()
    except OSError:
        return otherwise
    return int(text[:-1]) << 10 if text.endswith("K") and text[:-1].isdigit() else otherwise


def _with_torch(repeats: int, threads: int) -> Peaks:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.zeros(64 << 20, dtype=torch.float32)
        target = torch.empty_like(source)
        copied = best_seconds(lambda: target.copy_(source), repeats)
        return Peaks(
            source="torch",
            tier=None,
            threads=threads,
            gflops=_product(torch.float32, repeats),
            bf16_gflops=_product(torch.bfloat16, repeats),
            int8_gops=None,
            dram_gbytes_s=2 * source.nbytes / copied / 1e9,
            l2_gbytes_s=None,
        )
    finally:
        torch.set_num_threads(before)


def _product(dtype: torch.dtype, repeats: int, size: int = 1024) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, repeats) / 1e9


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """Shortest of so many runs, after one that is not measured."""
    run()
    times: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
