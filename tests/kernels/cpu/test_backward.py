"""Gradients from the C++ library against those of the reference in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.kernels import reference
from sparseloom.kernels.api import _checked_call
from sparseloom.kernels.common import AttentionCall, dropout_rows
from sparseloom.kernels.cpu.backward import backward
from sparseloom.mask import SparseMask

# Of the largest gradient of a tensor, or of 1. Half-precision gradients are rounded once, and so
# was `out`.
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def _random_call(
    q_len: int = 45,
    kv_len: int = 53,
    *,
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 16),
    block: tuple[int, int] | None = (8, 1),
    mask_heads: int = 2,
    mask_batch: int = 2,
    density: float = 0.3,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    causal: bool = False,
    padded: bool = False,
    dropout_p: float = 0.0,
) -> AttentionCall:
    torch.manual_seed(q_len + kv_len + dims[0])
    sizes = ((heads[0], q_len, dims[0]), (heads[1], kv_len, dims[0]), (heads[1], kv_len, dims[1]))
    inputs = [torch.randn(batch, *size).to(dtype) for size in sizes]
    mask = None
    if block is not None:
        grid = (mask_batch, mask_heads, -(-q_len // block[0]), -(-kv_len // block[1]))
        keep = torch.rand(grid) < density
        mask = SparseMask.from_block_bool(keep, block_size=block, q_len=q_len, kv_len=kv_len)
    padding = torch.rand(batch, kv_len) < 0.7 if padded else None
    call = _checked_call(*inputs, mask, causal, padding, None, dropout_p, True)
    return call._replace(seed=torch.tensor([7]))


def _in_fp64(call: AttentionCall) -> AttentionCall:
    query, key, value = (t.double() for t in (call.query, call.key, call.value))
    return call._replace(query=query, key=key, value=value)


def _check(call: AttentionCall, *, extras: bool = False) -> tuple[Tensor, ...]:
    """Compare with the reference; `extras` also differentiates lse and importances."""
    given_ = reference.forward(call, lse=True, importance=extras)
    exact = reference.forward(_in_fp64(call), lse=True, importance=extras)
    torch.manual_seed(1)
    grads = [None if t is None else torch.randn_like(t) for t in given_]
    if not extras:
        grads[1] = None
    assert given_.lse is not None
    assert exact.lse is not None
    got = backward(call, given_.out, given_.lse, *grads)  # type: ignore[arg-type]
    wide = [None if g is None else g.double() for g in grads]
    wanted = reference.backward(_in_fp64(call), exact.out, exact.lse, *wide)  # type: ignore[arg-type]
    for name, mine, right in zip(("query", "key", "value"), got, wanted, strict=True):
        assert mine.dtype == call.query.dtype
        # A row with one key has no gradient but what rounding leaves of its terms.
        size, error = right.abs().max().clamp(min=1.0), (mine.double() - right).abs().max()
        assert error <= _CLOSE[mine.dtype] * size, f"{name}: off by {error}"
    return got


@settings(
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), dropout_p=st.sampled_from([0.0, 0.4, 1.0]), extras=st.booleans())
def test_equals_reference(
    data: st.DataObject, dropout_p: float, extras: bool, draw_case: Any, tier: str
) -> None:
    case = draw_case(data, dtypes=(torch.float32,), longest=40)
    call = _checked_call(
        *case.inputs, case.mask, case.is_causal, case.key_padding, case.scale, dropout_p, True
    )
    _check(call._replace(seed=torch.tensor([11])), extras=extras)


@pytest.mark.parametrize("block", [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (5, 2), (64, 64), None])
def test_block_sizes(block: tuple[int, int] | None, tier: str) -> None:
    _check(_random_call(150, 170, block=block))
    _check(_random_call(150, 170, block=block, causal=True, padded=True), extras=True)


@pytest.mark.parametrize("dims", [(8, 8), (32, 64), (64, 32), (80, 96), (128, 24), (256, 256)])
def test_head_dims(dims: tuple[int, int], tier: str) -> None:
    _check(_random_call(dims=dims))
    _check(_random_call(dims=dims, block=(1, 1)))


@pytest.mark.parametrize("mask_heads", [1, 2, 6])
@pytest.mark.parametrize("mask_batch", [1, 2])
def test_shared_keys_and_shared_masks(mask_heads: int, mask_batch: int, tier: str) -> None:
    _check(_random_call(heads=(6, 2), mask_heads=mask_heads, mask_batch=mask_batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (24, 40)])
def test_half_precision(dtype: torch.dtype, dims: tuple[int, int], tier: str) -> None:
    _check(_random_call(dtype=dtype, dims=dims, heads=(4, 2)))
    _check(_random_call(dtype=dtype, dims=dims, causal=True, dropout_p=0.2), extras=True)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 70), (70, 1), (9, 130), (130, 9)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(q_len: int, kv_len: int, causal: bool, tier: str) -> None:
    for block in ((8, 1), (1, 1), (16, 16), None):
        _check(_random_call(q_len, kv_len, block=block, causal=causal, density=0.6))


def test_many_ranges_of_keys(tier: str) -> None:
    """More keys than the library keeps in the cache at once, in whole mask blocks."""
    for block in ((8, 1), (16, 48), None):
        causal = block != (16, 48)
        _check(
            _random_call(
                33, 3001, block=block, dims=(64, 64), heads=(2, 1), batch=1, mask_batch=1,
                causal=causal, padded=True,
            )
        )  # fmt: skip


def test_dropout_drops_what_the_reference_drops(tier: str) -> None:
    """With one-hot gradients of the output, the value gradients are the dropped probabilities."""
    for block in ((1, 1), (8, 1)):
        call = _random_call(16, 80, block=block, density=1.0, dropout_p=0.3)
        grad_out = torch.eye(16).expand(2, 2, 16, 16)
        result = reference.forward(call, lse=True, importance=False)
        assert result.lse is not None
        grads = backward(call, result.out, result.lse, grad_out, None, None, None)
        assert torch.equal(grads[2].mT != 0, dropout_rows(call, 0, 16, 80))


def test_rows_and_calls_without_keys(tier: str) -> None:
    empty = _random_call(density=0.0)
    assert all(not g.any() for g in _check(empty, extras=True))
    _check(_random_call(density=0.02), extras=True)
    nothing = _random_call(padded=True)
    assert nothing.key_padding is not None
    unseen = nothing._replace(key_padding=torch.zeros_like(nothing.key_padding))
    assert all(not g.any() for g in _check(unseen))


def test_directional_derivative(tier: str) -> None:
    call = _random_call(9, 11, dims=(8, 8), heads=(4, 2), causal=True, density=0.7)
    result = reference.forward(call, lse=True, importance=False)
    assert result.lse is not None
    torch.manual_seed(5)
    weights = torch.randn_like(result.out)
    grads = backward(call, result.out, result.lse, weights, None, None, None)
    wide, names = _in_fp64(call), ("query", "key", "value")
    for name, grad in zip(names, grads, strict=True):
        step = torch.randn_like(grad).double()
        ends = [
            (_out(wide._replace(**{name: getattr(wide, name) + sign * step})) * weights).sum()
            for sign in (1e-5, -1e-5)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((grad * step).sum(), slope, rtol=1e-4, atol=1e-5)


def _out(call: AttentionCall) -> Tensor:
    return reference.forward(call, lse=False, importance=False).out


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_with_the_same_bits_each_time(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in (
            _random_call(100, 90, heads=(4, 1), batch=1, mask_batch=1),
            _random_call(100, 90, heads=(1, 1), batch=1, mask_batch=1, mask_heads=1, causal=True),
            _random_call(100, 90, heads=(1, 1), batch=1, block=None, dtype=torch.bfloat16),
            _random_call(3, 90, heads=(1, 1), batch=1, mask_batch=1, mask_heads=1),
        ):
            for first, second in zip(_check(call), _check(call), strict=True):
                assert torch.equal(first, second)
    finally:
        torch.set_num_threads(before)


def test_strided_inputs(tier: str) -> None:
    call = _random_call(dims=(64, 64))
    plain = _check(call)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in call[:3]]
    behind = [torch.cat([t, t], -1)[..., 64:] for t in call[:3]]
    across = [t.mT.contiguous().mT for t in call[:3]]
    for query, key, value in (apart, behind, across):
        moved = _check(call._replace(query=query, key=key, value=value))
        for got, wanted in zip(moved, plain, strict=True):
            torch.testing.assert_close(got, wanted)


def test_fp64_is_refused() -> None:
    call = _in_fp64(_random_call())
    result = reference.forward(call, lse=True, importance=False)
    assert result.lse is not None
    with pytest.raises(TypeError, match=r"query must be fp32, bf16 or fp16, got torch\.float64"):
        backward(call, result.out, result.lse, result.out, None, None, None)
