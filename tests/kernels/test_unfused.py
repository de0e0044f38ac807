"""SDDMM, sparse softmax and SpMM: together the fused attention, alone their definitions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.kernels import attention, sddmm, sparse_softmax, spmm, unfused
from sparseloom.mask import SparseMask


def _composed(case: Any, mask: SparseMask, *inputs: Tensor) -> Tensor:
    q, k, v = inputs
    options = {name: value for name, value in case.options.items() if name != "enable_gqa"}
    return spmm(sparse_softmax(sddmm(q, k, mask, **options), mask), mask, v)


@settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_composed_equals_fused(data: st.DataObject, draw_case: Any) -> None:
    case = draw_case(data, masked=True, dtypes=(torch.float64, torch.float32, torch.bfloat16))
    mask = case.mask.expand(case.query.shape[0], case.query.shape[1])
    got = _composed(case, mask, *case.inputs)
    wanted = attention(*case.inputs, case.mask, **case.options, backend="reference")
    assert isinstance(wanted, Tensor)
    assert got.dtype == wanted.dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[got.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_gradients_equal_the_fused_ones_in_chunks_too(
    make_case: Any, monkeypatch: pytest.MonkeyPatch, block: tuple[int, int]
) -> None:
    case = make_case(block=block)
    mask = case.mask.expand(2, 4)
    leaves = case.leaves()
    fused = attention(*leaves, case.mask, **case.options)
    assert isinstance(fused, Tensor)
    weight = torch.randn_like(fused)
    wanted = torch.autograd.grad(fused, leaves, weight)
    monkeypatch.setattr(unfused, "CHUNK_ELEMENTS", 64)
    got = torch.autograd.grad(_composed(case, mask, *leaves), leaves, weight)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck_first_and_second_order(make_case: Any) -> None:
    case = make_case(q_len=3, kv_len=4, heads=2, head_dim=1)
    mask = case.mask.expand(2, 2)
    leaves = case.leaves()
    assert torch.autograd.gradcheck(lambda *t: _composed(case, mask, *t), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: _composed(case, mask, *t), leaves)


def test_value_layout() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    keep = torch.tensor([[[[True, False, True], [False, True, False]]]])
    mask = SparseMask.from_block_bool(keep, block_size=(2, 2), q_len=3, kv_len=5)
    values = sddmm(q, k, mask, scale=1.0)
    scores = q[0, 0] @ k[0, 0].T
    assert values.shape == (3, 2, 2)
    torch.testing.assert_close(values[0], scores[:2, :2])
    torch.testing.assert_close(values[1, :, 0], scores[:2, 4])  # key block 2 is cut after key 4
    assert (values[1, :, 1] == -torch.inf).all()
    torch.testing.assert_close(values[2, 0], scores[2, 2:4])
    assert (values[2, 1] == -torch.inf).all()  # query block 1 is cut after query 2
    probs = sparse_softmax(values, mask)
    torch.testing.assert_close(probs[0, 0].sum() + probs[1, 0].sum(), torch.tensor(1.0))
    assert (probs[2, 1] == 0).all()


def test_a_mask_that_keeps_nothing() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    empty = SparseMask.from_bool(torch.zeros(1, 2, 3, 3, dtype=torch.bool))
    out = spmm(sparse_softmax(sddmm(q, q, empty), empty), empty, q)
    assert (out == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert (grad == 0).all()


def test_autocast_does_not_reach_the_sums(make_case: Any) -> None:
    case = make_case(dtype=torch.float32)
    mask = case.mask.expand(2, 4)
    plain = _composed(case, mask, *case.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_composed(case, mask, *case.inputs), plain)


def test_what_does_not_fit_is_named() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    shared, own = SparseMask.full(3, 5), SparseMask.full(3, 5, batch=2, heads=4)
    product, softmax, out = (inspect.unwrap(f) for f in (sddmm, sparse_softmax, spmm))
    with pytest.raises(ValueError, match=r"query must have shape \(1, .*mask.expand"):
        product(q, k, shared)
    with pytest.raises(ValueError, match=r"query must have 4 heads as the mask, got 2"):
        product(q[:, :2], k, own)
    with pytest.raises(ValueError, match="key must have a number of heads that divides the 4"):
        product(q, k.repeat(1, 2, 1, 1)[:, :3], own)
    with pytest.raises(ValueError, match="key must have head_dim 8 as query, got 7"):
        product(q, k[..., :7], own)
    with pytest.raises(TypeError, match="key_padding must be bool"):
        product(q, k, own, key_padding=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"key_padding must have shape \(2, 5\), got \(2, 4\)"):
        product(q, k, own, key_padding=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"values must have shape \(120, 1, 1\)"):
        softmax(torch.zeros(119, 1, 1), own)
    with pytest.raises(ValueError, match=r"value must have shape \(2, heads, 5, dim\)"):
        out(torch.zeros(120, 1, 1), own, k[:, :, :4])
