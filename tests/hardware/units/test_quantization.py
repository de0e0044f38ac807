"""The numpy quantiser gives the codes of the torch one; bit planes split and join."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseloom import quantize as reference
from sparseloom.hardware.config import MachineError
from sparseloom.hardware.units.quantization import (
    high_plane_only,
    join_planes,
    quantize,
    split_planes,
)


@given(
    st.integers(0, 2**32),
    st.integers(2, 16),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.sampled_from([0.0, 1e-6, 1.0, 300.0]),
)
def test_codes_and_scales_equal_those_of_the_library(
    seed: int, bits: int, dtype: type, size: float
) -> None:
    x = (np.random.default_rng(seed).standard_normal((17, 8)) * size).astype(dtype)
    expected = reference.quantize(torch.from_numpy(x), bits, granularity="matrix", clip="max")
    found = quantize(x, bits)
    assert found.scale == float(expected.scale)
    assert found.codes.tolist() == expected.codes.tolist()


@given(st.integers(0, 2**32), st.integers(2, 12))
def test_a_fixed_scale_saturates_like_the_library(seed: int, bits: int) -> None:
    x = np.random.default_rng(seed).standard_normal((5, 9)).astype(np.float32)
    expected = reference.quantize(torch.from_numpy(x), bits, scale=torch.tensor([[0.0625]]))
    assert quantize(x, bits, scale=0.0625).codes.tolist() == expected.codes.tolist()


@given(st.lists(st.integers(-128, 127), min_size=1), st.integers(1, 7))
def test_planes_equal_those_of_the_library(values: list[int], lsb_bits: int) -> None:
    codes = np.array(values, np.int64)
    high, low = split_planes(codes, lsb_bits)
    expected = reference.split_planes(torch.tensor(values), 8 - lsb_bits, lsb_bits)
    assert (high.tolist(), low.tolist()) == (expected[0].tolist(), expected[1].tolist())
    assert join_planes(high, low, lsb_bits).tolist() == values
    floor = high_plane_only(codes, lsb_bits)
    assert floor.tolist() == [v // 2**lsb_bits * 2**lsb_bits for v in values]
    middle = high_plane_only(codes, lsb_bits, midpoint=True)
    assert (np.abs(middle - codes) <= 2 ** (lsb_bits - 1)).all()


def test_hand_example() -> None:
    """-23 in 4+4 bits: -2 * 16 + 9, so -32 from the high bits alone."""
    code = np.array([-23])
    assert [int(plane[0]) for plane in split_planes(code, 4)] == [-2, 9]
    assert high_plane_only(code, 4).tolist() == [-32]
    assert high_plane_only(code, 4, midpoint=True).tolist() == [-24]


def test_bad_input_is_named() -> None:
    x = np.ones(3, np.float32)
    with pytest.raises(MachineError, match=r"bits must be in \[2, 16\], got 1"):
        quantize(x, 1)
    with pytest.raises(MachineError, match="scale must be positive and finite, got 0"):
        quantize(x, 8, scale=0.0)
    with pytest.raises(MachineError, match="x must be finite"):
        quantize(np.array([1.0, np.nan]), 8)
    with pytest.raises(MachineError, match=r"lsb_bits must be in \[1, 15\], got 0"):
        split_planes(np.array([1]), 0)
