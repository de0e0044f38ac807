"""Dense attention of the library against the reference in fp64, in every tier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.kernels import reference
from sparseloom.kernels.common import AttentionCall, ForwardResult
from sparseloom.kernels.cpu import dense

# Half precision: inputs are exact; probabilities may be rounded to bf16 before the values.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 1e-3}
SUMS = {torch.float32: 5e-6, torch.bfloat16: 3e-4, torch.float16: 5e-6}
DTYPES = list(TOLERANCE)


def _call(
    q_len: int,
    kv_len: int,
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 16,
    value_dim: int = 16,
    batch: int = 1,
    is_causal: bool = False,
    padding: Tensor | None = None,
    scale: float | None = None,
    size: float = 1.0,
) -> AttentionCall:
    query = torch.randn(batch, heads[0], q_len, head_dim).mul(size).to(dtype)
    key = torch.randn(batch, heads[1], kv_len, head_dim).to(dtype)
    value = torch.randn(batch, heads[1], kv_len, value_dim).to(dtype)
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        indices=None,
        offsets=None,
        block_size=(1, 1),
        key_padding=padding,
        is_causal=is_causal,
        scale=head_dim**-0.5 if scale is None else scale,
    )


def _wanted(call: AttentionCall) -> ForwardResult:
    exact = call._replace(
        query=call.query.double(), key=call.key.double(), value=call.value.double()
    )
    return reference.forward(exact, lse=True, importance=True)


def _check(call: AttentionCall) -> None:
    dtype = call.query.dtype
    got, wanted = dense.forward(call, lse=True, importance=True), _wanted(call)
    assert got.out.dtype == dtype
    assert got.lse is not None
    assert got.key_importance is not None
    assert got.head_importance is not None
    assert wanted.lse is not None
    near, sums = TOLERANCE[dtype], SUMS[dtype]
    torch.testing.assert_close(got.out.double(), wanted.out, rtol=near, atol=near)
    torch.testing.assert_close(got.lse.double(), wanted.lse, rtol=sums, atol=sums)
    torch.testing.assert_close(
        got.key_importance.double(), wanted.key_importance, rtol=5 * sums, atol=5 * sums
    )
    torch.testing.assert_close(
        got.head_importance.double(), wanted.head_importance, rtol=near, atol=near
    )
    plain = dense.forward(call, lse=False, importance=False)
    torch.testing.assert_close(plain.out.double(), wanted.out, rtol=near, atol=near)
    assert plain[1:] == (None, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "head_dim", "value_dim"),
    [
        (1, 1, 8, 8),
        (1, 300, 64, 64),
        (130, 70, 64, 64),
        (65, 193, 32, 96),
        (97, 161, 80, 40),
        (64, 128, 128, 256),
        (33, 95, 256, 8),
    ],
)
def test_equals_the_reference(
    tier: str,
    dtype: torch.dtype,
    is_causal: bool,
    q_len: int,
    kv_len: int,
    head_dim: int,
    value_dim: int,
) -> None:
    torch.manual_seed(0)
    call = _call(
        q_len,
        kv_len,
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        is_causal=is_causal,
    )
    _check(call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_that_grow_along_the_keys(tier: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    call = _call(40, 600, dtype=dtype, head_dim=64)
    grow = torch.linspace(0.1, 8, 600)[:, None].to(dtype)
    _check(call._replace(key=call.key * grow))
    _check(call._replace(key=call.key * grow.flip(0)))
    _check(call._replace(scale=-0.7))
    _check(call._replace(scale=0.0))


@settings(
    deadline=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_groups_padding_and_causality(tier: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, groups = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    q_len, kv_len = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 140))
    kept = data.draw(st.sampled_from([None, 0.0, 0.1, 0.9]))
    call = _call(
        q_len,
        kv_len,
        batch=batch,
        heads=(2 * groups, 2),
        dtype=data.draw(st.sampled_from(DTYPES)),
        head_dim=8 * data.draw(st.integers(1, 6)),
        value_dim=8 * data.draw(st.integers(1, 6)),
        is_causal=data.draw(st.booleans()),
        padding=None if kept is None else torch.rand(batch, kv_len) < kept,
    )
    _check(call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_give_zero(tier: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    padding = torch.ones(1, 70, dtype=torch.bool)
    padding[0, :5] = False
    call = _call(90, 70, dtype=dtype, is_causal=True, padding=padding)
    got = dense.forward(call, lse=True, importance=True)
    assert got.lse is not None
    assert got.key_importance is not None
    # Query 20 is the first that comes after a key, query 25 the first after one that is no padding.
    assert (got.out[:, :, :25] == 0).all()
    assert (got.lse[:, :, :25] == -torch.inf).all()
    assert (got.out[:, :, 25:] != 0).any(-1).all()
    assert (got.key_importance[:, :, :5] == 0).all()
    torch.testing.assert_close(
        got.key_importance.sum(-1), torch.full((1, 2), 65.0), rtol=1e-4, atol=0
    )


def test_error_of_bf16_is_that_of_rounding(tier: str) -> None:
    torch.manual_seed(0)
    call = _call(256, 512, dtype=torch.bfloat16, head_dim=64, value_dim=64)
    wanted = _wanted(call).out
    errors = [
        dense.forward(call, lse=lse, importance=False).out.double().sub(wanted).norm()
        for lse in (False, True)
    ]
    rounding = wanted.bfloat16().double().sub(wanted).norm()
    sdpa = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
    # SDPA rounds the probabilities to bf16, too.
    assert max(errors) < 1.2 * max(sdpa.double().sub(wanted).norm(), 1.3 * rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(tier: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = torch.randn(2, 75, 3, 2, 24).to(dtype)  # as one projection writes q, k and v
    query, key, value = (packed[:, :, i].transpose(1, 2) for i in range(3))
    call = _call(75, 75)._replace(query=query, key=key, value=value)
    _check(call)
    _check(call._replace(key=key.mT.contiguous().mT))
    _check(call._replace(value=value[:, :, :1].expand_as(value)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_row_or_reaches_all(tier: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    call = _call(70, 90, dtype=dtype)
    call.query[0, 0, 3, 1] = torch.nan
    out = dense.forward(call, lse=False, importance=False).out.isnan()
    assert out[0, 0, 3].all()
    assert out.sum() == 16
    call.key[0, 1, 50, 0] = torch.nan
    out = dense.forward(call, lse=False, importance=False).out.isnan()
    assert out[0, 1].all()


def test_threads_change_nothing(tier: str) -> None:
    torch.manual_seed(0)
    call = _call(300, 200, is_causal=True, heads=(4, 2))
    wanted = dense.forward(call, lse=True, importance=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = dense.forward(call, lse=True, importance=True)
    finally:
        torch.set_num_threads(before)
    pairs: list[tuple[Any, Any]] = list(zip(alone, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
