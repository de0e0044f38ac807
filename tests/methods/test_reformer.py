"""LSH attention against direct formulas."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparseloom.methods import AttentionInputs, AttentionShape, MethodShape, Reformer

SHAPE = MethodShape(
    layers=2,
    hidden_size=24,
    heads=3,
    kv_heads=3,
    head_dim=8,
    max_length=512,
    rotary=False,
    is_causal=False,
)


def call(length: int, *, is_causal: bool = False, **changes: Any) -> AttentionInputs:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    base = AttentionInputs(query=q, key=k, value=v, layer=1, is_causal=is_causal, scale=8**-0.5)
    return dataclasses.replace(base, **changes)


def shared_attention(inputs: AttentionInputs) -> Tensor:
    """Dense attention with keys = queries at unit length; itself only where nothing else is."""
    scores = inputs.query @ functional.normalize(inputs.query, dim=-1).transpose(-1, -2)
    length = scores.shape[-1]
    keep = torch.ones(length, length, dtype=torch.bool)
    keep = keep.tril() if inputs.is_causal else keep
    keep = keep.expand(2, 1, -1, -1)
    if inputs.key_padding is not None:
        keep = keep & inputs.key_padding[:, None, None]
    others = keep & ~torch.eye(length, dtype=torch.bool)
    allowed = torch.where(others.any(-1, keepdim=True), others, keep)
    assert inputs.value is not None
    return scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num() @ inputs.value


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_two_chunks_that_see_each_other_are_dense(
    is_causal: bool, rounds: int, length: int
) -> None:
    method = Reformer(rounds=rounds, bucket_size=8).initialise(SHAPE)
    inputs = call(length, is_causal=is_causal)
    torch.testing.assert_close(method.attend(inputs), shared_attention(inputs))


def test_padding_is_as_if_it_were_not_there() -> None:
    padding = torch.ones(2, 16, dtype=torch.bool)
    padding[1, 11:] = False
    padding[0, :3] = False
    method = Reformer(rounds=2, bucket_size=8).initialise(SHAPE)
    inputs = call(16, key_padding=padding)
    real = padding[:, None, :, None].expand(2, 3, 16, 8)
    out = method.attend(inputs)
    torch.testing.assert_close(out[real], shared_attention(inputs)[real])
    assert (out[~real] == 0).all()


@pytest.mark.parametrize("is_causal", [True, False])
def test_chunks_and_rounds_follow_the_definition(is_causal: bool) -> None:
    """One round at a time by loops over sorted tokens, then the weights of the rounds."""
    method = Reformer(rounds=2, bucket_size=4).initialise(SHAPE)
    inputs = call(24, is_causal=is_causal)
    assert method.weights is not None
    layer: Any = method.weights.layers[1]
    turn = layer.rotations(3, 2, 8, 3)  # six buckets
    keys = functional.normalize(inputs.query, dim=-1)
    out = method.attend(inputs)
    assert inputs.value is not None
    for b, h in [(0, 0), (1, 2)]:
        parts, logs = torch.zeros(2, 24, 8).double(), torch.zeros(2, 24).double()
        for r in range(2):
            turned = inputs.query[b, h].float() @ turn[h, r]
            bucket = torch.cat([turned, -turned], -1).argmax(-1)
            order = sorted(range(24), key=lambda i, of=bucket: (int(of[i]), i))
            for place, i in enumerate(order):
                chunk = place // 4
                seen = [
                    j
                    for p, j in enumerate(order)
                    if p // 4 in (chunk, (chunk - 1) % 6) and (j <= i or not is_causal)
                ]
                others = [j for j in seen if j != i] or [i]
                scores = keys[b, h, others] @ inputs.query[b, h, i]
                if others == [i]:
                    scores = torch.tensor([-5e4]).double()
                parts[r, i] = scores.softmax(0) @ inputs.value[b, h, others]
                logs[r, i] = scores.logsumexp(0)
        expected = (parts * logs.softmax(0)[..., None]).sum(0)
        torch.testing.assert_close(out[b, h], expected)


def test_hashes_are_fixed_in_evaluation_and_new_in_training() -> None:
    method = Reformer(rounds=1, bucket_size=2).initialise(SHAPE)
    assert method.weights is not None
    inputs = call(32)
    first = method.attend(inputs)
    assert torch.equal(method.attend(inputs), first)
    method.weights.train()
    second, third = method.attend(inputs), method.attend(inputs)
    assert not torch.allclose(second, first)
    assert not torch.allclose(third, second)
    method.weights.eval()
    assert torch.equal(method.attend(inputs), third)


def test_near_tokens_find_each_other() -> None:
    """Pairs of equal queries share their bucket whatever the rotation."""
    half = torch.randn(1, 1, 32, 8, generator=torch.Generator().manual_seed(0)) * 8
    query = half.repeat_interleave(2, dim=2)
    value = torch.arange(64.0).view(1, 1, 64, 1)
    method = Reformer(rounds=4, bucket_size=8).initialise(SHAPE)
    inputs = AttentionInputs(
        query=query, key=query, value=value, layer=0, is_causal=False, scale=8**-0.5
    )
    partner = torch.arange(64.0).view(32, 2).flip(1).flatten()
    assert (method.attend(inputs)[0, 0, :, 0] - partner).abs().median() < 0.5


def test_chunks_and_products() -> None:
    assert Reformer().chunks(512) == (8, 64)
    assert Reformer().chunks(513) == (10, 64)
    assert Reformer(buckets=10).chunks(4001) == (10, 401)
    for length, millions in [(512, 68.2), (1024, 138), (2048, 285), (4096, 604)]:
        shape = AttentionShape(1, 1, 1, length, length, 64, 64, is_causal=False)
        assert float(f"{Reformer().macs(shape) / 1e6:.3g}") == millions
    made = Reformer().initialise(SHAPE).module
    assert made is not None
    assert not list(made.parameters())


def test_bad_calls_and_settings_are_named() -> None:
    inputs = call(16, is_causal=True)
    late = dataclasses.replace(inputs, query=inputs.query[:, :, -1:])
    with pytest.raises(NotImplementedError, match="its keys are the queries"):
        Reformer().initialise(SHAPE).attend(late)
    with pytest.raises(ValueError, match="buckets must be an even number of at least 2, got 5"):
        Reformer(buckets=5)
    with pytest.raises(ValueError, match="rounds must be an integer of at least 1"):
        Reformer(rounds=0)
