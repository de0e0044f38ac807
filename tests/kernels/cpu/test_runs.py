"""Whole tiles and means in one pass of the library, against the reference of regions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.kernels import regions as kernels
from sparseloom.kernels.api import AttentionOutput
from sparseloom.kernels.cpu.runs import key_runs
from sparseloom.kernels.regions import RegionPlan, plan_regions, region_attention, valid_keys
from sparseloom.regions import HeadRegions, Mode, Region, band, block, dilated, rows, stripe

# Output and log-sum-exp; bf16 rounds means and probabilities to bf16 before the products.
NEAR = {
    torch.float32: (5e-6, 5e-6),
    torch.bfloat16: (2e-2, 5e-3),
    torch.float16: (1e-3, 1e-5),
}
DTYPES = list(NEAR)
Three = tuple[Tensor, Tensor, Tensor]
_few = settings(
    deadline=None,
    derandomize=True,
    max_examples=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def _inputs(
    q_len: int,
    kv_len: int,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (2, 2),
    batch: int = 2,
    dims: tuple[int, int] = (16, 16),
) -> Three:
    generator = torch.Generator().manual_seed(q_len + kv_len)
    sizes = (
        (batch, heads[0], q_len, dims[0]),
        (batch, heads[1], kv_len, dims[0]),
        (batch, heads[1], kv_len, dims[1]),
    )
    query, key, value = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return query, key, value


def _coarse(first: int, width: int, segment: int) -> Region:
    return stripe(first, width, mode=Mode.COARSE, segment=segment)


def _check(inputs: Three, plan: RegionPlan, **options: Any) -> AttentionOutput:
    """The output with and without log-sum-exp, which take different ways on AMX."""
    near, sums = NEAR[inputs[0].dtype]
    query, key, value = (x.double() for x in inputs)
    slow = region_attention(
        query, key, value, plan, return_lse=True, backend="reference", **options
    )
    fast = region_attention(*inputs, plan, return_lse=True, **options)
    plain = region_attention(*inputs, plan, **options)
    assert isinstance(slow, AttentionOutput)
    assert isinstance(fast, AttentionOutput)
    assert isinstance(plain, Tensor)
    assert fast.out.dtype == plain.dtype == inputs[0].dtype
    assert fast.lse is not None
    assert slow.lse is not None
    torch.testing.assert_close(fast.out.double(), slow.out, rtol=near, atol=near)
    torch.testing.assert_close(plain.double(), slow.out, rtol=near, atol=near)
    torch.testing.assert_close(fast.lse.double(), slow.lse, rtol=sums, atol=sums)
    return fast


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if some part of a plan is computed by itself."""

    def refuse(*_: object) -> None:
        raise AssertionError("a part was computed by itself")

    monkeypatch.setattr(kernels, "_run", refuse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "dims"),
    [(1, 45, (8, 8)), (130, 150, (64, 64)), (97, 333, (40, 72)), (80, 600, (32, 128))],
)
def test_means_and_keys_share_one_softmax(
    tier: str, one_pass: None, dtype: torch.dtype, q_len: int, kv_len: int, dims: tuple[int, int]
) -> None:
    heads = (
        (rows(0, 1, kv_len), band(-32, 80), _coarse(0, 2048, 4)),
        (stripe(0, 32), block(0, 3, 96, 128), _coarse(32, 128, 8), _coarse(160, 2048, 2)),
    )
    _check(_inputs(q_len, kv_len, dtype, dims=dims), plan_regions(heads, q_len, kv_len))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segment", [2, 4, 8])
