"""Counts turned into key ids: nested within a step, values inside keys, the same by seed."""

from __future__ import annotations

import numpy as np
import pytest

from sparseloom.trace import (
    AttentionCall,
    ModelShape,
    Selection,
    Trace,
    TraceError,
    Workload,
    transformer_operators,
)
from sparseloom.trace.index_models import Clustered, IndexModel, Recorded, Uniform
from sparseloom.trace.kept_keys import with_keys

SHAPE = ModelShape(layers=3, hidden_size=16, heads=4, kv_heads=4, head_dim=4, is_causal=True)
KEEP = (30, 20, 8)
MODELS = [Uniform(), Clustered()]


def generation(steps: int = 2, length: int = 40) -> Workload:
    operators = [
        operator
        for step in range(steps)
        for operator in transformer_operators(
            SHAPE, q_len=1, kv_len=length + step, stage="decode", step=step
        )
        if operator.is_attention
    ]
    return Workload(SHAPE, tuple(operators), "tiny", scope="attention")


def counted(workload: Workload, keep: tuple[int, ...] = KEEP) -> Trace:
    calls = tuple(
        AttentionCall(
            key_counts=np.full((1, 4, 1), keep[operator.layer or 0]),
            value_counts=np.full((1, 4, 1), keep[operator.layer or 0] // 4),
        )
        for operator in workload.attention()
    )
    return Trace(workload, {"counts": Selection("counts", calls, {"method": "by hand"})})


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_cascade_and_values(model: IndexModel) -> None:
    trace = counted(generation())
    found = with_keys(trace, "counts", model, seed=3)
    for step in range(2):
        before = None
        for layer in range(3):
            call = found.calls[3 * step + layer]
            assert call.mask is not None
            assert call.value_mask is not None
            assert call.key_counts is None
            keys, values = call.mask.to_bool(), call.value_mask.to_bool()
            assert keys.sum(axis=3).tolist() == [[[KEEP[layer]]]]  # one row for all heads
            assert values.sum(axis=3).tolist() == [[[KEEP[layer] // 4]] * 4]
            assert not (values & ~keys).any()
            assert keys[..., -1].all()  # the newest token stays
            if before is not None:
                assert not (keys & ~before).any()
            before = keys
    assert found.method["index_model"] == model.name
    assert (found.method["index_seed"], found.method["method"]) == (3, "by hand")
    assert with_keys(trace, "counts", model, seed=3).calls == found.calls
    assert with_keys(trace, "counts", model, seed=4).calls != found.calls
    # What the machines count does not depend on the ids.
    one = Trace(trace.workload, {"counts": found})
    assert [p.tolist() for p in one.kept_pairs()] == [p.tolist() for p in trace.kept_pairs()]


def test_heads_of_their_own_and_dead_ones() -> None:
    workload = generation(steps=1)
    counts = np.array([[[10], [5], [0], [20]]])
    alive = np.array([True, True, False, True])
    calls = (
        AttentionCall(key_counts=counts, heads_alive=alive),
        AttentionCall(key_counts=np.minimum(counts, 7), heads_alive=alive),
        AttentionCall(key_counts=alive[None, :, None] * np.int64(5), heads_alive=alive),
    )
    trace = Trace(workload, {"s": Selection("s", calls)})
    first, second, third = with_keys(trace).calls
    assert first.mask is not None
    assert second.mask is not None
    assert third.mask is not None
    assert first.mask.row_lengths().tolist() == counts.tolist()
    assert not (second.mask.to_bool() & ~first.mask.to_bool()).any()
    assert third.mask.heads == 1
    kept = third.kept_pairs(workload.attention()[2])
    assert kept.tolist() == [[5, 5, 0, 5]]


def test_only_tokens_that_are_alive() -> None:
    workload = generation(steps=1)
    alive = np.zeros((1, 40), np.bool_)
    alive[0, 3:9] = True
    call = AttentionCall(key_counts=np.full((1, 4, 1), 6), tokens_alive=alive)
    trace = Trace(workload, {"s": Selection("s", (call,) * 3)})
    mask = with_keys(trace).calls[0].mask
    assert mask is not None
    assert mask.indices.tolist() == [3, 4, 5, 6, 7, 8]
    call = AttentionCall(key_counts=np.full((1, 4, 1), 7), tokens_alive=alive)
    trace = Trace(workload, {"s": Selection("s", (call,) * 3)})
    with pytest.raises(TraceError, match="7 kept of 6 keys that are alive"):
        with_keys(trace)


def test_more_values_than_keys_are_an_error() -> None:
    workload = generation(steps=1)
    call = AttentionCall(key_counts=np.full((1, 4, 1), 6), value_counts=np.full((1, 4, 1), 7))
    trace = Trace(workload, {"s": Selection("s", (call,) * 3)})
    with pytest.raises(TraceError, match="7 kept of 6 keys that are kept"):
        with_keys(trace)


def test_queries_of_a_prompt_see_no_later_keys() -> None:
    operators = transformer_operators(SHAPE, q_len=6)
    workload = Workload(SHAPE, operators, "prompt")
    counts = np.broadcast_to(np.array([1, 1, 2, 2, 3, 3]), (1, 4, 6)).copy()
    values = np.maximum(counts - 1, 1)
    calls = (AttentionCall(key_counts=counts, value_counts=values),) * 3
    trace = Trace(workload, {"s": Selection("s", calls)})
    for call in with_keys(trace).calls:
        assert call.mask is not None
        assert call.value_mask is not None
        keep = call.mask.to_bool()
        assert not (keep & ~np.tri(6, dtype=np.bool_)).any()
        assert keep.sum(axis=3).tolist() == [[[1, 1, 2, 2, 3, 3]]]
        kept_values = call.value_mask.to_bool()
        assert kept_values.sum(axis=3).tolist() == values.tolist()
        assert not (kept_values & ~keep).any()


def test_clusters_are_longer_and_nearer_the_newest_token() -> None:
    trace = counted(generation(steps=20, length=600), (300, 150, 75))

    def runs_and_place(model: IndexModel) -> tuple[float, float]:
        lengths, places = [], []
        for call in with_keys(trace, "counts", model).calls[2::3]:
            assert call.mask is not None
            ids = call.mask.indices
            lengths.append(ids.size / (1 + (np.diff(ids) > 1).sum()))
            places.append(float((ids > 500).mean()))
        return float(np.mean(lengths)), float(np.mean(places))

    runs, place = runs_and_place(Uniform())
    longer, nearer = runs_and_place(Clustered(run=8))
    # 75 of 600 at random: runs of 1/(1 − 75/600) = 1.14, a sixth of the tokens past 500.
    assert runs == pytest.approx(1.14, abs=0.05)
    assert place == pytest.approx(100 / 600, abs=0.03)
    assert longer > 4
    assert nearer > 0.3
    with pytest.raises(ValueError, match="run must be at least 1"):
        Clustered(run=0.5)


def test_a_recording_gives_its_own_ids_back() -> None:
    trace = counted(generation())
    recorded = with_keys(trace, "counts", Clustered(), seed=9)
    again = with_keys(trace, "counts", Recorded(trace.workload, recorded), seed=1)
    assert again.calls == recorded.calls
    assert again.method["selection"] == "counts"
    with pytest.raises(ValueError, match="no masks to take ids from"):
        Recorded(trace.workload, trace.selection("counts"))


def test_a_recording_of_another_length_is_stretched() -> None:
    short = counted(generation(steps=1, length=40))
    recorded = with_keys(short, "counts", Uniform())
    long = counted(generation(steps=1, length=80), (60, 40, 16))
    found = with_keys(long, "counts", Recorded(short.workload, recorded)).calls[2].mask
    source = recorded.calls[2].mask
    assert found is not None
    assert source is not None
    assert set(found.indices // 2) == set(source.indices)
