"""Decoding in C++ against the plain PyTorch form in fp64."""

from __future__ import annotations

import inspect
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseloom.kernels import DecodeOutput, PlaneCache, decode_attention

_decode: Any = inspect.unwrap(decode_attention)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def _double(cache: Any) -> Any:
    if not isinstance(cache, PlaneCache):
        return tuple(tensor.double() for tensor in cache)
    value = cache.value if cache.value_scale is not None else cache.value.double()
    scale = None if cache.value_scale is None else cache.value_scale.double()
    return replace(cache, key_scale=cache.key_scale.double(), value=value, value_scale=scale)


def _same(query: Tensor, cache: Any, **options: Any) -> DecodeOutput:
    """Checks all outputs of the C++ form and returns them."""
    options = {"enable_gqa": True, "return_importance": True, "return_stats": True, **options}
    got = decode_attention(query, cache, backend="cpu", **options)
    wanted = decode_attention(query.double(), _double(cache), backend="reference", **options)
    assert isinstance(got, DecodeOutput)
    assert isinstance(wanted, DecodeOutput)
    assert got.out.dtype == query.dtype
    rtol = TOLERANCE[query.dtype]
    torch.testing.assert_close(got.out.double(), wanted.out, rtol=rtol, atol=2e-5)
    torch.testing.assert_close(
        got.key_importance, wanted.key_importance.float(), rtol=1e-4, atol=2e-5
    )
    torch.testing.assert_close(
        got.head_importance, wanted.head_importance.float(), rtol=1e-4, atol=1e-4
    )
    for a, b in zip(got.stats, wanted.stats, strict=True):
        assert torch.equal(a, b)
    short = {**options, "return_importance": False, "return_stats": False}
    out = decode_attention(query, cache, backend="cpu", **short)
    torch.testing.assert_close(out, got.out, rtol=0, atol=1e-6 if rtol < 1e-3 else 1e-2)
    return got


def _tensors(
    heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, value_dim: int, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads, q_len, dim),
        torch.randn(batch, kv_heads, kv_len, dim),
        torch.randn(batch, kv_heads, kv_len, value_dim),
    )


