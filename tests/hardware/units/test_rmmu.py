"""The matrix unit: exact in every precision, and as fast as its widths allow."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.hardware.config import MachineError, checked
from sparseloom.hardware.units.composed_multiplier import product, product_sum
from sparseloom.hardware.units.rmmu import (
    Ports,
    RmmuConfig,
    attention_cycles,
    detecting_rows,
    matrix_product,
    overlapped_cycles,
    ports,
    product_cycles,
    score_cycles,
    step_rate,
    tile_cycles,
)

RMMU = RmmuConfig()
WIDTHS = (2, 4, 8, 16)


def codes(bits: int) -> np.ndarray:
    """All of them in two's complement."""
    return np.arange(-(1 << (bits - 1)), 1 << (bits - 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_product_of_narrow_codes(bits: int) -> None:
    a, b = (x.reshape(-1) for x in np.meshgrid(codes(bits), codes(bits)))
    assert (product(a, b, bits) == a * b).all()


def test_products_of_16_bits() -> None:
    """All codes against those whose halves are extreme, and random pairs."""
    random = np.random.default_rng(0)
    for b in (-32768, -129, -1, 255, 32767):
        assert (product(codes(16), np.full(1 << 16, b), 16) == codes(16) * b).all()
    a, b = random.integers(-32768, 32768, (2, 50_000))
    assert (product(a, b, 16) == a * b).all()


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (16, Ports(16, 16, 32)),
        (8, Ports(32, 32, 18)),
        (4, Ports(64, 32, 12)),
        (2, Ports(128, 32, 10)),
    ],
)
def test_widths_inside_an_element(bits: int, expected: Ports) -> None:
    """The sum holds the largest that can occur, and not with one bit less."""
    found = ports(RMMU, bits)
    assert found == expected
    lowest = np.full(RMMU.products(bits), -(1 << (bits - 1)))
    largest = RMMU.products(bits) << (2 * bits - 2)
    assert int(product_sum(lowest, lowest, bits, found.sum_bits)) == largest
    with pytest.raises(MachineError, match=f"a sum in the multiplier must fit in .* got {largest}"):
        product_sum(lowest, lowest, bits, found.sum_bits - 1)


def test_the_published_example() -> None:
    """FX4 made of INT2: four products of 4 bits, added inside to 6 bits, of 8 + 8 bits."""
    small = RmmuConfig(base_bits=4, stream_bits=8)
    assert (small.products(2), small.word(2), small.sets(2), small.depth(2)) == (4, 4, 1, 4)
    assert ports(small, 2) == Ports(8, 8, 6)
    four = np.array(np.meshgrid(*[codes(2)] * 4)).reshape(4, -1).T
    for stationary in four:
        held = np.broadcast_to(stationary, four.shape)
        assert (product_sum(four, held, 2, 6) == four @ stationary).all()


def test_throughput_and_its_alternatives() -> None:
    assert [RMMU.products(bits) for bits in WIDTHS] == [64, 16, 4, 1]
    assert [(RMMU.depth(bits), RMMU.sets(bits)) for bits in WIDTHS] == [
        (16, 4),
        (8, 2),
        (4, 1),
        (1, 1),
    ]
    linear = RmmuConfig(multiplier="linear")
    assert [linear.products(bits) for bits in WIDTHS] == [8, 4, 2, 1]
    assert [linear.sets(bits) for bits in WIDTHS] == [1, 1, 1, 1]
    for cap in (4, 8, 16):
        capped = RmmuConfig(max_products=cap)
        assert [capped.products(bits) for bits in WIDTHS] == [cap, min(cap, 16), 4, 1]
    wide = RmmuConfig(stream="wide")
    assert [ports(wide, bits).streaming_bits for bits in WIDTHS] == [128, 64, 32, 16]
    assert RMMU.products(32) == 1, "nothing wider than the base"


variants = st.sampled_from(
    [
        RMMU,
        RmmuConfig(multiplier="linear"),
        RmmuConfig(stream="wide"),
        RmmuConfig(max_products=4),
    ]
)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(WIDTHS),
    variants,
    st.integers(0, 3),
    st.integers(0, 40),
    st.integers(1, 3),
)
def test_products_of_matrices_are_exact(
    seed: int, bits: int, config: RmmuConfig, m: int, k: int, n: int
) -> None:
    random = np.random.default_rng(seed)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    a, b = random.integers(low, high, (m, k)), random.integers(low, high, (k, n))
    assert (matrix_product(config, a, b, bits, composed=True) == a @ b).all()
    assert (matrix_product(config, a, b, bits) == a @ b).all()


def test_each_row_has_a_precision() -> None:
    random = np.random.default_rng(0)
    bits = np.array([2, 4, 8, 16, 2, 16])
    a = np.stack([random.integers(-(1 << (w - 1)), 1 << (w - 1), 64) for w in bits.tolist()])
    b = random.integers(-2, 2, (64, 2))
    for composed in (False, True):
        assert (matrix_product(RMMU, a, b, bits, composed=composed) == a @ b).all()
    with pytest.raises(MachineError, match=r"a must fit in 2 bits, \[-2, 1\], got"):
        matrix_product(RMMU, a[::-1].copy(), b, bits)
    with pytest.raises(MachineError, match=r"b must fit in 2 bits, \[-2, 1\], got 2"):
        matrix_product(RMMU, a, np.full((64, 2), 2), bits)


