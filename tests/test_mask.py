"""SparseMask against plain boolean arrays, and by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.mask import SparseMask, allowed_pairs

thorough = settings(deadline=None, max_examples=40)


@st.composite
def masks(draw: st.DrawFn, largest: int = 20) -> SparseMask:
    """Masks with ragged edges, empty rows, shared batch and heads, at any density."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    q_len, kv_len = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    bq, bk = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows, columns = -(-q_len // bq), -(-kv_len // bk)
    keep = torch.rand(batch, heads, rows, columns, generator=noise) < density
    keep &= torch.rand(batch, heads, rows, 1, generator=noise) < 0.9
    return SparseMask.from_block_bool(keep, block_size=(bq, bk), q_len=q_len, kv_len=kv_len)


def causal(mask: SparseMask) -> Tensor:
    return torch.ones(mask.shape[2:], dtype=torch.bool).tril(mask.kv_len - mask.q_len)


def revalidate(mask: SparseMask) -> SparseMask:
    """The same parts through the checking constructor."""
    size = {"block_size": mask.block_size, "q_len": mask.q_len, "kv_len": mask.kv_len}
    return SparseMask(mask.indices, mask.offsets, **size)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the annotation checks of the tests, so that our own errors are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def worked() -> SparseMask:
    """Blocks of 2 x 3 on 5 queries and 7 keys: block rows {0, 2}, {}, {1}, the last ones cut."""
    indices = torch.tensor([[0, 2], [-1, -1], [1, -1]])
    return SparseMask.from_padded(indices, block_size=(2, 3), q_len=5, kv_len=7)


# ------------------------------------------------------------------------------- by hand


def test_worked_rows(worked: SparseMask) -> None:
    assert worked.indices.tolist() == [0, 2, 1]
    assert worked.offsets.tolist() == [[[0, 2, 2, 3]]]
    assert worked.counts.tolist() == [[[2, 0, 1]]]
    assert (worked.batch, worked.heads, worked.q_blocks, worked.kv_blocks) == (1, 1, 3, 3)
    assert (worked.nnz, worked.shape, worked.device.type) == (3, (1, 1, 5, 7), "cpu")
    assert worked.entry_rows().tolist() == [0, 0, 2]


def test_worked_pairs(worked: SparseMask) -> None:
    rows = ["1110001", "1110001", "0000000", "0000000", "0001110"]
    assert worked.to_bool()[0, 0].int().tolist() == [[int(c) for c in row] for row in rows]
    assert worked.kept_pairs().tolist() == [[11]]
    assert worked.density() == 11 / 35
    # Causality sees keys up to i + 2: of 3 + 4 + 5 + 6 + 7 allowed pairs 3 + 3 + 0 + 0 + 3 stay.
    assert worked.kept_pairs(is_causal=True).tolist() == [[9]]
    assert worked.density(is_causal=True) == 9 / 25
    # Without keys 1 and 4: 2 + 2 + 0 + 0 + 2 of 2 + 3 + 3 + 4 + 5.
    padding = torch.tensor([[True, False, True, True, False, True, True]])
    assert worked.density(is_causal=True, key_padding=padding) == 6 / 17


def test_worked_formats(worked: SparseMask) -> None:
    indices, counts = worked.padded()
    assert indices.tolist() == [[[[0, 2], [-1, -1], [1, -1]]]]
    assert counts.tolist() == [[[2, 0, 1]]]
    assert (indices.dtype, counts.dtype) == (torch.int32, torch.int32)
    turned = worked.transpose()
    assert (turned.block_size, turned.q_len, turned.kv_len) == ((3, 2), 7, 5)
    assert turned.indices.tolist() == [0, 2, 0]
    assert turned.counts.tolist() == [[[1, 1, 1]]]
    assert worked.transpose_order().tolist() == [0, 2, 1]
    assert repr(worked) == (
        "SparseMask(batch=1, heads=1, q_len=5, kv_len=7, block_size=(2, 3), kept=33.33%)"
    )


# ---------------------------------------------------------------------------- properties


@thorough
@given(masks())
def test_round_trips(mask: SparseMask) -> None:
    size = {"block_size": mask.block_size, "q_len": mask.q_len, "kv_len": mask.kv_len}
    keep = mask.to_bool()
    assert keep.shape == mask.shape
    assert SparseMask.from_bool(keep, block_size=mask.block_size) == mask
    assert SparseMask.from_block_bool(mask.to_block_bool(), **size) == mask
    indices, counts = mask.padded()
    assert SparseMask.from_padded(indices, **size) == mask
    junk = torch.where(indices < 0, 10**6, indices)
    assert SparseMask.from_padded(junk, counts, **size) == mask
    assert SparseMask.from_csr(*mask.to_csr(), **size) == mask
    assert SparseMask.from_numpy(mask.numpy()) == mask
    assert revalidate(mask) == mask
    assert pickle.loads(pickle.dumps(mask)) == mask == copy.deepcopy(mask)