def _cache(kind: str, key: Tensor, value: Tensor) -> tuple[Any, bool]:
    """A cache and whether it has two planes."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if kind in dtypes:
        return (key.to(dtypes[kind]), value.to(dtypes[kind])), False
    if kind == "int8":
        return (
            PlaneCache.from_tensors(key, value, msb_bits=8, lsb_bits=0, int8_values=True), False
        )  # fmt: skip
    bits, rest = kind.split("+")
    stored = rest.split("/")[1]
    cache = PlaneCache.from_tensors(
        key,
        value.to(dtypes.get(stored, torch.float32)),
        msb_bits=int(bits),
        midpoint=int(bits) in (6, 10),
        int8_values=stored == "int8",
    )
    return cache, True


KINDS = (
    "fp32", "bf16", "fp16", "int8", "4+4/int8", "6+4/fp32", "8+4/int8", "8+4/bf16", "10+4/fp16",
    "12+4/fp32",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_agrees_with_the_reference(kind: str, tier: str) -> None:
    draw = random.Random(kind)
    for seed in range(5):
        torch.manual_seed(seed)
        kv_heads = draw.choice([1, 2, 3])
        heads = kv_heads * draw.choice([1, 1, 2, 3, 5])
        q_len = draw.choice([1, 1, 2, 3, 7, 16])
        kv_len = draw.choice([1, 5, 16, 33, 100, 300])
        dim, value_dim = draw.choice(
            [(64, 64), (8, 8), (16, 24), (80, 80), (96, 128), (128, 64), (40, 8), (256, 256)]
        )
        query, key, value = _tensors(heads, kv_heads, q_len, kv_len, dim, value_dim)
        cache, two = _cache(kind, key, value)
        query = query * draw.choice([0.3, 1.0, 3.0])
        if not isinstance(cache, PlaneCache):
            query = query.to(cache[0].dtype)
        keep = None
        if draw.random() < 0.5:
            kept, keep_heads = draw.randint(0, kv_len), draw.choice([1, kv_heads, heads])
            keep = torch.rand(2, keep_heads, kv_len).argsort(-1)[..., :kept]
            keep[torch.rand(keep.shape) < 0.2] = -1
            keep = keep.to(draw.choice([torch.int64, torch.int32, torch.int16]))
        padding = None
        if draw.random() < 0.3:
            padding = torch.rand(2, kv_len) < 0.7
        _same(
            query,
            cache,
            keep=keep,
            key_padding=padding,
            value_keep=draw.choice([None, None, 0.01, 0.2, 0.5, 1.0]),
            progressive=draw.choice([None, 0.0, 0.1, 0.4, 1.0]) if two else None,
            renormalise=draw.random() < 0.3,
            is_causal=draw.random() < 0.7,
            scale=draw.choice([None, None, 0.2]),
        )


@pytest.mark.parametrize("kind", ["fp32", "int8", "8+4/int8"])
def test_long_caches_are_cut_in_pieces(kind: str, tier: str) -> None:
    torch.manual_seed(0)
    refetched: list[bool] = []
    for heads, kv_heads, q_len in [(1, 1, 1), (4, 2, 3), (8, 1, 16)]:
        query, key, value = _tensors(heads, kv_heads, q_len, 5000, 64, 64, batch=1)
        cache, two = _cache(kind, key, value)
        keep = torch.rand(1, 1, 5000).argsort(-1)[..., :3000]
        for options in [
            {},
            {"value_keep": 0.2},
            {"keep": keep, "value_keep": 0.2, "progressive": 0.007 if two else None},
        ]:
            result = _same(query, cache, **options)
            assert result.stats is not None
            refetched += result.stats.refetched.flatten().tolist()
    assert any(refetched) == two
    assert not all(refetched)


def test_ties_go_to_the_key_listed_first(tier: str) -> None:
    query, value = torch.ones(1, 1, 1, 8), torch.eye(100)[None, None]
    # Key j has the score of key j % 10: the budget of 25 ends within the keys that tie.
    key = (torch.arange(100) % 10).float()[None, None, :, None].expand(1, 1, 100, 8) / 8
    for sign in (1, -1, 0):
        options: dict[str, Any] = {"value_keep": 0.25, "scale": 1.0}
        _same(query, (sign * key, value), **options)
        out = decode_attention(query, (sign * key, value), backend="cpu", **options).flatten()
        best = [9, 8] if sign == 1 else [0, 1]
        wanted = [n * 10 + j for j in best for n in range(10)]
        wanted += [n * 10 + (7 if sign == 1 else 2) for n in range(5)]
        wanted = range(25) if sign == 0 else sorted(wanted)
        assert out.nonzero().flatten().tolist() == list(wanted)
    # In the order of the list, not of the keys.
    keep = torch.arange(99, -1, -1)[None, None]
    out = decode_attention(query, (0 * key, value), backend="cpu", keep=keep, **options)
    assert out.flatten().nonzero().flatten().tolist() == list(range(75, 100))


@pytest.mark.parametrize("seed", range(6))
def test_exact_selection_among_many_kinds_of_numbers(seed: int, tier: str) -> None:
    torch.manual_seed(seed)
    draws = [
        torch.randn(1000),
        torch.randn(1000).exp() * 50,
        torch.randint(-3, 3, (1000,)).float(),
        torch.cat([torch.zeros(990), torch.randn(10)]) * 1e-30,
        torch.cat([-torch.zeros(500), torch.zeros(500)]),
        torch.cat([torch.full((999,), -1e30), torch.ones(1)]),
    ]
    scores = draws[seed]
    key = torch.zeros(1, 1, 1000, 8)
    key[0, 0, :, 0] = scores
    query = torch.zeros(1, 1, 1, 8)
    query[..., 0] = 1
    value = torch.eye(1000)[None, None]
    for share in (0.001, 0.1, 0.5, 0.999, 1.0):
        budget = max(1, int(share * 1000 + 1e-9))
        got = decode_attention(
            query, (key, value), value_keep=share, scale=1.0, backend="cpu", return_stats=True,
            return_importance=True,
        )  # fmt: skip
        assert got.stats.values_read.item() == budget
        order = scores.argsort(descending=True, stable=True)[:budget]
        probs = torch.zeros(1000)
        probs[order] = scores.double().softmax(0).float()[order]
        torch.testing.assert_close(got.out.flatten(), probs, rtol=1e-4, atol=1e-12)


def test_scales_may_vary_along_tokens_or_dimensions(tier: str) -> None:
    torch.manual_seed(0)
    query, key, value = _tensors(4, 2, 3, 70, 24, 40)
    codes, stored = (key * 30).round().to(torch.int8), (value * 30).round().to(torch.int8)
    for shape in [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 70, 1), (1, 1, 70, 1)]:
        a, b = torch.rand(shape) / 20 + 0.01, torch.rand(shape) / 20 + 0.01
        cache = PlaneCache(codes, None, a, stored, 8, 0, value_scale=b)
        _same(query, cache, value_keep=0.5)
        _same(query, cache, keep=torch.tensor([[[5, 69, -1, 2]]] * 2))
        lsb = torch.randint(0, 256, (2, 2, 70, 12), dtype=torch.uint8)
        for midpoint in (False, True):
            planes = PlaneCache(codes, lsb, a / 16, value, midpoint=midpoint)
            for threshold in (None, 0.0, 0.15, 1.0):
                _same(query, planes, progressive=threshold)
    for heads in (1, 2):
        a, b = torch.rand(1, heads, 1, 24) / 20, torch.rand(1, heads, 1, 40) / 20
        _same(query, PlaneCache(codes, None, a, stored, 8, 0, value_scale=b), value_keep=0.5)
    both = PlaneCache(codes, None, torch.rand(2, 2, 70, 24), value, 8, 0)
    with pytest.raises(NotImplementedError, match="key_scale must not vary along the tokens and"):
        decode_attention(query, both, enable_gqa=True, backend="cpu")


def test_any_layout_is_read(tier: str) -> None:
    torch.manual_seed(0)
    query, key, value = _tensors(4, 2, 2, 50, 16, 16)
    spread = [
        torch.zeros(2, 80, 3, t.shape[1], 17)[:, : t.shape[2], 1, :, :16]
        for t in (query, key, value)
    ]
    views = [t.transpose(1, 2) for t in spread]
    for view, tensor in zip(views, (query, key, value), strict=True):
        view.copy_(tensor)
    _same(views[0], (views[1], views[2]), value_keep=0.3)
    columns = [t.mT.contiguous().mT for t in (query, key, value)]
    _same(columns[0], (columns[1], columns[2]))
    padding = torch.rand(50, 2).T < 0.5
    keep = torch.stack([torch.randperm(50) for _ in range(4)]).view(2, 2, 50)[..., ::2]
    _same(query, (key, value), key_padding=padding, keep=keep)


def test_rows_without_keys_give_zero(tier: str) -> None:
    query, key, value = _tensors(2, 1, 3, 2, 8, 8)
    cache = PlaneCache.from_tensors(key, value)
    for options in [{}, {"value_keep": 0.5}, {"progressive": 0.5, "renormalise": True}]:
        result = _same(query, cache, **options)
        assert (result.out[:, :, 0] == 0).all()  # three queries, two keys
        for keep in (torch.full((2, 1, 3), -1), torch.zeros(2, 2, 0, dtype=torch.int64)):
            assert (_same(query, cache, keep=keep, **options).out == 0).all()
        nothing = torch.zeros(2, 2, dtype=torch.bool)
        assert (_same(query, cache, key_padding=nothing, **options).out == 0).all()


def test_a_growing_cache_is_read_in_place(tier: str) -> None:
    torch.manual_seed(0)
    query, key, value = _tensors(2, 2, 1, 40, 16, 16)
    cache = PlaneCache.from_tensors(key[:, :, :20], value[:, :, :20], int8_values=True)
    for n in range(20, 40):
        cache = cache.append(key[:, :, n : n + 1], value[:, :, n : n + 1])
        _same(query, cache, progressive=0.1)


def test_calls_that_cannot_run_are_refused_with_the_reason() -> None:
    query, key, value = _tensors(2, 2, 1, 5, 8, 8)
    q64, k64, v64 = query.double(), key.double(), value.double()
    refused: list[tuple[Tensor, Any, str]] = [
        (q64, (k64, v64), "it computes in fp32, not for torch.float64"),
        (query, (key.requires_grad_(), value), "it has no gradients"),
        (query, PlaneCache.from_tensors(k64, v64), "values must be int8, fp32, bf16 or fp16"),
        (
            query,
            PlaneCache.from_tensors(key, value, lsb_bits=6),
            "the low plane must have at most 4 bits, got 6",
        ),
        (
            query[..., :7],
            PlaneCache.from_tensors(key[..., :7], value),
            "head_dim must be even with two planes, got 7",
        ),
    ]
    for q, cache, reason in refused:
        with pytest.raises(NotImplementedError, match=f"'cpu' cannot run this call: {reason}"):
            decode_attention(q, cache, backend="cpu")
        assert torch.isfinite(decode_attention(q, cache)).all()  # "auto" takes the other one
    with torch.no_grad():
        decode_attention(query, (key, value), backend="cpu")


def test_lists_that_name_no_key_are_refused(tier: str) -> None:
    query, key, value = _tensors(2, 2, 1, 9, 8, 8)
    for dtype in (torch.int64, torch.int32):
        keep = torch.zeros(2, 2, 40000, dtype=dtype)
        keep[1, 0, 39999], keep[1, 1, 5] = 9, -2
        with pytest.raises(IndexError, match="got 9 at batch 1, head 0, position 39999"):
            _decode(query, (key, value), keep=keep, backend="cpu")
    with pytest.raises(IndexError, match="got 4294967296 at batch 0, head 0, position 0"):
        _decode(query, (key, value), keep=torch.full((2, 1, 3), 1 << 32), backend="cpu")
    # Full vectors, too, look at each entry.
    for wrong in (9, -2, (1 << 32) + 3, -(1 << 32), (1 << 63) - 1, -(1 << 63)):
        for at in (0, 13, 18, 39):
            keep = (torch.arange(40) % 10 - 1).expand(2, 1, 40).clone()
            keep[1, 0, at] = wrong
            with pytest.raises(IndexError, match=f"got {wrong} at batch 1, head 0, position {at}"):
                _decode(query, (key, value), keep=keep, backend="cpu")
