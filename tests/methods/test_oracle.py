from __future__ import annotations

import torch

from sparseloom.methods import AttentionInputs, Oracle


def inputs_of(query: torch.Tensor, key: torch.Tensor, *, is_causal: bool) -> AttentionInputs:
    return AttentionInputs(query=query, key=key, layer=0, is_causal=is_causal, scale=0.5)


def draw(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_topk_of_the_true_scores_with_grouped_heads() -> None:
    query, key = draw(2, 4, 30, 8), draw(2, 2, 30, 8)
    mask = Oracle(sparsity=0.8, minimum_keys=1).select(inputs_of(query, key, is_causal=False))
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    best = scores.topk(6, -1).indices.sort(-1).values
    assert torch.equal(mask.padded()[0].long(), best)


def test_threshold_keeps_what_reaches_it_and_the_row_maximum() -> None:
    query, key = draw(1, 2, 25, 4), draw(1, 2, 25, 4)
    for is_causal in (False, True):
        mask = Oracle(threshold=0.3).select(inputs_of(query, key, is_causal=is_causal))
        scores = 0.5 * query @ key.transpose(-1, -2)
        if is_causal:
            scores = scores.masked_fill(~torch.ones(25, 25).bool().tril(), -torch.inf)
        share = scores.softmax(-1)
        expected = (share >= 0.3) | (share == share.amax(-1, keepdim=True))
        if is_causal:
            expected |= torch.eye(25).bool()
        assert torch.equal(mask.to_bool(), expected)
        assert not torch.equal(expected, share >= 0.3)


def test_low_threshold_and_no_sparsity_keep_everything() -> None:
    query, key = draw(1, 1, 12, 4), draw(1, 1, 12, 4)
    inputs = inputs_of(query, key, is_causal=True)
    for oracle in (Oracle(sparsity=0.0), Oracle(threshold=1e-30)):
        assert oracle.select(inputs).density(is_causal=True) == 1.0
    assert not Oracle(sparsity=0.0).worthwhile(12, 12)
    assert Oracle(threshold=1e-30).worthwhile(12, 12)
    assert Oracle(sparsity=0.5).prediction_macs(inputs.shape) == 78 * 4
