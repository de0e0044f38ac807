"""Rows of a quantised cache stored by C++ against the PyTorch form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseloom.kernels import PlaneCache
from sparseloom.kernels.cpu import native

pytestmark = pytest.mark.skipif(native.missing_reason() is not None, reason="no C++ backend")


def _cache(dtype: torch.dtype, bits: tuple[int, int], dim: int = 12) -> tuple[PlaneCache, Any, Any]:
    generator = torch.Generator().manual_seed(3)
    key, value = (
        torch.randn(2, 3, 9, dim, generator=generator).to(dtype).transpose(0, 0) for _ in range(2)
    )
    whole = PlaneCache.from_tensors(
        key, value, msb_bits=bits[0], lsb_bits=bits[1], int8_values=True
    )
    front = PlaneCache(
        whole.key_msb[:, :, :4],
        None if whole.key_lsb is None else whole.key_lsb[:, :, :4],
        whole.key_scale,
        whole.value[:, :, :4],
        *bits,
        value_scale=whole.value_scale,
    )
    return front, key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [(8, 4), (6, 4), (4, 4), (12, 4), (6, 2), (8, 0)])
def test_codes_equal_those_of_append(dtype: torch.dtype, bits: tuple[int, int]) -> None:
    front, key, value = _cache(dtype, bits)
    wanted = ours = front
    for step in range(4, 9):
        rows = key[:, :, step : step + 1], value[:, :, step : step + 1]
        wanted = wanted.append(*rows)
        appended = ours.append_within(*rows)
        assert appended is not None
        ours = appended
    assert ours.length == 9
    assert torch.equal(ours.key_msb, wanted.key_msb)
    assert torch.equal(ours.value, wanted.value)
    if bits[1]:
        assert ours.key_lsb is not None
        assert wanted.key_lsb is not None
        assert torch.equal(ours.key_lsb, wanted.key_lsb)
    assert front.length == 4  # what was there stays as it is


def test_an_odd_width_and_several_rows_at_once() -> None:
    front, key, value = _cache(torch.float32, (8, 4), dim=7)
    ours, wanted = (
        front.append_within(key[:, :, 4:], value[:, :, 4:]),
        front.append(key[:, :, 4:], value[:, :, 4:]),
    )
    assert ours is not None
    assert torch.equal(ours.key_msb, wanted.key_msb)
    assert ours.key_lsb is not None
    assert wanted.key_lsb is not None
    assert torch.equal(ours.key_lsb, wanted.key_lsb)


def test_two_caches_may_go_on_from_one() -> None:
    front, key, value = _cache(torch.float32, (8, 4))
    one = front.append_within(key[:, :, 4:5], value[:, :, 4:5])
    assert one is not None
    first, second = (
        one.append_within(key[:, :, n : n + 1], value[:, :, n : n + 1]) for n in (5, 6)
    )
    assert first is not None
    assert second is not None
    assert torch.equal(first.key_msb, one.append(key[:, :, 5:6], value[:, :, 5:6]).key_msb)
    assert torch.equal(second.key_msb, one.append(key[:, :, 6:7], value[:, :, 6:7]).key_msb)


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("number", [1e3, float("nan"), float("inf")])
def test_numbers_without_a_code_are_left_to_append(which: str, number: float) -> None:
    front, key, value = _cache(torch.float32, (8, 4))
    rows = {"key": key[:, :, 4:5].clone(), "value": value[:, :, 4:5].clone()}
    rows[which][1, 2, 0, 5] = number
    assert front.append_within(**rows) is None
    assert front.append_within(key[:, :, 4:5], value[:, :, 4:5]) is not None


def test_fewer_bits_of_values_clip_earlier() -> None:
    front, key, value = _cache(torch.float32, (8, 4))
    assert front.append_within(key[:, :, 4:5], value[:, :, 4:5], value_bits=4) is None
    small = value[:, :, 4:5] * 0.01
    ours = front.append_within(key[:, :, 4:5], small, value_bits=4)
    assert ours is not None
    assert torch.equal(ours.value, front.append(key[:, :, 4:5], small).value)


def test_what_it_does_not_take() -> None:
    front, key, value = _cache(torch.float32, (8, 4))
    assert front.append_within(key[:, :, 4:5].double(), value[:, :, 4:5].double()) is None
    plain = PlaneCache.from_tensors(key[:, :, :4], value[:, :, :4])
    assert plain.append_within(key[:, :, 4:5], value[:, :, 4:5]) is None
    needs = key[:, :, 4:5].clone().requires_grad_()
    assert front.append_within(needs, value[:, :, 4:5]) is None
