"""What a sparse method computes inside a model, with and without a cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseloom.integrations import describe, method_shape, sparsify
from sparseloom.mask import SparseMask
from sparseloom.methods import (
    AttentionGate,
    AttentionInputs,
    Dense,
    DynamicSparse,
    LightningIndexer,
    Method,
    Oracle,
    Predictor,
    SlidingWindow,
    costs,
)

METHODS = ["oracle", "threshold", "window", "dynamic"]


class Calibrate:
    """Lets a predictor see some inputs in training mode, which fixes its quantisers."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor.train()

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        assert inputs.hidden_states is not None
        with torch.enable_grad():
            self.predictor.layers[inputs.layer].project(inputs.hidden_states, inputs.rotary)


def make(name: str, model: nn.Module, **changes: Any) -> Method:
    """A sparse method; the predictor's weights are random, which its plumbing does not notice."""
    if name == "dynamic":
        shape = describe(model)
        predictor = Predictor.for_shape(
            layers=shape.layers,
            hidden_size=shape.hidden_size,
            heads=shape.heads,
            head_dim=shape.head_dim,
            projection=0.5,
            rotary=shape.rotary,
        )
        with sparsify(model, Dense(), observer=Calibrate(predictor)), torch.no_grad():
            model(input_ids=torch.arange(40).view(2, 20) + 3)
        settings = {"sparsity": 0.7, "minimum_keys": 2, "projection": 0.5, **changes}
        return DynamicSparse(**settings, predictor=predictor.eval())
    gate = AttentionGate(sparsity=0.7, block_size=(1, 4), width=8, minimum_keys=4)
    indexer = LightningIndexer(sparsity=0.7, width=8, index_heads=2, minimum_keys=2)
    learned = {"gate": gate, "indexer": indexer}
    if name in learned:
        return learned[name].initialise(method_shape(model))
    return {
        "oracle": Oracle(sparsity=0.7, minimum_keys=2),
        "threshold": Oracle(threshold=0.05),
        "window": SlidingWindow(sparsity=0.7, growing=True, minimum_keys=2),
    }[name]


class Checker:
    """Recomputes every attention call from its inputs and its mask, pair by pair."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.calls = 0

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        assert mask is not None
        assert inputs.value is not None
        batch, heads, q_len, _ = inputs.query.shape
        kv_len = inputs.key.shape[2]
        keep = mask.expand(batch, heads).to_bool()
        if inputs.is_causal:
            rows = torch.arange(kv_len - q_len, kv_len)
            keep = keep & (torch.arange(kv_len) <= rows[:, None])
        if inputs.key_padding is not None:
            keep = keep & inputs.key_padding[:, None, None]
        key, value = (
            t.double().repeat_interleave(heads // t.shape[1], dim=1)
            for t in (inputs.key, inputs.value)
        )
        scores = (inputs.query.double() @ key.transpose(-1, -2)) * inputs.scale
        weights = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)
        self.worst = max(self.worst, float((weights @ value - output).abs().max()))
        self.calls += 1


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_the_mask_is_what_runs(zoo: SimpleNamespace, family: str, padding: str, name: str) -> None:
    model, inputs, checker = zoo.build(family), zoo.inputs(padding), Checker()
    with sparsify(model, make(name, model), when="always", observer=checker) as sparse:
        found = zoo.real(model(**inputs)[0], inputs)
    assert checker.calls == 2
    assert checker.worst < 1e-4
    assert all(0.05 < row["density"] < 0.9 for row in sparse.stats())
    assert (found - zoo.real(model(**inputs)[0], inputs)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("name", ["oracle", "window", "dynamic", "gate", "indexer"])
def test_decoding_step_by_step_equals_one_pass(
    zoo: SimpleNamespace, family: str, name: str
) -> None:
    """Row by row choices do not depend on whether earlier tokens came at once or one by one."""
    model, inputs = zoo.build(family), zoo.inputs("left", length=18)
    method = make(name, model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with sparsify(model, method, when="always"):
        at_once = model(**inputs, position_ids=positions, use_cache=False).logits
        cache, steps = None, []
        for start, stop in [(0, 11), (11, 13), *((i, i + 1) for i in range(13, 18))]:
            out = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(out.logits)
    found = zoo.real(torch.cat(steps, dim=1), inputs)
    torch.testing.assert_close(found, zoo.real(at_once, inputs), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["oracle", "dynamic", "gate", "indexer"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_generating_without_a_cache(
    zoo: SimpleNamespace, family: str, name: str, beams: int
) -> None:
    model, inputs = zoo.build(family), zoo.inputs("left", length=12)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    with sparsify(model, make(name, model), when="always"):
        cached = model.generate(**inputs, **settings, use_cache=True)
        anew = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(cached, anew)
    assert not torch.equal(cached, model.generate(**inputs, **settings))


class Kept:
    """The last row's kept keys of every call, by layer and number of keys."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], Tensor] = {}

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        assert mask is not None
        keep = mask.to_bool()
        first = keep.shape[-1] - keep.shape[-2]
        for row in range(keep.shape[-2]):
            keys = first + row + 1
            self.rows[inputs.layer, keys] = keep[:, :, row, :keys]


