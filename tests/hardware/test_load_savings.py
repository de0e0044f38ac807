"""Load savings of a trace: known masks, and the same counts as the trace's own."""

from __future__ import annotations

import numpy as np
import pytest

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.load_savings import VARIANTS, load_savings, random_union_ratio
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)


def trace_of(
    *calls: AttentionCall,
    length: int,
    heads: int = 2,
    batch: int = 1,
    is_causal: bool = False,
    padding: np.ndarray | None = None,
) -> Trace:
    """A model with one layer for each call."""
    shape = ModelShape(
        layers=len(calls),
        hidden_size=8 * heads,
        heads=heads,
        kv_heads=heads,
        head_dim=8,
        intermediate_size=16,
        is_causal=is_causal,
    )
    operators = transformer_operators(
        shape, q_len=length, batch=batch, padding=None if padding is None else 0
    )
    paddings = () if padding is None else (padding,)
    workload = Workload(shape, operators, name="small", paddings=paddings)
    return Trace(workload, {"some": Selection("some", calls)})


def random_mask(
    length: int, density: float, *, batch: int = 1, heads: int = 2, is_causal: bool = False
) -> MaskArrays:
    keep = np.random.default_rng(0).random((batch, heads, length, length)) < density
    return MaskArrays.from_bool(keep, is_causal=is_causal)


def test_random_masks_save_what_chance_gives() -> None:
    trace = trace_of(AttentionCall(mask=random_mask(600, 0.1)), length=600)
    rows = load_savings(trace)
    assert len(rows) == 8 * len(VARIANTS)
    for found in rows:
        assert found["union_ratio"] == pytest.approx(found["random_ratio"], rel=0.01)
        assert found["density"] == pytest.approx(0.1, rel=0.02)
        if found["dataflow"] == "out_of_order":
            assert found["load_ratio"] == pytest.approx(found["union_ratio"], rel=0.001)
        elif found["parallel_queries"] > 1:
            assert found["load_ratio"] > found["union_ratio"]
    assert rows[0]["load_ratio"] == 1
    assert random_union_ratio(0, 4) == 1


def test_neighbours_that_agree_share_every_load() -> None:
    """Blocks of four queries that keep the same keys: a quarter of the loads, all slots full."""
    keep = np.random.default_rng(0).random((1, 2, 16, 64)) < 0.2
    mask = MaskArrays.from_bool(keep.repeat(4, axis=2))
    trace = trace_of(AttentionCall(mask=mask), length=64)
    for found in load_savings(trace, "some", parallel_queries=[4]):
        assert found["load_ratio"] == found["union_ratio"] == 0.25
        assert (found["idle_slots"], found["utilisation"], found["reloads"]) == (0, 1, 0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_counts_are_those_of_the_trace(is_causal: bool) -> None:
    """Masks shared by heads and sequences, a dead head, padding, blocks, a dense call."""
    padding = np.ones((3, 32), np.bool_)
    padding[1, 20:], padding[2, :5] = False, False
    keep = np.random.default_rng(1).random((3, 2, 8, 4)) < 0.5
    blocks = MaskArrays.from_bool(
        keep.repeat(4, axis=2).repeat(8, axis=3), block_size=(4, 8), is_causal=is_causal
    )
    calls = (
        AttentionCall(mask=random_mask(32, 0.3, is_causal=is_causal)),
        AttentionCall(mask=random_mask(32, 0.3, batch=3, heads=4, is_causal=is_causal)),
        AttentionCall(mask=blocks, heads_alive=np.array([True, False, True, True])),
        AttentionCall(),
    )
    for pad in (None, padding):
        trace = trace_of(*calls, length=32, heads=4, batch=3, is_causal=is_causal, padding=pad)
        operators = trace.workload.attention()
        for found in load_savings(trace, parallel_queries=[1, 3, 4]):
            for name, group in (("kept", 1), ("union", found["parallel_queries"])):
                expected = sum(
                    int(call.kept_pairs(operator, pad, group=group).sum())
                    for operator, call in zip(operators, calls, strict=True)
                )
                assert found[name] == expected, name
            assert found["loads"] == found["union"] + found["reloads"]
            if (found["dataflow"], found["split"]) == ("out_of_order", False):
                assert found["reloads"] == 0


def test_fewer_queries_than_places() -> None:
    """One query has the whole array; its slots are not idle."""
    mask = MaskArrays(
        np.array([1, 4, 5], np.int32), np.array([[[0, 3]]]), (1, 1), 1, 8, is_causal=True
    )
    model = ModelShape(
        layers=1,
        hidden_size=8,
        heads=1,
        kv_heads=1,
        head_dim=8,
        intermediate_size=16,
        is_causal=True,
    )
    operators = transformer_operators(model, q_len=1, kv_len=8, stage="decode")
    calls = (AttentionCall(mask=mask),)
    trace = Trace(Workload(model, operators), {"one": Selection("one", calls)})
    for found in load_savings(trace, parallel_queries=[4]):
        assert (found["loads"], found["steps"], found["idle_slots"]) == (3, 3, 0)


def test_counts_without_keys_are_refused() -> None:
    call = AttentionCall(key_counts=np.full((1, 2, 4), 2))
    with pytest.raises(MachineError, match="call 0 of selection 'some' counts kept keys without"):
        load_savings(trace_of(call, length=4))
