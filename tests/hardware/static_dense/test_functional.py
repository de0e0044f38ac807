"""What the PE puts out against the integer model, numpy, and exact products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom import hardware
from sparseloom.hardware import MachineError
from sparseloom.hardware.static_dense import StaticDense
from sparseloom.hardware.static_dense.config import StaticDenseConfig
from sparseloom.hardware.static_dense.counts import head_counts
from sparseloom.hardware.static_dense.functional import compute, quantised
from sparseloom.hardware.static_dense.lowering import HeadSize, lower
from sparseloom.hardware.static_dense.sequencer import sequence
from sparseloom.region_model import integer_attention
from sparseloom.regions import Mode, Region, band, exact_pairs, rows, stripe


def config(name: str = "dense_static_dac_2023") -> StaticDenseConfig:
    machine = hardware.load(name)
    assert isinstance(machine, StaticDense)
    return machine.settings


def codes(rng: np.random.Generator, *shape: int, most: int = 127) -> np.ndarray:
    return rng.integers(-most, most + 1, shape)


# The first query tile sees everything, every tile its diagonal: no row is without keys.
SAFE = (rows(0, 1, 512), band(0, 16))
EXTRA: tuple[Region, ...] = (
    stripe(0, 32),
    band(-32, 80),
    stripe(64, 64, mode=Mode.COARSE, segment=4),
    stripe(0, 512, mode=Mode.COARSE, segment=8),
    Region(Mode.STRIDED, 0, 512, 2, 6, pattern=0b01000101),
    Region(Mode.LOW_PRECISION, 2, 9, 4, 8, low_precision_shift=4),
    band(0, 48, causal=True),
)


@given(
    st.lists(st.sampled_from(EXTRA), unique=True),
    st.sampled_from([(48, 64), (100, 100), (33, 130)]),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_the_output_is_the_integer_models_bit_for_bit(
    extra: list[Region], lengths: tuple[int, int], seed: int
) -> None:
    q_len, kv_len = lengths
    regions = [*SAFE, *extra]
    regions.sort(key=lambda region: region.mode is Mode.COARSE)
    # Pieces run after whole tiles: with strided regions last of the exact ones, as the model does.
    regions.sort(key=lambda region: (region.mode is Mode.COARSE, region.mode is Mode.STRIDED))
    rng = np.random.default_rng(seed)
    query, key, value = codes(rng, q_len, 64), codes(rng, kv_len, 64), codes(rng, kv_len, 32)
    n_valid = int(rng.integers(kv_len // 2, kv_len + 1))
    factor = 1e-4
    ours = compute(config(), query, key, value, regions, factor, n_valid=n_valid)
    model = integer_attention(query, key, value, regions, factor, n_valid=n_valid)
    assert (ours.output == model).all()
    size = HeadSize(q_len, kv_len, 64, 32)
    runs = sequence(regions, q_len, kv_len, n_valid)
    work = lower(config(), runs, size)
    # Pieces beyond the valid keys are not laid out, which may save their last tile.
    assert 0 <= int(work.tiles.sum()) - ours.tiles <= work.count
    assert ours.multiplies == ours.tiles * 16 * 32 * (64 + 32)


def test_everything_is_numpy_attention_within_its_number_format() -> None:
    rng = np.random.default_rng(0)
    n, d = 128, 64
    query, key, value = (rng.standard_normal((n, d)) for _ in range(3))
    (q, sq), (k, sk), (v, sv) = (quantised(x) for x in (query, key, value))
    found = compute(config(), q, k, v, [stripe(0, n)], sq * sk / np.sqrt(d))
    scores = query @ key.T / np.sqrt(d)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    exact = weights @ value
    # Probabilities are codes of 1/128, scores of 1/4 log 2: a mean over 128 keys of such.
    error = np.abs(found.output * sv / 2**7 - exact)
    assert error.mean() < 0.08
    assert error.max() < 0.5
    runs = sequence([stripe(0, n)], n, n, n)
    size = HeadSize(n, n, d, d)
    counted = head_counts(config(), runs, lower(config(), runs, size), size)
    assert found.multiplies == counted["mac_int8"] == 2 * n * n * d


def test_a_chain_without_softmax_is_exact() -> None:
    rng = np.random.default_rng(1)
    query, key = codes(rng, 96, 64, most=1), codes(rng, 96, 64, most=1)
    value = codes(rng, 96, 64)
    regions = [rows(0, 1, 96), band(-32, 80)]
    found = compute(config(), query, key, value, regions, 1.0, softmax=False)
    met = exact_pairs(regions, 96, 96)
    assert not met.all()
    assert (found.output == np.where(met, query @ key.T, 0) @ value).all()
    with pytest.raises(MachineError, match="scores must fit into 8 bits without softmax, got"):
        compute(config(), 9 * query, 9 * key, value, regions, 1.0, softmax=False)


def test_limits_are_refused() -> None:
    one = np.full((544, 64), 127)
    with pytest.raises(MachineError, match=r"kv_len must be at most 512, .* got 544"):
        compute(config(), one, one, one, [stripe(0, 544)], 1e-6)
    narrow = config().model_copy(
        update={"vector": config().vector.model_copy(update={"latch_bits": 20})}
    )
    with pytest.raises(MachineError, match="sums must fit into latches of 20 bits, got 1032256"):
        compute(narrow, one[:32], one[:32], one[:32], [stripe(0, 32)], 1e-6)
    assert compute(config(), one[:32], one[:32], one[:32], [stripe(0, 32)], 1e-6).largest_sum
