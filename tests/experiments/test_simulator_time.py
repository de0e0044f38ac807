"""Recorded masks on a published size."""

from __future__ import annotations

import numpy as np
import pytest

from sparseloom.experiments.reproduce.dota_benchmarks import Benchmark, random_mask
from sparseloom.experiments.simulator_time import dealt, timed
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    PredictorShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)

LENGTH = 16


def recorded(length: int = LENGTH) -> Trace:
    """One layer of two heads that keep a quarter and a half."""
    parts = [random_mask(length, share) for share in (0.25, 0.5)]
    offsets = [parts[0].offsets, parts[1].offsets + parts[0].nnz]
    mask = MaskArrays(
        np.concatenate([part.indices for part in parts]),
        np.concatenate(offsets, axis=1),
        (1, 1),
        length,
        length,
    )
    shape = ModelShape(layers=1, hidden_size=8, heads=2, kv_heads=2, head_dim=4)
    operators = transformer_operators(shape, q_len=length)
    call = AttentionCall(mask=mask, predictor=PredictorShape(head_dim=2))
    return Trace(Workload(shape, operators), {"ours": Selection("ours", (call,))})


def test_heads_are_dealt_in_turn() -> None:
    trace = dealt(recorded(), "ours", Benchmark("x", 2, 3, 16, 8, 32, LENGTH, 0.1, 0.1))
    first, second = trace.selection("ours").calls
    quarter, half = LENGTH * LENGTH // 4, LENGTH * LENGTH // 2
    assert first.mask is not None
    assert second.mask is not None
    assert first.mask.kept_pairs().tolist() == [[quarter, half, quarter]]
    assert second.mask.kept_pairs().tolist() == [[half, quarter, half]]
    given = recorded().selection("ours").calls[0].mask
    assert given is not None
    assert np.array_equal(first.mask.indices[: given.nnz], given.indices)
    assert first.predictor == PredictorShape(head_dim=2)


def test_masks_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="masks must have 32 queries, got one of 16"):
        dealt(recorded(), "ours", Benchmark("x", 1, 2, 16, 8, 32, 32, 0.1, 0.1))


def test_both_fidelities_are_timed() -> None:
    trace = dealt(recorded(), "ours", Benchmark("x", 1, 2, 16, 8, 32, LENGTH, 0.1, 0.1))
    found = timed(trace, "ours", repeats=1)
    assert found["cycle"]["cycles"] >= found["analytic"]["cycles"] > 0
    assert found["cycle"]["seconds"] > 0
