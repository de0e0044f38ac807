"""Training a sparsified model: gradients, dropout, gradient checkpointing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseloom.integrations import in_recomputation, sparsify
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Dense, Method, Oracle

SPARSE = Oracle(sparsity=0.7, minimum_keys=2)
TRAINED = ["bert", "gpt2", "llama"]
NO_DROPOUT: dict[str, dict[str, float]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"attention_dropout": 0.0},
}


class Watcher:
    """Counts calls, and those made for the second time."""

    def __init__(self) -> None:
        self.calls = self.again = 0

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        self.calls += 1
        self.again += in_recomputation()


def gradients(
    model: nn.Module, method: Method | None, inputs: dict[str, Tensor], **options: Any
) -> tuple[list[Tensor], Any]:
    """Gradients of a loss on the real tokens, and the session."""
    model.zero_grad()
    session = None
    keep = inputs["attention_mask"].bool()
    if method is None:
        model(**inputs)[0][keep].square().mean().backward()
    else:
        with sparsify(model, method, **options) as session:
            model(**inputs)[0][keep].square().mean().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found, session


@pytest.mark.parametrize("family", TRAINED)
def test_gradients_at_density_one(zoo: SimpleNamespace, family: str, padding: str) -> None:
    model, inputs = zoo.build(family, **NO_DROPOUT[family]).train(), zoo.inputs(padding)
    expected, _ = gradients(model, None, inputs)
    for method in (Dense(), zoo.everything):
        found, _ = gradients(model, method, inputs)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("sparse", [True, False])
def test_gradient_checkpointing(zoo: SimpleNamespace, family: str, sparse: bool) -> None:
    """The same gradients, and every call counted once although the backward pass repeats it."""
    model, inputs = zoo.build(family, **NO_DROPOUT[family]).train(), zoo.inputs("left")
    method = SPARSE if sparse else Dense()
    expected, plain = gradients(model, method, inputs)
    old = model.gradient_checkpointing_enable  # the name before 5.x
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    watcher = Watcher()
    found, session = gradients(model, method, inputs, observer=watcher)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert session.stats() == plain.stats()
    assert [row["calls"] for row in session.stats()] == [1, 1]
    assert (watcher.calls, watcher.again) == (4, 2)


@pytest.mark.parametrize("family", TRAINED)
def test_dense_dropout_is_the_models_own(zoo: SimpleNamespace, family: str) -> None:
    model, inputs = zoo.build(family).train(), zoo.inputs("none")
    if family == "llama":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
    torch.manual_seed(5)
    expected, _ = gradients(model, None, inputs)
    torch.manual_seed(5)
    found, _ = gradients(model, Dense(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_sparse_dropout(zoo: SimpleNamespace) -> None:
    """Attention dropout acts in training alone, and keeps the expected output."""
    model, inputs = zoo.build("llama", attention_dropout=0.5), zoo.inputs("none", batch=2)
    with torch.no_grad(), sparsify(model, SPARSE):
        quiet = model(**inputs)[0]
        assert torch.equal(model(**inputs)[0], quiet)
        model.train()
        torch.manual_seed(0)
        first = model(**inputs)[0]
        assert not torch.equal(model(**inputs)[0], first)
        torch.manual_seed(0)
        assert torch.equal(model(**inputs)[0], first)
    calls: list[Tensor] = []

    class Keep:
        def on_attention(
            self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
        ) -> None:
            if inputs.layer == 0:
                calls.append(output)

    with torch.no_grad(), sparsify(model, SPARSE, observer=Keep()):
        for _ in range(32):
            model(**inputs)
        model.eval()
        model(**inputs)
    mean, exact = torch.stack(calls[:-1]).mean(0), calls[-1]
    assert (mean - exact).abs().mean() < 0.25 * exact.abs().mean()


def test_masks_are_constants_of_the_loss(zoo: SimpleNamespace) -> None:
    """Selection leaves no graph behind: the loss sees kept pairs alone."""
    model, inputs = zoo.build("llama").train(), zoo.inputs("none")
    seen: list[bool] = []

    class Grad(Oracle):
        def select(self, inputs: AttentionInputs) -> SparseMask:
            seen.append(torch.is_grad_enabled())
            return super().select(inputs)

    gradients(model, Grad(sparsity=0.7, minimum_keys=2), inputs)
    assert seen == [False, False]
