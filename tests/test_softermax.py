"""Softermax and the integer model of regions, against plain Python integers and one softmax."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom import regions as rg
from sparseloom.region_model import integer_attention, low_codes, merged_attention, run_work
from sparseloom.regions import HeadRegions, Mode, Region, band, dilated, rows, stripe
from sparseloom.softermax import (
    SoftermaxFormat,
    add_run,
    empty_rows,
    normalize,
    power_codes,
    reciprocal_codes,
    score_codes,
)

_few = settings(max_examples=15, deadline=None, derandomize=True)
HEAD: HeadRegions = (
    rows(0, 1, 200),
    band(-32, 80),
    dilated(96, 32, 0b00100101, diagonal=False),
    stripe(0, 32),
    stripe(160, 32, mode=Mode.LOW_PRECISION),
    stripe(0, 208, mode=Mode.COARSE, segment=4),
)
FORMATS = (
    SoftermaxFormat(),
    SoftermaxFormat(input_bits=11, input_fraction=5, sum_integer=14, output_fraction=11),
)

# ------------------------------------------------------- the same in plain Python integers


def half_up(code: int, shift: int) -> int:
    return math.floor(Fraction(code, 2**shift) + Fraction(1, 2)) if shift else code


def power_by_hand(form: SoftermaxFormat, below: int) -> int:
    """2^(below / 2^fraction) for below <= 0."""
    whole, part = divmod(below, 1 << form.input_fraction)
    piece, rest = divmod(part, 1 << form.input_fraction - 2)
    low, high = (round(2 ** (i / 4) * 2**form.power_fraction) for i in (piece, piece + 1))
    return (low + math.floor(Fraction((high - low) * rest, 1 << form.input_fraction - 2))) >> -whole


def reciprocal_by_hand(form: SoftermaxFormat, total: int) -> tuple[int, int]:
    leading = total.bit_length() - 1
    fraction = Fraction(total, 1 << leading) - 1
    piece = int(fraction * 4)
    low, high = (round(2**15 / (1 + i / 4)) for i in (piece, piece + 1))
    chord = low - math.floor((low - high) * (fraction * 4 - piece))
    return half_up(chord, 15 - form.reciprocal_fraction), leading - form.sum_fraction


def row_by_hand(form: SoftermaxFormat, runs: list[list[int]]) -> list[list[int]]:
    """Probabilities of one row from the score codes of its runs, word for word as specified."""
    m, ell, kept = -128, 0, []
    for scores in runs:
        m_new = max([m] + [math.ceil(Fraction(s, 1 << form.input_fraction)) for s in scores])
        powers = [power_by_hand(form, s - (m_new << form.input_fraction)) for s in scores]
        ell = (ell >> m_new - m) + half_up(sum(powers), form.power_fraction - form.sum_fraction)
        stored = [half_up(p, form.power_fraction - form.stored_fraction) for p in powers]
        kept.append((stored, m_new))
        m = m_new
    if not ell:
        return [[] for _ in runs]
    mantissa, exponent = reciprocal_by_hand(form, ell)
    shift = form.stored_fraction + form.reciprocal_fraction - form.output_fraction + exponent
    return [[half_up((p >> m - tag) * mantissa, shift) for p in stored] for stored, tag in kept]


def attention_by_hand(
    form: SoftermaxFormat, q: list[list[int]], k: list[list[int]], v: list[list[int]],
    regions: HeadRegions, factor: float, n_valid: int,
) -> list[list[int]]:  # fmt: skip
    """`integer_attention` row by row and key by key."""

    def few(vector: list[int], shift: int) -> list[int]:
        lost = 0
        while lost < shift and round(Fraction(max(map(abs, vector)), 2**lost)) > 7:
            lost += 1
        if not shift:
            return vector
        return [max(-7, min(7, round(Fraction(x, 2**lost)))) << lost for x in vector]

    found = rg.runs(regions, len(q), len(k), n_valid)
    rank = {i: place for place, i in enumerate(rg.by_priority(regions))}
    out: list[list[int]] = []
    for i, query in enumerate(q):
        mine = [
            (rank[region], begin, end, regions[region])
            for t, begin, end, region in zip(*(x.tolist() for x in found), strict=True)
            if t == i // 16
        ]
        runs: list[list[int]] = []
        values: list[list[list[int]]] = []
        for _, begin, end, region in sorted(mine, key=lambda run: run[:2]):
            scores: list[int] = []
            rows_of_v: list[list[int]] = []
            shift = region.low_precision_shift
            for first in range(32 * begin, min(32 * end, n_valid), region.segment):
                if region.mode is Mode.STRIDED and not region.pattern >> first % 8 & 1:
                    continue
                if region.causal and region.mode is not Mode.COARSE and first > i + len(k) - len(q):
                    continue
                keys = range(first, min(first + region.segment, n_valid))
                mean_k, mean_v = (
                    [
                        round(Fraction(sum(x[j][d] for j in keys), len(keys)))
                        for d in range(len(x[0]))
                    ]
                    for x in (k, v)
                )
                dot = sum(a * b for a, b in zip(few(query, shift), few(mean_k, shift), strict=True))
                score = dot * (factor * math.log2(math.e)) + math.log2(len(keys))
                high = 2 ** (form.input_bits - 1) - 1
                scores.append(max(-high - 1, min(high, round(score * 2**form.input_fraction))))
                rows_of_v.append(few(mean_v, shift))
            runs.append(scores)
            values.append(rows_of_v)
        shares = row_by_hand(form, runs)
        sums = [0] * len(v[0])
        for share, vectors in zip(shares, values, strict=True):
            for p, vector in zip(share, vectors, strict=bool(share)):
                sums = [a + p * b for a, b in zip(sums, vector, strict=True)]
        out.append(sums)
    return out


@pytest.mark.parametrize("form", FORMATS)
@given(data=st.data())
@_few
def test_rows_are_bit_for_bit_those_of_plain_integers(
    form: SoftermaxFormat, data: st.DataObject
) -> None:
    high = 2 ** (form.input_bits - 1)
    codes = st.lists(st.integers(-high, high - 1), max_size=9)
    runs = data.draw(st.lists(codes, min_size=1, max_size=5))
    state, kept = empty_rows(form, 1), []
    for scores in runs:
        row = np.array([scores], np.int64).reshape(1, -1)
        state, powers = add_run(form, state, row, np.ones_like(row, np.bool_))
        kept.append(powers)
    found = [normalize(form, state, powers)[0].tolist() for powers in kept]
    assert found == [x or [0] * len(r) for x, r in zip(row_by_hand(form, runs), runs, strict=True)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("n_valid", [200, 131])
def test_attention_is_bit_for_bit_that_of_plain_integers(
    form: SoftermaxFormat, n_valid: int
) -> None:
    rng = np.random.default_rng(n_valid)
    q, k, v = (rng.integers(-127, 128, (n, 4)) for n in (40, 200, 200))
    for regions in (
        HEAD,
        (band(-32, 80, causal=True), stripe(0, 192, mode=Mode.COARSE, segment=8)),
    ):
        found = integer_attention(q, k, v, regions, 2e-4, n_valid=n_valid, form=form)
        by_hand = attention_by_hand(
            form, q.tolist(), k.tolist(), v.tolist(), regions, 2e-4, n_valid
        )
        assert found.tolist() == by_hand


# ------------------------------------------------------------------------- how exact it is


@pytest.mark.parametrize("form", FORMATS)
def test_powers_and_reciprocals_are_close(form: SoftermaxFormat) -> None:
    below = -np.arange(16 << form.input_fraction)
    powers = power_codes(form, below) / 2**form.power_fraction
    exact = 2.0 ** (below / 2**form.input_fraction)
    # A chord of 2^x over a quarter lies at most 0.4 % above it; shifts round down one step.
    assert (powers <= exact * 1.004 + 2**-form.power_fraction).all()
    assert (powers >= exact - 2.0 * 2**-form.power_fraction).all()
    sums = np.unique(np.linspace(2, form.largest_sum, 5000).astype(np.int64))
    mantissa, exponent = reciprocal_codes(form, sums)
    assert mantissa.min() >= 2 ** (form.reciprocal_fraction - 1)
    assert mantissa.max() <= 2**form.reciprocal_fraction
    ours = mantissa / 2**form.reciprocal_fraction / 2.0**exponent
    error = ours * sums / 2**form.sum_fraction - 1
    # A chord of 1/x lies at most 1.25 % above it; half a step of 2^-7 at 1/2 is 0.8 %.
    assert error.min() > -0.008
    assert error.max() < 0.0125 + 0.008


def test_quarter_steps_need_no_chord() -> None:
    quarters = power_codes(SoftermaxFormat(), -np.arange(5))
    assert quarters.tolist() == [32768, round(32768 * 2**0.75) >> 1, round(32768 * 2**0.5) >> 1,
                                 round(32768 * 2**0.25) >> 1, 16384]  # fmt: skip


def test_a_sum_beyond_its_format_raises_unless_it_may_saturate() -> None:
    for keys, fits in ((1023, True), (1024, False)):
        scores = np.zeros((1, keys), np.int64)
        allowed = np.ones((1, keys), np.bool_)
        form = SoftermaxFormat()
        if fits:
            state, _ = add_run(form, empty_rows(form, 1), scores, allowed)
            assert state.total.tolist() == [1023 * 64]
            continue
        with pytest.raises(ValueError, match=r"which is 1024\.00 in row 0 and at most 1023\.98 in"):
            add_run(form, empty_rows(form, 1), scores, allowed)
        register = SoftermaxFormat(saturate=True)
        state, _ = add_run(register, empty_rows(register, 1), scores, allowed)
        assert state.total.tolist() == [(1 << 16) - 1]
        wide = SoftermaxFormat(sum_integer=12)
        state, _ = add_run(wide, empty_rows(wide, 1), scores, allowed)
        assert state.total.tolist() == [1024 * 64]


@pytest.mark.parametrize(
    ("width", "value"), [("input_bits", 17), ("stored_fraction", 16), ("output_fraction", 14)]
)
def test_widths_that_do_not_fit_are_refused(width: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{width} must be in .* got {value}"):
        SoftermaxFormat(**{width: value})  # pyright: ignore[reportArgumentType]


def test_scores_are_rounded_and_saturated() -> None:
    found = score_codes(SoftermaxFormat(), np.array([0.1, 0.125, 0.375, -40.0, 40.0]))
    assert found.tolist() == [0, 0, 2, -128, 127]


def test_integers_come_near_the_floating_softmax() -> None:
    """With few keys of unequal weight the formats cost a few steps of the output."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 16)) for n in (64, 64, 64))
    regions = (band(-32, 80), stripe(0, 64, mode=Mode.COARSE, segment=2))
    scales = [np.abs(x).max() / 127 for x in (q, k, v)]
    codes = [np.rint(x / s).astype(np.int64) for x, s in zip((q, k, v), scales, strict=True)]
    exact = merged_attention(q, k, v, regions)
    errors = []
    for form in (SoftermaxFormat(), SoftermaxFormat(input_bits=11, input_fraction=6,
                 stored_fraction=15, reciprocal_fraction=15, output_fraction=14)):  # fmt: skip
        factor = float(scales[0] * scales[1]) / 4
        sums = integer_attention(codes[0], codes[1], codes[2], regions, factor, form=form)
        errors.append(np.abs(sums * scales[2] / 2**form.output_fraction - exact).max())
    assert errors[0] < 0.15 * np.abs(v).max()
    assert errors[1] < 0.03 * np.abs(v).max()


