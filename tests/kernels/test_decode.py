"""Decoding: against the full attention, and SpAtten's three reductions against their rules."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.kernels import DecodeOutput, PlaneCache, attention, decode_attention
from sparseloom.kernels.planes import pack_nibbles, unpack_nibbles
from sparseloom.mask import SparseMask

_decode: Any = inspect.unwrap(decode_attention)
_quick = settings(
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)


def _inputs(heads: int = 4, kv_heads: int = 2, q_len: int = 2, kv_len: int = 9) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in sizes]


@_quick
@given(data=st.data())
def test_without_reductions_it_is_attention(data: st.DataObject, draw_case: Any) -> None:
    case = draw_case(data, masked=False)
    q, k, v = case.inputs
    got = decode_attention(q, (k, v), **case.options, return_importance=True)
    wanted = attention(q, k, v, **case.options, return_importance=True)
    assert isinstance(got, DecodeOutput)
    tolerance = 1e-12 if q.dtype == torch.float64 else 1e-5
    for a, b in zip(got[:3], (wanted[0], wanted[2], wanted[3]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@_quick
@given(
    keep_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_kept_keys_are_a_mask(keep_heads: int, causal: bool, padded: bool, seed: int) -> None:
    q, k, v = _inputs()
    torch.manual_seed(seed)
    keep = torch.stack([torch.randperm(9)[:5] for _ in range(2 * keep_heads)])
    keep = keep.view(2, keep_heads, 5)
    keep[torch.rand(keep.shape) < 0.3] = -1
    padding = torch.rand(2, 9) < 0.7 if padded else None
    options: dict[str, Any] = {
        "is_causal": causal,
        "key_padding": padding,
        "enable_gqa": True,
        "return_importance": True,
    }
    got = decode_attention(q, (k, v), keep=keep, **options)
    kept = torch.zeros(2, keep_heads, 10, dtype=torch.bool).scatter_(2, keep + 1, True)[..., 1:]
    mask = SparseMask.from_bool(kept[:, :, None].expand(-1, -1, 2, -1).contiguous())
    wanted = attention(q, k, v, mask, **options)
    for a, b in zip(got[:3], (wanted[0], wanted[2], wanted[3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_local_value_pruning_reads_the_largest_probabilities() -> None:
    # Scores 0..4 for key j: probabilities rise with j.
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.arange(5, dtype=torch.float64).view(1, 1, 5, 1)
    v = torch.eye(5, dtype=torch.float64).view(1, 1, 5, 5)
    probs = torch.softmax(k.flatten(), 0)
    out = decode_attention(q, (k, v), value_keep=0.5, scale=1.0, return_stats=True)
    assert isinstance(out, DecodeOutput)
    assert out.stats is not None
    torch.testing.assert_close(out.out.flatten(), probs * torch.tensor([0, 0, 0, 1, 1]))
    assert out.stats.values_read.item() == 2  # floor(0.5 * 5)
    assert out.stats.keys_read.item() == 5
    scaled = decode_attention(q, (k, v), value_keep=0.5, scale=1.0, renormalise=True)
    torch.testing.assert_close(scaled.flatten()[3:], probs[3:] / probs[3:].sum())
    tied = decode_attention(q, (k, v), value_keep=0.4, scale=0.0)
    torch.testing.assert_close(tied.flatten(), torch.tensor([0.2, 0.2, 0, 0, 0]).double())
    few = decode_attention(q, (k, v), value_keep=0.01, scale=1.0)
    assert (few.flatten() != 0).sum() == 1


def test_value_budget_counts_the_keys_of_each_row() -> None:
    q, k, v = _inputs(q_len=3, kv_len=100)
    padding = torch.ones(2, 100, dtype=torch.bool)
    padding[1, :50] = False
    options: dict[str, Any] = {"key_padding": padding, "enable_gqa": True, "return_stats": True}
    # 0.29 * 100 is 28.999… in floating point, but means 29.
    stats = decode_attention(q, (k, v), value_keep=0.29, **options).stats
    assert stats.keys_read[0, 0].tolist() == [98, 99, 100]
    assert stats.values_read[0, 0].tolist() == [28, 28, 29]
    assert stats.values_read[1, 3].tolist() == [13, 14, 14]  # of 48, 49, 50
    nothing = torch.full((2, 1, 4), -1)
    result = decode_attention(q, (k, v), keep=nothing, value_keep=0.5, **options)
    assert (result.out == 0).all()
    assert (result.stats.values_read == 0).all()


def test_planes_hold_the_keys_exactly() -> None:
    _, k, v = _inputs(kv_len=20)
    for msb_bits, lsb_bits in [(4, 4), (6, 4), (8, 4), (12, 4)]:
        cache = PlaneCache.from_tensors(k, v, msb_bits=msb_bits, lsb_bits=lsb_bits)
        full = cache.full_keys(cache.key_msb, cache.key_lsb)
        assert torch.equal(full, (k / cache.key_scale).round().int())
        high = cache.high_keys(cache.key_msb)
        assert torch.equal(high, full // 16 * 16)  # the low bits read as zero: rounded down
        assert full.abs().max() == 2 ** (msb_bits + lsb_bits - 1) - 1
        assert cache.key_scale.shape == (2, 2, 1, 1)
        middle = PlaneCache.from_tensors(k, v, msb_bits=msb_bits, lsb_bits=lsb_bits, midpoint=True)
        assert torch.equal(middle.high_keys(middle.key_msb), high + 8)


def test_appending_keeps_the_scale_and_clips() -> None:
    _, k, v = _inputs(kv_len=20)
    cache = PlaneCache.from_tensors(k[:, :, :12], v[:, :, :12])
    longer = cache.append(k[:, :, 12:], v[:, :, 12:])
    assert longer.key_msb.shape == k.shape
    assert torch.equal(longer.key_scale, cache.key_scale)
    assert torch.equal(longer.value, v)
    codes = longer.full_keys(longer.key_msb, longer.key_lsb)
    assert torch.equal(codes, (k / cache.key_scale).round().clamp(-2047, 2047).int())
    per_token = PlaneCache(cache.key_msb, cache.key_lsb, torch.ones(2, 2, 12, 1), v[:, :, :12])
    with pytest.raises(ValueError, match="key_scale must be the same for all tokens"):
        per_token.append(k[:, :, 12:], v[:, :, 12:])


def test_the_low_plane_takes_half_a_byte_per_number() -> None:
    for dim in (1, 2, 7, 8):
        numbers = torch.randint(0, 16, (2, 3, dim), dtype=torch.int8)
        packed = pack_nibbles(numbers)
        assert packed.shape == (2, 3, (dim + 1) // 2)
        assert torch.equal(unpack_nibbles(packed, dim), numbers.to(torch.uint8))
    _, k, v = _inputs(kv_len=20)
    assert PlaneCache.from_tensors(k, v).key_lsb.dtype == torch.uint8
    wide = PlaneCache.from_tensors(k, v, msb_bits=6, lsb_bits=8)
    assert wide.key_lsb.dtype == torch.int16
    assert torch.equal(wide.full_keys(wide.key_msb, wide.key_lsb), (k / wide.key_scale).round())


def test_int8_cache_is_attention_to_what_it_stands_for() -> None:
    q, k, v = _inputs(kv_len=20)
    cache = PlaneCache.from_tensors(k, v, lsb_bits=0, int8_values=True)
    assert cache.key_lsb is None
    assert cache.key_msb.dtype == cache.value.dtype == torch.int8
    key, value = cache.key_msb * cache.key_scale, cache.value * cache.value_scale
    assert ((key - k).abs() <= cache.key_scale / 2 + 1e-12).all()
    assert ((value - v).abs() <= cache.value_scale / 2 + 1e-12).all()
    keep = torch.tensor([[[3, 19, -1, 0]]]).expand(2, 1, 4)
    for options in ({}, {"keep": keep}, {"value_keep": 0.3}):
        options = {"enable_gqa": True, **options}
        got = decode_attention(q, cache, **options)
        wanted = decode_attention(q, (key, value), **options)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="progressive must be None for a cache with one plane"):
        decode_attention(q, cache, enable_gqa=True, progressive=0.1)
    per_token = replace(cache, value_scale=torch.ones(2, 2, 20, 1))
    with pytest.raises(ValueError, match="value_scale must be the same for all tokens"):
        per_token.append(k, v)


def test_appending_one_by_one_copies_now_and_then() -> None:
    _, k, v = _inputs(kv_len=200)
    cache = PlaneCache.from_tensors(k[:, :, :10], v[:, :, :10], int8_values=True)
    whole = cache.append(k[:, :, 10:], v[:, :, 10:])
    places = set()
    for n in range(10, 200):
        cache = cache.append(k[:, :, n : n + 1], v[:, :, n : n + 1])
        places.add(cache.key_msb.data_ptr())
        assert cache.length == n + 1
    assert len(places) <= 5
    for name in ("key_msb", "key_lsb", "value"):
        assert torch.equal(getattr(cache, name), getattr(whole, name))


def test_two_continuations_of_one_cache_do_not_meet() -> None:
    _, k, v = _inputs(kv_len=20)
    start = PlaneCache.from_tensors(k[:, :, :8], v[:, :, :8]).append(k[:, :, 8:9], v[:, :, 8:9])
    one = start.append(k[:, :, 9:12], v[:, :, 9:12])
    other = start.append(k[:, :, 12:15], v[:, :, 12:15])
    assert torch.equal(one.value, v[:, :, :12])
    assert torch.equal(other.value, torch.cat([v[:, :, :9], v[:, :, 12:15]], 2))
    assert torch.equal(start.value, v[:, :, :9])
    with torch.inference_mode():
        inside = PlaneCache.from_tensors(k[:, :, :8], v[:, :, :8])
        inside = inside.append(k[:, :, 8:9], v[:, :, 8:9])
    assert torch.equal(inside.append(k[:, :, 9:10], v[:, :, 9:10]).value, v[:, :, :10])
    v.requires_grad_()
    start.append(k[:, :, 9:12], v[:, :, 9:12]).value.sum().backward()
    assert v.grad is not None
    assert v.grad.sum() == v[:, :, 9:12].numel()


@_quick
@given(
    threshold=st.sampled_from([0.0, 0.2, 0.4, 1.0]),
    midpoint=st.booleans(),
    kept=st.booleans(),
    seed=st.integers(0, 100),
)
def test_progressive_rows_use_the_planes_that_they_should(
    threshold: float, midpoint: bool, kept: bool, seed: int
) -> None:
    q, k, v = _inputs(q_len=3)
    torch.manual_seed(seed)
    q = q * torch.rand(2, 4, 3, 1) * 3
    cache = PlaneCache.from_tensors(k, v, msb_bits=3, midpoint=midpoint)
    keep = torch.stack([torch.randperm(9)[:6] for _ in range(4)]).view(2, 2, 6) if kept else None
    options: dict[str, Any] = {"keep": keep, "enable_gqa": True}
    result = decode_attention(
        q, cache, progressive=threshold, return_importance=True, return_stats=True, **options
    )
    msb_key = cache.high_keys(cache.key_msb) * cache.key_scale
    full_key = cache.full_keys(cache.key_msb, cache.key_lsb) * cache.key_scale
    from_msb = decode_attention(q, (msb_key, v), **options)
    from_all = decode_attention(q, (full_key, v), **options)
    # The largest probability, read off values that are the identity matrix.
    eye = torch.eye(9, dtype=torch.float64).expand(2, 2, 9, 9)
    peak = decode_attention(q, (msb_key, eye), **options).amax(-1)
    assert torch.equal(result.stats.refetched, peak < threshold)
    wanted = torch.where(result.stats.refetched[..., None], from_all, from_msb)
    torch.testing.assert_close(result.out, wanted, rtol=1e-12, atol=1e-13)
    # The importances come from the final probabilities, which sum to one per row.
    torch.testing.assert_close(result.key_importance.sum(-1), torch.full((2, 4), 3.0).double())
    static = decode_attention(q, cache, **options)
    torch.testing.assert_close(static, from_all, rtol=1e-12, atol=1e-13)


def test_softmax_error_is_at_most_half_the_score_error() -> None:
    # SpAtten §III-D: a perturbation d of one score moves the probabilities by at most d/2 in L1.
    torch.manual_seed(0)
    scores = torch.randn(500, 12, dtype=torch.float64) * 3
    moved = scores.clone()
    step = 0.01
    moved[:, 0] += step
    change = (moved.softmax(-1) - scores.softmax(-1)).abs().sum(-1)
    assert change.max() <= step / 2
    assert change.max() > step / 4


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"value_keep": 0.0}, ValueError, r"value_keep must be in \(0, 1\], got 0.0"),
        ({"progressive": 0.1}, ValueError, "progressive must be None for a cache of plain"),
        ({"progressive": 1.1}, ValueError, r"progressive must be in \[0, 1\], got 1.1"),
        (
            {"backend": "flex"},
            ValueError,
            r"unknown backend 'flex'.*\(there is: auto, cpu, triton, reference",
        ),
        ({"keep": torch.zeros(2, 1, 4)}, TypeError, "keep must hold integers, got torch.float32"),
        (
            {"keep": torch.zeros(2, 3, 4, dtype=torch.int64)},
            ValueError,
            r"keep must have shape \(2, heads, kept\) with heads in \[1, 2, 4\], got \(2, 3, 4\)",
        ),
        (
            {"keep": torch.tensor([[[0, 8, -1]], [[1, 9, 2]]])},
            IndexError,
            r"keep must be in \[0, 9\) or -1, got 9 at batch 1, head 0, position 1",
        ),
        (
            {"key_padding": torch.ones(2, 8, dtype=torch.bool)},
            ValueError,
            r"key_padding must have shape \(batch, kv_len\) = \(2, 9\)",
        ),
        ({"enable_gqa": False}, ValueError, "set enable_gqa=True"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    q, k, v = _inputs()
    with pytest.raises(error, match=sentence):
        _decode(q, (k, v), **{"enable_gqa": True, **options})


def test_too_many_queries_and_bad_planes_are_named() -> None:
    q, k, v = _inputs(q_len=17, kv_len=20)
    with pytest.raises(ValueError, match=r"query must have 1 to 16 rows .*, got 17"):
        decode_attention(q, (k, v), enable_gqa=True)
    cache = PlaneCache.from_tensors(k, v)
    check: Any = inspect.unwrap(PlaneCache.__post_init__)
    with pytest.raises(ValueError, match="msb_bits and lsb_bits must be at least 1"):
        PlaneCache.from_tensors(k, v, msb_bits=0)
    for changed, sentence in [
        ({"key_lsb": cache.key_lsb[:, :, 1:]}, "key_lsb must have shape"),
        ({"key_lsb": None}, "key_lsb must be None for lsb_bits = 0 only, got lsb_bits = 4"),
        ({"key_lsb": cache.key_lsb.char()}, r"key_lsb must be uint8 \(pack_nibbles\) for 4 bits"),
        ({"value": v[:, :1]}, "value must have shape"),
        ({"value_scale": cache.key_scale}, "value must be int8 with value_scale and"),
    ]:
        fields = {
            "key_msb": cache.key_msb,
            "key_lsb": cache.key_lsb,
            "key_scale": cache.key_scale,
            "value": v,
            "lsb_bits": 4,
            "value_scale": None,
        }
        with pytest.raises((TypeError, ValueError), match=sentence):
            check(SimpleNamespace(**{**fields, **changed}))
