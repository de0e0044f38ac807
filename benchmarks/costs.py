"""Make the cost tables that the package ships: one calibration for each instruction set.

    python benchmarks/costs.py                 # every tier that this processor has, widest first
    python benchmarks/costs.py --tier avx2     # one, replaced in the file
    python benchmarks/costs.py --check         # where the rule selects: how long that takes now
    python benchmarks/costs.py --check --length 8192 --limit 300

Narrower tiers run in processes in which PyTorch and its libraries are narrowed as well, so that
dense attention is what a processor without the wider instructions has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sparseloom.experiments.bench_cases import AttentionCase
from sparseloom.experiments.bench_contenders import BASELINE, contenders_of, untrained
from sparseloom.experiments.timing import interleave
from sparseloom.kernels.cpu import native
from sparseloom.mask import SparseMask
from sparseloom.methods import costs

OUT = Path(__file__).parents[1] / "src" / "sparseloom" / "methods" / "costs.json"
CHECKED_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
CHECKED_SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
ALLOWED = 1.1  # of the dense time
# AVX-512 without BF16 or AMX: oneDNN calls it after the first processors that had it.
NARROWED = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
}


def calibrated(tier: str, repeats: int) -> costs.CostTable:
    """The table of one tier, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.json"
        settings = {
            **NARROWED[tier],
            "SPARSELOOM_CPU_TIER": tier,
            "SPARSELOOM_CALIBRATION": str(file),
        }
        subprocess.run(
            [sys.executable, "-m", "sparseloom", "bench", "--calibrate", f"--repeats={repeats}"],
            check=True,
            env=os.environ | settings,
        )
        (table,) = costs.read_tables(file)
    return table


def checked(
    lengths: Sequence[int], repeats: int, limit_s: float
) -> list[tuple[float, float, costs.AttentionShape, str]]:
    """Calls that the rule in use runs sparse: time over that of dense, expected ratio, shape and
    settings; those that took longest over dense first. Stops after `limit_s`."""
    found: list[tuple[float, float, costs.AttentionShape, str]] = []
    began = time.monotonic()
    for length in lengths:
        for block in ((1, 1), (8, 1)):
            for share in CHECKED_SPARSITIES:
                case = AttentionCase(
                    q_len=length, kv_len=length, block_size=block, sparsity=share, causal=False
                )
                method = untrained(case, seed=1)
                expected = costs.forecast(method, case.shape, case.dtype)
                if expected is None or expected.ratio > costs.MARGIN:
                    continue
                if time.monotonic() - began > limit_s:
                    break
                whole = SparseMask.full(length, length)
                contenders = contenders_of(case, whole, (), seed=1)[0]
                runs = {name: contenders[name].run for name in (BASELINE, "dynamic")}
                with torch.inference_mode():
                    times = interleave(runs, repeats=repeats)
                ratio = times["dynamic"].ms / times[BASELINE].ms
                what = f"{'x'.join(map(str, block))} at {share:.0%}"
                found.append((ratio, expected.ratio, case.shape, what))
    return sorted(found, key=lambda row: row[0], reverse=True)


def main() -> None:
    """Calibrate and write, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tier", action="append", choices=list(NARROWED))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--length", type=int, action="append", help="--check: tokens, these alone")
    parser.add_argument("--limit", type=float, default=120.0, help="--check: seconds, about")
    wanted = parser.parse_args()
    if wanted.check:
        rows = checked(wanted.length or CHECKED_LENGTHS, wanted.repeats, wanted.limit)
        over = sum(row[0] > ALLOWED for row in rows)
        sys.stdout.write(f"{len(rows)} calls run sparse, {over} of them over {ALLOWED} x dense\n")
        for ratio, expected, shape, what in rows[:10]:
            sys.stdout.write(f"{ratio:.2f} (expected {expected:.2f})  {shape.q_len} {what}\n")
        return
    known = [name for name in native.available_tiers() if name in NARROWED]
    for tier in wanted.tier or reversed(known):
        others = [table for table in costs.read_tables(OUT) if table.tier != tier]
        tables = [*others, calibrated(tier, wanted.repeats)]
        tables.sort(key=lambda table: native.TIERS.index(table.tier))
        costs.write_tables(OUT, tables)
        sys.stdout.write(f"{tier}: {OUT}\n")


if __name__ == "__main__":
    main()