# -------------------------------------------------------------------------- runs and merge


def direct(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, regions: HeadRegions, n_valid: int
) -> np.ndarray:
    """One softmax over the union, segments with their logarithm, in fp64."""
    scale = q.shape[1] ** -0.5
    scores = [np.where(rg.exact_pairs(regions, len(q), len(k), n_valid), q @ k.T * scale, -np.inf)]
    values = [v]
    for size, met in rg.coarse_segments(regions, len(q), len(k), n_valid).items():
        starts = np.arange(0, len(k), size)
        counts = np.clip(n_valid - starts, 0, np.minimum(size, len(k) - starts))
        there = (np.arange(len(k)) < n_valid)[:, None]
        means = [
            np.add.reduceat(np.where(there, x, 0), starts) / np.maximum(counts, 1)[:, None]
            for x in (k, v)
        ]
        bias = np.log(np.maximum(counts, 1))
        met = met.repeat(16, 0)[: len(q)]
        scores.append(np.where(met, q @ means[0].T * scale + bias, -np.inf))
        values.append(means[1])
    every = np.concatenate(scores, 1)
    top = every.max(1, keepdims=True)
    weights = np.exp(every - np.where(np.isfinite(top), top, 0))
    total = weights.sum(1, keepdims=True)
    return weights @ np.concatenate(values) / np.where(total > 0, total, 1)