@thorough
@given(masks(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_counting_without_the_array(
    mask: SparseMask, is_causal: bool, pad: bool, seed: int
) -> None:
    noise = torch.Generator().manual_seed(seed)
    padding = torch.rand(mask.batch, mask.kv_len, generator=noise) < 0.6 if pad else None
    allowed = causal(mask) if is_causal else torch.ones_like(causal(mask))
    if padding is not None:
        allowed = allowed & padding[:, None, None]
    keep = mask.to_bool() & allowed
    rule = {"is_causal": is_causal, "key_padding": padding}
    assert torch.equal(mask.kept_pairs(**rule), keep.sum((-1, -2)))
    total = allowed.expand(mask.shape).sum().item()
    assert mask.density(**rule) == (keep.sum().item() / total if total else 0)
    each = allowed_pairs(mask.q_len, mask.kv_len, **rule)
    assert torch.equal(each, allowed.reshape(len(each), -1).sum(-1))


@thorough
@given(masks(), st.integers(2, 3), st.booleans())
def test_counting_of_shared_parts(mask: SparseMask, batch: int, is_causal: bool) -> None:
    shared = mask[:1]
    padding = torch.arange(mask.kv_len) >= torch.arange(batch)[:, None]
    keep = shared.to_bool() & padding[:, None, None]
    keep &= causal(mask) | (not is_causal)
    kept = shared.kept_pairs(is_causal=is_causal, key_padding=padding)
    assert torch.equal(kept, keep.sum((-1, -2)))
    one = mask.kept_pairs(is_causal=is_causal, key_padding=padding[:1])
    assert torch.equal(one, (mask.to_bool() & (causal(mask) | (not is_causal))).sum((-1, -2)))


@thorough
@given(masks())
def test_transpose(mask: SparseMask) -> None:
    turned = mask.transpose()
    assert torch.equal(turned.to_bool(), mask.to_bool().mT)
    assert revalidate(turned).transpose() == mask
    assert mask.transpose() is turned  # made once
    assert torch.equal(mask.entry_rows()[mask.transpose_order()] % mask.q_blocks, turned.indices)
    assert pickle.loads(pickle.dumps(mask))._transposed is None


@thorough
@given(masks(), st.data())
def test_slicing(mask: SparseMask, data: st.DataObject) -> None:
    keep = mask.to_bool()
    b = data.draw(st.integers(-mask.batch, mask.batch - 1))
    h = data.draw(st.integers(-mask.heads, mask.heads - 1))
    one = mask[b, h]
    assert torch.equal(one.to_bool()[0, 0], keep[b, h])
    assert one.indices.untyped_storage().data_ptr() == mask.indices.untyped_storage().data_ptr()
    assert torch.equal(mask[b].to_bool()[0], keep[b])
    for part in (slice(None, None, 2), slice(0, 1), slice(None)):
        assert torch.equal(revalidate(mask[part, h]).to_bool(), keep[part, h][:, None])
        assert torch.equal(revalidate(mask[:, part]).to_bool(), keep[:, part])


@thorough
@given(masks(), st.integers(1, 3), st.integers(1, 3))
def test_expand(mask: SparseMask, batch: int, repeat: int) -> None:
    wide = revalidate(mask[0].expand(batch, repeat * mask.heads))
    # Query head h of H takes mask head h * Hm // H: each head is repeated in place.
    expected = mask.to_bool()[:1].repeat_interleave(repeat, 1).expand(batch, -1, -1, -1)
    assert torch.equal(wide.to_bool(), expected)


# ---------------------------------------------------------------------------- the object


def test_full() -> None:
    mask = SparseMask.full(5, 7, batch=2, heads=3, block_size=(2, 4))
    assert (mask.shape, bool(mask.to_bool().all())) == ((2, 3, 5, 7), True)
    assert mask.density() == mask.density(is_causal=True) == 1
    assert revalidate(mask) == mask


def test_padded_is_a_view_where_rows_are_equal() -> None:
    indices = torch.arange(3, dtype=torch.int32).expand(1, 2, 4, 3).contiguous()
    mask = SparseMask.from_padded(indices, q_len=4, kv_len=9)
    assert mask.indices.data_ptr() == indices.data_ptr() == mask.padded()[0].data_ptr()


def test_a_mask_that_keeps_nothing() -> None:
    mask = SparseMask.from_bool(torch.zeros(2, 1, 3, 4, dtype=torch.bool))
    assert (mask.nnz, mask.padded()[0].shape, mask.density(is_causal=True)) == (0, (2, 1, 3, 0), 0)
    assert not mask.to_bool().any()
    assert mask.transpose().nnz == mask[1].nnz == mask.expand(2, 4).nnz == 0
    nothing_allowed = torch.zeros(2, 4, dtype=torch.bool)
    assert SparseMask.full(3, 4).density(key_padding=nothing_allowed) == 0


def test_equality_is_by_content(worked: SparseMask) -> None:
    same = copy.copy(worked)
    assert worked == same
    assert worked is not same
    assert worked != SparseMask.full(5, 7, block_size=(2, 3))
    assert worked != SparseMask(worked.indices, worked.offsets, q_len=3, kv_len=3)
    assert worked != "mask"
    with pytest.raises(TypeError, match="unhashable"):
        hash(worked)


def test_it_cannot_be_changed(worked: SparseMask) -> None:
    with pytest.raises(AttributeError, match="immutable: cannot set 'q_len'"):
        worked.q_len = 3
    with pytest.raises(AttributeError, match="immutable: cannot delete 'indices'"):
        del worked.indices


def test_to_device(worked: SparseMask) -> None:
    assert worked.to("cpu") is worked
    moved = worked.to("meta")
    assert (moved.device.type, moved.offsets.device.type, moved.q_len) == ("meta", "meta", 5)


def test_inside_a_compiled_function(worked: SparseMask) -> None:
    def score(values: Tensor, mask: SparseMask) -> Tensor:
        rows = values[mask.indices.to(torch.int64)] * mask.block_size[0] + mask.kv_blocks
        return rows.sum() + mask.counts.sum() + mask.shape[2]

    compiled = torch.compile(score, fullgraph=True, backend="eager")
    values = torch.arange(10.0)
    assert compiled(values, worked) == score(values, worked)
    other = SparseMask.full(9, 8)
    assert compiled(values, other) == score(values, other)

    def build(indices: Tensor, offsets: Tensor) -> SparseMask:
        return SparseMask(indices, offsets, q_len=3, kv_len=3, validate=False)

    built = torch.compile(build, fullgraph=True, backend="eager")(worked.indices, worked.offsets)
    assert built == build(worked.indices, worked.offsets)


# --------------------------------------------------------------------------------- errors


def parts(rows: list[list[int]], heads: int = 1) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([len(row) for row in rows]).view(1, heads, -1)
    flat = torch.tensor([j for row in rows for j in row], dtype=torch.int32)
    ends = counts.reshape(-1).cumsum(0).view(counts.shape)
    return flat, torch.cat([ends[..., :1] - counts[..., :1], ends], -1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 2], [], [1], [2, 1]], r"ascend within a row, got 1 after 2 at batch 0, head 1, "),
        ([[0, 2], [], [1], [1, 1]], r"got 1 after 1 at batch 0, head 1, row 1, position 1"),
        ([[0, 2], [], [], [0, 3]], r"in \[0, 3\), got 3 at batch 0, head 1, row 1, position 1"),
        ([[], [0, -1], [], []], r"got -1 at batch 0, head 0, row 1, position 1"),
    ],
)
def test_wrong_indices(rows: list[list[int]], message: str) -> None:
    indices, offsets = parts(rows, heads=2)
    with pytest.raises(ValueError, match=message):
        SparseMask(indices, offsets, q_len=2, kv_len=3)


