"""Decoding in Triton against the plain PyTorch form in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseloom.kernels import DecodeOutput, PlaneCache, decode_attention

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
pytestmark = pytest.mark.usefixtures("device")


def _double(cache: Any) -> Any:
    if not isinstance(cache, PlaneCache):
        return tuple(tensor.double() for tensor in cache)
    value = cache.value if cache.value_scale is not None else cache.value.double()
    scale = None if cache.value_scale is None else cache.value_scale.double()
    return replace(cache, key_scale=cache.key_scale.double(), value=value, value_scale=scale)


def _same(query: Tensor, cache: Any, **options: Any) -> DecodeOutput:
    """Checks all outputs and returns them."""
    options = {"enable_gqa": True, "return_importance": True, "return_stats": True, **options}
    got = decode_attention(query, cache, backend="triton", **options)
    wanted = decode_attention(query.double(), _double(cache), backend="reference", **options)
    assert isinstance(got, DecodeOutput)
    assert isinstance(wanted, DecodeOutput)
    assert got.out.dtype == query.dtype
    assert got.stats is not None
    assert wanted.stats is not None
    rtol = TOLERANCE[query.dtype]
    torch.testing.assert_close(got.out.double(), wanted.out, rtol=rtol, atol=rtol)
    for ours, theirs in zip(got[1:3], wanted[1:3], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=max(1e-4, rtol), atol=1e-4)
    for ours, theirs in zip(got.stats, wanted.stats, strict=True):
        assert torch.equal(ours, theirs)
    return got


def _tensors(
    device: torch.device, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(kv_len)
    sizes = ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, 24))
    query, key, value = (torch.randn(2, *size).to(device) for size in sizes)
    return query, key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "q_len"), [(4, 2, 1), (3, 3, 3)])
def test_plain_caches(
    dtype: torch.dtype, heads: int, kv_heads: int, q_len: int, device: torch.device
) -> None:
    query, key, value = (t.to(dtype) for t in _tensors(device, heads, kv_heads, q_len, 150))
    padding = torch.rand(2, 150, device=device) < 0.7
    padding[1] = False  # nothing to attend to
    got = _same(query, (key, value), key_padding=padding)
    assert (got.out[1] == 0).all()


@pytest.mark.parametrize(
    ("bits", "stored", "dtype"),
    [
        ((8, 0), "int8", torch.float32),
        ((4, 4), "int8", torch.bfloat16),
        ((8, 4), "float16", torch.float16),
        ((12, 4), "float32", torch.float32),
    ],
)
@pytest.mark.parametrize("progressive", [None, 0.12])
def test_planes(
    bits: tuple[int, int],
    stored: str,
    dtype: torch.dtype,
    progressive: float | None,
    device: torch.device,
) -> None:
    if progressive is not None and not bits[1]:
        pytest.skip("one plane has nothing to fetch")
    query, key, value = _tensors(device, 4, 2, 2, 70)
    query = (query * torch.tensor([0.3, 1.0, 2.0, 4.0], device=device)[:, None, None]).to(dtype)
    cache = PlaneCache.from_tensors(
        key,
        value if stored == "int8" else value.to(getattr(torch, stored)),
        msb_bits=bits[0],
        lsb_bits=bits[1],
        midpoint=bits[0] == 8,
        int8_values=stored == "int8",
    )
    got = _same(query, cache, progressive=progressive)
    if progressive is not None:
        assert got.stats is not None
        assert 0 < int(got.stats.refetched.sum()) < got.stats.refetched.numel()


@pytest.mark.parametrize("keep_heads", [1, 2, 4])
def test_kept_keys_and_values(keep_heads: int, device: torch.device) -> None:
    query, key, value = _tensors(device, 4, 2, 2, 90)
    torch.manual_seed(0)
    keep = torch.rand(2, keep_heads, 90).argsort(-1)[..., :75]
    keep[torch.rand(keep.shape) < 0.2] = -1
    cache = PlaneCache.from_tensors(key, value, int8_values=True)
    for index, value_keep, renormalise in [(torch.int64, 0.29, False), (torch.int16, 0.01, True)]:
        _same(
            query,
            cache,
            keep=keep.to(device, index),
            value_keep=value_keep,
            renormalise=renormalise,
            progressive=0.1,
        )


def test_equal_probabilities_read_the_first_values(device: torch.device) -> None:
    query, key, value = _tensors(device, 2, 1, 1, 70)
    got = _same(query, (key, value), value_keep=0.2, scale=0.0)
    expected = value[:, :, :14].sum(2) / 70
    torch.testing.assert_close(got.out[:, 1], expected)


def test_scales_of_tokens_and_of_dims(device: torch.device) -> None:
    query, key, value = _tensors(device, 2, 1, 1, 40)
    codes = (key * 20).round().clamp(-127, 127).to(torch.int8)
    values = (value * 20).round().clamp(-127, 127).to(torch.int8)
    for shape, value_shape in [((2, 1, 40, 1), (1, 1, 1, 24)), ((1, 1, 1, 16), (2, 1, 40, 1))]:
        scales = [0.02 + 0.05 * torch.rand(s, device=device) for s in (shape, value_shape)]
        cache = PlaneCache(codes, None, scales[0], values, 8, 0, value_scale=scales[1])
        _same(query, cache)


def test_a_long_cache_is_cut_in_parts(device: torch.device) -> None:
    query, key, value = _tensors(device, 2, 1, 1, 700)
    cache = PlaneCache.from_tensors(key[:1], value[:1])
    _same(query[:1], cache, value_keep=0.1, progressive=0.5)


def test_what_cannot_run_is_said(device: torch.device) -> None:
    query, key, value = _tensors(device, 2, 1, 1, 20)
    keep = torch.zeros(2, 1, 3, dtype=torch.int64, device=device)
    keep[1, 0, 2] = 20
    with pytest.raises(IndexError, match="got 20 at batch 1, head 0, position 2"):
        decode_attention(query, (key, value), keep=keep, enable_gqa=True, backend="triton")
    with pytest.raises(NotImplementedError, match="'triton' cannot run this call: it computes in"):
        decode_attention(
            *(query.double(), (key.double(), value.double())), enable_gqa=True, backend="triton"
        )
    with pytest.raises(NotImplementedError, match="it has no gradients"):
        decode_attention(query.requires_grad_(), (key, value), enable_gqa=True, backend="triton")
    wide = torch.zeros(1, 1, 1, 264, device=device)
    with pytest.raises(NotImplementedError, match="head_dim of at most 256, got 264"):
        decode_attention(wide, (wide, wide), backend="triton")
