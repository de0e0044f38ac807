"""The table of compiled kernels, on reports that are ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseloom.experiments.gpu import compiled
from sparseloom.kernels.triton import compile_report
from sparseloom.kernels.triton.compile_report import CompileReport
from sparseloom.results import read_results, results

ROOT = Path(__file__).parents[3]


def report(**changes) -> CompileReport:
    return CompileReport(**{
        "name": "forward", "arch": 90, "registers": 168, "spill_store_bytes": 0,
        "spill_load_bytes": 0, "loop_spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 98304,
        "threads": 256, "tensor_cores": ("wgmma.m64n128k16.f32.bf16.bf16",), "serialized": False,
        "warps_per_multiprocessor": 8, **changes,
    })  # fmt: skip


def test_rows_and_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def reports_of(**words) -> list[CompileReport]:
        asked.update(words)
        slow = {"spill_store_bytes": 8, "spill_load_bytes": 16, "loop_spill_bytes": 4}
        cores = ("wgmma.m64n64k32.s32.s8.s8", "wgmma.m64n128k32.s32.s8.s8")
        return [
            report(),
            report(arch=80, tensor_cores=("mma.m16n8k16.f32.bf16.bf16.f32",)),
            report(name="select", tensor_cores=(), shared_bytes=1100),
            report(name="score", tensor_cores=cores, serialized=True, **slow),
        ]

    pytest.importorskip("triton")
    monkeypatch.setattr(compile_report, "reports_of", reports_of)
    rows = compiled.kernel_rows([80, 90], only="f")
    assert asked == {"archs": [80, 90], "only": "f"}
    assert results(rows).rows
    assert rows[0]["record"] == "gpu compiler"
    assert rows[0]["ptxas"].split(".")[0].isdigit()
    assert compiled.markdown(rows, 90).splitlines()[2:] == [
        "| forward | 256 | 168 | 0 | 96.0 KiB | 8 | wgmma bf16×bf16→f32 |",
        "| select | 256 | 168 | 0 | 1.1 KiB | 8 | – |",
        "| score | 256 | 168 | 24 (4 in loops) | 96.0 KiB | 8 | wgmma s8×s8→s32 (serialized) |",
    ]
    assert compiled.markdown(rows, 80).splitlines()[2:] == [
        "| forward | 256 | 168 | 0 | 96.0 KiB | 8 | mma bf16×bf16→f32 |",
    ]


def test_the_page_shows_what_is_stored() -> None:
    file = ROOT / "results/gpu_kernels_compiled.json"
    rows = [row.model_dump() for row in read_results(file).rows]
    text = (ROOT / "docs/gpu.md").read_text("utf-8")
    assert compiled.markdown(rows, 90) in text
    assert f"Triton {rows[0]['triton']}, ptxas {rows[0]['ptxas']}" in text


def test_what_is_stored_runs_without_spilling_in_loops() -> None:
    """But for gradients: the page names those kernels, and this test, when one gets better."""
    file = ROOT / "results/gpu_kernels_compiled.json"
    kernels = [row.model_dump() for row in read_results(file).rows][1:]
    assert {row["arch"] for row in kernels} == {80, 90}
    assert all(row["warps_per_multiprocessor"] > 0 for row in kernels)
    spilling = {(row["name"], row["arch"]) for row in kernels if row["loop_spill_bytes"]}
    assert spilling == {
        (f"backward queries {name}", 80)
        for name in ("64x1 d80 fp16", "8x1 d256 bf16", "64x1 d128 bf16", "128x1 d128 bf16",
                     "16x1 d128 bf16", "8x1 d128 bf16", "1x1 d128 bf16")
    }  # fmt: skip
    waiting = [(row["name"], row["arch"]) for row in kernels if row["serialized"]]
    assert waiting == [("backward queries 64x1 d256 bf16", 90)]