@given(st.integers(1, 70), st.integers(1, 210), st.data())
@_few
def test_the_merge_is_one_softmax_in_any_order(
    q_len: int, kv_len: int, data: st.DataObject
) -> None:
    n_valid = data.draw(st.integers(0, kv_len))
    seed = data.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, 8)) * 2 for n in (q_len, kv_len, kv_len))
    regions = tuple(r for r in HEAD if r.mode is not Mode.LOW_PRECISION)
    expected = direct(q, k, v, regions, n_valid)
    shuffle = random.Random(seed)
    for order in (list, lambda works: shuffle.sample(works, len(works))):
        found = merged_attention(q, k, v, regions, n_valid=n_valid, order=order)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_order_of_runs_moves_integers_by_steps_at_most() -> None:
    rng = np.random.default_rng(5)
    q, k, v = (rng.integers(-127, 128, (n, 4)) for n in (48, 200, 200))
    straight = integer_attention(q, k, v, HEAD, 2e-4)
    turned = integer_attention(q, k, v, HEAD, 2e-4, order=lambda works: works[::-1])
    # A sum that was shifted in another order differs by a step per run: 1/64 of at least 1/2.
    assert np.abs(straight - turned).max() <= 0.07 * 128 * 127


def test_runs_come_by_priority_then_by_key() -> None:
    tiles = list(run_work(HEAD, 64, 200, 131))
    assert len(tiles[0]) == 1
    for tile in tiles:
        places = [HEAD.index(work.region) for work in tile]
        assert places == sorted(places)
    coarse = [work for work in tiles[3] if work.region.mode is Mode.COARSE][-1]
    assert coarse.counts.tolist()[-1] == 3
    strided = next(work for work in tiles[3] if work.region.mode is Mode.STRIDED)
    assert set((strided.keys % 8).tolist()) <= {0, 2, 5}
    assert max(int(work.keys.max()) for tile in tiles for work in tile) < 131


