"""Make the cost tables that the package ships: one calibration for each instruction set.

    python benchmarks/costs.py                 # every tier that this processor has, widest first
    python benchmarks/costs.py --tier avx2     # one, replaced in the file

Narrower tiers run in processes in which PyTorch and its libraries are narrowed as well, so that
dense attention is what a processor without the wider instructions has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sparseloom.kernels.cpu import native
from sparseloom.methods import costs

OUT = Path(__file__).parents[1] / "src" / "sparseloom" / "methods" / "costs.json"
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


def main() -> None:
    """Calibrate and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tier", action="append", choices=list(NARROWED))
    parser.add_argument("--repeats", type=int, default=7)
    wanted = parser.parse_args()
    known = [name for name in native.available_tiers() if name in NARROWED]
    for tier in wanted.tier or reversed(known):
        others = [table for table in costs.read_tables(OUT) if table.tier != tier]
        tables = [*others, calibrated(tier, wanted.repeats)]
        tables.sort(key=lambda table: native.TIERS.index(table.tier))
        costs.write_tables(OUT, tables)
        sys.stdout.write(f"{tier}: {OUT}\n")


if __name__ == "__main__":
    main()
