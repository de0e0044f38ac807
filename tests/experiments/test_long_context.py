"""The stretched built-in model: same weights, longer positions, nearly the same short text."""

from __future__ import annotations

import pytest
import torch

from sparseloom.experiments.long_context import stretched
from sparseloom.models import load_model


def test_stretching_keeps_weights_and_changes_positions() -> None:
    long, short = stretched(8192), load_model("stdlib")
    assert long.context == 8192
    for one, other in zip(long.model.parameters(), short.model.parameters(), strict=True):
        assert torch.equal(one, other)
    ids = torch.tensor([list(b"\0def f(self):\n    return self\n" * 4)])
    with torch.no_grad():
        a, b = (m.model(input_ids=ids).logits.softmax(-1) for m in (long, short))
    assert not torch.equal(a, b)
    assert (a - b).abs().sum(-1).mean() < 0.3


def test_shorter_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be above 2048, the built-in model's, got 64"):
        stretched(64)
