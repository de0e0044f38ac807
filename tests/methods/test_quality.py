from __future__ import annotations

import pytest
import torch

import sparseloom.methods.scores as scores_module
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Oracle, RandomMask, overlap, retained_mass
from sparseloom.methods.quality import kept_rows


def draw(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def bools(rows: list[list[int]]) -> SparseMask:
    return SparseMask.from_bool(torch.tensor(rows, dtype=torch.bool))


def test_overlap_of_a_worked_example() -> None:
    mask = bools([[1, 1, 0], [0, 1, 1], [1, 0, 1]])
    oracle = bools([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert overlap(mask, oracle).tolist() == [[0.75]]
    assert overlap(oracle, mask).tolist() == [[0.5]]
    # Causally the mask loses two pairs: (0, 1) and (1, 2).
    assert overlap(oracle, mask, is_causal=True).tolist() == [[0.75]]
    padding = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    assert overlap(mask, oracle, key_padding=padding).tolist() == [[0.75], [1.0], [1.0]]


def test_overlap_of_different_blocks_and_shared_heads() -> None:
    fine = torch.rand(2, 4, 13, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    tall = torch.rand(1, 2, 4, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = SparseMask.from_bool(fine)
    blocks = SparseMask.from_block_bool(tall, block_size=(4, 3), q_len=13, kv_len=9)
    wide = blocks.to_bool().repeat_interleave(2, 1).expand(2, -1, -1, -1)
    both = (fine & wide).sum((-2, -1))
    torch.testing.assert_close(overlap(mask, blocks), both / wide.sum((-2, -1)))
    torch.testing.assert_close(overlap(blocks, mask), both / fine.sum((-2, -1)))
    assert torch.equal(
        kept_rows(blocks, 4, 13, 4), blocks.to_bool().repeat_interleave(2, 1)[:, :, 4:]
    )


def test_retained_mass_is_the_kept_share(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = draw(2, 4, 21, 8), draw(2, 2, 21, 8)
    padding = torch.ones(2, 21, dtype=torch.bool)
    padding[0, :5] = False
    inputs = AttentionInputs(
        query=query, key=key, layer=0, is_causal=True, scale=0.4, key_padding=padding
    )
    mask = RandomMask(sparsity=0.7, minimum_keys=1).select(inputs)
    scores = 0.4 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    may = torch.ones(21, 21).bool().tril() & padding[:, None, None, :]
    share = scores.masked_fill(~may, -torch.inf).softmax(-1).nan_to_num()
    kept = (share * mask.to_bool()).sum(-1)  # (B, H, L)
    expected = torch.stack([kept[0, :, 5:].mean(-1), kept[1].mean(-1)])
    settings = {"scale": 0.4, "is_causal": True, "key_padding": padding}
    torch.testing.assert_close(retained_mass(query, key, mask, **settings), expected)
    monkeypatch.setattr(scores_module, "CPU_CHUNK", 1)
    torch.testing.assert_close(retained_mass(query, key, mask, **settings), expected)
    real = torch.arange(21).expand(2, -1) >= 11
    late = retained_mass(query, key, mask, query_padding=real, **settings)
    torch.testing.assert_close(late, kept[:, :, 11:].mean(-1))


def test_everything_retains_everything_and_the_oracle_the_most() -> None:
    query, key = draw(1, 2, 24, 8), draw(1, 2, 24, 8)
    full = retained_mass(query, key, SparseMask.full(24, 24), is_causal=True)
    torch.testing.assert_close(full, torch.ones(1, 2))
    inputs = AttentionInputs(query=query, key=key, layer=0, is_causal=True, scale=8**-0.5)
    for block_size in ((1, 1), (8, 1)):
        best = Oracle(sparsity=0.8, minimum_keys=2, block_size=block_size).select(inputs)
        other = Oracle(sparsity=0.8, minimum_keys=2, block_size=block_size, pooling="max").select(
            inputs
        )
        kept = retained_mass(query, key, best, is_causal=True)
        assert (kept >= retained_mass(query, key, other, is_causal=True)).all()
        assert (kept < 1).all()


def test_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match=r"oracle_mask must have the lengths of mask \(3, 3\)"):
        overlap(SparseMask.full(3, 3), SparseMask.full(3, 4))
    with pytest.raises(ValueError, match="mask must have q_len 5 and kv_len 5, got 3 and 3"):
        retained_mass(draw(1, 1, 5, 2), draw(1, 1, 5, 2), SparseMask.full(3, 3))
