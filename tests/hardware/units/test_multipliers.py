"""Multiplier arrays: the published throughput and latency, and exact products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseloom.hardware.config import MachineError, checked
from sparseloom.hardware.units.multipliers import (
    MultiplierConfig,
    Work,
    fitting_shift,
    prob_value,
    prob_value_work,
    query_key,
    query_key_work,
    rounded,
    vectors_per_cycle,
)

FULL = MultiplierConfig()
EIGHTH = MultiplierConfig(multipliers=64)


@pytest.mark.parametrize(("head_dim", "per_cycle"), [(64, 8), (128, 4), (256, 2), (512, 1)])
def test_scores_per_cycle(head_dim: int, per_cycle: int) -> None:
    assert vectors_per_cycle(FULL, head_dim) == per_cycle
    assert vectors_per_cycle(EIGHTH, 64) == 1


def test_published_latencies() -> None:
    """8 cycles from a line to its scores and 1 + 1 + 3 + 1 of prob x V, for a head dim of 64."""
    assert query_key_work(FULL, 1024, 64) == Work(128, 8, 65536, 65536)
    assert prob_value_work(FULL, 1024, 64) == Work(128, 6, 65536, 65536)
    assert query_key_work(FULL, 1024, 512).latency == 11
    assert prob_value_work(FULL, 1024, 512).latency == 3


def test_padding_is_issued_but_not_useful() -> None:
    assert query_key_work(FULL, 9, 64) == Work(2, 8, 1024, 576)
    assert query_key_work(FULL, 8, 48) == Work(1, 8, 512, 384)
    assert query_key_work(FULL, 8, 80) == Work(2, 9, 1024, 640)
    assert query_key_work(FULL, 0, 64) == Work(0, 8, 0, 0)


@given(
    st.integers(0, 2**32),
    st.integers(0, 40),
    st.sampled_from([1, 48, 64, 80, 128, 256, 512]),
)
def test_both_modes_are_exact(seed: int, n: int, head_dim: int) -> None:
    random = np.random.default_rng(seed)
    vectors = random.integers(-2048, 2048, (n, head_dim))
    query, weights = random.integers(-2048, 2048, head_dim), random.integers(0, 4096, n)
    assert query_key(FULL, query, vectors).tolist() == (vectors @ query).tolist()
    assert prob_value(FULL, weights, vectors).tolist() == (weights @ vectors).tolist()


def test_rounding() -> None:
    sums = np.array([7, 8, -8, -9, 24, 10**9, -(10**9)])
    assert rounded(sums, 4).tolist() == [0, 1, 0, -1, 2, 2047, -2048]
    assert rounded(np.array([5]), 0).tolist() == [5]
    with pytest.raises(MachineError, match="shift must be at least 0, got -1"):
        rounded(sums, -1)


@given(st.integers(0, 2**40), st.integers(2, 16))
def test_fitting_shift_is_the_smallest_that_does_not_saturate(peak: int, bits: int) -> None:
    def saturates(shift: int) -> bool:
        return rounded(np.array([peak]), shift, bits)[0] != rounded(np.array([peak]), shift, 60)[0]

    shift = fitting_shift(peak, bits)
    assert not saturates(shift)
    assert shift == 0 or saturates(shift - 1)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(MachineError, match=r"head_dim must be in \[1, 64\], got 128"):
        query_key_work(EIGHTH, 8, 128)
    with pytest.raises(MachineError, match="multipliers must be a power of two, got 500"):
        checked(MultiplierConfig, {"multipliers": 500}, "here")
    with pytest.raises(MachineError, match="smallest_width must be at most 32"):
        checked(MultiplierConfig, {"multipliers": 32}, "here")
