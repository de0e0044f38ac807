"""The lightning indexer: its scores, codes, cache and training, against plain readings."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from sparseloom.methods import AttentionInputs, LightningIndexer, MethodShape, topk_mask
from sparseloom.methods.indexer import _hadamard

HIDDEN, HEADS, HEAD_DIM, LENGTH = 24, 4, 16, 40
SHAPE = MethodShape(2, HIDDEN, HEADS, 2, HEAD_DIM, 64, rotary=True, is_causal=True)


def indexer_of(*, rotary: bool = True, **changes: object) -> LightningIndexer:
    settings: dict = {"width": 8, "index_heads": 3, "sparsity": 0.8, "minimum_keys": 4}
    shape = dataclasses.replace(SHAPE, rotary=rotary)
    return LightningIndexer(**{**settings, **changes}).initialise(shape, seed=1)


def hidden_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(5))


def rotary_of(length: int, start: int = 0) -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(start, start + length)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def inputs_of(
    hidden: Tensor | None = None, start: int = 0, stop: int = LENGTH, **changes: object
) -> AttentionInputs:
    hidden = hidden_of() if hidden is None else hidden
    generator = torch.Generator().manual_seed(7)
    batch = len(hidden)
    query = torch.randn(batch, HEADS, LENGTH, HEAD_DIM, generator=generator)
    key = torch.randn(batch, 2, LENGTH, HEAD_DIM, generator=generator)
    inputs = AttentionInputs(
        query=query[:, :, start:stop],
        key=key[:, :, :stop],
        layer=1,
        is_causal=True,
        scale=HEAD_DIM**-0.5,
        hidden_states=hidden[:, start:stop],
        rotary=rotary_of(stop - start, start),
    )
    return dataclasses.replace(inputs, **changes)


@torch.no_grad()
def test_scores_are_those_of_the_formula() -> None:
    method = indexer_of(bits=32)
    assert method.indexer is not None
    layer, hidden = method.indexer.layers[1], hidden_of(1)
    got = method.predicted(inputs_of(hidden), torch.arange(LENGTH))
    cos, sin = rotary_of(LENGTH)
    fast, slow = (cos[0, :, 0], sin[0, :, 0]), (cos[0, :, 7], sin[0, :, 7])

    def turned(columns: Tensor, at: int) -> Tensor:  # 4 of 8 columns: pairs (0, 2) and (1, 3)
        out = columns.clone()
        for pair, (c, s) in enumerate((fast, slow)):
            a, b = columns[pair], columns[pair + 2]
            out[pair], out[pair + 2] = a * c[at] - b * s[at], b * c[at] + a * s[at]
        return out

    x = hidden[0]
    keys = torch.nn.functional.layer_norm(x @ layer.w_k.weight.T, (8,))
    for t, s in [(0, 0), (5, 39), (39, 5)]:
        queries = (x[t] @ layer.w_q.weight.T).view(3, 8)
        weights = x[t] @ layer.w_weight.weight.T / math.sqrt(3 * 8)
        expected = sum(
            float(weights[j]) * max(0.0, float(turned(queries[j], t) @ turned(keys[s], s)))
            for j in range(3)
        )
        assert float(got[0, 0, t, s]) == pytest.approx(expected, abs=1e-5)


def test_codes_are_close_and_choose_exactly() -> None:
    exact, coded = indexer_of(bits=32), indexer_of(bits=8)
    inputs, rows = inputs_of(), torch.arange(LENGTH)
    full = exact.predicted(inputs, rows).detach()
    near = coded.predicted(inputs, rows).detach()
    assert 0 < float((full - near).abs().max()) < 0.05 * float(full.abs().max())
    mask = coded.select(inputs)
    assert mask.heads == 1
    expected = topk_mask(near, sparsity=0.8, minimum_keys=4, is_causal=True)
    assert mask == expected
    blocks = dataclasses.replace(coded, block_size=(8, 1)).select(inputs)
    assert (blocks.block_size, blocks.heads) == ((8, 1), 1)


def test_hadamard_rotation_changes_no_product() -> None:
    a, b = torch.randn(2, 5, 8)
    torch.testing.assert_close(_hadamard(a) @ _hadamard(b).T, a @ b.T)
    peak = torch.nn.functional.one_hot(torch.tensor([3]), 8).float()
    torch.testing.assert_close(_hadamard(peak).abs(), torch.full((1, 8), 8**-0.5))
    assert _hadamard(a[:, :6]) is not None
    assert torch.equal(_hadamard(a[:, :6]), a[:, :6])


@pytest.mark.parametrize("rotary", [True, False])
def test_decoding_is_prefill(rotary: bool) -> None:
    method = indexer_of(rotary=rotary)
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, :6] = False
    whole = method.select(inputs_of(key_padding=padding)).to_bool()
    past = method.new_state(1)
    for start, stop in [(0, 25), *((i, i + 1) for i in range(25, LENGTH))]:
        call = inputs_of(start=start, stop=stop, past=past, key_padding=padding[:, :stop])
        rows = method.select(call).to_bool()
        assert torch.equal(rows, whole[:, :, start:stop, :stop])
    assert past.length == LENGTH
    assert past.tensors[0].dtype == torch.int8


def test_beams_rollback_and_batches() -> None:
    method = indexer_of()
    past = method.new_state(1)
    method.remember(inputs_of(stop=30, past=past))
    past.reorder(torch.tensor([1, 1]))
    past.crop(20)
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([3, 0]))
    swapped = hidden_of()[[1, 1]]
    got = method.select(inputs_of(swapped, 20, past=past)).to_bool()
    assert torch.equal(got, method.select(inputs_of(swapped)).to_bool()[:, :, 20:])


def test_it_learns_from_the_summed_attention_and_leaves_the_model_alone() -> None:
    method = indexer_of()
    hidden = hidden_of().requires_grad_()
    inputs = inputs_of(hidden)
    inputs.query.requires_grad_()
    rows = torch.tensor([3, 17, 30])
    found = method.compare(inputs, rows, detach=False)
    key = inputs.key.repeat_interleave(2, 1)
    scores = inputs.query[:, :, rows] @ key.transpose(-1, -2) * inputs.scale
    may = torch.arange(LENGTH) <= rows[:, None]
    share = scores.masked_fill(~may, -torch.inf).softmax(-1).sum(1, keepdim=True)
    expected = share / share.sum(-1, keepdim=True)
    got = found.target.masked_fill(~found.allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(got, expected.detach())
    (found.target.sum() + found.predicted.sum()).backward()
    assert hidden.grad is None
    assert inputs.query.grad is None
    assert method.indexer is not None
    reached = {n for n, p in method.indexer.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in reached} == {"1"}
    assert len(reached) == 5


def test_costs() -> None:
    shape = inputs_of().shape
    pairs = LENGTH * (LENGTH + 1) // 2
    expected = 2 * (LENGTH * HIDDEN * (3 * 9 + 8) + pairs * 3 * 9)
    assert indexer_of().prediction_macs(shape) == expected
    assert not indexer_of().worthwhile(1, 4)
    assert indexer_of().work(shape) is None


def test_what_is_missing_is_named() -> None:
    method, inputs = indexer_of(), inputs_of()
    with pytest.raises(ValueError, match="LightningIndexer has no trained predictor"):
        LightningIndexer().select(inputs)
    with pytest.raises(ValueError, match="LightningIndexer has no weights"):
        LightningIndexer().sizes()
    with pytest.raises(ValueError, match="hidden_states are missing"):
        method.select(dataclasses.replace(inputs, hidden_states=None))
    with pytest.raises(ValueError, match="rotary is missing"):
        method.select(dataclasses.replace(inputs, rotary=None))
    with pytest.raises(ValueError, match="attention has 40 keys in layer 1, the indexer 10"):
        method.select(inputs_of(start=30, past=method.new_state(1)))
    with pytest.raises(ValueError, match="bits must be 8, what the indexer was made with, got 32"):
        dataclasses.replace(method, bits=32)
