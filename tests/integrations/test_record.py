"""A recorded trace: every operator with its role and sizes, every kept pair."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseloom.hardware.cascade import Cascade, with_cascade
from sparseloom.integrations import describe, record, sparsify
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Dense, DynamicSparse, Elsa, Oracle, Predictor
from sparseloom.trace import Trace, transformer_operators

SPARSE = Oracle(sparsity=0.7, minimum_keys=2)


def test_the_operators_of_llama(zoo: SimpleNamespace) -> None:
    """The same work as the standard list, which writes queries, keys and values as one product."""
    model, inputs = zoo.build("llama"), zoo.inputs("none")
    trace = record(model, Dense(), inputs, name="tiny")
    found = trace.workload.operators
    standard = transformer_operators(describe(model), q_len=24, batch=3)
    for role in ("qkv", "attention", "attention_output", "ffn", "head"):
        mine, theirs = (
            sum(o.macs for o in operators if o.role == role) for operators in (found, standard)
        )
        assert mine == theirs > 0, role
    attention = [o for o in found if o.kind == "attention"]
    assert attention == [o for o in standard if o.kind == "attention"]
    roles = [o.role for o in found if o.layer == 1]
    assert roles == [
        "norm",
        *["qkv"] * 3,
        "attention",
        "attention_output",
        "norm",
        *["ffn"] * 4,  # gate, activation, up, down
    ]
    assert trace.workload.model == describe(model)
    assert (trace.workload.name, trace.workload.scope) == ("tiny", "model")
    assert list(trace.selections) == ["dense"]
    assert trace.density() == 1.0


def test_thresholds_of_all_layers_fit_into_a_name(zoo: SimpleNamespace, tmp_path: Path) -> None:
    names: list[str] = []
    for level in (0.1, 0.2):
        method = Elsa(thresholds=((level,), (0.3,)))
        trace = record(zoo.build("llama"), method, zoo.inputs("none"))
        trace.save(tmp_path / str(level))
        (selection,) = Trace.load(tmp_path / str(level)).selections.values()
        assert selection.method == method.to_dict()
        names.append(selection.name)
    assert all(name.startswith("elsa:thresholds=#") for name in names)
    assert names[0] != names[1]


def test_roles_in_every_family(zoo: SimpleNamespace, family: str) -> None:
    operators = record(zoo.build(family), Dense(), zoo.inputs("none")).workload.operators
    for layer in (0, 1):
        products = [o for o in operators if o.layer == layer and o.kind == "gemm"]
        roles = Counter(o.role for o in products)
        assert roles["attention_output"] == 1
        assert roles["other"] == roles["head"] == 0
        width = sum(o.columns for o in products if o.role == "qkv")
        shape = describe(zoo.build(family))
        assert width == (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        inner = sum(o.columns for o in products if o.role == "ffn")
        assert inner == shape.intermediate_size * (2 if shape.gated_ffn else 1) + 32
        assert all((o.batch, o.rows) == (3, 24) for o in products)


class Masks:
    """Keeps the masks of a run."""

    def __init__(self) -> None:
        self.masks: list[SparseMask] = []
        self.inputs: list[AttentionInputs] = []

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        assert mask is not None
        self.masks.append(mask)
        self.inputs.append(inputs)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_masks_are_those_that_ran(zoo: SimpleNamespace, family: str, padding: str) -> None:
    model, inputs, seen = zoo.build(family), zoo.inputs(padding), Masks()
    trace = record(model, SPARSE, inputs, tensors=True)
    with sparsify(model, SPARSE, observer=seen) as sparse:
        model(**inputs)
    selection = trace.selection()
    assert selection.name == "oracle:sparsity=0.7,minimum_keys=2"
    assert selection.method == SPARSE.to_dict()
    for call, mask in zip(selection.calls, seen.masks, strict=True):
        assert call.mask is not None
        assert call.predictor is None
        assert np.array_equal(call.mask.indices, mask.indices.numpy())
        assert np.array_equal(call.mask.offsets, mask.offsets.numpy())
    for layer, row in enumerate(sparse.stats()):
        assert int(trace.kept_pairs()[layer].sum()) == row["kept_pairs"]
        assert int(trace.allowed_pairs()[layer].sum()) == row["allowed_pairs"]
        for name in ("query", "key", "value"):
            expected = getattr(seen.inputs[layer], name).numpy()
            assert np.array_equal(trace.tensors[f"calls.{layer}.{name}"], expected)
    assert len(trace.workload.paddings) == (0 if padding == "none" else 1)


def test_generation(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("gpt2"), zoo.inputs("left", length=9)
    trace = record(model, SPARSE, inputs, new_tokens=2)
    attention = trace.workload.attention()
    assert [(o.step, o.stage, o.q_len, o.kv_len) for o in attention] == [
        *[(0, "prefill", 9, 9)] * 2,
        *[(1, "decode", 1, 10)] * 2,
        *[(2, "decode", 1, 11)] * 2,
    ]
    heads = [o for o in trace.workload.operators if o.role == "head"]
    assert [(o.step, o.rows, o.columns) for o in heads] == [(0, 1, 61), (1, 1, 61), (2, 1, 61)]
    roles = Counter(o.role for o in trace.workload.operators if o.step == 2 and o.kind == "gemm")
    assert roles == {"qkv": 2, "attention_output": 2, "ffn": 4, "head": 1}


def test_generation_of_a_cached_model_feeds_cascade_pruning(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("none", length=9)
    inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    trace = record(model, Dense(), inputs, tensors=True, new_tokens=2)
    operators = trace.workload.attention()
    for call, operator in enumerate(operators):
        key = trace.tensors[f"calls.{call}.key"]
        assert key.shape == (1, operator.kv_heads, operator.kv_len, operator.head_dim)
        assert trace.tensors[f"calls.{call}.query"].shape[2] == operator.q_len
        if call >= 2:  # two layers: the same one a step before
            before = trace.tensors[f"calls.{call - 2}.key"]
            assert np.array_equal(key[:, :, : before.shape[2]], before)
    pruned = with_cascade(trace, Cascade(token_keep=(0.8, 0.5))).selection("spatten")
    alive = [call.tokens_alive for call in pruned.calls]
    # Of the longest, 11; the prompt is read whole.
    assert [int(one.sum()) for one in alive if one is not None] == [9, 9, 8, 5, 8, 5]


def test_the_predictor_is_described(zoo: SimpleNamespace) -> None:
    model = zoo.build("gpt2")
    predictor = Predictor.for_shape(
        layers=2, hidden_size=32, heads=4, head_dim=8, projection=0.5, bits=8
    )
    method = DynamicSparse(
        sparsity=0.7, projection=0.5, bits=8, minimum_keys=2, predictor=predictor.eval()
    )
    call = record(model, method, zoo.inputs("none")).selection().calls[0]
    assert call.predictor is not None
    assert (call.predictor.head_dim, call.predictor.bits) == (4, 8)


def test_selections_share_a_workload(zoo: SimpleNamespace, tmp_path: Path) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("right")
    first = record(model, SPARSE, inputs)
    second = record(model, Oracle(sparsity=0.5, block_size=(8, 1), minimum_keys=2), inputs)
    assert first.workload == second.workload
    both = Trace(first.workload, {**first.selections, **second.selections})
    both.save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace") == both


def test_the_loss_is_kept_and_the_mode_restored(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("llama").train(), zoo.inputs("none")
    trace = record(model, SPARSE, {**inputs, "labels": inputs["input_ids"]})
    quality = trace.selection().quality
    assert quality["metric"] == "loss"
    assert isinstance(quality["value"], float)
    assert model.training
    assert not any(module._forward_hooks for module in model.model.layers.modules())


def test_what_is_refused(zoo: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="new_tokens must be 0 or more, got -1"):
        record(zoo.build("gpt2"), SPARSE, zoo.inputs("none"), new_tokens=-1)
    with pytest.raises(ValueError, match="BertModel cannot generate"):
        record(zoo.build("bert"), SPARSE, zoo.inputs("none"), new_tokens=1)
