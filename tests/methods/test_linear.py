"""Linear attention against its quadratic form."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from sparseloom.methods import AttentionInputs, AttentionShape, LinearAttention


@pytest.mark.parametrize("length", [1, 5, 128, 300])
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_its_quadratic_form(is_causal: bool, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    inputs = AttentionInputs(
        query=q, key=k[:, :1], value=v[:, :1], layer=0, is_causal=is_causal, scale=0.4
    )
    phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k[:, :1]))
    scores = phi_q @ phi_k.transpose(-1, -2)
    scores = scores.tril() if is_causal else scores
    expected = scores / (scores.sum(-1, keepdim=True) + 1e-6) @ v[:, :1]
    out = LinearAttention().attend(inputs)
    torch.testing.assert_close(out, expected)
    if is_causal and length > 1:
        late = dataclasses.replace(inputs, query=q[:, :, -2:])
        torch.testing.assert_close(LinearAttention().attend(late), expected[:, :, -2:])


def test_gradients_are_those_of_the_quadratic_form() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        inputs = AttentionInputs(query=q, key=k, value=v, layer=0, is_causal=True, scale=1.0)
        return LinearAttention().attend(inputs)

    assert torch.autograd.gradcheck(attend, (q, k, v))
    phi_q, phi_k = functional.elu(q) + 1, functional.elu(k) + 1
    scores = (phi_q @ phi_k.transpose(-1, -2)).tril()
    direct = scores / (scores.sum(-1, keepdim=True) + 1e-6) @ v
    for ours, theirs in zip(
        torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v)),
        torch.autograd.grad(direct.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_products_are_counted() -> None:
    shape = AttentionShape(2, 3, 1, 1000, 1000, 64, 192, is_causal=False)
    assert LinearAttention().macs(shape) == 2 * 3 * 2 * 1000 * 64 * 64
