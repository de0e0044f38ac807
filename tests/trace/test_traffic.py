"""Bytes of keys and values: worked by hand, atoms of 32 bytes."""

from __future__ import annotations

import numpy as np
import pytest

from sparseloom.trace import AttentionCall, ModelShape, Operator, transformer_operators
from sparseloom.trace.traffic import Layout, call_traffic

SHAPE = ModelShape(layers=1, hidden_size=256, heads=4, kv_heads=4, head_dim=64, is_causal=True)


def one(kv_len: int = 100) -> Operator:
    operators = transformer_operators(SHAPE, q_len=1, kv_len=kv_len, stage="decode")
    return next(operator for operator in operators if operator.is_attention)


def counts(*heads: int) -> np.ndarray:
    return np.array(heads)[None, :, None]


@pytest.mark.parametrize(
    ("bits", "useful", "fetched"),
    [(4, 32, 32), (8, 64, 64), (10, 80, 96), (12, 96, 96), (16, 128, 128), (None, 256, 256)],
)
def test_a_vector_by_width(bits: int | None, useful: int, fetched: int) -> None:
    call = AttentionCall(key_counts=counts(1, 0, 0, 0), key_bits=bits, value_bits=bits)
    found = call_traffic(call, one())
    assert (found.useful_key, found.fetched_key) == (useful, fetched)
    assert (found.useful_value, found.fetched_value) == (useful, fetched)


def test_six_bits_pack_in_pairs_for_keys_and_not_for_pruned_values() -> None:
    call = AttentionCall(
        key_counts=counts(10, 10, 10, 10),
        value_counts=counts(4, 4, 4, 4),
        key_bits=6,
        value_bits=6,
    )
    found = call_traffic(call, one())
    assert (found.useful_key, found.fetched_key) == (4 * 10 * 48, 4 * 10 * 48)
    assert (found.useful_value, found.fetched_value) == (4 * 4 * 48, 4 * 4 * 64)
    assert found.fetched_value / found.useful_value == pytest.approx(4 / 3)
    alone = call_traffic(call, one(), layout=Layout(packed_bits=()))
    assert alone.fetched_key == 4 * 10 * 64
    # Values of the same tokens in all heads are packed as keys are.
    whole = call_traffic(AttentionCall(key_counts=counts(9, 9, 9, 9), value_bits=6), one())
    assert whole.fetched_value == whole.useful_value == 4 * 9 * 48


def test_a_head_without_its_partner_pays_for_two_atoms() -> None:
    alive = np.array([True, True, True, False])
    call = AttentionCall(key_counts=counts(5, 5, 5, 0), heads_alive=alive, key_bits=6)
    assert call_traffic(call, one()).fetched_key == 5 * 96 + 5 * 64
    # Nested sets: three tokens wanted by both heads, two by one of them.
    call = AttentionCall(key_counts=counts(5, 3, 0, 0), key_bits=6)
    assert call_traffic(call, one()).fetched_key == 3 * 96 + 2 * 64


def test_low_bits_are_fetched_for_the_rows_that_asked() -> None:
    call = AttentionCall(
        key_counts=counts(10, 10, 10, 10),
        key_bits=6,
        lsb_bits=4,
        lsb_refetch=np.array([True, False, True, False])[None, :, None],
    )
    found = call_traffic(call, one())
    assert (found.useful_lsb, found.fetched_lsb) == (2 * 10 * 32, 2 * 10 * 32)
    assert found.useful == 4 * 10 * 48 + 640 + 4 * 10 * 256


def test_a_prompt_fetches_each_vector_once_per_head() -> None:
    shape = SHAPE.model_copy(update={"is_causal": False})
    operators = transformer_operators(shape, q_len=20)
    operator = next(found for found in operators if found.is_attention)
    alive = np.arange(20)[None, :] < 15
    rows = (alive[:, None, :] & np.ones((1, 4, 1), np.bool_)) * np.int64(15)
    call = AttentionCall(key_counts=rows, tokens_alive=alive, key_bits=8, value_bits=8)
    assert call_traffic(call, operator).fetched_key == 4 * 15 * 64
    # The same without counts, and dense.
    call = AttentionCall(tokens_alive=alive, key_bits=8, value_bits=8)
    assert call_traffic(call, operator).fetched_value == 4 * 15 * 64
    assert call_traffic(AttentionCall(key_bits=8), operator).fetched_key == 4 * 20 * 64


def test_a_layout_needs_atoms() -> None:
    with pytest.raises(ValueError, match="atom_bytes and packed_heads must be at least 1"):
        Layout(atom_bytes=0)
