"""What the compiler makes of the attention kernels at their defaults, for cards not here."""

from __future__ import annotations

import pytest

from sparseloom.kernels.triton.compile_report import CompileReport, reports_of

pytest.importorskip("triton")

MODULE = ["sparseloom.kernels.triton.variants"]
HOT = (
    "forward 64x1", "forward 128x1", "forward 8x1", "forward 64x64",
    "backward queries 64x1", "backward queries 64x64", "backward keys 64x64",
)  # fmt: skip


@pytest.fixture(scope="module")
def hopper() -> dict[str, CompileReport]:
    found = reports_of(MODULE, archs=[90], only=f"^({'|'.join(HOT)}) d128 bf16$")
    return {report.name.removesuffix(" d128 bf16"): report for report in found}


def test_hot_kernels_are_fit_to_run(hopper: dict[str, CompileReport]) -> None:
    assert hopper.keys() == set(HOT)
    for name, report in hopper.items():
        assert report.loop_spill_bytes == 0, name
        assert not report.serialized, name
        # Two blocks of four warps, or one of eight: while some wait, others compute.
        assert report.warps_per_multiprocessor >= 8, name


def test_hot_kernels_use_the_tensor_cores_of_hopper(hopper: dict[str, CompileReport]) -> None:
    for name, report in hopper.items():
        assert report.tensor_cores, name
        assert all(one.startswith("wgmma.m64") for one in report.tensor_cores), name
    # Narrow blocks have the keys on the M side.
    assert hopper["forward 8x1"].tensor_cores == ("wgmma.m64n16k16.f32.bf16.bf16",)


def test_an_older_card() -> None:
    (report,) = reports_of(MODULE, archs=[80], only="^forward 64x1 d128 bf16$")
    assert report.tensor_cores == ("mma.m16n8k16.f32.bf16.bf16.f32",)
    assert report.loop_spill_bytes == 0
    assert report.warps_per_multiprocessor >= 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_default(arch: int) -> None:
    found = reports_of(MODULE, archs=[arch])
    assert len(found) > 20
    for report in found:
        assert report.warps_per_multiprocessor >= 4, report
        assert not report.serialized, report
        if arch == 90:
            assert report.loop_spill_bytes == 0, report
