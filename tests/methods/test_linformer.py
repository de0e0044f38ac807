"""Linformer against its definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sparseloom.methods import AttentionInputs, AttentionShape, Linformer, MethodShape
from sparseloom.methods.linformer import LinformerLayer

SHAPE = MethodShape(
    layers=2,
    hidden_size=24,
    heads=3,
    kv_heads=3,
    head_dim=8,
    max_length=20,
    rotary=False,
    is_causal=False,
)


def call(length: int = 12, *, padding: torch.Tensor | None = None) -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return AttentionInputs(
        query=q, key=k, value=v, layer=1, is_causal=False, scale=0.3, key_padding=padding
    )


def layer_of(method: Linformer, index: int = 1) -> LinformerLayer:
    assert method.weights is not None
    layer = method.weights.layers[index]
    assert isinstance(layer, LinformerLayer)
    return layer


@pytest.mark.parametrize("share", [True, False])
def test_equals_the_formula_entry_by_entry(share: bool) -> None:
    method = Linformer(rank=5, share_kv=share).initialise(SHAPE)
    inputs = call()
    layer = layer_of(method)
    e = layer.key_projection.detach().double()
    f = e if layer.value_projection is None else layer.value_projection.detach().double()
    assert (layer.value_projection is None) == share
    out = method.attend(inputs)
    assert inputs.value is not None
    for b, h, i in [(0, 0, 0), (1, 2, 11), (0, 1, 7)]:
        scores = torch.zeros(5, dtype=torch.float64)
        for r in range(5):
            row = sum(e[j, r] * inputs.key[b, h, j] for j in range(12))
            scores[r] = (inputs.query[b, h, i] @ row) * 0.3
        weights = scores.exp() / scores.exp().sum()
        expected = sum(
            weights[r] * sum(f[j, r] * inputs.value[b, h, j] for j in range(12)) for r in range(5)
        )
        torch.testing.assert_close(out[b, h, i], expected)


def test_identity_projections_are_dense_attention() -> None:
    method = Linformer(rank=12).initialise(SHAPE)
    layer = layer_of(method)
    assert layer.value_projection is not None
    with torch.no_grad():
        layer.key_projection.copy_(torch.eye(20, 12))
        layer.value_projection.copy_(torch.eye(20, 12))
    inputs = call()
    assert inputs.value is not None
    dense = functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, scale=0.3
    )
    torch.testing.assert_close(method.attend(inputs), dense)


def test_shorter_inputs_use_the_first_rows_and_longer_ones_are_refused() -> None:
    method = Linformer(rank=5).initialise(SHAPE)
    before = method.attend(call(9))
    with torch.no_grad():
        layer_of(method).key_projection[9:] += 1.0
    torch.testing.assert_close(method.attend(call(9)), before)
    assert not torch.allclose(method.attend(call(10))[:, :, :9], before)
    with pytest.raises(ValueError, match=r"at most 20 tokens.*got 21"):
        method.attend(call(21))


def test_parameters_and_products() -> None:
    text = MethodShape(
        layers=4,
        hidden_size=256,
        heads=4,
        kv_heads=4,
        head_dim=64,
        max_length=4000,
        rotary=False,
        is_causal=False,
    )
    for method, count in [
        (Linformer(), 2 * 4000 * 256 * 4),
        (Linformer(rank=32, share_kv=True), 4000 * 32 * 4),
    ]:
        made = method.initialise(text).module
        assert made is not None
        assert sum(p.numel() for p in made.parameters()) == count
    for length, millions in [(512, 33.6), (1024, 67.1), (2048, 134), (4096, 268)]:
        shape = AttentionShape(1, 1, 1, length, length, 64, 64, is_causal=False)
        assert float(f"{Linformer().macs(shape) / 1e6:.3g}") == millions


def test_projections_learn() -> None:
    method = Linformer(rank=5).initialise(SHAPE)
    layer = layer_of(method)
    method.attend(call()).square().sum().backward()
    assert layer.value_projection is not None
    for parameter in (layer.key_projection, layer.value_projection):
        assert parameter.grad is not None
        assert (parameter.grad[:12] != 0).all()
        assert (parameter.grad[12:] == 0).all()


def test_without_weights_or_with_a_cache_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="linformer has no weights yet"):
        Linformer().attend(call())
    inputs = call()
    import dataclasses

    late = dataclasses.replace(inputs, query=inputs.query[:, :, -1:])
    with pytest.raises(NotImplementedError, match="linformer needs all tokens at once"):
        Linformer(rank=4).initialise(SHAPE).attend(late)
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got 0"):
        Linformer(rank=0)
