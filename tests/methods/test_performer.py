"""Performer (FAVOR+) against the softmax that it estimates and against its own formula."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparseloom.methods import AttentionInputs, AttentionShape, MethodShape, Performer
from sparseloom.methods.performer import PerformerLayer, orthogonal_features

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


def call(length: int = 24, *, spread: float = 1.0, is_causal: bool = False) -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 3, length, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return AttentionInputs(
        query=q * spread, key=k * spread, value=v, layer=1, is_causal=is_causal, scale=8**-0.5
    )


def layer_of(method: Performer) -> PerformerLayer:
    assert method.weights is not None
    layer = method.weights.layers[1]
    assert isinstance(layer, PerformerLayer)
    return layer


def error(features: int, *, is_causal: bool = False) -> float:
    """Mean error against softmax attention over several draws of W."""
    inputs = call(spread=0.5, is_causal=is_causal)
    assert inputs.value is not None
    exact = functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=is_causal
    )
    total = 0.0
    for seed in range(8):
        method = Performer(features=features, epsilon=0.0).initialise(SHAPE, seed=seed)
        total += float((method.attend(inputs) - exact).square().mean())
    return math.sqrt(total / 8)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_estimate_converges_to_softmax_attention(is_causal: bool) -> None:
    few, many = error(64, is_causal=is_causal), error(4096, is_causal=is_causal)
    assert many < 0.02
    assert 4 < few / many < 20  # like √(4096 / 64) = 8


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("epsilon", [None, 0.05])
def test_equals_the_quadratic_formula(kernel: Any, epsilon: float | None) -> None:
    method = Performer(features=12, kernel=kernel, epsilon=epsilon).initialise(SHAPE)
    inputs = call()
    w = layer_of(method).features.double()
    ridge = epsilon if epsilon is not None else {"softmax": 1e-4, "relu": 1e-3}[kernel]

    def phi(x: Tensor, *, of_keys: bool) -> Tensor:
        if kernel == "relu":
            return (x @ w.T).clamp(min=0) + ridge
        x = x * 8**-0.25
        raw = x @ w.T
        top = raw.amax((-1, -2), keepdim=True) if of_keys else raw.amax(-1, keepdim=True)
        return (raw - x.square().sum(-1, keepdim=True) / 2 - top).exp() + ridge

    scores = phi(inputs.query, of_keys=False) @ phi(inputs.key, of_keys=True).transpose(-1, -2)
    assert inputs.value is not None
    expected = scores / scores.sum(-1, keepdim=True) @ inputs.value
    torch.testing.assert_close(method.attend(inputs), expected)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_causal_is_the_definition_on_each_prefix(kernel: Any) -> None:
    method = Performer(features=12, kernel=kernel, epsilon=0.03).initialise(SHAPE)
    inputs = call(150, spread=1.5, is_causal=True)  # more than a chunk of the prefix sums
    out = method.attend(inputs)
    assert inputs.value is not None
    for i in (0, 1, 100, 127, 128, 149):
        prefix = dataclasses.replace(
            inputs,
            query=inputs.query[:, :, : i + 1],
            key=inputs.key[:, :, : i + 1],
            value=inputs.value[:, :, : i + 1],
            is_causal=False,
        )
        torch.testing.assert_close(out[:, :, i], method.attend(prefix)[:, :, i])
    late = dataclasses.replace(inputs, query=inputs.query[:, :, -4:])  # with a key/value cache
    torch.testing.assert_close(method.attend(late), out[:, :, -4:])


def test_rows_of_a_block_are_orthogonal_and_as_long_as_gaussian_ones() -> None:
    w = orthogonal_features(2 * 64 + 9, 64, torch.Generator().manual_seed(3))
    for block in (w[:64], w[64:128], w[128:]):
        products = block @ block.T
        assert (products - products.diag().diag()).abs().max() < 1e-3
    assert (w[:64] @ w[64:128].T).abs().max() > 1.0
    squares = orthogonal_features(4096, 64, torch.Generator().manual_seed(4)).square().sum(1)
    assert abs(float(squares.mean()) - 64) < 1.0  # χ² of 64: mean 64, variance 128
    assert abs(float(squares.var()) - 128) < 15


def test_features_are_redrawn_in_training_and_frozen_in_evaluation() -> None:
    method = Performer(features=6, redraw_every=2).initialise(SHAPE)
    layer, inputs = layer_of(method), call()
    first = layer.features.clone()
    method.attend(inputs)
    assert torch.equal(layer.features, first)
    assert int(layer.step) == 0
    layer.train()
    method.attend(inputs)
    assert torch.equal(layer.features, first)
    method.attend(inputs)
    second = layer.features.clone()
    assert not torch.equal(second, first)
    method.attend(inputs)
    layer.eval()
    for _ in range(3):
        method.attend(inputs)
    assert torch.equal(layer.features, second)
    never = Performer(features=6, redraw_every=0).initialise(SHAPE)
    layer_of(never).train()
    before = layer_of(never).features.clone()
    for _ in range(3):
        never.attend(inputs)
    assert torch.equal(layer_of(never).features, before)


def test_dropout_drops_keys_and_keeps_the_expectation() -> None:
    method = Performer(features=32).initialise(SHAPE)
    inputs = call()
    torch.manual_seed(0)
    runs = torch.stack([method.attend(inputs, dropout_p=0.3) for _ in range(400)])
    plain = method.attend(inputs)
    assert not torch.allclose(runs[0], plain)
    assert (runs.mean(0) - plain).abs().max() < 0.15


def test_sizes_and_products() -> None:
    assert Performer().width(64) == 266
    assert Performer().width(32) == 110
    assert Performer(kernel="relu", features=0).width(64) == 64
    text = dataclasses.replace(SHAPE, layers=4, heads=4, hidden_size=256, head_dim=64)
    made = Performer().initialise(text).module
    assert made is not None
    assert not list(made.parameters())  # nothing is learned
    assert sum(b.numel() for b in made.buffers() if b.dim() == 2) == 4 * 266 * 64
    for length, millions in [(512, 34.9), (1024, 69.7), (2048, 139), (4096, 279)]:
        shape = AttentionShape(1, 1, 1, length, length, 64, 64, is_causal=False)
        assert float(f"{Performer().macs(shape) / 1e6:.3g}") == millions
        relu = Performer(kernel="relu", features=0).macs(shape)
        assert relu == 2 * length * 64 * 64


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": 0}, "features must be an integer of at least 1, got 0"),
        ({"epsilon": -1.0}, "epsilon must be 0 or more, got -1.0"),
        ({"redraw_every": -1}, "redraw_every must be an integer of at least 0, got -1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Performer(**settings)
