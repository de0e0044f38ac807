"""SparseMask in other formats: CSR, numpy, FlexAttention's BlockMask, pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparseloom._mask_plot import cell_shares
from sparseloom.mask import SparseMask

thorough = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)


def some_mask(seed: int, largest: int) -> SparseMask:
    """A random mask: any block size, ragged edges, some empty rows."""
    noise = np.random.default_rng(seed)
    q_len, kv_len = (int(n) for n in noise.integers(1, largest + 1, 2))
    bq, bk, batch, heads = (int(n) for n in noise.integers(1, [6, 6, 4, 4]))
    keep = noise.random((batch, heads, -(-q_len // bq), -(-kv_len // bk))) < noise.random()
    keep &= noise.random((*keep.shape[:3], 1)) < 0.9
    return SparseMask.from_block_bool(
        torch.from_numpy(keep), block_size=(bq, bk), q_len=q_len, kv_len=kv_len
    )


def causal(mask: SparseMask) -> Tensor:
    return torch.ones(mask.shape[2:], dtype=torch.bool).tril(mask.kv_len - mask.q_len)


@pytest.fixture
def worked() -> SparseMask:
    """Blocks of 2 x 3 on 5 queries and 7 keys: block rows {0, 2}, {}, {1}, the last ones cut."""
    indices = torch.tensor([[0, 2], [-1, -1], [1, -1]])
    return SparseMask.from_padded(indices, block_size=(2, 3), q_len=5, kv_len=7)


# --------------------------------------------------------------------------- CSR and numpy


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_csr_starts_anew_in_each_head() -> None:
    indices = torch.tensor([[[[0, 1], [2, -1]], [[1, -1], [-1, -1]]]])
    mask = SparseMask.from_padded(indices, q_len=2, kv_len=3)
    crow, col = mask.to_csr()
    assert crow.tolist() == [[[0, 2, 3], [0, 1, 1]]]
    assert col.tolist() == [0, 1, 2, 1]
    # torch wants both lists in one type.
    head = torch.sparse_csr_tensor(
        crow[0, 0], col[:3].to(torch.int64), torch.ones(3), (2, 3), check_invariants=True
    )
    assert torch.equal(head.to_dense() == 1, mask.to_bool()[0, 0])
    assert SparseMask.from_csr(crow[0, 1], col[3:], q_len=2, kv_len=3) == mask[0, 1]


def test_wrong_other_formats() -> None:
    col = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"start at 0 in each .* got 1 at batch 0, head 1"):
        SparseMask.from_csr(torch.tensor([[[0, 1], [1, 2]]]), col, q_len=1, kv_len=2)
    arrays = SparseMask.full(2, 2).numpy()
    with pytest.raises(ValueError, match="missing: q_len"):
        SparseMask.from_numpy({k: v for k, v in arrays.items() if k != "q_len"})
    with pytest.raises(TypeError, match="indices must be integers, got float64"):
        SparseMask.from_numpy({**arrays, "indices": np.zeros(4)})
    with pytest.raises(ValueError, match="got 9 at batch 0, head 0, row 1, position 1"):
        SparseMask.from_numpy({**arrays, "indices": np.array([0, 1, 0, 9])})


def test_from_numpy_takes_read_only_arrays() -> None:
    arrays = SparseMask.full(2, 2).numpy()
    arrays["indices"] = np.frombuffer(arrays["indices"].tobytes(), dtype=np.int32)
    assert SparseMask.from_numpy(arrays) == SparseMask.full(2, 2)


# --------------------------------------------------------------------------- FlexAttention


def lists(counts: Tensor, indices: Tensor) -> list[set[int]]:
    rows = indices.flatten(0, -2).tolist()
    return [set(row[:n]) for row, n in zip(rows, counts.flatten().tolist(), strict=True)]


@thorough
@given(seeds, st.booleans(), st.booleans(), st.booleans())
def test_block_mask_is_what_torch_would_make(
    seed: int, is_causal: bool, pad: bool, for_eager: bool
) -> None:
    mask = some_mask(seed, largest=12)
    keep = mask.to_bool()
    padding = torch.arange(mask.kv_len) >= torch.arange(mask.batch)[:, None] if pad else None
    allowed = keep & (causal(mask) | (not is_causal))
    if padding is not None:
        allowed &= padding[:, None, None]
    ours = mask.to_block_mask(is_causal=is_causal, key_padding=padding, for_eager=for_eager)
    theirs = create_block_mask(
        lambda b, h, i, j: allowed[b, h, i, j],
        *mask.shape,
        device="cpu",
        BLOCK_SIZE=mask.block_size,
    )
    assert (ours.BLOCK_SIZE, ours.seq_lengths) == (theirs.BLOCK_SIZE, theirs.seq_lengths)
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = f"{name}_num_blocks", f"{name}_indices"
        mine = lists(getattr(ours, counts), getattr(ours, indices))
        assert mine == lists(getattr(theirs, counts), getattr(theirs, indices)), name
        for attribute in (counts, indices):
            assert getattr(ours, attribute).shape == getattr(theirs, attribute).shape
            assert getattr(ours, attribute).dtype == torch.int32


def test_block_mask_shares_no_tensor() -> None:
    # FlexAttention's CPU code does not compile if two of the lists are one tensor.
    block_mask = SparseMask.full(32, 32, block_size=(16, 16)).to_block_mask(is_causal=True)
    names = ["kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"]
    names += [f"full_{name}" for name in names]
    assert len({getattr(block_mask, name).untyped_storage().data_ptr() for name in names}) == 8


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_mask_in_eager_flex_attention() -> None:
    noise = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 24, 8, generator=noise).unbind(0)
    blocks = torch.rand(1, 2, 3, 6, generator=noise) < 0.7
    mask = SparseMask.from_block_bool(blocks, block_size=(8, 4), q_len=24, kv_len=24)
    padding = torch.ones(2, 24, dtype=torch.bool)
    padding[1, :5] = False
    block_mask = mask.to_block_mask(is_causal=True, key_padding=padding, for_eager=True)
    keep = mask.to_bool() & causal(mask) & padding[:, None, None]
    scores = (query @ key.mT / 8**0.5).masked_fill(~keep, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0) @ value
    out = flex_attention(query, key, value, block_mask=block_mask)
    torch.testing.assert_close(out, expected)


# ------------------------------------------------------------------------------- pictures


def test_picture_of_a_small_mask(worked: SparseMask) -> None:
    figure = worked.plot(is_causal=True)
    cells, _veil, edge = figure.data
    assert np.asarray(cells.z).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    # The first block covers queries 0 and 1 and keys 0 to 2.
    assert (cells.y0, cells.dy, cells.x0, cells.dx) == (1, 2, 1.5, 3)
    assert list(figure.layout.yaxis.range) == [5, 0]
    assert "density 36.00% (causal)" in figure.layout.title.text
    # Query 0 sees keys 0, 1, 2: the edge runs down right of them, then one key further.
    assert list(zip(edge.x, edge.y, strict=True))[:4] == [(3, 0), (3, 1), (4, 1), (4, 2)]


@thorough
@given(seeds, st.integers(1, 9))
def test_picture_counts_blocks(seed: int, max_cells: int) -> None:
    mask = some_mask(seed, largest=40)[0, 0]
    shares, (queries, keys) = cell_shares(mask, max_cells)
    assert max(shares.shape) <= max_cells
    blocks = mask.to_block_bool()[0, 0].numpy()
    rows, columns = queries // mask.block_size[0], keys // mask.block_size[1]
    for (i, j), share in np.ndenumerate(shares):
        tile = blocks[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert share == np.float32(tile.mean())


def test_picture_inside_subplots() -> None:
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2)
    mask = SparseMask.full(600, 300, heads=2)
    for head in range(2):
        assert mask.plot(0, head, is_causal=True, figure=figure, row=1, col=head + 1) is figure
    assert [trace.xaxis for trace in figure.data] == ["x"] * 3 + ["x2"] * 3
    # More queries than keys: the first 300 see nothing, so the edge follows the left side.
    assert list(zip(figure.data[2].x, figure.data[2].y, strict=True)) == [
        (0, 0),
        (0, 300),
        (300, 600),
    ]
    with pytest.raises(ValueError, match="max_cells must be at least 1, got 0"):
        mask.plot(max_cells=0)
