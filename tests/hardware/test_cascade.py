"""Cascade pruning from recorded tensors: scores by hand, survivors nested, generation anew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparseloom.hardware.cascade import Cascade, with_cascade
from sparseloom.hardware.config import MachineError
from sparseloom.hardware.units.numerics import Datapath, attention_head
from sparseloom.trace import ModelShape, Trace, Workload, transformer_operators

SHAPE = ModelShape(layers=3, hidden_size=16, heads=2, kv_heads=1, head_dim=8)
STATIC = Datapath(key_bits=8)


def tensors_of(workload: Workload, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {}
    for i, op in enumerate(workload.attention()):
        for name, heads, length in (
            ("query", op.heads, op.q_len),
            ("key", op.kv_heads, op.kv_len),
            ("value", op.kv_heads, op.kv_len),
        ):
            shape = (op.batch, heads, length, op.head_dim)
            found[f"calls.{i}.{name}"] = 2 * rng.standard_normal(shape, np.float32)
    return found


def prompt(length: int = 12, batch: int = 1, padding: np.ndarray | None = None) -> Trace:
    operators = transformer_operators(
        SHAPE, q_len=length, batch=batch, padding=None if padding is None else 0
    )
    paddings = () if padding is None else (padding,)
    workload = Workload(SHAPE, operators, "prompt", paddings)
    return Trace(workload, {}, tensors_of(workload))


def generation(length: int = 12, steps: int = 2) -> Trace:
    shape = SHAPE.model_copy(update={"is_causal": True})
    operators = list(transformer_operators(shape, q_len=length))
    for step in range(1, steps + 1):
        operators += transformer_operators(
            shape, q_len=1, kv_len=length + step, stage="decode", step=step
        )
    workload = Workload(shape, tuple(operators), "generation")
    return Trace(workload, {}, tensors_of(workload))


def test_tokens_are_ranked_by_column_sums_over_heads() -> None:
    trace = prompt()
    cascade = Cascade(token_keep=(1.0, 0.5, 0.25), path=STATIC, keep_first=False)
    calls = with_cascade(trace, cascade, probabilities=True).selection("spatten").calls
    scores = np.zeros(12)
    q, k, v = (trace.tensors[f"calls.0.{name}"] for name in ("query", "key", "value"))
    for h in range(2):
        scores += attention_head(STATIC, q[0, h], k[0, 0], v[0, 0]).importance
    best = np.sort(np.argsort(-scores, kind="stable")[:6])
    assert calls[1].tokens_alive is not None
    assert np.flatnonzero(calls[1].tokens_alive[0]).tolist() == best.tolist()
    assert [call.token_keep for call in calls] == [6, 3, None]
    assert calls[2].tokens_alive is not None
    assert calls[2].tokens_alive.sum() == 3
    assert not (calls[2].tokens_alive & ~calls[1].tokens_alive).any()
    # Dead queries keep nothing, live ones all that is alive.
    assert calls[1].mask is not None
    keep = calls[1].mask.to_bool()[0, 0]
    assert np.array_equal(keep, np.outer(calls[1].tokens_alive[0], calls[1].tokens_alive[0]))


def test_the_first_token_of_a_prompt_stays_and_widths_are_static() -> None:
    found = with_cascade(prompt(), Cascade(token_keep=(1.0, 0.5, 0.1)))
    calls = found.selection("spatten").calls
    assert all(call.tokens_alive is not None and call.tokens_alive[0, 0] for call in calls)
    assert {(call.key_bits, call.lsb_bits, call.value_bits) for call in calls} == {(12, None, 8)}
    assert found.selection("spatten").method["loop"] == "open"
    assert not any(name.endswith("probability") for name in found.tensors)


def test_heads_are_ranked_by_the_size_of_their_outputs() -> None:
    trace = prompt()
    tensors = dict(trace.tensors)
    # Sharp attention to one value against a flat mean over many: head 1 is the larger.
    tensors["calls.0.query"] = (
        tensors["calls.0.query"] * np.array([0.01, 4.0], np.float32)[:, None, None]
    )
    found = with_cascade(
        replace(trace, tensors=tensors), Cascade(token_keep=1.0, head_keep=(1.0, 0.5, 0.5))
    )
    calls = found.selection("spatten").calls
    assert calls[0].heads_alive is None
    assert calls[1].heads_alive is not None
    assert calls[1].heads_alive.tolist() == [False, True]
    assert found.kept_pairs("spatten")[1].tolist() == [[0, 144]]


def test_padding_is_no_token() -> None:
    padding = np.array([[True] * 12, [True] * 8 + [False] * 4])
    found = with_cascade(prompt(batch=2, padding=padding), Cascade(token_keep=(1.0, 0.5, 0.5)))
    for call, counts in zip(
        found.selection("spatten").calls, ([12, 8], [6, 4], [6, 4]), strict=True
    ):
        assert call.tokens_alive is not None
        assert call.tokens_alive.sum(axis=1).tolist() == counts
        assert not (call.tokens_alive & ~padding).any()


def test_each_step_starts_from_all_tokens_again() -> None:
    path = Datapath(key_bits=(6, 4), threshold=0.9, value_keep=0.5)
    cascade = Cascade(token_keep=(0.8, 0.5, 0.3), path=path)
    found = with_cascade(generation(), cascade, probabilities=True)
    calls = found.selection("spatten").calls
    for call in calls[:3]:
        assert call.mask is None
        assert (call.key_bits, call.lsb_bits) == (10, None)
    # Fractions count from the longest, 14.
    for step in (1, 2):
        before = None
        for layer, count in enumerate((11, 7, 4)):
            number = 3 * step + layer
            call = calls[number]
            assert call.tokens_alive is not None
            assert call.mask is not None
            assert call.value_mask is not None
            assert call.lsb_refetch is not None
            alive = call.tokens_alive[0]
            assert alive.sum() == count
            assert alive[-1]  # the newest
            assert before is None or not (alive & ~before).any()
            before = alive
            assert call.mask.to_bool()[0, 0, 0].tolist() == alive.tolist()
            values = call.value_mask.to_bool()[0, :, 0]
            assert values.sum(axis=1).tolist() == [count // 2] * 2
            assert not (values & ~alive).any()
            codes = found.tensors[f"calls.{number}.probability"]
            assert codes.dtype == np.uint16
            assert codes.shape == (1, 2, 1, 12 + step)
            assert (codes[0, :, 0, ~alive] == 0).all()
            for h in range(2):
                assert int(codes[0, h].sum()) == pytest.approx(4096, abs=count)
                # The kept values are those of the largest probabilities.
                left = codes[0, h, 0][alive & ~values[h]]
                assert codes[0, h, 0][values[h]].min() >= left.max()
                if call.lsb_refetch[0, h, 0]:
                    assert call.lsb_threshold == 0.9
    assert [call.token_keep for call in calls] == [None, None, 11, 7, 4, 11, 7, 4, None]
    rows = [c.lsb_refetch for c in calls if c.lsb_refetch is not None]
    assert 0 < sum(int(row.sum()) for row in rows) < 12
    every = with_cascade(generation(), replace(cascade, path=Datapath(threshold=1.0)))
    assert all(
        call.lsb_refetch is None or call.lsb_refetch.all()
        for call in every.selection("spatten").calls
    )


def test_decay_forgets_the_prompt() -> None:
    trace = generation(steps=1)
    tensors = dict(trace.tensors)
    for i in range(3):  # every query of the prompt that sees token 8 looks at it
        tensors[f"calls.{i}.query"] = np.full((1, 2, 12, 8), 2, np.float32)
        tensors[f"calls.{i}.key"] = tensors[f"calls.{i}.key"].copy()
        tensors[f"calls.{i}.key"][0, 0, 8] = 8
    trace = replace(trace, tensors=tensors)
    keeps = [
        with_cascade(trace, Cascade(token_keep=(0.5, 0.5, 0.5), decay=decay)).selection("spatten")
        for decay in (1.0, 0.0)
    ]
    first, forgotten = (one.calls[3].tokens_alive for one in keeps)
    assert first is not None
    assert forgotten is not None
    # Without scores the first tokens are kept, by the rule for ties, and the newest.
    assert np.flatnonzero(forgotten[0]).tolist() == [0, 1, 2, 3, 4, 12]
    assert first[0, 8]


def test_what_cannot_be_run() -> None:
    with pytest.raises(MachineError, match=r"no tensor calls\.0\.query: record it with"):
        with_cascade(replace(prompt(), tensors={}), Cascade())
    with pytest.raises(MachineError, match="token_keep must have one share for each of 3 layers"):
        with_cascade(prompt(), Cascade(token_keep=(1.0, 0.5)))
    with pytest.raises(MachineError, match="head_keep must not rise"):
        with_cascade(prompt(), Cascade(head_keep=(0.5, 1.0, 1.0)))
