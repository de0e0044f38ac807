"""The hot kernels of prediction and decoding as compilers see them, for cards that are not there:
those whose work grows with pairs of queries and keys, and the projection."""

from __future__ import annotations

import pytest

from sparseloom.kernels.triton.compile_report import CompileReport, reports_of

pytest.importorskip("triton")

SHARED = {80: 163 << 10, 90: 227 << 10}
PACKAGE = "sparseloom.kernels.triton"


@pytest.fixture(scope="module")
def reports() -> list[CompileReport]:
    products = "^(encode product|top-k 1x1 rank_products)$"
    pooled = "^(top-k mass 64x1 (row_stats|rank_blocks)|decode bf16 (score|weigh))$"
    modules = [f"{PACKAGE}.predict_variants", f"{PACKAGE}.decode_variants"]
    return [
        *reports_of(modules[:1], archs=[80, 90], only=products),
        *reports_of(modules, archs=[90], only=pooled),
    ]


def test_they_fit_and_nothing_spills(reports: list[CompileReport]) -> None:
    assert len(reports) == 8
    for report in reports:
        assert report.shared_bytes <= SHARED[report.arch], report
        assert report.warps_per_multiprocessor >= 8, report
        assert report.spill_store_bytes == report.spill_load_bytes == 0, report
        assert not report.serialized, report


def test_codes_are_multiplied_by_int8_tensor_cores(reports: list[CompileReport]) -> None:
    for report in reports:
        used = " ".join(report.tensor_cores)
        if report.name.startswith("decode"):
            assert "bf16.bf16" in used, report
        else:
            assert "s8.s8" in used, report
            assert ("wgmma" in used) == (report.arch == 90), report
