from __future__ import annotations

import torch

from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, RandomMask, budgets


def select(
    method: RandomMask,
    q_len: int,
    kv_len: int,
    *,
    layer: int = 0,
    batch: int = 1,
    is_causal: bool = True,
    key_padding: torch.Tensor | None = None,
) -> SparseMask:
    inputs = AttentionInputs(
        query=torch.zeros(batch, 2, q_len, 1),
        key=torch.zeros(batch, 2, kv_len, 1),
        layer=layer,
        is_causal=is_causal,
        scale=1.0,
        key_padding=key_padding,
    )
    return method.select(inputs)


def test_exact_budget_and_diagonal() -> None:
    mask = select(RandomMask(sparsity=0.8, minimum_keys=2), 50, 50)
    assert torch.equal(mask.counts[0, 1], budgets(torch.arange(1, 51), 0.8, 2))
    assert torch.diagonal(mask.to_bool(), dim1=-2, dim2=-1).all()


def test_seed_layer_and_head_decide() -> None:
    method = RandomMask(sparsity=0.8, seed=1)
    first = select(method, 80, 80)
    assert select(method, 80, 80) == first
    assert select(RandomMask(sparsity=0.8, seed=2), 80, 80) != first
    assert select(method, 80, 80, layer=1) != first
    assert first[:, 0] != first[:, 1]


def test_keys_are_spread_evenly() -> None:
    mask = select(RandomMask(sparsity=0.75, minimum_keys=1), 256, 64, is_causal=False)
    hits = mask.to_bool().sum((0, 1, 2)).double()  # 512 draws of 16 out of 64: 128 ± 10
    assert abs(float(hits.mean()) - 128) < 1e-9
    assert float(hits.std()) < 16
    assert float((hits - 128).abs().max()) < 45


def test_one_by_one_is_all_at_once_and_padding_is_left_out() -> None:
    method = RandomMask(sparsity=0.8)
    whole = select(method, 60, 60).to_bool()
    assert torch.equal(select(method, 1, 60).to_bool(), whole[:, :, -1:])
    padding = torch.ones(2, 60, dtype=torch.bool)
    padding[1, :20] = False
    padded = select(method, 60, 60, batch=2, key_padding=padding)
    assert torch.equal(padded.to_bool()[:1], whole)
    assert not padded.to_bool()[1, :, :, :20].any()
