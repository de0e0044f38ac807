"""The predictor losses against what they are by definition."""

from __future__ import annotations

import math

import pytest
import torch

from sparseloom.training.losses import attention_kl, score_mse


def test_kl_of_a_worked_example() -> None:
    scores = torch.tensor([[[[0.0, math.log(3.0)]]]])  # P = (1/4, 3/4)
    predicted = torch.zeros(1, 1, 1, 2)  # Q = (1/2, 1/2)
    allowed = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert attention_kl(scores, predicted, allowed).item() == pytest.approx(expected, abs=1e-6)


def test_kl_matches_the_dense_definition_row_by_row() -> None:
    torch.manual_seed(0)
    scores, predicted = torch.randn(2, 3, 5, 7).double(), torch.randn(2, 3, 5, 7).double()
    allowed = torch.rand(2, 1, 5, 7) < 0.6
    allowed[..., 0] = True
    total = 0.0
    for b in range(2):
        for h in range(3):
            for i in range(5):
                keys = allowed[b, 0, i]
                p, q = scores[b, h, i, keys].softmax(0), predicted[b, h, i, keys].softmax(0)
                total += (p * (p / q).log()).sum().item()
    assert attention_kl(scores, predicted, allowed).item() == pytest.approx(total / 30, rel=1e-9)


def test_forbidden_pairs_and_empty_rows_make_no_nan() -> None:
    scores = torch.randn(1, 2, 4, 4)
    predicted = torch.randn(1, 2, 4, 4, requires_grad=True)
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()[None, None].clone()
    allowed[..., 2, :] = False
    loss = attention_kl(scores, predicted, allowed)
    loss.backward()
    assert torch.isfinite(loss)
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
    assert (predicted.grad[..., 2, :] == 0).all()
    assert (predicted.grad[..., 0, 1:] == 0).all()


def test_kl_is_zero_only_for_equal_distributions() -> None:
    scores = torch.randn(1, 2, 3, 5)
    allowed = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    assert attention_kl(scores, scores + 3.0, allowed).item() == pytest.approx(0.0, abs=1e-6)
    assert attention_kl(scores, -scores, allowed).item() > 0.1


@pytest.mark.parametrize("shape", [(1, 1, 4, 6), (2, 1, 4, 6), (1, 1, 1, 6)])
def test_mse_is_the_mean_over_allowed_entries(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    scores, predicted = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    allowed = torch.rand(shape) < 0.5
    allowed[..., 0] = True
    full = allowed.expand(2, 3, 4, 6)
    expected = (scores - predicted)[full].square().mean()
    assert score_mse(scores, predicted, allowed).item() == pytest.approx(expected.item(), rel=1e-5)
