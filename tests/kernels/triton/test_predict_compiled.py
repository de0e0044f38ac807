"""The kernels of prediction, selection and decoding as compilers see them, for cards that are not
there."""

from __future__ import annotations

import pytest

from sparseloom.kernels.triton.compile_report import CompileReport, reports_of

pytest.importorskip("triton")

SHARED = {80: 163 << 10, 90: 227 << 10}
# The kernels whose time grows with pairs of queries and keys, and the projection.
HOT = "^(encode (product|fp8)|top-k .*(rank_|row_stats|digit 1)|decode .*(score|weigh)$)"


@pytest.fixture(scope="module")
def reports() -> list[CompileReport]:
    modules = ("predict_variants", "decode_variants")
    return reports_of([f"sparseloom.kernels.triton.{name}" for name in modules], only=HOT)


def test_they_fit_and_no_loop_spills(reports: list[CompileReport]) -> None:
    assert {report.arch for report in reports} == {80, 90}
    for report in reports:
        assert report.shared_bytes <= SHARED[report.arch], report
        assert report.warps_per_multiprocessor >= 8, report
        assert report.loop_spill_bytes == 0, report
        assert not report.serialized, report


def test_products_are_those_of_the_tensor_cores(reports: list[CompileReport]) -> None:
    checked: set[str] = set()
    for report in reports:
        if "digit" in report.name:  # counts, multiplies nothing
            continue
        used = " ".join(report.tensor_cores)
        if "decode" in report.name:
            assert "bf16" in used, report
        elif "fp8" in report.name:
            assert "wgmma" in used, report
            assert "e4m3" in used, report
        elif "mean" in report.name:
            assert "tf32" in used, report
        else:
            assert "s8.s8" in used, report
            assert ("wgmma" in used) == (report.arch == 90), report
        checked.add(report.name.split()[-1])
    assert checked == {"product", "rank_products", "row_stats", "rank_blocks", "score", "weigh"}
