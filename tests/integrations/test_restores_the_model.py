"""After the block the model is what it was before, whatever happened inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from sparseloom.integrations import sparsify
from sparseloom.integrations.call import SITES
from sparseloom.methods import Dense, Oracle

Snapshot = Callable[[nn.Module], object]
SPARSE = Oracle(sparsity=0.7, minimum_keys=2)


@torch.no_grad()
def test_nothing_is_left(zoo: SimpleNamespace, family: str, snapshot: Snapshot) -> None:
    model, inputs = zoo.build(family), zoo.inputs("left")
    expected = model(**inputs)[0]  # hooks of transformers' own are there from now on
    before = snapshot(model)
    with sparsify(model, SPARSE):
        model(**inputs)
        assert snapshot(model) != before
    assert snapshot(model) == before
    assert len(SITES) == 0
    assert torch.equal(model(**inputs)[0], expected)


class Unlucky:
    """Fails at the second attention call."""

    def __init__(self) -> None:
        self.calls = 0

    def on_attention(self, inputs: object, mask: object, output: object) -> None:
        self.calls += 1
        if self.calls == 2:
            raise KeyError("out of luck")


@torch.no_grad()
def test_nothing_is_left_after_an_exception(
    zoo: SimpleNamespace, family: str, snapshot: Snapshot
) -> None:
    model, inputs = zoo.build(family), zoo.inputs("none")
    model(**inputs)
    before = snapshot(model)
    with pytest.raises(KeyError, match="out of luck"), sparsify(model, SPARSE, observer=Unlucky()):
        model(**inputs)
    assert snapshot(model) == before
    assert len(SITES) == 0


def test_a_refused_model_is_left_alone(zoo: SimpleNamespace, snapshot: Snapshot) -> None:
    model = zoo.build("llama")
    model.config.output_attentions = False
    before = snapshot(model)
    with sparsify(model, Dense()):
        inside = snapshot(model)
        for again in (model, model.model):
            with (
                pytest.raises(RuntimeError, match="is sparsified already"),
                sparsify(again, SPARSE),
            ):
                pass
        assert snapshot(model) == inside
    assert snapshot(model) == before


@torch.no_grad()
def test_two_models_with_one_configuration_object(zoo: SimpleNamespace) -> None:
    """Only the model that was given runs sparse, in whatever order the blocks end."""
    one = zoo.build("llama")
    two = transformers.LlamaForCausalLM(one.config).eval()
    two.load_state_dict(one.state_dict())
    inputs = zoo.inputs("left")
    before, name = zoo.real(one(**inputs)[0], inputs), one.config._attn_implementation
    with sparsify(one, SPARSE) as sparse:
        torch.testing.assert_close(zoo.real(two(**inputs)[0], inputs), before, rtol=1e-5, atol=1e-5)
        assert sparse.stats() == []
        assert (zoo.real(one(**inputs)[0], inputs) - before).abs().max() > 1e-3
    first, second = sparsify(one, SPARSE), sparsify(two, SPARSE)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert one.config._attn_implementation != name
    assert (zoo.real(two(**inputs)[0], inputs) - before).abs().max() > 1e-3
    second.__exit__(None, None, None)
    assert one.config._attn_implementation == name
    assert torch.equal(zoo.real(one(**inputs)[0], inputs), before)


@torch.no_grad()
def test_the_inner_model_alone(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("none")
    expected = model(**inputs)[0]
    with sparsify(model.model, SPARSE) as sparse:
        assert (model(**inputs)[0] - expected).abs().max() > 1e-3
    assert len(sparse.stats()) == 2
    assert torch.equal(model(**inputs)[0], expected)


@torch.no_grad()
def test_a_copy_made_inside_runs_dense(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("right")
    expected = zoo.real(model(**inputs)[0], inputs)
    with sparsify(model, SPARSE) as sparse:
        copied = copy.deepcopy(model)
        found = zoo.real(copied(**inputs)[0], inputs)
        assert sparse.stats() == []
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_block_can_be_entered_again(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("gpt2"), zoo.inputs("none")
    block = sparsify(model, SPARSE)
    for calls in (1, 2):
        with block as sparse:
            model(**inputs)
        assert sparse.stats()[0]["calls"] == calls
    block.reset()
    assert block.stats() == []