@pytest.mark.parametrize("composed", [False, True])
def test_an_accumulator_that_overflows_is_an_error(composed: bool) -> None:
    """Also where the sums that follow would bring it back."""
    narrow = RmmuConfig(accumulator_bits=12)
    row = np.array([[7] * 32 + [-7] * 32])
    column = np.full((64, 1), 7)
    assert matrix_product(RMMU, row, column, 4, composed=composed).tolist() == [[0]]
    with pytest.raises(MachineError, match="an accumulator's sum must fit in 12 bits"):
        matrix_product(narrow, row * 2, column, 8, composed=composed)
    assert matrix_product(narrow, row, column, 4, composed=composed).tolist() == [[0]]
    with pytest.raises(MachineError, match="an accumulator's sum must fit in 11 bits"):
        matrix_product(RmmuConfig(accumulator_bits=11), row, column, 4, composed=composed)


def test_cycles_of_dense_products() -> None:
    """A full tile takes its inner size; 48 more to fill and drain, once or for every tile."""
    assert tile_cycles(RMMU, 32, 64, 16) == 64
    assert tile_cycles(RMMU, 33, 64, 17) == 4 * 64
    # BERT-large's projections at 384 tokens on one Lane: 3 · n · d · d / 512.
    assert tile_cycles(RMMU, 384, 1024, 3 * 1024) == 3 * 384 * 1024 * 1024 // 512
    assert product_cycles(RMMU, 33, 64, 17) == 4 * 64 + 48
    assert product_cycles(RMMU, 33, 64, 17, double_buffered=False) == 4 * (64 + 48)
    assert product_cycles(RMMU, 0, 64, 17, double_buffered=False) == 0
    quick = RmmuConfig(fill_cycles=0, drain_cycles=0)
    assert product_cycles(quick, 33, 64, 17) == 4 * 64
    for bits, speed in ((8, 4), (4, 16), (2, 64)):
        assert tile_cycles(RMMU, 320, 640, 640, bits=bits) * speed == tile_cycles(
            RMMU, 320, 640, 640
        )


def test_scores_and_values_per_cycle() -> None:
    """128 elements for each of four queries: 128 / head_dim scores a cycle."""
    for head_dim in (8, 16, 32, 64, 128, 256):
        assert step_rate(RMMU, head_dim) == Fraction(128, head_dim)
    assert step_rate(RMMU, 80) == Fraction(8, 5)
    assert step_rate(RMMU, 24) == Fraction(8, 2), "half of the second row's turn is empty"
    assert step_rate(RMMU, 64, rows=27) == Fraction(6, 4), "three of 27 rows idle"
    assert step_rate(RMMU, 64, parallel_queries=1) == 8
    assert attention_cycles(RMMU, 100, 64) == 50
    assert attention_cycles(RMMU, 100, 64, alone=True) == 50 + 48
    assert attention_cycles(RMMU, 0, 64, alone=True) == 0
    assert attention_cycles(RMMU, 100, 64, rows=27) == 67
    assert attention_cycles(RMMU, 3, 256) == 6
    with pytest.raises(MachineError, match=r"rows must be in \[4, 32\] for 4 parallel.*got 3"):
        step_rate(RMMU, 64, rows=3)


def test_predicted_scores_per_cycle() -> None:
    """512 in INT4 with 16 values a head; a width of 2 fills two of eight values: 1024, not 4096."""
    assert score_cycles(RMMU, 512 * 1000, 16, bits=4) == 1000
    assert score_cycles(RMMU, 1024 * 1000, 2, bits=4) == 1000
    assert score_cycles(RMMU, 512 * 1000, 16, bits=4, rows=5) == 6400
    assert score_cycles(RMMU, 1, 17, bits=4) == 3


def test_rows_that_detect() -> None:
    """2000 keys, 5 % kept, 16 values of 4 bits against 64 of 16: 5 of 32 rows."""
    assert detecting_rows(RMMU, 2000 * 16 / 16, 2 * 0.05 * 2000 * 64) == 5
    assert detecting_rows(RMMU, 0, 10) == 0
    assert detecting_rows(RMMU, 10, 0) == 32
    assert detecting_rows(RMMU, 1e9, 1) == 31
    with pytest.raises(MachineError, match="detect and attend must be at least 0, got -1 and 2"):
        detecting_rows(RMMU, -1, 2)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_splitting_rows_costs_only_the_rounding(detect: float, attend: float) -> None:
    """Never faster than all rows in turn, and slower by less than one row of those that attend."""
    sequential = overlapped_cycles(RmmuConfig(policy="sequential"), detect, attend)
    split = overlapped_cycles(RMMU, detect, attend)
    assert split >= sequential * (1 - 1e-9)
    rows = detecting_rows(RMMU, detect, attend)
    if 0 < rows < 31:
        assert split <= sequential * (32 - rows + 1) / (32 - rows) * (1 + 1e-9)


def test_what_is_refused() -> None:
    with pytest.raises(MachineError, match="bits must be one of 2, 4, 8, 16, got 3"):
        product(np.array([1]), np.array([1]), 3)
    with pytest.raises(MachineError, match=r"b must fit in 4 bits, \[-8, 7\], got 8"):
        product(np.array([1]), np.array([8]), 4)
    with pytest.raises(MachineError, match=r"must be \(m, k\) and \(k, n\), got \(2, 3\) and"):
        matrix_product(RMMU, np.zeros((2, 3), int), np.zeros((2, 3), int), 4)
    with pytest.raises(MachineError, match="bits must be at most 4, got 8"):
        matrix_product(RmmuConfig(base_bits=4), np.ones((1, 1), int), np.ones((1, 1), int), 8)
    with pytest.raises(MachineError, match="base_bits must be a power of two, got 12"):
        checked(RmmuConfig, {"base_bits": 12}, "here")
