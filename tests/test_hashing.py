"""Hashes of signs: the directions, the fast product, and how well angles come out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.hashing import (
    BIAS_PERCENTILE,
    PUBLISHED_BIAS,
    Form,
    angle,
    angle_bias,
    angle_error,
    cosine_table,
    factor_sizes,
    gram_schmidt,
    hamming,
    make_hasher,
    pack,
)


def test_gram_schmidt_keeps_the_spaces() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 9))
    found = gram_schmidt(rows)
    np.testing.assert_allclose(found @ found.T, np.eye(5), atol=1e-12)
    # Row i lies in the span of the first i + 1 rows: the factor between them is triangular.
    factor = rows @ found.T
    np.testing.assert_allclose(factor @ found, rows, atol=1e-12)
    assert np.abs(np.triu(factor, 1)).max() < 1e-12
    assert (np.diag(factor) > 0).all()


def test_gram_schmidt_refuses_what_has_no_basis() -> None:
    with pytest.raises(ValueError, match="rows must be at most as many as their 2 numbers, got 3"):
        gram_schmidt(np.ones((3, 2)))
    with pytest.raises(ValueError, match="row 1 is not"):
        gram_schmidt(np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]))


@pytest.mark.parametrize(
    ("dim", "sizes"),
    [
        (1, (4, 4, 4)),
        (64, (4, 4, 4)),
        (65, (8, 4, 4)),
        (128, (8, 4, 4)),
        (256, (8, 8, 4)),
        (512, (8, 8, 8)),
        (4096, (16, 16, 16)),
    ],
)
def test_factor_sizes(dim: int, sizes: tuple[int, int, int]) -> None:
    assert factor_sizes(dim) == sizes


@settings(deadline=None, max_examples=20)
@given(dim=st.integers(1, 130), seed=st.integers(0, 50))
def test_fast_product_is_the_whole_matrix(dim: int, seed: int) -> None:
    hasher = make_hasher(dim, seed=seed)
    whole = np.eye(1)
    for factor in hasher.factors:
        np.testing.assert_allclose(factor @ factor.T, np.eye(len(factor)), atol=1e-12)
        whole = np.kron(whole, factor)
    assert whole.shape == (hasher.bits, hasher.bits)
    vectors = np.random.default_rng(seed).standard_normal((3, 2, dim))
    filled = np.zeros((3, 2, hasher.bits))
    filled[..., :dim] = vectors
    np.testing.assert_allclose(hasher.project(vectors), filled @ whole.T, atol=1e-12)
    np.testing.assert_allclose(hasher.matrix, whole[:, :dim], atol=1e-15)


def test_published_number_of_multiplications() -> None:
    assert make_hasher(64).multiplications == 768 == round(3 * 64 ** (4 / 3))
    assert make_hasher(64, form="orthogonal").multiplications == 4096
    assert make_hasher(32).multiplications == 768  # filled up to 64
    assert make_hasher(128).multiplications == 128 * 16


@pytest.mark.parametrize(("dim", "bits"), [(64, 64), (64, 40), (16, 40), (8, 64)])
def test_orthogonal_directions_come_in_batches(dim: int, bits: int) -> None:
    hasher = make_hasher(dim, bits, form="orthogonal")
    for first in range(0, bits, dim):
        batch = hasher.matrix[first : first + dim]
        np.testing.assert_allclose(batch @ batch.T, np.eye(len(batch)), atol=1e-12)
    assert hasher.matrix.shape == (bits, dim)


@pytest.mark.parametrize("form", ["kronecker", "orthogonal"])
def test_bias_for_64_numbers_and_64_bits(form: Form) -> None:
    """Published: the 80th percentile of the error is 0.127."""
    for seed in range(2):
        error = angle_error(make_hasher(64, form=form, seed=seed), pairs=100_000, seed=seed)
        assert np.percentile(error, BIAS_PERCENTILE) == pytest.approx(PUBLISHED_BIAS, abs=0.002)
        assert abs(error.mean()) < 0.002


def test_bias_shrinks_with_more_bits() -> None:
    assert angle_bias(64) == PUBLISHED_BIAS
    assert angle_bias(128) < angle_bias(64) < angle_bias(16, 16, form="orthogonal")
    error = angle_error(make_hasher(32), pairs=20_000, seed=5)
    assert np.mean(error < angle_bias(32)) == pytest.approx(0.8, abs=0.03)


def test_hashes_and_distances() -> None:
    random = np.random.default_rng(2)
    for bits in (64, 40, 130):
        one, other = random.random((2, 6, bits)) < 0.5
        found = hamming(pack(one), pack(other))
        np.testing.assert_array_equal(found, (one[:, None] != other[None]).sum(-1))
    hasher = make_hasher(64)
    x = random.standard_normal((5, 64))
    np.testing.assert_array_equal(np.diag(hamming(hasher.hashes(x), hasher.hashes(-x))), 64)
    assert hasher.signs(np.zeros((1, 64))).all()  # 0 counts as positive
    # The length of a vector says nothing about its direction.
    np.testing.assert_array_equal(hasher.hashes(x), hasher.hashes(3.0 * x))


def test_cosine_table_by_hand() -> None:
    table = cosine_table(64, 0.127)
    assert table.shape == (65,)
    assert table[:3].tolist() == [1.0, 1.0, 1.0]  # π · 2 / 64 is below the bias
    assert table[32] == pytest.approx(math.sin(0.127))
    assert table[64] == pytest.approx(-math.cos(0.127))
    assert (np.diff(table[3:]) < 0).all()
    assert angle(np.array([0, 64]), 64, 0.127).tolist() == [0.0, math.pi - 0.127]


def test_directions_are_the_same_whenever_asked_for() -> None:
    first, again = make_hasher(64, seed=1), make_hasher(64, seed=1)
    np.testing.assert_array_equal(first.matrix, again.matrix)
    assert np.abs(first.matrix - make_hasher(64, seed=2).matrix).max() > 0.01


@pytest.mark.parametrize(
    ("dim", "bits", "form", "words"),
    [
        (0, None, "kronecker", r"dim must be in \[1, 4096\], got 0"),
        (4097, None, "kronecker", r"dim must be in \[1, 4096\], got 4097"),
        (64, 32, "kronecker", "bits must be 64 with Kronecker factors for vectors of 64 numbers"),
        (64, 5000, "orthogonal", r"bits must be in \[1, 4096\], got 5000"),
    ],
)
def test_what_cannot_be_hashed(dim: int, bits: int | None, form: Form, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_hasher(dim, bits, form=form)


def test_vectors_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="vectors must have 64 numbers, got 63"):
        make_hasher(64).project(np.zeros((2, 63)))
