"""The gate on pooled blocks: what it pools, its cache, its training, against plain readings."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from sparseloom.methods import AttentionGate, AttentionInputs, MethodShape
from sparseloom.methods.rotary import rotate, spread_frequencies

HEADS, KV_HEADS, HEAD_DIM, WIDTH, LENGTH = 4, 2, 16, 8, 40
SHAPE = MethodShape(2, 24, HEADS, KV_HEADS, HEAD_DIM, 64, rotary=True, is_causal=True)


def gate_of(*, rotary: bool = True, **changes: object) -> AttentionGate:
    shape = dataclasses.replace(SHAPE, rotary=rotary)
    settings: dict = {"block_size": (1, 4), "width": WIDTH, "sparsity": 0.6, "minimum_keys": 4}
    return AttentionGate(**{**settings, **changes}).initialise(shape, seed=3)


def rotary_of(length: int, start: int = 0) -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(start, start + length)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def states_of(heads: int, batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Queries or keys as a model rotates them."""
    generator = torch.Generator().manual_seed(seed + heads)
    plain = torch.randn(batch, heads, length, HEAD_DIM, generator=generator)
    cos, sin = rotary_of(length)
    return rotate(plain, (cos[None], sin[None]), torch.arange(HEAD_DIM // 2))


def inputs_of(
    batch: int = 2, start: int = 0, stop: int = LENGTH, **changes: object
) -> AttentionInputs:
    inputs = AttentionInputs(
        query=states_of(HEADS, batch)[:, :, start:stop],
        key=states_of(KV_HEADS, batch)[:, :, :stop],
        layer=1,
        is_causal=True,
        scale=HEAD_DIM**-0.5,
        rotary=rotary_of(stop - start, start),
    )
    return dataclasses.replace(inputs, **changes)


@torch.no_grad()
def test_scores_are_products_of_pooled_and_rotated_blocks() -> None:
    method = gate_of(block_size=(8, 4))
    assert method.gate is not None
    layer = method.gate.layers[1]
    inputs = inputs_of(1)
    got = method.predicted(inputs, torch.arange(LENGTH))
    generator = torch.Generator().manual_seed(HEADS)
    query = torch.randn(1, HEADS, LENGTH, HEAD_DIM, generator=generator)  # before rotation
    generator = torch.Generator().manual_seed(KV_HEADS)
    key = torch.randn(1, KV_HEADS, LENGTH, HEAD_DIM, generator=generator)
    cos, sin = rotary_of(LENGTH)
    chosen = spread_frequencies(cos, WIDTH, HEAD_DIM)
    assert len(chosen) == WIDTH // 2
    for i, j, head in [(0, 0, 0), (3, 5, 1), (4, 9, 3)]:
        mean_q = query[0, head, 8 * i : 8 * i + 8].mean(0) @ layer.w_q[head]
        block = key[0, head // 2, 4 * j : 4 * j + 4]
        pooled = torch.cat([block.amax(0), block.amin(0), block.mean(0)]) @ layer.w_k[head // 2]
        at = [rotate(x[None], (cos[0, p : p + 1], sin[0, p : p + 1]), chosen)
              for x, p in ((mean_q, 8 * i), (pooled, 4 * j))]  # fmt: skip
        expected = float((at[0] * at[1]).sum()) / math.sqrt(WIDTH)
        assert float(got[0, head, 8 * i + 2, 4 * j + 1]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("prompt", [1, 17, 24])
def test_decoding_is_prefill(prompt: int, rotary: bool) -> None:
    method = gate_of(rotary=rotary)
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, :6] = False
    whole = method.select(inputs_of(key_padding=padding)).to_bool()
    past = method.new_state(1)
    for start, stop in [(0, prompt), (prompt, 30), *((i, i + 1) for i in range(30, LENGTH))]:
        call = inputs_of(start=start, stop=stop, past=past, key_padding=padding[:, :stop])
        rows = method.select(call).to_bool()
        may = torch.arange(stop) <= torch.arange(start, stop)[:, None]
        assert torch.equal(rows & may, whole[:, :, start:stop, :stop] & may)
    assert past.length == LENGTH


def test_beams_rollback_and_batches() -> None:
    method = gate_of()
    past = method.new_state(1)
    method.remember(inputs_of(stop=22, past=past))  # dense at first: positions alone
    method.select(inputs_of(start=22, stop=31, past=past))
    past.reorder(torch.tensor([1, 1]))
    past.crop(-4)
    assert past.length == 27
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([3, 0]))
    inputs = inputs_of(start=27)
    swapped = dataclasses.replace(
        inputs, query=inputs.query[[1, 1]], key=inputs.key[[1, 1]], past=past
    )
    got = method.select(swapped).to_bool()
    assert torch.equal(got, method.select(inputs_of()).to_bool()[[1, 1], :, 27:])


def test_padding_changes_nothing_for_the_others() -> None:
    method = gate_of(block_size=(4, 4))
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[0, 30:] = False  # in the middle of a block
    for is_causal in (True, False):
        together = method.select(inputs_of(key_padding=padding, is_causal=is_causal)).to_bool()
        short = method.select(inputs_of(stop=30, is_causal=is_causal)).to_bool()
        assert torch.equal(together[:1, :, :30, :30], short[:1])


def test_threshold_keeps_the_large_shares() -> None:
    method = gate_of(block_size=(4, 4), threshold=0.15)
    inputs = inputs_of(1, is_causal=False)
    blocks = method.predicted(inputs, torch.arange(0, LENGTH, 4))[..., ::4]
    share = blocks.softmax(-1)
    expected = (share >= 0.15) | (share == share.amax(-1, keepdim=True))
    assert torch.equal(method.select(inputs).to_block_bool(), expected)
    assert 0 < int(expected.sum()) < expected.numel()
    causal = method.select(inputs_of(1)).to_block_bool()
    assert torch.diagonal(causal, dim1=-2, dim2=-1).all()
    assert not causal.triu(1).any()


def test_target_is_the_pooled_attention() -> None:
    method = gate_of(block_size=(4, 8))
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, :9] = False
    inputs = inputs_of(key_padding=padding)
    found = method.compare(inputs, torch.arange(LENGTH), detach=True)
    key = inputs.key.repeat_interleave(2, 1)
    may = padding[:, None, None, :] & torch.ones(LENGTH, LENGTH).tril().bool()
    may = may & padding[:, None, :, None]
    true = (inputs.query @ key.transpose(-1, -2) * inputs.scale).masked_fill(~may, -1e30)
    true = true.softmax(-1) * may
    pooled = true.unflatten(-1, (-1, 8)).unflatten(2, (-1, 4)).amax((3, 5))
    expected = pooled / pooled.sum(-1, keepdim=True).clamp(min=1e-30)
    alive = found.allowed.any(-1, keepdim=True)
    got = found.target.masked_fill(~found.allowed, -1e30).softmax(-1)
    torch.testing.assert_close(got * alive, expected * alive)
    assert found.allowed[0, 0].any(-1).all()
    assert found.allowed[1, 0].any(-1).tolist() == [False, False, *[True] * 8]
    assert found.predicted.requires_grad
    some = method.compare(inputs, torch.tensor([1, 2, 9, 30, 31, 38]), detach=True)
    assert some.target.shape[2] == 2  # six rows fill two blocks


def test_the_model_is_left_alone() -> None:
    inputs = inputs_of()
    inputs.query.requires_grad_()
    inputs.key.requires_grad_()
    method = gate_of()
    found = method.compare(inputs, torch.arange(8), detach=False)
    (found.target.sum() + found.predicted.sum()).backward()
    assert inputs.query.grad is None
    assert inputs.key.grad is None
    assert method.gate is not None
    assert [p.grad is not None for p in method.gate.parameters()] == [False, False, True, True]


def test_costs() -> None:
    shape = inputs_of().shape
    method = gate_of(block_size=(4, 8))
    made = (HEADS * 10 + 3 * KV_HEADS * 5) * HEAD_DIM
    pairs = HEADS * sum(-(-4 * (i + 1) // 8) for i in range(10))
    assert method.prediction_macs(shape) == 2 * (made + pairs) * WIDTH
    assert not method.worthwhile(1, 8)
    assert gate_of(threshold=0.1).worthwhile(1, 5)
    assert not gate_of(threshold=0.1).worthwhile(1, 4)


def test_what_is_missing_is_named() -> None:
    method, inputs = gate_of(), inputs_of()
    with pytest.raises(ValueError, match="AttentionGate has no trained predictor: run"):
        AttentionGate().select(inputs)
    with pytest.raises(ValueError, match="AttentionGate has no weights"):
        AttentionGate().sizes()
    with pytest.raises(ValueError, match="rotary is missing"):
        method.select(dataclasses.replace(inputs, rotary=None))
    with pytest.raises(ValueError, match="layer must be below 2"):
        method.select(dataclasses.replace(inputs, layer=2))
    with pytest.raises(ValueError, match="attention has 40 keys in layer 1, the gate 10"):
        method.select(inputs_of(start=30, past=method.new_state(1)))
    with pytest.raises(ValueError, match="width must be 8, what the gate was made with, got 16"):
        dataclasses.replace(method, width=16)
    assert method.gate is not None
    state = method.gate.state_dict()
    with pytest.raises(ValueError, match="heads of the stored predictor is damaged: 'missing'"):
        method.restore({"layers": 2}, state)
    with pytest.raises(ValueError, match="weights of the stored predictor do not fit"):
        method.restore({**method.sizes(), "layers": 1}, state)
