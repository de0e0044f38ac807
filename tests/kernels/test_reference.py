"""The reference backend against loops over numbers, against autograd and against SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.kernels import attention, common, reference
from sparseloom.kernels.api import AttentionOutput, _checked_call
from sparseloom.mask import SparseMask

_quick = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
_EPSILON = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def _call(case: Any, *inputs: Tensor) -> common.AttentionCall:
    return _checked_call(
        *(inputs or case.inputs), case.mask, case.is_causal, case.key_padding, case.scale, 0.0, True
    )


@settings(_quick, max_examples=60)
@given(data=st.data())
def test_equals_loops_over_numbers(data: st.DataObject, draw_case: Any, naive: Any) -> None:
    case = draw_case(data, dtypes=tuple(_EPSILON))
    result = attention(
        *case.inputs,
        case.mask,
        **case.options,
        return_lse=True,
        return_importance=True,
        backend="reference",
    )
    assert isinstance(result, AttentionOutput)
    assert result.out.dtype == case.query.dtype
    # Sums are held in fp32 at least; only the output is rounded to the dtype of the inputs.
    exact = 1e-12 if case.query.dtype == torch.float64 else 1e-5
    rounding = _EPSILON[case.query.dtype]
    for got, wanted in zip(result, naive(case), strict=True):
        assert got is not None
        if got is result.out:
            allowed = exact + rounding * wanted.abs()
        else:
            assert got.dtype == (torch.float64 if exact == 1e-12 else torch.float32)
            allowed = exact * (1 + wanted.abs())
        same = (got == wanted) | ((got - wanted).abs() <= allowed)  # -inf equals -inf
        assert same.all()


@settings(_quick, max_examples=20)
@given(data=st.data(), dropout_p=st.sampled_from([0.0, 0.4, 1.0]))
def test_backward_is_the_derivative_of_forward(
    data: st.DataObject, draw_case: Any, dropout_p: float
) -> None:
    case = draw_case(data)
    leaves = case.leaves()
    call = _call(case, *leaves)._replace(dropout_p=dropout_p, seed=torch.tensor([7]))
    result = reference.forward(call, lse=True, importance=True)
    out, lse = result.out, result.lse
    assert lse is not None
    grads = [torch.randn_like(t) for t in result if t is not None]
    with torch.no_grad():
        by_hand = reference.backward(call, out, lse, *grads)
    outputs = [t for t in result if t is not None]
    pairs = [(t.masked_fill(t == -torch.inf, 0), g) for t, g in zip(outputs, grads, strict=True)]
    by_autograd = torch.autograd.grad([t for t, _ in pairs], leaves, [g for _, g in pairs])
    for name, got, wanted in zip("qkv", by_hand, by_autograd, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11, msg=name)


def test_gradcheck_first_and_second_order(make_case: Any) -> None:
    case = make_case(q_len=4, kv_len=4, heads=2, head_dim=1)

    def everything(*inputs: Tensor) -> tuple[Tensor, ...]:
        result = reference.forward(_call(case, *inputs), lse=True, importance=True)
        assert result.lse is not None
        finite = result.lse.masked_fill(result.lse == -torch.inf, 0)
        return result.out, finite, result.key_importance, result.head_importance  # type: ignore[return-value]

    assert torch.autograd.gradcheck(everything, case.leaves())
    assert torch.autograd.gradgradcheck(everything, case.leaves())


def test_gradcheck_of_the_operator_with_dropout(make_case: Any) -> None:
    case = make_case(q_len=4, kv_len=4, heads=2, head_dim=1)

    def everything(*inputs: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        result = attention(
            *inputs,
            case.mask,
            **case.options,
            dropout_p=0.3,
            return_lse=True,
            return_importance=True,
            backend="reference",
        )
        assert isinstance(result, AttentionOutput)
        assert result.lse is not None
        finite = result.lse.masked_fill(result.lse == -torch.inf, 0)
        return result.out, finite, result.key_importance, result.head_importance  # type: ignore[return-value]

    assert torch.autograd.gradcheck(everything, case.leaves())


def test_second_derivative_of_the_operator_says_that_there_is_none(make_case: Any) -> None:
    case = make_case()
    leaves = case.leaves()
    out = attention(*leaves, case.mask, **case.options)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grads[0].sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_keys_give_zero_and_no_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 5, 4, dtype=dtype, requires_grad=True) for _ in range(3)]
    keep = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    keep[..., 2, :] = False
    padding = torch.tensor([[True] * 5, [False] * 5])
    out = attention(*inputs, SparseMask.from_bool(keep), key_padding=padding)
    assert (out[:, :, 2] == 0).all()
    assert (out[1] == 0).all()
    assert (out[0, :, 3] != 0).all()
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, 2] == 0).all()
    assert all((g[1] == 0).all() for g in grads)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, make_case: Any, rows: int) -> None:
    case = make_case(block=(3, 2))
    leaves = case.leaves()

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        result = attention(
            *leaves,
            case.mask,
            **case.options,
            dropout_p=0.4,
            return_lse=True,
            return_importance=True,
        )
        loss = sum(t.exp().sum() for t in result if t is not None)
        return [t for t in result if t is not None] + list(torch.autograd.grad(loss, leaves))

    whole = run()
    seen: list[tuple[int, int, int]] = []
    chunks: Callable[..., Any] = common.row_chunks
    monkeypatch.setattr(common, "CHUNK_ELEMENTS", rows * 2 * 4 * 9)
    monkeypatch.setattr(
        reference, "row_chunks", lambda call: [seen.append(c) or c for c in chunks(call)]
    )
    for got, wanted in zip(run(), whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    assert len(seen) == 2 * -(-7 // rows)  # forward and backward
    assert all(end - first <= rows for first, end, _ in seen)


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_full_mask_equals_sdpa(kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, 65, 16)
    k, v = torch.randn(2, kv_heads, 65, 16), torch.randn(2, kv_heads, 65, 24)
    for causal in (False, True):
        full = SparseMask.full(65, 65, block_size=(8, 8))
        out = attention(q, k, v, full, is_causal=causal, enable_gqa=True, backend="reference")
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        assert (out - wanted).abs().max() < 1e-5


def test_dropout_bits_are_splitmix64_of_the_pair(make_case: Any) -> None:
    case = make_case()
    seed, p = (1 << 62) - 12345, 0.3
    call = _call(case)._replace(dropout_p=p, seed=torch.tensor([seed]))
    got = common.dropout_rows(call, 2, 5, 8)
    heads, q_len, kv_len = 4, 7, 9
    wrap = (1 << 64) - 1
    for b, h, i, j in [(0, 0, 2, 0), (0, 3, 4, 7), (1, 2, 3, 5), (1, 3, 4, 7)]:
        pair = ((b * heads + h) * q_len + i) * kv_len + j
        z = (seed + 0x9E3779B97F4A7C15 * pair) & wrap
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        z ^= z >> 31
        assert bool(got[b, h, i - 2, j]) == ((z >> 40) >= round(p * (1 << 24)))


def test_dropout_rate_scale_and_seed() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 96, 8), torch.randn(1, 4, 96, 8), torch.ones(1, 4, 96, 1)
    full = SparseMask.full(96, 96)

    def run(p: float) -> Tensor:
        return attention(q, k, v, full, dropout_p=p, scale=0.0)  # type: ignore[return-value]

    torch.manual_seed(1)
    first, second = run(0.25), run(0.25)
    torch.manual_seed(1)
    assert torch.equal(run(0.25), first)
    assert not torch.equal(first, second)
    # Each output is the mean of 96 values 0 or 1/(1 - p): 384 rows have mean 1 and a known spread.
    spread = (0.25 / 0.75 / 96) ** 0.5
    assert abs(first.mean() - 1) < 4 * spread / 384**0.5
    assert 0.8 * spread < first.std() < 1.2 * spread
    assert (run(1.0) == 0).all()
    assert torch.allclose(run(0.0), torch.ones_like(first))


def test_importance_sums_count_rows_and_magnitudes(make_case: Any) -> None:
    case = make_case(padded=False, is_causal=False)
    result = attention(*case.inputs, case.mask, enable_gqa=True, return_importance=True)
    assert isinstance(result, AttentionOutput)
    assert result.lse is None
    assert result.key_importance is not None
    rows_with_keys = case.mask.expand(2, 4).counts.gt(0).repeat_interleave(2, -1)[..., :7].sum(-1)
    torch.testing.assert_close(result.key_importance.sum(-1), rows_with_keys.double())
    torch.testing.assert_close(result.head_importance, result.out.abs().sum((2, 3)))
