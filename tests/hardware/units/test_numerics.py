"""A head on SpAtten's datapath against float64 attention, and its decisions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseloom.hardware.config import MachineError, checked
from sparseloom.hardware.units.numerics import (
    Datapath,
    attention_head,
    attention_row,
    score_shift,
    value_count,
)
from sparseloom.hardware.units.quantization import Codes, high_plane_only, quantize

_Floats = NDArray[np.float64]


def _tensors(
    seed: int, rows: int, n: int, d: int, size: float = 1.0
) -> tuple[_Floats, _Floats, _Floats]:
    random = np.random.default_rng(seed)
    q = random.standard_normal((rows, d)) * size
    return q, random.standard_normal((n, d)), random.standard_normal((n, d))


def _probabilities(q: _Floats, k: _Floats, is_causal: bool = False) -> _Floats:
    logits = q @ k.T / np.sqrt(q.shape[1])
    if is_causal:
        late = np.triu(np.ones(logits.shape, np.bool_), 1 + k.shape[0] - q.shape[0])
        logits[late] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _logit_error(path: Datapath, q: _Floats, k: _Floats, key_bits: int) -> float:
    """Largest error of a logit: half a step of each code times the other operand's row, and half
    a step of the rounded score.
    """
    queries, keys = quantize(q, path.query_bits), quantize(k, key_bits)
    d = q.shape[1]
    of_q = queries.scale / 2 * np.abs(k).sum(-1).max()
    of_k = keys.scale / 2 * (np.abs(q).sum(-1).max() + d * queries.scale / 2)
    shift = score_shift(path, queries.codes, keys.codes)
    of_score = queries.scale * keys.scale * 2.0**shift / 2
    return float((of_q + of_k + of_score) / np.sqrt(d))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.integers(6, 80),
    st.sampled_from([8, 12, (6, 4), (8, 4), (10, 4)]),
    st.sampled_from([6, 8, 12]),
    st.booleans(),
)
def test_against_float_attention(
    seed: int,
    rows: int,
    n: int,
    key_bits: tuple[int, int] | int,
    value_bits: int,
    is_causal: bool,
) -> None:
    """With every logit off by at most e, the magnitudes of a row's Δp sum to 2 tanh(e / 2) <= e
    at most (half of the mass moves by +e, half by -e). Then 12-bit codes, half a step each, and
    for outputs half a step of the values and the final rounding.
    """
    path = Datapath(key_bits=key_bits, value_bits=value_bits, threshold=1.0)
    q, k, v = _tensors(seed, rows, n, 16, 2.0)
    head = attention_head(path, q, k, v, is_causal=is_causal)
    exact = _probabilities(q, k, is_causal)
    l1 = _logit_error(path, q, k, sum(path.planes)) + n * 0.5 / 4096 + 1 / 4096 + 1e-5
    assert np.abs(head.probabilities - exact).sum(-1).max() <= l1
    step = quantize(v, value_bits).scale
    largest = np.abs(v).max()
    final = step / 2 ** (12 - value_bits) / 2
    bound = l1 * largest + (1 + n * 0.5 / 4096) * step / 2 + final
    # A sum of rounded probabilities above 1 can saturate the largest 12-bit output.
    bound += n * 0.5 / 4096 * largest
    assert np.abs(head.output - exact @ v).max() <= bound
    assert head.head_importance == pytest.approx(np.abs(head.output).sum())


def test_typical_errors_are_small() -> None:
    """12-bit operands of a head with 256 keys: mean errors near a 12-bit step."""
    q, k, v = _tensors(0, 8, 256, 64, 3.0)
    head = attention_head(Datapath(key_bits=12, value_bits=12), q, k, v)
    exact = _probabilities(q, k)
    assert np.abs(head.probabilities - exact).mean() < 0.3 / 4096
    assert np.abs(head.output - exact @ v).mean() < 0.005


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(5, 60))
def test_rows_with_low_bits_equal_static_keys(seed: int, rows: int, n: int) -> None:
    q, k, v = _tensors(seed, rows, n, 16, 3.0)
    progressive = Datapath(key_bits=(6, 4), threshold=0.5, value_keep=0.4)
    static = Datapath(key_bits=10, value_keep=0.4)
    queries, keys, values = quantize(q, 12), quantize(k, 10), quantize(v, 8)
    floor = keys._replace(codes=high_plane_only(keys.codes, 4))
    head = attention_head(progressive, q, k, v)
    shift = score_shift(progressive, queries.codes, keys.codes)
    for i in range(rows):
        query, scale = queries.codes[i], queries.scale
        found = attention_row(progressive, query, keys, values, scale, shift)
        full = attention_row(static, query, keys, values, scale, shift)
        high = attention_row(static, query, floor, values, scale, shift)
        assert found.refetched == (high.probabilities.max() < 2048) == head.refetched[i]
        assert not full.refetched
        expected = full if found.refetched else high
        assert found.probabilities.tolist() == expected.probabilities.tolist()
        assert found.output.tolist() == expected.output.tolist()
        assert found.value_ids.tolist() == expected.value_ids.tolist()
        assert head.probabilities[i].tolist() == (found.probabilities / 4096).tolist()


def test_a_row_without_low_bits_uses_the_floor() -> None:
    """Keys 16 and 31 in 4+4 bits are the same until the low plane arrives."""
    keys, values = Codes(np.array([[16], [31]]), 1.0, 8), Codes(np.array([[1], [2]]), 1.0, 8)
    query = np.array([1])
    path = Datapath(key_bits=(4, 4), threshold=0.5)
    row = attention_row(path, query, keys, values, 1.0, 0)
    assert (row.refetched, row.probabilities.tolist()) == (False, [2048, 2048])
    path = Datapath(key_bits=(4, 4), threshold=0.51)
    row = attention_row(path, query, keys, values, 1.0, 0)
    assert (row.refetched, row.probabilities.tolist()) == (True, [0, 4095])
    assert high_plane_only(keys.codes, 4).tolist() == [[16], [16]]


def test_local_value_pruning_keeps_the_largest_without_renormalising() -> None:
    q, k, v = _tensors(1, 3, 50, 16, 3.0)
    every = attention_head(Datapath(), q, k, v)
    some = attention_head(Datapath(value_keep=0.2), q, k, v)
    assert some.probabilities.tolist() == every.probabilities.tolist()
    step = quantize(v, 8).scale
    values = quantize(v, 8).codes * step
    for i in range(3):
        ids = some.value_ids[i]
        assert ids.tolist() == sorted(
            np.argsort(-some.probabilities[i], kind="stable")[:10].tolist()
        )
        expected = some.probabilities[i, ids] @ values[ids]
        assert np.abs(some.output[i] - expected).max() <= step / 16 / 2 * 1.0001
    assert len(every.value_ids[0]) == 50


def test_value_counts_are_those_of_the_published_traces() -> None:
    assert value_count(Datapath(value_keep=0.2), 921) == 184
    assert value_count(Datapath(value_keep=0.2), 1024) == 204
    assert value_count(Datapath(value_keep=0.3), 10) == 3
    assert value_count(Datapath(value_keep=0.2), 3) == 1


def test_importance_is_the_column_sum_of_what_was_accepted() -> None:
    """By hand: two queries, three keys; the logits are ln of 1 : 1 : 2 and of 6 : 1 : 1."""
    q = np.eye(2)
    logits = np.log(np.array([[1.0, 1.0, 2.0], [6.0, 1.0, 1.0]]))
    path = Datapath(key_bits=12, value_bits=12)
    head = attention_head(path, q, logits.T * np.sqrt(2), np.ones((3, 2)))
    assert head.probabilities == pytest.approx(
        np.array([[0.25, 0.25, 0.5], [0.75, 0.125, 0.125]]), abs=0.001
    )
    assert head.importance == pytest.approx(np.array([1.0, 0.375, 0.625]), abs=0.002)
    assert head.head_importance == pytest.approx(4.0, abs=0.01)


def test_flat_rows_fetch_their_low_bits_and_peaked_ones_do_not() -> None:
    q, k, v = _tensors(2, 1, 200, 16)
    flat = attention_head(Datapath(threshold=0.1), q * 0.1, k, v)
    peaked = attention_head(Datapath(threshold=0.1), k[:1] * 6, k, v)
    assert flat.refetched.all()
    assert not peaked.refetched.any()


def test_settings_of_a_machine_file() -> None:
    assert checked(Datapath, {"key_bits": [6, 4]}, "here").planes == (6, 4)
    assert checked(Datapath, {"key_bits": 12}, "here").planes == (12, 0)
    with pytest.raises(MachineError, match="key_bits"):
        checked(Datapath, {"key_bits": [6, 4, 2]}, "here")


def test_bad_input_is_named() -> None:
    q, k, v = _tensors(0, 3, 2, 4)
    with pytest.raises(MachineError, match="is_causal needs at least as many keys as rows"):
        attention_head(Datapath(), q, k, v, is_causal=True)
    with pytest.raises(MachineError, match="q, k and v must be"):
        attention_head(Datapath(), q, k, v[:1])
    with pytest.raises(MachineError, match="key_bits must be within 16 bits"):
        checked(Datapath, {"key_bits": (14, 4)}, "here")
