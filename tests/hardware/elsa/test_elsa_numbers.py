"""ELSA's search and attention in its number formats, against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.hardware.elsa.config import Numbers
from sparseloom.hardware.elsa.numbers import (
    attend,
    candidates,
    exponentials,
    level_of,
    quantised,
    reciprocals,
    similarity,
)
from sparseloom.hashing import make_hasher

NUMBERS = Numbers(
    integer_bits=6,
    fraction_bits=3,
    hash_fraction_bits=5,
    norm_bits=8,
    norm_fraction_bits=3,
    cosine_fraction_bits=8,
    exponent_bits=10,
    mantissa_bits=5,
    table_bits=5,
)
FINE = NUMBERS.model_copy(update={"fraction_bits": 10, "mantissa_bits": 14, "table_bits": 14})
HASHER, BIAS = make_hasher(64), 0.127


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_similarity_by_hand() -> None:
    query, key = values(0, 6, 64), 2 * values(1, 9, 64)
    visible = np.tril(np.ones((6, 9), np.bool_), 3)
    found = similarity(query, key, visible, hasher=HASHER, bias=BIAS, numbers=NUMBERS)
    # Directions of a sign and five fraction bits, operands in eighths: all integers.
    whole = np.eye(1, dtype=np.int64)
    for factor in HASHER.factors:
        whole = np.kron(whole, np.clip(np.rint(factor * 32), -32, 31).astype(np.int64))
    q, k = (np.clip(np.rint(x * 8), -256, 255).astype(np.int64) for x in (query, key))
    for i in range(6):
        longest = 0
        for j in range(9):
            differ = sum((int(row @ q[i]) >= 0) != (int(row @ k[j]) >= 0) for row in whole)
            cosine = round(math.cos(max(0.0, math.pi / 64 * differ - BIAS)) * 256)
            norm = min(255, round(math.sqrt(int(k[j] @ k[j]))))  # eighths of eighths
            assert found.values[i, j] == norm * cosine
            longest = max(longest, norm if visible[i, j] else 0)
        assert found.largest[i] == longest * 256


def test_hash_of_few_bits_agrees_with_the_exact_one() -> None:
    vectors = values(2, 400, 64)
    same = quantised(HASHER, NUMBERS).signs(np.rint(vectors * 8)) == HASHER.signs(vectors)
    assert same.mean() > 0.95


def test_candidates_exceed_the_threshold() -> None:
    query, key = values(3, 50, 64), values(4, 60, 64)
    visible = np.ones((50, 60), np.bool_)
    visible[:, 50:] = False
    found = similarity(query, key, visible, hasher=HASHER, bias=BIAS, numbers=NUMBERS)
    for share in (0.05, 0.2, 0.7):
        level = level_of(found, visible, share)
        kept = candidates(found, visible, level)
        # What is equal to the last one stays, too.
        assert share <= kept.sum() / visible.sum() < share + 0.02
        assert not kept[:, 50:].any()
        assert found.normalised[kept].min() > level >= found.normalised[visible & ~kept].max()
    assert (candidates(found, visible, level_of(found, visible, 1.0)) == visible).all()
    # What the angle says is what matters: kept keys have larger products.
    scores = query @ key.T
    kept = candidates(found, visible, level_of(found, visible, 0.2))
    assert scores[kept].mean() > scores[visible].mean() + 0.8 * scores[visible].std()


@settings(deadline=None, max_examples=50)
@given(score=st.integers(-4000, 4000))
def test_exponentials_have_five_bits(score: int) -> None:
    """Half an entry of 32 and half a unit of 5 bits: 1.1 % and 1.6 %."""
    (found,) = exponentials(np.array([score]), NUMBERS, scale=0.125)
    exact = math.exp(score * 0.125 / 64)
    assert found == pytest.approx(exact, rel=math.log(2) / 64 + 1 / 64 + 1e-3)
    mantissa, _ = math.frexp(found)
    assert mantissa * 64 == int(mantissa * 64)


def test_exponentials_saturate() -> None:
    found = exponentials(np.array([-(1 << 22), -1, 0, 1 << 22]), NUMBERS, scale=1.0)
    assert found[0] == 0.0
    assert found[1] <= found[2]
    assert math.frexp(found[3])[1] == 512  # 1.m · 2^511


@settings(deadline=None, max_examples=50)
@given(total=st.floats(1e-20, 1e20))
def test_reciprocals_have_five_bits(total: float) -> None:
    (found,) = reciprocals(np.array([total]), NUMBERS)
    assert found * total == pytest.approx(1.0, abs=1 / 64 + 1 / 64 + 1e-3)
    assert reciprocals(np.array([0.0]), NUMBERS)[0] == 0.0


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, kept: np.ndarray) -> np.ndarray:
    scores = np.where(kept, q @ k.T * 64**-0.5, -np.inf)
    weights = np.exp(scores - np.where(kept.any(1), scores.max(1), 0.0)[:, None])
    return weights @ v / np.maximum(weights.sum(1), 1e-300)[:, None]


@pytest.mark.parametrize("everything", [True, False])
def test_output_is_attention_within_the_formats(everything: bool) -> None:
    q, k, v = values(5, 40, 64), values(6, 48, 64), values(7, 48, 64)
    kept = np.ones((40, 48), np.bool_) if everything else np.tril(np.ones((40, 48), np.bool_), -2)
    found = attend(q, k, v, kept, numbers=NUMBERS, scale=64**-0.5)
    q8, k8, v8 = (np.rint(x * 8) / 8 for x in (q, k, v))
    exact = reference(q8, k8, v8, kept)
    # Weights are off by 2.7 % up or down, twice where they are divided, the reciprocal by 3.1 %;
    # the output is rounded to eighths.
    weight = reference(q8, k8, np.abs(v8), kept)
    assert (np.abs(found - exact) <= 0.09 * weight + 1 / 16).all()
    assert np.abs(found - exact).mean() < 0.04
    assert (found * 8 == np.rint(found * 8)).all()
    fine = attend(q, k, v, kept, numbers=FINE, scale=64**-0.5)
    np.testing.assert_allclose(fine, reference(q, k, v, kept), atol=0.004)
    if not everything:
        assert not found[:2].any()


def test_no_maximum_is_needed() -> None:
    """Scores of ±60 would leave the range of half precision, not that of 10 exponent bits."""
    q, k, v = 4 * values(8, 20, 64), 4 * values(9, 20, 64), values(10, 20, 64)
    kept = np.ones((20, 20), np.bool_)
    assert np.abs(q @ k.T / 8).max() > 50
    found = attend(q, k, v, kept, numbers=FINE, scale=64**-0.5)
    np.testing.assert_allclose(found, reference(q, k, v, kept), atol=0.02)
