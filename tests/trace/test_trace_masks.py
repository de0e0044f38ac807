"""Masks as arrays, against booleans counted one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseloom.trace import MaskArrays, TraceError, allowed_pairs


def visible(q_len: int, kv_len: int, is_causal: bool) -> np.ndarray:
    if not is_causal:
        return np.ones((q_len, kv_len), np.bool_)
    return np.arange(kv_len) <= np.arange(q_len)[:, None] + (kv_len - q_len)


@st.composite
def masks(draw: st.DrawFn) -> tuple[MaskArrays, np.ndarray]:
    """A mask and the booleans it was made from, with ragged edges and empty rows."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len, kv_len = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    rows, keys = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = rng.random((batch, heads, -(-q_len // rows), -(-kv_len // keys)))
    keep = (blocks < draw(st.sampled_from([0.0, 0.3, 1.0]))).repeat(rows, 2).repeat(keys, 3)
    keep = keep[:, :, :q_len, :kv_len]
    is_causal = draw(st.booleans())
    return MaskArrays.from_bool(keep, block_size=(rows, keys), is_causal=is_causal), keep


@given(masks())
def test_booleans_round_trip(case: tuple[MaskArrays, np.ndarray]) -> None:
    mask, keep = case
    assert np.array_equal(mask.to_bool(), keep)
    assert mask.row_lengths().sum() == mask.nnz


@given(masks(), st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_pairs_and_loads_are_counted_right(
    case: tuple[MaskArrays, np.ndarray], group: int, seed: int, padded: bool
) -> None:
    mask, keep = case
    rng = np.random.default_rng(seed)
    padding = rng.random((mask.batch, mask.kv_len)) < 0.7 if padded else None
    keep = keep & visible(mask.q_len, mask.kv_len, mask.is_causal)
    if padding is not None:
        keep = keep & padding[:, None, None, :]
    assert np.array_equal(mask.kept_pairs(padding), keep.sum(axis=(2, 3)))
    loads = sum(
        keep[:, :, i : i + group].any(axis=2).sum(axis=2) for i in range(0, mask.q_len, group)
    )
    assert np.array_equal(mask.distinct_keys(group, padding), loads)
    for b, h in np.ndindex(mask.batch, mask.heads):
        offsets, keys = mask.query_keys(b, h, None if padding is None else padding[b])
        assert offsets.shape == (mask.q_len + 1,)
        for i in range(mask.q_len):
            row = keys[offsets[i] : offsets[i + 1]]
            assert np.array_equal(row, np.flatnonzero(keep[b, h, i]))


@given(st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(1, 5))
def test_allowed_pairs_are_counted_right(
    q_len: int, kv_len: int, is_causal: bool, group: int
) -> None:
    padding = np.random.default_rng(q_len * 13 + kv_len).random((2, kv_len)) < 0.6
    allowed = visible(q_len, kv_len, is_causal)[None] & padding[:, None]
    loads = sum(allowed[:, i : i + group].any(axis=1).sum(axis=1) for i in range(0, q_len, group))
    found = allowed_pairs(q_len, kv_len, is_causal=is_causal, key_padding=padding, group=group)
    assert np.array_equal(found, loads)


def test_one_mask_serves_sequences_with_different_padding() -> None:
    mask = MaskArrays.from_bool(np.ones((1, 2, 3, 4), np.bool_))
    padding = np.array([[True, True, False, False], [True] * 4])
    assert mask.kept_pairs(padding).tolist() == [[6, 6], [12, 12]]
    with pytest.raises(ValueError, match="1 or 2 sequences"):
        MaskArrays.from_bool(np.ones((2, 1, 3, 4), np.bool_)).kept_pairs(np.ones((3, 4), np.bool_))


def test_the_bookkeeping_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = np.random.default_rng(0).random((1, 2, 23, 17)) < 0.3
    mask = MaskArrays.from_bool(keep, is_causal=True)
    whole = mask.distinct_keys(4)
    monkeypatch.setattr("sparseloom.trace.masks._CELLS", 40)
    assert np.array_equal(mask.distinct_keys(4), whole)


def test_worked_example_of_shared_loads() -> None:
    # Four queries with four keys each need eight keys between them.
    keep = np.zeros((1, 1, 4, 8), np.bool_)
    for query, kept in enumerate([(1, 2, 4, 6), (0, 2, 3, 6), (2, 4, 5, 7), (0, 2, 4, 7)]):
        keep[0, 0, query, list(kept)] = True
    mask = MaskArrays.from_bool(keep)
    assert mask.distinct_keys(4).item() == 8
    assert mask.distinct_keys(1).item() == mask.kept_pairs().item() == 16


def offsets(*values: int) -> np.ndarray:
    return np.array(values, np.int64).reshape(1, 1, -1)


@pytest.mark.parametrize(
    ("indices", "rows", "message"),
    [
        ([0, 5], offsets(0, 1, 2), r"indices must be in \[0, 4\), got 5 at position 1"),
        ([0, -1], offsets(0, 1, 2), "got -1 at position 1"),
        ([2, 1], offsets(0, 2, 2), "do not at position 1"),
        ([1, 1], offsets(0, 2, 2), "do not at position 1"),
        ([0, 1], offsets(0, 3, 2), r"must not fall, but do at \(batch, head, row\) \(0, 0, 2\)"),
        ([0, 1], offsets(0, 1, 1), "run from 0 to 2"),
        ([0, 1], offsets(1, 1, 2), "run from 0 to 2"),
        ([0, 1], offsets(0, 2), "3 entries per head for 2 queries"),
    ],
)
def test_contradictions_are_named(indices: list[int], rows: np.ndarray, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        MaskArrays(np.array(indices, np.int32), rows, (1, 1), 2, 4)
    assert "\n" not in str(caught.value)


def test_heads_must_follow_each_other() -> None:
    rows = np.array([[[0, 1], [2, 2]]], np.int64)
    with pytest.raises(TraceError, match=r"\(0, 1\) must start where"):
        MaskArrays(np.array([0, 1], np.int32), rows, (1, 1), 1, 4)


def test_a_partly_kept_block_is_refused() -> None:
    keep = np.zeros((1, 1, 4, 4), np.bool_)
    keep[0, 0, 2, 3] = True
    with pytest.raises(TraceError, match=r"\(0, 0, 1, 1\) is only partly kept"):
        MaskArrays.from_bool(keep, block_size=(2, 2))


def test_equality_sees_every_field() -> None:
    keep = np.eye(4, dtype=np.bool_)[None, None]
    mask = MaskArrays.from_bool(keep)
    assert mask == MaskArrays.from_bool(keep)
    assert mask != MaskArrays.from_bool(keep, is_causal=True)
    assert mask != MaskArrays.from_bool(~keep)
    assert "4 kept" in repr(mask)
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask)
