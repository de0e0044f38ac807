"""The softmax pipeline against float64, its published latencies, and how it damps errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.units.softmax import (
    SoftmaxConfig,
    exp_taylor,
    operations_per_score,
    probabilities,
    row_cycles,
    row_latency,
    softmax,
)

CONFIG = SoftmaxConfig()


def _exact(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_error_of_the_series() -> None:
    """(ln 2 / 2)**6 / 720 * exp(ln 2 / 2) = 3.4e-6, and a few roundings of 6e-8."""
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    error = np.abs(exp_taylor(x) / np.exp(x.astype(np.float64)) - 1)
    assert error.max() < 3.9e-6
    assert error.max() > 2e-6  # a longer series than that of the paper would hide here
    assert exp_taylor(np.zeros(1, np.float32))[0] == 1.0


def test_published_latencies() -> None:
    assert row_latency(CONFIG, 1024) == 7 + 21 + 23 + 29 + 7 + 128
    assert row_latency(SoftmaxConfig(waits_for_max=True), 1024) == 87 + 256
    assert row_cycles(CONFIG, 1024) == 128
    assert row_cycles(CONFIG, 9) == 2


def test_operations() -> None:
    assert operations_per_score(CONFIG) == {"multiply": 10, "add": 9, "compare": 1, "divide": 1}
    plain = operations_per_score(SoftmaxConfig(subtract_max=False))
    assert plain == {"multiply": 10, "add": 8, "compare": 0, "divide": 1}


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.floats(1e-4, 0.02), st.booleans())
def test_equals_float64_to_12_bits(seed: int, n: int, scale: float, subtract_max: bool) -> None:
    scores = np.random.default_rng(seed).integers(-2048, 2048, (3, n))
    config = SoftmaxConfig(subtract_max=subtract_max)
    codes = softmax(config, scores, scale)
    exact = _exact(scores * scale)
    # Half a step, and the 1e-5 of fp32; what rounds to 1 has no code.
    assert np.abs(codes / 4096 - np.minimum(exact, 4095 / 4096)).max() <= 0.5 / 4096 + 1e-5
    assert codes.min() >= 0
    assert codes.max() <= 4095


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 200), st.integers(-400, 400))
def test_an_error_in_one_score_is_at_least_halved(seed: int, n: int, by: int) -> None:
    """Σ|Δp| = 2 |Δp_0| <= Δs / 2, because dp_0/ds_0 = p_0 (1 - p_0) <= 1/4 (§III-D, Eq. 1-2)."""
    scale, scores = 0.01, np.random.default_rng(seed).integers(-300, 300, n)
    moved = scores.copy()
    moved[0] += by
    change = probabilities(CONFIG, moved, scale) - probabilities(CONFIG, scores, scale)
    assert np.abs(change).sum() <= abs(by) * scale / 2 + 2e-5


def test_without_the_maximum_large_scores_are_refused() -> None:
    config = SoftmaxConfig(subtract_max=False)
    with pytest.raises(MachineError, match="scores must be at most 88"):
        softmax(config, np.array([100]), 1.0)
    assert softmax(CONFIG, np.array([100, -100]), 1.0).tolist() == [4095, 0]