@torch.no_grad()
@pytest.mark.parametrize("name", ["dynamic", "gate", "indexer"])
def test_beams_select_what_teacher_forcing_does(zoo: SimpleNamespace, name: str) -> None:
    """Every step of the winning beams chose the keys that their whole text chooses at once."""
    model, inputs = zoo.build("llama"), zoo.inputs("none", length=14, batch=2)
    method, during, after = make(name, model), Kept(), Kept()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with sparsify(model, method, when="always", observer=during):
        texts = model.generate(**inputs, **settings)
    with sparsify(model, method, when="always", observer=after):
        model(input_ids=texts, use_cache=False)
    assert texts.shape[1] == 20
    compared = 0
    for place, forced in after.rows.items():
        beams = during.rows.get(place)  # of the last token there was no step
        for text in range(2 if beams is not None else 0):
            some = beams[3 * text : 3 * text + 3] if len(beams) > 2 else beams[text : text + 1]
            assert (some == forced[text]).flatten(1).all(1).any(), place
            compared += 1
    assert compared == 2 * 2 * 19


@torch.no_grad()
def test_short_inputs_run_dense_and_are_remembered(zoo: SimpleNamespace) -> None:
    """A prompt below the cost rule's length runs dense; its predictor keys are there later."""
    model, inputs = zoo.build("llama"), zoo.inputs("none", length=6)
    method = make("dynamic", model, minimum_keys=8)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with sparsify(model, method, when="always") as sparse:
        cached = model.generate(**inputs, **settings)
        row = sparse.stats()[0]
        anew = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(cached, anew)
    assert (row["calls"], row["dense_calls"], row["ran"]) == (8, 3, "sparse")