def test_padding_shortens_segments(
    tier: str, one_pass: None, dtype: torch.dtype, segment: int
) -> None:
    n = 300
    plan = plan_regions([(band(0, 16), _coarse(0, 320, segment))], n, n)
    inputs = _inputs(n, n, dtype, batch=4)
    scattered = torch.rand(n, generator=torch.Generator().manual_seed(2)) < 0.5
    lengths = valid_keys([n, 13, 257], n)
    padding = torch.cat([lengths, scattered[None]])
    for x in inputs[1:]:
        x.masked_fill_(~padding[:, None, :, None], torch.inf if segment == 2 else 7.0)
    if segment == 2:  # keys that are met one by one may not be infinite
        plan = plan_regions([(_coarse(0, 320, segment),)], n, n)
    found = region_attention(*inputs, plan, key_padding=padding)
    assert isinstance(found, Tensor)
    near = NEAR[dtype][0]
    query, key, value = (torch.where(x.isfinite(), x, 0) for x in inputs)
    wanted = _check((query, key, value), plan, key_padding=padding).out
    torch.testing.assert_close(found, wanted, rtol=near, atol=near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_means_lie_before_their_queries(
    tier: str, one_pass: None, dtype: torch.dtype
) -> None:
    heads = ((band(-64, 112), _coarse(0, 2048, 8)), (band(-16, 48), _coarse(0, 2048, 2)))
    for q_len, kv_len in ((200, 200), (70, 300), (150, 90)):
        plan = plan_regions(heads, q_len, kv_len, is_causal=True)
        _check(_inputs(q_len, kv_len, dtype), plan)
    inputs = _inputs(200, 200, dtype)
    plan = plan_regions(heads, 200, 200, is_causal=True)
    before = region_attention(*inputs, plan)
    for x in inputs:
        x[:, :, 150:] = 3.0
    after = region_attention(*inputs, plan)
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    torch.testing.assert_close(after[:, :, :150], before[:, :, :150], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_heads_share_key_heads_and_masks(
    tier: str, one_pass: None, dtype: torch.dtype
) -> None:
    inputs = _inputs(120, 120, dtype, heads=(8, 2))
    heads = tuple((band(0, 16 * h + 16), _coarse(0, 128, 2 << h % 3)) for h in range(4))
    _check(inputs, plan_regions(heads, 120, 120), enable_gqa=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_give_nothing(tier: str, one_pass: None, dtype: torch.dtype) -> None:
    inputs = _inputs(100, 96, dtype)
    heads = ((stripe(32, 32), _coarse(64, 32, 4)),)
    padding = valid_keys([20, 96], 96)
    found = _check(inputs, plan_regions(heads, 100, 96), key_padding=padding)
    assert found.lse is not None
    assert (found.out[0] == 0).all()
    assert (found.lse[0] == -torch.inf).all()
    assert (found.out[1] != 0).any(-1).all()
    some = ((block(1, 3, 0, 64), block(2, 4, 64, 32, mode=Mode.COARSE, segment=8)),)
    found = _check(inputs, plan_regions(some, 100, 96))
    assert (found.out[:, :, :16] == 0).all()
    assert (found.out[:, :, 16:64] != 0).any(-1).all()
    assert (found.out[:, :, 64:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_any_scale(tier: str, one_pass: None, dtype: torch.dtype) -> None:
    query, key, value = _inputs(70, 400, dtype, dims=(64, 64))
    plan = plan_regions([(stripe(0, 64), _coarse(0, 512, 4))], 70, 400)
    padding = valid_keys([400, 203], 400)
    grow = torch.linspace(0.1, 8, 400)[:, None].to(dtype)
    exact = key * grow if dtype != torch.bfloat16 else key.mul(0.5)
    _check((query, exact, value), plan, key_padding=padding)
    for scale in (-0.2, 0.0, 1e-3):
        _check((query, key, value), plan, key_padding=padding, scale=scale)


@_few
@given(data=st.data())
def test_random_regions_beside_parts_of_their_own(tier: str, data: st.DataObject) -> None:
    """Tiles with holes are parts of their own, joined with what runs give."""
    q_len, kv_len = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 280))

    def region() -> Region:
        mode = data.draw(st.sampled_from([Mode.FULL, Mode.COARSE, Mode.COARSE]))
        r0 = data.draw(st.integers(0, 4))
        log2s = data.draw(st.integers(1, 3)) if mode is Mode.COARSE else 0
        return Region(
            mode, r0, r0 + data.draw(st.integers(1, 8)), data.draw(st.integers(-4, 12)),
            data.draw(st.integers(1, 16)), data.draw(st.integers(0, 1)), log2s,
            data.draw(st.booleans()),
        )  # fmt: skip

    def head() -> HeadRegions:
        found = [region() for _ in range(data.draw(st.integers(1, 3)))]
        holes = [dilated(0, 64, 0b101)] if data.draw(st.booleans()) else []
        return (*found, *holes, _coarse(32, 32, 2))

    dtype = data.draw(st.sampled_from(DTYPES))
    plan = plan_regions([head(), head()], q_len, kv_len, is_causal=data.draw(st.booleans()))
    kept = data.draw(st.sampled_from([1.0, 0.9, 0.3]))
    generator = torch.Generator().manual_seed(q_len)
    padding = None if kept == 1.0 else torch.rand(2, kv_len, generator=generator) < kept
    _check(_inputs(q_len, kv_len, dtype), plan, key_padding=padding)


def test_threads_change_nothing(tier: str) -> None:
    """Most key heads belong to one thread each, the last ones to all."""
    inputs = _inputs(130, 200, torch.bfloat16, heads=(14, 7), batch=1)
    plan = plan_regions([(band(0, 48), _coarse(0, 224, 4))], 130, 200)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 9):
            torch.set_num_threads(threads)
            found.append(region_attention(*inputs, plan, enable_gqa=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found)


def test_gradients_take_the_parts(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(64, 64, torch.float32)
    for x in inputs:
        x.requires_grad_()
    plan = plan_regions([(band(0, 16), _coarse(0, 64, 4))], 64, 64)
    monkeypatch.setattr(kernels, "_run_runs", None)  # not called
    out = region_attention(*inputs, plan)
    assert isinstance(out, Tensor)
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert grad.isfinite().all()


def test_compiled_plans_run_in_one_pass() -> None:
    inputs = _inputs(64, 64, torch.float32)
    plan = plan_regions([(band(0, 16), _coarse(0, 64, 4))], 64, 64)
    assert plan.runs is not None
    table, offsets = plan.runs
    torch.library.opcheck(
        torch.ops.sparseloom.attention_runs.default,
        (*inputs, table, offsets, None, False, 0.25, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_runs_are_sorted_by_what_they_hold() -> None:
    log2s = np.array(
        [
            [[0, 0, 2, 2, -1, 0], [1, -1, -1, 1, 1, -1]],
            [[-1] * 6, [0] * 6],
        ],
        np.int16,
    )
    table, offsets = key_runs(log2s)
    assert table.tolist() == [
        [0, 2, 0], [5, 6, 0], [2, 4, 2],
        [0, 1, 1], [3, 5, 1],
        [0, 6, 0],
    ]  # fmt: skip
    assert offsets.tolist() == [[0, 3, 5], [5, 5, 6]]
