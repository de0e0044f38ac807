"""Sparse Sinkhorn attention against its definition."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from sparseloom.methods import AttentionInputs, MethodShape, Sinkhorn
from sparseloom.methods.sinkhorn import SortNet, sinkhorn

SHAPE = MethodShape(
    layers=1,
    hidden_size=24,
    heads=3,
    kv_heads=3,
    head_dim=8,
    max_length=24,
    rotary=False,
    is_causal=False,
)


def call(length: int = 24) -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return AttentionInputs(query=q, key=k, value=v, layer=0, is_causal=False, scale=0.4)


@dataclass(frozen=True)
class Placed(Sinkhorn):
    """With a permutation that is given: place i gets block `places[i]`."""

    places: tuple[int, ...] = (0, 1, 2, 3)

    def permutation(self, key: torch.Tensor, layer: SortNet) -> torch.Tensor:
        hard = torch.eye(4, dtype=key.dtype)[torch.tensor(self.places)]
        return hard.expand(*key.shape[:2], 4, 4)


def net_of(method: Sinkhorn) -> SortNet:
    assert method.weights is not None
    layer = method.weights.layers[0]
    assert isinstance(layer, SortNet)
    return layer


def test_rows_and_columns_sum_to_one() -> None:
    scores = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2
    r = sinkhorn(scores, 200)
    torch.testing.assert_close(r.sum(-1), torch.ones(2, 3, 6))
    torch.testing.assert_close(r.sum(-2), torch.ones(2, 3, 6))
    hidden = torch.eye(6)[torch.tensor([2, 0, 5, 1, 4, 3])]
    sharp = sinkhorn((scores + 30 * hidden) * 20, 7)  # a low temperature gives a permutation
    torch.testing.assert_close(sharp, hidden.expand_as(sharp), atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("joint", [False, True])
def test_a_permutation_brings_one_other_block(joint: bool) -> None:
    places = [2, 0, 3, 1]
    weights = Sinkhorn(block=6).initialise(SHAPE).weights
    method = Placed(block=6, joint=joint, weights=weights, places=tuple(places))
    inputs = call()
    value = inputs.value
    assert value is not None
    out = method.attend(inputs)
    for b, h, i in [(0, 0, 0), (1, 2, 23), (0, 1, 11)]:
        own = slice(i // 6 * 6, i // 6 * 6 + 6)
        other = places[i // 6]
        there = slice(other * 6, other * 6 + 6)

        def to(place: list[slice], b: int = b, h: int = h, i: int = i) -> torch.Tensor:
            keys = torch.cat([inputs.key[b, h, part] for part in place])
            values = torch.cat([value[b, h, part] for part in place])
            return (keys @ inputs.query[b, h, i] * 0.4).softmax(0) @ values

        expected = to([own, there]) if joint else to([own]) + to([there])
        torch.testing.assert_close(out[b, h, i], expected, atol=1e-6, rtol=1e-6)


def test_without_iterations_the_blocks_are_mixed_by_a_softmax() -> None:
    method = Sinkhorn(block=6, iterations=0).initialise(SHAPE)
    inputs = call()
    value = inputs.value
    assert value is not None
    places = net_of(method).places.detach().double()
    keys = inputs.key.unflatten(2, (4, 6))
    r = (keys.sum(3) @ places).transpose(-1, -2).softmax(-1)
    torch.testing.assert_close(method.permutation(keys, net_of(method)), r)
    k = torch.einsum("bhij,bhjtd->bhitd", r, keys).flatten(2, 3)
    v = torch.einsum("bhij,bhjtd->bhitd", r, value.unflatten(2, (4, 6))).flatten(2, 3)
    block = torch.eye(4, dtype=torch.bool).repeat_interleave(6, 0).repeat_interleave(6, 1)

    def local(key: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            inputs.query, key, values, attn_mask=block, scale=0.4
        )

    expected = local(inputs.key, value) + local(k, v)
    torch.testing.assert_close(method.attend(inputs), expected)


def test_a_hard_permutation_counts_no_padding() -> None:
    """With blocks in place (R = 1) both parts are dense attention within blocks, without pads."""
    padding = torch.ones(2, 24, dtype=torch.bool)
    padding[0, 15:] = False
    inputs = dataclasses.replace(call(), key_padding=padding)
    method = Sinkhorn(block=6, iterations=1, temperature=1.0).initialise(SHAPE)
    value = inputs.value
    assert value is not None
    keep = torch.eye(4, dtype=torch.bool).repeat_interleave(6, 0).repeat_interleave(6, 1)
    keep = keep & padding[:, None, None]
    scores = inputs.query @ inputs.key.transpose(-1, -2) * 0.4
    dense = scores.masked_fill(~keep, -math.inf).softmax(-1).nan_to_num() @ value
    fixed = Placed(block=6, weights=method.weights)
    real = padding[:, None, :, None].expand_as(dense)
    torch.testing.assert_close(fixed.attend(inputs)[real], 2 * dense[real])


def test_noise_is_for_training_only_and_the_network_learns() -> None:
    method = Sinkhorn(block=6).initialise(SHAPE)
    net, inputs = net_of(method), call()
    assert torch.equal(method.attend(inputs), method.attend(inputs))
    net.train()
    torch.manual_seed(0)
    assert not torch.allclose(method.attend(inputs), method.attend(inputs))
    method.attend(inputs).square().sum().backward()
    assert net.places.grad is not None
    assert (net.places.grad != 0).all()
    assert net.places.shape == (8, 4)


def test_longer_inputs_and_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 4 blocks of 6 tokens.*got 5"):
        Sinkhorn(block=6).initialise(SHAPE).attend(call(25))
    with pytest.raises(ValueError, match="block must be an integer of at least 1"):
        Sinkhorn(block=0)