@torch.no_grad()
def test_density_one_needs_no_predictor(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("left", length=8)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    with sparsify(model, DynamicSparse(sparsity=0.0)):
        assert torch.equal(model.generate(**inputs, **settings), expected)
    untrained = DynamicSparse(sparsity=0.5, minimum_keys=1)
    with sparsify(model, untrained), pytest.raises(ValueError, match="no trained predictor"):
        model(**inputs)


@torch.no_grad()
def test_a_cache_filled_elsewhere_is_refused_where_it_matters(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("none", length=12)
    ids = inputs["input_ids"]
    method = make("dynamic", model)
    before = model(input_ids=ids[:, :10], use_cache=True).past_key_values
    unseen = "past_key_values holds 10 tokens of which"
    with sparsify(model, method), pytest.raises(ValueError, match=unseen):
        model(input_ids=ids[:, 10:], past_key_values=before)
    before = model(input_ids=ids[:, :10], use_cache=True).past_key_values
    expected = model(input_ids=ids, use_cache=False).logits[:, 10:]
    with sparsify(model, zoo.everything):  # needs nothing from the cache
        found = model(input_ids=ids[:, 10:], past_key_values=before).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("block_size", [(8, 1), (4, 4)])
def test_blocks(zoo: SimpleNamespace, padding: str, block_size: tuple[int, int]) -> None:
    model, inputs, checker = zoo.build("llama"), zoo.inputs(padding, length=21), Checker()
    method = Oracle(sparsity=0.7, minimum_keys=2, block_size=block_size)
    with sparsify(model, method, observer=checker) as sparse:
        model(**inputs)
    assert checker.worst < 1e-4
    assert sparse.stats()[0]["density"] < 1.0


@torch.no_grad()
def test_an_explicit_backend_runs_or_raises(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("none")
    method = Oracle(sparsity=0.7, minimum_keys=2)
    with sparsify(model, method, backend="reference") as sparse:
        model(**inputs)
    assert {row["backend"] for row in sparse.stats()} == {"reference"}
    refused = pytest.raises(NotImplementedError, match="takes no mask")
    with sparsify(model, method, backend="dense"), refused:
        model(**inputs)


@torch.no_grad()
def test_a_compiled_model(zoo: SimpleNamespace) -> None:
    """`torch.compile` breaks its graph at each attention and computes the same."""
    model, inputs = zoo.build("llama", num_hidden_layers=1), zoo.inputs("left")
    with sparsify(model, Oracle(sparsity=0.7, minimum_keys=2)) as sparse:
        expected = model(**inputs, use_cache=False)[0]
        compiled = torch.compile(model, backend="eager")
        found = [compiled(**inputs, use_cache=False)[0] for _ in range(2)]
    torch.testing.assert_close(found, [expected, expected], rtol=1e-5, atol=1e-5)
    assert [row["calls"] for row in sparse.stats()] == [3]


@torch.no_grad()
def test_the_cost_rule_decides_unless_told_otherwise(
    zoo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("none")
    method = make("dynamic", model)
    expected = model(**inputs).logits
    asked: list[int] = []

    def never(method: object, call: AttentionInputs) -> bool:
        asked.append(call.layer)
        return False

    monkeypatch.setattr(costs, "pays", never)
    with sparsify(model, method) as sparse:
        found = model(**inputs).logits
    assert torch.equal(found, expected) or (found - expected).abs().max() < 1e-5
    assert asked == [0, 1]
    assert [(row["ran"], row["dense_calls"]) for row in sparse.stats()] == [("dense", 1)] * 2
    assert sparse.stats()[0]["prediction_macs"] == 0
    forced: list[dict[str, Any]] = [
        {"when": "always"}, {"backend": "reference"}, {"diagnose": True}
    ]  # fmt: skip
    for options in forced:
        with sparsify(model, method, **options) as sparse:
            model(**inputs)
        assert {row["ran"] for row in sparse.stats()} == {"sparse"}, options
    assert asked == [0, 1]
    monkeypatch.setattr(costs, "pays", lambda *_: True)
    with sparsify(model, method) as sparse:
        model(**inputs)
    assert {row["ran"] for row in sparse.stats()} == {"sparse"}


@torch.no_grad()
def test_a_step_that_does_not_pay_is_remembered(
    zoo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictor's keys of a prompt that ran dense are there when selecting pays at last."""
    model, inputs = zoo.build("llama"), zoo.inputs("none", length=12)
    method = make("dynamic", model)
    monkeypatch.setattr(costs, "pays", lambda _, call: call.key.shape[2] >= 15)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with sparsify(model, method) as sparse:
        model.generate(**inputs, **settings)
    row = sparse.stats()[0]
    assert (row["calls"], row["dense_calls"], row["ran"]) == (6, 3, "sparse")
