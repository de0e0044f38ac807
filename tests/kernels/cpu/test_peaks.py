"""The measured peaks: there in every tier, and replaced where the C++ backend is missing."""

from __future__ import annotations

import pytest
import torch

from sparseloom.kernels.cpu import native, peaks
from sparseloom.kernels.cpu.peaks import Peaks, measure_peaks

needs_library = pytest.mark.skipif(
    native.missing_reason() is not None, reason=native.missing_reason() or ""
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_SECONDS", 0.002)
    monkeypatch.setattr(peaks, "_LARGEST", 1 << 24)


@needs_library
@pytest.mark.parametrize("tier", native.TIERS)
def test_every_tier(tier: str) -> None:
    if tier not in native.available_tiers():
        pytest.skip(f"this processor has no {tier}")
    with native.use_tier(tier):
        found = measure_peaks(repeats=1, threads=2)
    assert (found.source, found.tier, found.threads) == ("registers", tier, 2)
    assert found.gflops > 0.1
    assert found.dram_gbytes_s > 0
    assert found.l2_gbytes_s is not None
    assert found.l2_gbytes_s > 0
    rank = native.TIERS.index(tier)
    assert (found.int8_gops is not None) == (rank >= native.TIERS.index("avx512"))
    assert (found.bf16_gflops is not None) == (rank >= native.TIERS.index("avx512_bf16"))
    if rank == native.TIERS.index("amx"):  # 16 times the vectors' rate on paper
        assert found.bf16_gflops is not None
        assert found.bf16_gflops > 2 * found.gflops


def test_torch_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing_reason", lambda: "not built")
    monkeypatch.setattr(peaks, "_product", lambda dtype, repeats: 7.0)
    before = torch.get_num_threads()
    found = measure_peaks(repeats=1, threads=1)
    assert torch.get_num_threads() == before
    assert (found.source, found.tier, found.threads) == ("torch", None, 1)
    assert (found.gflops, found.int8_gops, found.l2_gbytes_s) == (7.0, None, None)
    assert found.dram_gbytes_s > 0


def test_the_product_is_counted() -> None:
    assert peaks._product(torch.float32, 1, size=32) > 0


def test_which_peak_belongs_to_a_dtype() -> None:
    both = Peaks("registers", "amx", 1, 10.0, 40.0, 80.0, 5.0, 50.0)
    assert both.of(torch.bfloat16) == 40.0
    assert both.of(torch.float32) == both.of(torch.float16) == 10.0
    old = Peaks("registers", "avx2", 1, 10.0, None, None, 5.0, 50.0)
    assert old.of(torch.bfloat16) == 10.0
