"""Resident warps, worked by hand from the limits of the cards."""

from __future__ import annotations

import pytest

from sparseloom.kernels.triton.occupancy import multiprocessor, warps_per_multiprocessor


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "warps"),
    [
        (128, 32, 0, 64),  # all there are
        (128, 33, 0, 48),  # 40 registers: 16384 / 1280 = 12 warps in each quarter
        (128, 255, 0, 8),  # 2 warps in each quarter
        (256, 168, 0, 8),  # 3 warps in each quarter, 12 in all: one block of 8
        (32, 16, 0, 32),  # 32 blocks at most
        (128, 32, 100 << 10, 8),  # 228 KiB hold two blocks of 101 KiB
        (128, 32, 113 << 10, 8),  # exactly two of 114 KiB
        (128, 32, (113 << 10) + 1, 4),
        (128, 32, 227 << 10, 4),
        (128, 32, (227 << 10) + 1, 0),  # more than a block may have
    ],
)
def test_hopper(threads, registers, shared, warps):
    found = warps_per_multiprocessor(90, threads=threads, registers=registers, shared_bytes=shared)
    assert found == warps


def test_ampere_has_less_shared_memory():
    take = {"threads": 128, "registers": 64, "shared_bytes": 80 << 10}
    assert warps_per_multiprocessor(80, **take) == 8
    assert warps_per_multiprocessor(80, **take | {"shared_bytes": (81 << 10) + 1}) == 4
    assert warps_per_multiprocessor(80, **take | {"shared_bytes": 164 << 10}) == 0


def test_an_architecture_nothing_is_known_of():
    with pytest.raises(ValueError, match=r"arch must be one of 80, 90 .*, got 70"):
        multiprocessor(70)
