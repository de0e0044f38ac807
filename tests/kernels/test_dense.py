"""The dense backend: SDPA with bottom-right causality, padding and rows without keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.kernels import attention


@settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_equals_the_reference(data: st.DataObject, draw_case: Any) -> None:
    case = draw_case(data, dtypes=(torch.float64, torch.float32, torch.bfloat16), masked=False)
    got = attention(*case.inputs, **case.options, backend="dense")
    wanted = attention(*(t.double() for t in case.inputs), **case.options, backend="reference")
    assert isinstance(got, Tensor)
    assert got.dtype == case.query.dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[got.dtype]
    assert ((got - wanted).abs() <= tolerance * (1 + wanted.abs())).all()


def test_one_query_sees_the_whole_cache() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 6, 4)
    got = attention(q, k, k, is_causal=True)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, k))
    top_left = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    assert (got - top_left).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_keys_give_zero_and_no_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 2, 6, 4, dtype=dtype, requires_grad=True)
    k = torch.randn(2, 2, 4, 4, dtype=dtype, requires_grad=True)
    padding = torch.tensor([[False, True, True, True], [True, True, True, False]])
    out = attention(q, k, k, is_causal=True, key_padding=padding, backend="dense")
    assert isinstance(out, Tensor)
    # Queries 0 and 1 come before every key; in the first sequence query 2 sees only padding.
    assert (out[:, :, :2] == 0).all()
    assert (out[0, :, 2] == 0).all()
    assert (out[1, :, 2] != 0).all()
    grads = torch.autograd.grad(out.float().square().sum(), (q, k))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, :2] == 0).all()


def test_dropout_reaches_sdpa() -> None:
    q = torch.zeros(1, 1, 64, 4)
    v = torch.ones(1, 1, 64, 1)
    torch.manual_seed(0)
    out = attention(q, q, v, dropout_p=0.5)
    assert isinstance(out, Tensor)
    assert 0.8 < out.mean() < 1.2
    assert out.std() > 0.05
