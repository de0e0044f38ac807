"""The kernels of prediction and selection as compilers see them, for cards that are not there."""

from __future__ import annotations

import pytest

from sparseloom.kernels.triton.compile_report import CompileReport, reports_of

pytest.importorskip("triton")

SHARED = {80: 163 << 10, 90: 227 << 10}
PRODUCTS = ("product", "rank_products", "row_stats", "rank_blocks", "best_keys")


@pytest.fixture(scope="module")
def reports() -> list[CompileReport]:
    return reports_of(["sparseloom.kernels.triton.predict_variants"])


def test_every_kernel_fits_and_no_loop_spills(reports: list[CompileReport]) -> None:
    assert {report.arch for report in reports} == {80, 90}
    for report in reports:
        assert report.shared_bytes <= SHARED[report.arch], report
        assert report.warps_per_multiprocessor >= 4, report
        assert report.loop_spill_bytes == 0, report
        assert not report.serialized, report


def test_codes_are_multiplied_by_the_tensor_cores(reports: list[CompileReport]) -> None:
    checked = 0
    for report in reports:
        if not report.name.endswith(PRODUCTS):
            continue
        checked += 1
        used = " ".join(report.tensor_cores)
        kind = "wgmma" if report.arch == 90 else "mma"
        types = "e4m3.e4m3" if "fp8" in report.name else "s8.s8"
        if "mean" in report.name:
            types = "tf32.tf32"
        assert types in used, report
        assert used.startswith(kind), report
    assert checked >= 14


def test_the_least_there_has_to_be(reports: list[CompileReport]) -> None:
    names = {report.name.split()[-1] for report in reports if "digit" not in report.name}
    assert names >= {*PRODUCTS, "quantise", "encode", "block_means", "find_level", "emit"}