@thorough
@given(masks(), st.data())
def test_the_first_offending_index_is_named(mask: SparseMask, data: st.DataObject) -> None:
    if not mask.nnz:
        return
    place = data.draw(st.integers(0, mask.nnz - 1))
    indices = mask.indices.clone()
    indices[place:] = mask.kv_blocks + place  # and all that follow
    row = int(mask.entry_rows()[place])
    position = place - int(mask.offsets[..., :-1].flatten()[row])
    bh, i = divmod(row, mask.q_blocks)
    b, h = divmod(bh, mask.heads)
    wrong = SparseMask(
        indices,
        mask.offsets,
        block_size=mask.block_size,
        q_len=mask.q_len,
        kv_len=mask.kv_len,
        validate=False,
    )
    with pytest.raises(ValueError, match="must be in") as caught:
        revalidate(wrong)
    where = f"at batch {b}, head {h}, row {i}, position {position}"
    assert str(caught.value).endswith(where)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([[[1, 2, 3]]], "offsets must start at 0, got 1"),
        ([[[0, 2, 1]]], "must not decrease, got 1 after 2 at batch 0, head 0, row 1"),
        ([[[0, 1, 2]]], r"must end at len\(indices\) = 3, got 2"),
        ([[[0, 1, 2], [1, 3, 3]]], "to the next, got 1 after 2 at batch 0, head 1"),
        ([[[0, 3]]], r"must have shape \(batch, heads, 3\), got \(1, 1, 2\)"),
    ],
)
def test_wrong_offsets(offsets: list[list[list[int]]], message: str) -> None:
    indices = torch.tensor([0, 1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        SparseMask(indices, torch.tensor(offsets), q_len=2, kv_len=3)


@pytest.mark.usefixtures("unchecked")
def test_wrong_types() -> None:
    indices, offsets = torch.tensor([0], dtype=torch.int32), torch.tensor([[[0, 1]]])
    with pytest.raises(TypeError, match=r"indices must be int32, got torch.int64"):
        SparseMask(indices.long(), offsets, q_len=1, kv_len=1)
    with pytest.raises(TypeError, match=r"offsets must be int64, got torch.int32"):
        SparseMask(indices, offsets.int(), q_len=1, kv_len=1)
    with pytest.raises(ValueError, match=r"indices must have one dimension, got shape \(1, 1\)"):
        SparseMask(indices[None], offsets, q_len=1, kv_len=1)
    with pytest.raises(TypeError, match=r"keep must be bool, got torch.float32"):
        SparseMask.from_bool(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"2 or 4 dimensions, got shape \(1, 2, 2\)"):
        SparseMask.from_bool(torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"indices must be integers, got torch.float32"):
        SparseMask.from_padded(torch.ones(2, 2), q_len=2, kv_len=2)
    with pytest.raises(TypeError, match=r"key_padding must be bool \(True = attend\)"):
        SparseMask.full(2, 2).density(key_padding=torch.ones(1, 2))


def test_wrong_sizes() -> None:
    keep = torch.ones(2, 3, dtype=torch.bool)
    for block_size in ((0, 1), (1, -2)):
        with pytest.raises(ValueError, match=r"block_size must be two integers of at least 1"):
            SparseMask.from_bool(keep, block_size=block_size)
    with pytest.raises(ValueError, match="q_len must be at least 1, got 0"):
        SparseMask.full(0, 3)
    with pytest.raises(ValueError, match=r"must end in \(2, 2\) for q_len 3, kv_len 3"):
        SparseMask.from_block_bool(keep, block_size=(2, 2), q_len=3, kv_len=3)
    with pytest.raises(ValueError, match="block of 2x2, but the block at batch 0, head 0, query 2"):
        SparseMask.from_bool(torch.ones(4, 4).triu(-1).bool(), block_size=(2, 2))
    full = SparseMask.full(2, 3, batch=2, heads=2)
    with pytest.raises(ValueError, match=r"must have shape \(batch, 3\), got \(2, 4\)"):
        full.density(key_padding=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="must have batch 2 or 1 as the mask, got 3"):
        full.density(key_padding=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"batch must be 2 \(only 1 can be expanded\), got 4"):
        full.expand(4, 2)
    with pytest.raises(ValueError, match="heads must be a multiple of 2, got 3"):
        full.expand(2, 3)
    with pytest.raises(IndexError, match=r"head must be in \[-2, 2\), got 2"):
        full[0, 2]
    with pytest.raises(IndexError, match=r"batch slice .* keeps nothing"):
        full[2:]


def test_wrong_padded_rows() -> None:
    size = {"q_len": 2, "kv_len": 3}
    with pytest.raises(
        ValueError, match="before a key block at batch 0, head 0, row 1, position 0"
    ):
        SparseMask.from_padded(torch.tensor([[0, 1], [-1, 2]]), **size)
    with pytest.raises(ValueError, match=r"counts must be in \[0, 2\], got 3 at batch 0, head 0"):
        SparseMask.from_padded(torch.tensor([[0, 1], [1, 2]]), torch.tensor([2, 3]), **size)
    with pytest.raises(ValueError, match="got 1 after 2 at batch 0, head 0, row 1, position 1"):
        SparseMask.from_padded(torch.tensor([[0, 1], [2, 1]]), **size)
    with pytest.raises(ValueError, match=r"must have shape \(batch, heads, 3\), got \(1, 1, 4\)"):
        SparseMask.from_padded(torch.tensor([[0], [1], [2]]), **size)
    # Would be 1 after a cast to int32 that wraps around.
    with pytest.raises(ValueError, match=f"got {2**32 + 1} at batch 0, head 0, row 0"):
        SparseMask.from_padded(torch.tensor([[2**32 + 1], [1]]), **size)
