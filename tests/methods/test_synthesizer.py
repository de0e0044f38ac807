"""Synthesizer's four variants against their formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sparseloom.methods import AttentionInputs, AttentionShape, MethodShape, Synthesizer
from sparseloom.methods.synthesizer import SynthesizerLayer, factors

SHAPE = MethodShape(
    layers=1,
    hidden_size=24,
    heads=3,
    kv_heads=3,
    head_dim=8,
    max_length=12,
    rotary=False,
    is_causal=False,
)
RANDOM, DENSE = ("random", "factorized_random"), ("dense", "factorized_dense")


def call(length: int = 10, *, is_causal: bool = False) -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    hidden = torch.randn(2, length, 24, generator=generator, dtype=torch.float64)
    return AttentionInputs(
        query=q, key=k, value=v, layer=0, is_causal=is_causal, scale=1.0, hidden_states=hidden
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("variant", [*RANDOM, *DENSE])
def test_rows_follow_the_formula(variant: Any, is_causal: bool) -> None:
    method = Synthesizer(variant=variant, rank=4).initialise(SHAPE)
    inputs = call(is_causal=is_causal)
    assert inputs.value is not None
    assert inputs.hidden_states is not None
    assert method.weights is not None
    layer = method.weights.layers[0]
    assert isinstance(layer, SynthesizerLayer)
    w = {name: p.detach().double() for name, p in layer.matrices.items()}
    out = method.attend(inputs)
    for b, h, i in [(0, 0, 0), (1, 2, 9), (0, 1, 4)]:
        x = inputs.hidden_states[b, i]
        inner = (x @ w["first"][h]).clamp(min=0) if "first" in w else x
        scores = torch.zeros(10, dtype=torch.float64)
        for j in range(10):
            if variant == "random":
                scores[j] = w["scores"][h, i, j]
            elif variant == "factorized_random":
                scores[j] = w["rows"][h, i] @ w["columns"][h, j]
            elif variant == "dense":
                scores[j] = inner @ w["second"][h, :, j]
            else:  # max_length 12 is 4 · 3
                assert (w["a"].shape[-1], w["b"].shape[-1]) == (4, 3)
                scores[j] = (inner @ w["a"][h, :, j % 4]) * (inner @ w["b"][h, :, j // 4])
        end = i + 1 if is_causal else 10
        expected = scores[:end].softmax(0) @ inputs.value[b, h, :end]
        torch.testing.assert_close(out[b, h, i], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", [*RANDOM, *DENSE])
def test_products_of_tokens_play_no_part(variant: Any) -> None:
    method = Synthesizer(variant=variant, rank=4).initialise(SHAPE)
    inputs = call()
    out = method.attend(inputs)
    other = dataclasses.replace(inputs, query=inputs.query * 3, key=-inputs.key)
    assert torch.equal(method.attend(other), out)
    assert inputs.hidden_states is not None
    moved = dataclasses.replace(inputs, hidden_states=inputs.hidden_states + 1)
    assert torch.equal(method.attend(moved), out) == (variant in RANDOM)
    blind = dataclasses.replace(inputs, hidden_states=None)
    if variant in RANDOM:
        assert torch.equal(method.attend(blind), out)
    else:
        with pytest.raises(ValueError, match="makes its scores from them"):
            method.attend(blind)


def test_parameters_on_the_long_range_arena_s_text_model() -> None:
    text = dataclasses.replace(SHAPE, layers=4, heads=4, hidden_size=256, head_dim=64)
    text = dataclasses.replace(text, max_length=1001)
    for variant, per_head in {
        "random": 1001 * 1001,
        "factorized_random": 2 * 1001 * 32,
        "dense": 256 * 64 + 64 * 1001,
        "factorized_dense": 256 * 64 + 64 * (32 + 32),
    }.items():
        method: Any = Synthesizer(variant=variant)  # pyright: ignore[reportArgumentType]
        made = method.initialise(text).module
        assert sum(p.numel() for p in made.parameters()) == 4 * 4 * per_head


def test_factors_cover_the_length() -> None:
    assert [factors(n) for n in (1, 2, 12, 16, 1024, 13)] == [
        (1, 1),
        (2, 1),
        (4, 3),
        (4, 4),
        (32, 32),
        (4, 4),
    ]
    for length in range(1, 300):
        a, b = factors(length)
        assert length <= a * b < length + a
        assert max(a, b) <= 4 * min(a, b)


def test_products_are_counted() -> None:
    shape = AttentionShape(1, 1, 1, 100, 100, 8, 24, is_causal=False)
    expected = {
        "random": 100 * 100 * 8,
        "factorized_random": 100 * 100 * (8 + 32),
        "dense": 100 * 100 * 8 + 100 * 24 * 8 + 100 * 100 * 8,
        "factorized_dense": 100 * 100 * 8 + 100 * 24 * 8 + 100 * 8 * 20,
    }
    for variant, macs in expected.items():
        method: Any = Synthesizer(variant=variant)  # pyright: ignore[reportArgumentType]
        assert method.macs(shape) == macs


def test_longer_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 12 tokens.*got 13"):
        Synthesizer().initialise(SHAPE).attend(call(13))