def test_few_bits_keep_the_largest_code() -> None:
    codes = np.array([[127, 1, -8], [7, -3, 0], [20, 9, 3], [0, 0, 0]])
    assert (low_codes(codes, 0) == codes).all()
    # 127 needs 5 bits less and may lose 4: 127 / 16 rounds to 8 and is clipped to 7.
    assert low_codes(codes, 4).tolist() == [[112, 0, 0], [7, -3, 0], [20, 8, 4], [0, 0, 0]]
    assert low_codes(codes, 5)[0].tolist() == [128, 0, 0]


def test_what_the_model_refuses() -> None:
    codes = np.zeros((4, 4), np.int64)
    with pytest.raises(ValueError, match=r"key must hold codes in \[-127, 127\], got 128"):
        integer_attention(codes, codes + 128, codes, (band(0, 16),), 1.0)
    low = (band(0, 16, mode=Mode.LOW_PRECISION),)
    with pytest.raises(ValueError, match="regions must not be LOW_PRECISION here"):
        merged_attention(codes * 1.0, codes * 1.0, codes * 1.0, low)
    with pytest.raises(ValueError, match=r"n_valid must be in \[0, 4\], got 5"):
        integer_attention(codes, codes, codes, (band(0, 16),), 1.0, n_valid=5)


def test_rows_without_keys_give_zero() -> None:
    codes = np.ones((20, 4), np.int64)
    nothing = (Region(Mode.FULL, 1, 2, 0, 1),)
    out = integer_attention(codes, codes, codes, nothing, 1e-3)
    assert (out[:16] == 0).all()
    assert (out[16:] != 0).all()
    assert (merged_attention(codes * 1.0, codes * 1.0, codes * 1.0, nothing)[:16] == 0).all()
