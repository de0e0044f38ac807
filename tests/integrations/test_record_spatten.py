"""Runs under `SpAtten` recorded, written, read back, simulated: the counts are those that ran."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sparseloom as sl
from sparseloom import hardware
from sparseloom.hardware.cascade import Cascade, with_cascade
from sparseloom.integrations import record, sparsify
from sparseloom.methods import Dense
from sparseloom.trace import AttentionCall, Trace, TraceError
from sparseloom.trace.summary import call_counts, shares
from sparseloom.trace.traffic import trace_traffic

ENCODER = sl.SpAtten(token_keep=0.6, head_keep=0.75)
DECODER = sl.SpAtten(
    token_keep=(0.8, 0.5), head_keep=(1.0, 0.5), value_keep=0.5, key_bits=(6, 4), value_bits=8,
    threshold=0.4, decay=0.9,
)  # fmt: skip
STEPS = 3


def total(array: np.ndarray | None) -> int:
    assert array is not None
    return int(array.sum())


def heads_of(call: AttentionCall, heads: int) -> int:
    return heads if call.heads_alive is None else total(call.heads_alive)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_an_encoder(zoo: SimpleNamespace, family: str, tmp_path: Path) -> None:
    if family not in zoo.families:
        pytest.skip("this family is not supported with this transformers version")
    layers = {"num_hidden_layers": 4} if family == "bert" else {"n_layers": 4}
    model, inputs = zoo.build(family, **layers), zoo.inputs("right", length=20)
    trace = record(model, ENCODER, inputs, tensors=True)
    with torch.no_grad(), sparsify(model, ENCODER) as sparse:
        model(**inputs)
    assert trace.workload == record(model, Dense(), inputs).workload
    selection = trace.selection()
    assert selection.method == ENCODER.to_dict()
    calls, padding = selection.calls, inputs["attention_mask"].bool().numpy()
    found = call_counts(trace.workload, selection)
    assert [one.keys for one in found] == [row["kept_pairs"] for row in sparse.stats()]
    assert [one.tokens_alive for one in found] == [
        row.get("tokens_alive") for row in sparse.stats()
    ]
    assert [one.heads_alive for one in found] == [row.get("heads_alive") for row in sparse.stats()]
    for layer, (row, seen) in enumerate(zip(sparse.stats(), sparse.survivors(), strict=True)):
        call = calls[layer]
        assert total(trace.kept_pairs()[layer]) == row["kept_pairs"]
        assert total(call.tokens_alive) == row.get("tokens_alive")
        assert seen.tokens is not None
        assert call.tokens_alive is not None
        assert np.array_equal(call.tokens_alive, seen.tokens.numpy())
        assert not (call.tokens_alive & ~padding).any()
        # Queries of tokens that are left stand in their places, and nothing else does.
        query = trace.tensors[f"calls.{layer}.query"]
        assert query.shape == (3, 4, 20, 8)
        if layer > 1:
            assert np.array_equal((query != 0).any((1, 3)), call.tokens_alive)
    counts = ENCODER.kept_tokens(4, 20)
    assert [call.token_keep for call in calls] == [
        after if after < now else None for now, after in zip(counts, [*counts[1:], 99], strict=True)
    ]
    assert [call.accumulates_importance for call in calls] == [True, True, True, False]
    trace.save(tmp_path / "trace")
    again = Trace.load(tmp_path / "trace")
    assert again == trace
    machine = hardware.load("spatten_hpca_2021")
    ours, dense = (machine.simulate(again, name) for name in (selection.name, "dense"))
    assert 0 < ours.cycles < dense.cycles


def test_sequences_with_heads_of_their_own(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("bert", num_hidden_layers=4), zoo.inputs("left", length=16)
    method = sl.SpAtten(token_keep=None, head_keep=(1.0, 0.5, 0.5, 0.25))
    trace = record(model, method, inputs, tensors=True)
    with torch.no_grad(), sparsify(model, method) as sparse:
        model(**inputs)
    seen = [one.heads for one in sparse.survivors()]
    assert any(one is not None and not torch.equal(one[0], one[1]) for one in seen)
    for layer, row in enumerate(sparse.stats()):
        assert total(trace.kept_pairs()[layer]) == row["kept_pairs"]
        assert trace.tensors[f"calls.{layer}.key"].shape == (3, 4, 16, 8)


@pytest.fixture
def prompt(zoo: SimpleNamespace) -> dict[str, torch.Tensor]:
    inputs = zoo.inputs("none", length=12)
    return {name: tensor[:1] for name, tensor in inputs.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation(
    zoo: SimpleNamespace, family: str, prompt: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = zoo.build(family)
    trace = record(model, DECODER, prompt, new_tokens=STEPS)
    length: Any = {"max_new_tokens": STEPS + 1, "min_new_tokens": STEPS + 1, "do_sample": False}
    with sparsify(model, DECODER) as sparse:
        model.generate(**prompt, **length)
    stats, calls, pairs = sparse.stats(), trace.selection().calls, trace.kept_pairs()
    for layer, row in enumerate(stats):
        mine = calls[layer::2]
        assert sum(total(one) for one in pairs[layer::2]) == row["kept_pairs"]
        assert sum(total(call.lsb_refetch) for call in mine[1:]) == row.get("low_rows")
        alive = [total(call.tokens_alive) for call in mine[1:]]
        assert alive == [DECODER.kept_tokens(2, 13 + step)[layer] for step in range(STEPS)]
        assert [heads_of(call, 4) for call in mine[1:]] == [DECODER.kept_heads(2, 4)[layer]] * STEPS
    counts = call_counts(trace.workload, trace.selection())
    for layer, row in enumerate(stats):
        mine = counts[layer::2]
        assert sum(one.keys for one in mine) == row["kept_pairs"]
        assert sum(one.rows for one in mine[1:]) == row.get("rows")
        assert sum(one.low_rows for one in mine) == row.get("low_rows")
        assert [one.heads_alive for one in mine] == [
            4,
            *DECODER.kept_heads(2, 4)[layer:][:1] * STEPS,
        ]
    assert [(one.stage, one.tokens, one.tokens_alive) for one in counts[:3]] == [
        ("prefill", 12, 12), ("prefill", 12, 12), ("decode", 13, DECODER.kept_tokens(2, 13)[0]),
    ]  # fmt: skip
    left = shares(trace.workload, trace.selection())
    assert left["values_read"] < left["keys_kept"] < left["tokens_alive"] < 1
    assert (calls[0].mask, calls[0].key_bits) == (None, None)
    assert {(c.key_bits, c.lsb_bits, c.lsb_threshold, c.value_bits) for c in calls[2:]} == {
        (6, 4, 0.4, 8)
    }
    # Ranked for layer 0 of the next step at the end of each step, the last one excepted.
    steps = [count for step in range(STEPS) for count in DECODER.kept_tokens(2, 13 + step)]
    assert [call.token_keep for call in calls] == [None, *steps, None]
    assert [c.rescales_importance for c in calls] == [False, True] * 3 + [False] * 2
    trace.save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace") == trace

    trace.to_spatten_csv(tmp_path / "run.csv")
    read = Trace.from_spatten_csv(tmp_path / "run.csv", name=trace.selection().name)
    assert read.workload.source == str(DECODER)
    for mine, theirs in zip(calls[2:], read.selection().calls, strict=True):
        for name in ("key_bits", "lsb_bits", "lsb_threshold", "value_bits", "token_keep",
                     "accumulates_importance", "rescales_importance"):  # fmt: skip
            assert getattr(mine, name) == getattr(theirs, name), name
        assert np.array_equal(mine.lsb_refetch, theirs.lsb_refetch)  # pyright: ignore[reportArgumentType]
        assert heads_of(mine, 4) == heads_of(theirs, 4)
    for mine, theirs in zip(pairs[2:], read.kept_pairs(), strict=True):
        assert np.array_equal(mine, theirs)
    read.to_spatten_csv(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "run.csv").read_bytes()
    moved = trace_traffic(read)
    if family == "gpt2":  # each query head has keys of its own, as in the files
        for name, ours in (
            ("key_high_bytes", moved.useful_key),
            ("key_low_bytes", moved.useful_lsb),
            ("value_bytes", moved.useful_value),
        ):
            assert sum(row[name] for row in stats) == ours
    machine = hardware.load("spatten_hpca_2021")
    for one in (trace, read):
        report = machine.simulate(one, fidelity="cycle")
        assert report.cycles > 0
        assert (report.dram_bytes or 0) >= (report.useful_bytes or 0) > 0


@pytest.mark.parametrize(
    "method",
    [DECODER, sl.H2O(heavy_keep=0.3, recent_keep=0.2), sl.StreamingLLM(window=0.3)],
    ids=lambda method: method.name,
)
def test_a_batch_that_generates(zoo: SimpleNamespace, method: Any, tmp_path: Path) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("left", length=12)
    trace = record(model, method, inputs, new_tokens=2)
    length: Any = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with sparsify(model, method) as sparse:
        model.generate(**inputs, **length)
    for layer, row in enumerate(sparse.stats()):
        assert sum(total(one) for one in trace.kept_pairs()[layer::2]) == row["kept_pairs"]
        assert sum(total(one) for one in trace.allowed_pairs()[layer::2]) == row["allowed_pairs"]
    assert trace.density() < 1
    with pytest.raises(TraceError, match="step 1, layer 0: the format has one sequence and one"):
        trace.to_spatten_csv(tmp_path / "run.csv")
    assert hardware.load("spatten_hpca_2021").simulate(trace).cycles > 0


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_decoder_whose_prompt_gets_shorter(zoo: SimpleNamespace, granularity: Any) -> None:
    model, inputs = zoo.build("gpt2", n_layer=4), zoo.inputs("left", length=16)
    method = sl.SpAtten(
        token_keep=0.6, head_keep=0.75, prompt="shorten", granularity=granularity, recent=2
    )
    trace = record(model, method, inputs, tensors=True)
    with torch.no_grad(), sparsify(model, method) as sparse:
        model(**inputs)
    counts = call_counts(trace.workload, trace.selection())
    assert [one.keys for one in counts] == [row["kept_pairs"] for row in sparse.stats()]
    assert [one.tokens_alive for one in counts] == [
        row.get("tokens_alive") for row in sparse.stats()
    ]
    assert trace.tensors["calls.3.key"].shape == (3, 4, 16, 8)
    with pytest.raises(ValueError, match=r"new_tokens must be 0: spatten.* shortens the sequence"):
        record(model, method, inputs, new_tokens=1)


def test_counts_are_those_of_the_machine(
    zoo: SimpleNamespace, prompt: dict[str, torch.Tensor]
) -> None:
    """The method in the model and the cascade on a recording leave as many tokens and heads."""
    keep: dict[str, Any] = {"token_keep": 0.6, "head_keep": 0.8}
    encoder = zoo.build("bert", num_hidden_layers=4)
    decoder = zoo.build("llama", num_hidden_layers=4)
    short = {name: tensor[:1, :19] for name, tensor in zoo.inputs("none").items()}
    for model, given, new, those in (
        (encoder, short, 0, slice(None)),
        (decoder, prompt, 1, slice(4, None)),
    ):
        ours = record(model, sl.SpAtten(**keep), given, new_tokens=new)
        dense = record(model, Dense(), given, tensors=True, new_tokens=new)
        assert ours.workload == dense.workload
        theirs = with_cascade(dense, Cascade(**keep)).selection("spatten").calls[those]
        mine = ours.selection().calls[those]
        assert [total(call.tokens_alive) for call in mine] == [
            total(call.tokens_alive) for call in theirs
        ]
        assert [heads_of(call, 4) for call in mine] == [heads_of(call, 4) for call in theirs]
        assert [call.token_keep for call in mine] == [call.token_keep for call in theirs]
        assert heads_of(mine[-1], 4) < 4
