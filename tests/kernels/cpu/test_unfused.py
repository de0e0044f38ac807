"""SDDMM, softmax and SpMM of the library against their PyTorch forms, in every tier."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.kernels import sddmm, sparse_softmax, spmm, unfused
from sparseloom.kernels.cpu import unfused as cpu
from sparseloom.mask import SparseMask

BLOCKS = [(1, 1), (1, 5), (2, 1), (3, 2), (4, 1), (8, 1), (16, 1), (5, 7), (16, 16), (70, 60)]


def _mask(
    q_len: int, kv_len: int, block: tuple[int, int], density: float, *, batch: int, heads: int
) -> SparseMask:
    keep = torch.rand(batch, heads, -(-q_len // block[0]), -(-kv_len // block[1])) < density
    return SparseMask.from_block_bool(keep, block_size=block, q_len=q_len, kv_len=kv_len)


def _by_torch(run: Callable[[], Tensor]) -> Tensor:
    """What the PyTorch form returns."""
    takes = cpu.takes
    try:
        cpu.takes = lambda *_: False
        return run()
    finally:
        cpu.takes = takes


def _check(run: Callable[[], Tensor], tolerance: float) -> Tensor:
    got, wanted = run(), _by_torch(run)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    return wanted


@settings(
    deadline=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_equal_their_pytorch_forms(tier: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, groups, kv_heads = (data.draw(st.integers(1, 2)) for _ in range(3))
    q_len, kv_len = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    head_dim, value_dim = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 140))
    heads = groups * kv_heads
    block = data.draw(st.sampled_from(BLOCKS))
    density = data.draw(st.sampled_from([0.02, 0.3, 1.0]))
    mask = _mask(q_len, kv_len, block, density, batch=batch, heads=heads)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    query = torch.randn(batch, heads, q_len, head_dim).to(dtype)
    key = torch.randn(batch, kv_heads, kv_len, head_dim).to(dtype)
    value = torch.randn(batch, kv_heads, kv_len, value_dim).to(dtype)
    padding = torch.rand(batch, kv_len) < 0.7 if data.draw(st.booleans()) else None
    is_causal = data.draw(st.booleans())
    scores = _check(lambda: sddmm(query, key, mask, is_causal=is_causal, key_padding=padding), 2e-6)
    probs = _check(lambda: sparse_softmax(scores, mask), 2e-6)
    _check(lambda: spmm(probs, mask, value), 2e-6 if dtype == torch.float32 else 8e-3)


def test_the_library_answers_only_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mask = _mask(9, 11, (4, 1), 0.5, batch=1, heads=2)
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 11, 8)
    calls: list[Tensor] = []
    real = cpu.sddmm
    monkeypatch.setattr(cpu, "sddmm", lambda *a, **k: calls.append(a[0]) or real(*a, **k))
    sddmm(query, key, mask)
    assert len(calls) == 1
    sddmm(query.double(), key.double(), mask)
    leaf = query.clone().requires_grad_()
    scores = sddmm(leaf, key, mask)
    assert len(calls) == 1
    assert scores.requires_grad
    with torch.no_grad():
        sddmm(leaf, key, mask)
    assert len(calls) == 2


def test_rows_without_keys_and_extreme_scores(tier: str) -> None:
    keep = torch.zeros(1, 1, 6, 40, dtype=torch.bool)
    keep[..., 1, :] = keep[..., 3, 5:8] = keep[..., 4, ::3] = True
    mask = SparseMask.from_bool(keep)
    values = torch.randn(mask.nnz, 1, 1) * 200
    values[:20] = -torch.inf
    values[40:43] = -torch.inf
    probs = _check(lambda: sparse_softmax(values, mask), 1e-6)
    assert (probs[40:43] == 0).all()
    value = torch.randn(1, 1, 40, 24)
    out = _check(lambda: spmm(probs, mask, value), 1e-6)
    assert (out[0, 0, [0, 2, 3, 5]] == 0).all()
    values[50] = torch.nan
    assert sparse_softmax(values, mask)[43:].isnan().all()


def test_any_strides(tier: str) -> None:
    torch.manual_seed(0)
    mask = _mask(30, 40, (8, 1), 0.4, batch=2, heads=3)
    query = torch.randn(2, 30, 3, 16).transpose(1, 2)
    key = torch.randn(2, 1, 16, 40).mT
    scores = _check(lambda: sddmm(query, key, mask), 1e-6)
    probs = _check(lambda: sparse_softmax(scores, mask), 1e-6)
    _check(lambda: spmm(probs.mT.contiguous().mT, mask, key.expand(2, 3, 40, 16)), 1e-6)


def test_dtypes_of_values_are_kept() -> None:
    mask = SparseMask.full(4, 4)
    values = torch.rand(16, 1, 1, dtype=torch.bfloat16)
    assert unfused.sparse_softmax(values, mask).dtype == torch.bfloat16
