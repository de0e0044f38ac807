from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Oracle, SlidingWindow, budgets


def select(method: SlidingWindow, q_len: int, kv_len: int, *, is_causal: bool) -> SparseMask:
    inputs = AttentionInputs(
        query=torch.zeros(1, 1, q_len, 1),
        key=torch.zeros(1, 1, kv_len, 1),
        layer=0,
        is_causal=is_causal,
        scale=1.0,
    )
    return method.select(inputs)


def test_worked_examples() -> None:
    causal = select(SlidingWindow(width=2), 4, 4, is_causal=True)
    assert causal.to_bool()[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    around = select(SlidingWindow(width=3), 4, 4, is_causal=False)
    assert around.to_bool()[0, 0].int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 1, 1, 1],
        [0, 0, 1, 1],
    ]
    even = select(SlidingWindow(width=2), 3, 3, is_causal=False)
    assert even.to_bool()[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    growing = select(SlidingWindow(sparsity=0.5, growing=True), 4, 4, is_causal=True)
    assert growing.to_bool()[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    inside = select(SlidingWindow(sparsity=0.5, growing=True), 4, 4, is_causal=False)
    assert inside.to_bool()[0, 0].int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


@given(st.integers(1, 300), st.integers(0, 99), st.booleans())
@settings(deadline=None)
def test_fixed_width_has_the_nearest_density(length: int, percent: int, is_causal: bool) -> None:
    method = SlidingWindow(sparsity=percent / 100)
    total = length * (length + 1) // 2 if is_causal else length * length
    wanted = (1 - percent / 100) * total
    widths = range(1, (length if is_causal else 2 * length - 1) + 1)
    width = method.width_at(length, is_causal=is_causal)

    def kept(w: int) -> int:
        start, stop = SlidingWindow(width=w).windows(length, length, is_causal=is_causal)
        return int((stop - start).sum())

    assert width in widths
    gap = abs(kept(width) - wanted)
    for other in {width - 1, width + 1}.intersection(widths):
        assert gap <= abs(kept(other) - wanted)


def test_densities_at_a_real_length() -> None:
    for growing in (False, True):
        for is_causal in (False, True):
            method = SlidingWindow(sparsity=0.9, growing=growing)
            density = select(method, 512, 512, is_causal=is_causal).density(is_causal=is_causal)
            assert abs(density - 0.1) < 0.0021


def test_growing_window_has_the_budget_of_top_k() -> None:
    window = select(
        SlidingWindow(sparsity=0.9, growing=True, minimum_keys=16), 300, 300, is_causal=True
    )
    expected = budgets(torch.arange(1, 301), 0.9, 16)
    assert torch.equal(window.counts[0, 0], expected)
    inputs = AttentionInputs(
        query=torch.randn(1, 1, 300, 4),
        key=torch.randn(1, 1, 300, 4),
        layer=0,
        is_causal=True,
        scale=1.0,
    )
    oracle = Oracle(sparsity=0.9).select(inputs)
    assert torch.equal(oracle.counts, window.counts)


def test_windows_with_a_cache_are_the_last_rows() -> None:
    for method in (SlidingWindow(sparsity=0.8), SlidingWindow(sparsity=0.8, growing=True)):
        for is_causal in (True, False):
            whole = select(method, 40, 40, is_causal=is_causal).to_bool()
            last = select(method, 3, 40, is_causal=is_causal).to_bool()
            assert torch.equal(last, whole[:, :, -3:])


def test_more_queries_than_keys() -> None:
    mask = select(SlidingWindow(width=2), 4, 2, is_causal=True)
    assert mask.counts.tolist() == [[[0, 0, 1, 2]]]


def test_minimum_keys_and_cost_rule() -> None:
    assert SlidingWindow(sparsity=0.99, minimum_keys=7).width_at(20, is_causal=True) == 7
    assert not SlidingWindow(width=8).worthwhile(8, 8)
    assert SlidingWindow(width=8).worthwhile(8, 9)
    assert not SlidingWindow(sparsity=0.9).worthwhile(1, 1)
