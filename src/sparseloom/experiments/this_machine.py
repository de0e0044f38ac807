"""Measure this machine for the simulator's machine `this`: peaks, efficiencies and overheads.

    python -m sparseloom.experiments.this_machine

writes `this_machine.yaml` into the user's cache folder (`$SPARSELOOM_THIS_MACHINE` names another
file), and prints what it wrote.  Dense fp32 operators of torch are timed: a large product, a
product with one row (weights from memory), attention of many queries and of one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional

from sparseloom.files import fresh_file
from sparseloom.hardware.devices import this_machine_file
from sparseloom.kernels.cpu.peaks import best_seconds, measure_peaks
from sparseloom.results import machine_facts

_SIZE, _HEADS, _LENGTH, _DIM = 2048, 16, 1024, 64
_BYTES = 4


def measure(*, repeats: int = 5) -> dict[str, Any]:
    """What `sparseloom.hardware.devices.Measured` holds; each time is the best of `repeats`."""
    peaks = measure_peaks(repeats=repeats)
    flops, bandwidth = peaks.gflops * 1e9, peaks.dram_gbytes_s * 1e9
    a, b, row = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE), torch.randn(1, _SIZE)
    # Weights of many layers in turn, so that no cache holds them.
    weights = [torch.randn(_SIZE, _SIZE) for _ in range(16)]
    tiny = torch.randn(1, 16), torch.randn(16, 16)
    product = best_seconds(lambda: a @ b, repeats)
    streamed = best_seconds(lambda: [row @ weight for weight in weights], repeats)
    overhead = best_seconds(lambda: tiny[0] @ tiny[1], 50 * repeats)
    many, one, few = _attention(_LENGTH), _attention(1), _attention(1, length=4)
    prefill = best_seconds(many, repeats)
    decode = best_seconds(one, repeats)
    start = best_seconds(few, 50 * repeats)
    pairs = _HEADS * _LENGTH * _LENGTH * _DIM
    cache = 2 * _HEADS * _LENGTH * _DIM * _BYTES
    return {
        "schema": "sparseloom/this_machine/1",
        "cpu": machine_facts().cpu or "unknown",
        "threads": peaks.threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": {
            "peak_gflops": float(peaks.gflops),
            "memory_gbytes_per_second": float(peaks.dram_gbytes_s),
            "bits": 8 * _BYTES,
        },
        "gemm": {
            "compute_efficiency": _share(2 * _SIZE**3 / flops, product),
            "memory_efficiency": _share(len(weights) * _SIZE**2 * _BYTES / bandwidth, streamed),
            "overhead_us": overhead * 1e6,
        },
        "attention": {
            "compute_efficiency": _share(4 * pairs / flops, prefill),
            "memory_efficiency": _share(cache / bandwidth, decode),
            # The model charges it for each of the two products.
            "overhead_us": start * 1e6 / 2,
            "matmul_share": 1.0,
        },
    }


def write(found: dict[str, Any], file: Path | None = None) -> Path:
    """Put a measurement where the machine `this` looks for it."""
    file = this_machine_file() if file is None else file
    with fresh_file(file) as fresh:
        fresh.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    return file


def _attention(queries: int, *, length: int = _LENGTH) -> Callable[[], Tensor]:
    query = torch.randn(1, _HEADS, queries, _DIM)
    key, value = (torch.randn(1, _HEADS, length, _DIM) for _ in range(2))
    return lambda: functional.scaled_dot_product_attention(query, key, value)


def _share(ideal: float, measured: float) -> float:
    """Of the peak; what the caches hold may look faster than memory."""
    return min(1.0, ideal / measured)


def main() -> None:
    """Measure, write, and print the file."""
    first = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(
        "python -m sparseloom.experiments.this_machine", description=first
    )
    usual = f"where the machine `this` looks for it: {this_machine_file()}".replace("%", "%%")
    parser.add_argument("--out", type=Path, default=None, help=f"file; default: {usual}")
    out = parser.parse_args().out
    file = write(measure(), out)
    sys.stdout.write(f"{file}\n{file.read_text(encoding='utf-8')}")


if __name__ == "__main__":
    main()
