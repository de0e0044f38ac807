"""What a Lane computes equals attention in numpy within its number format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hardware.dota.conftest import machine

from sparseloom import hardware
from sparseloom.hardware.dota.functional import attend
from sparseloom.trace import MaskArrays, Trace

STEP = 1 / 32767


def exact(q: Any, k: Any, v: Any, keep: np.ndarray, scale: float, *, softmax: bool) -> np.ndarray:
    """Masked attention in double precision; zeros where a query keeps nothing."""
    scores = q @ k.T * scale
    if not softmax:
        return np.where(keep, scores, 0.0) @ v
    powers = np.where(keep, np.exp(scores - scores.max(axis=1, keepdims=True)), 0.0)
    sums = powers.sum(axis=1, keepdims=True)
    return np.divide(powers, sums, out=np.zeros_like(powers), where=sums > 0) @ v


def sample(
    seed: int, q_len: int = 21, kv_len: int = 34, width: int = 16
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, width)) for n in (q_len, kv_len, kv_len))
    return q, k, v


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_masked_attention(share: float, causal: bool) -> None:
    q, k, v = sample(0)
    keep = np.random.default_rng(1).random((1, 1, 21, 34)) < share
    mask = MaskArrays.from_bool(keep, is_causal=causal)
    kept = keep[0, 0] & (np.arange(34) <= np.arange(21)[:, None] + 13 if causal else True)
    found = attend(machine().settings, q, k, v, mask)
    wanted = exact(q, k, v, kept, 0.25, softmax=True)
    # Half a step of q and k in each score, of each probability and value, and of the output.
    largest = np.abs(v).max()
    most = kept.sum(axis=1).max()
    bound = STEP * largest * (most / 2 + 1) + 2 * STEP * np.abs(q).max() * np.abs(k).max() * largest
    assert np.abs(found.output - wanted).max(initial=0) <= bound
    assert np.array_equal(found.output[~kept.any(axis=1)], np.zeros_like(q)[~kept.any(axis=1)])
    assert found.multiplications == 2 * 16 * kept.sum()


def test_all_pairs_cost_the_multiplications_of_the_closed_form(make: Any) -> None:
    maker = make(heads=2, head_dim=16, length=24)
    trace = Trace(maker.workload())
    full = MaskArrays.from_bool(np.ones((1, 2, 24, 24), np.bool_))
    found = 0
    for head in range(2):
        q, k, v = sample(head, 24, 24)
        found += attend(machine().settings, q, k, v, full, head=head).multiplications
    gemms = sum(op.macs for op in trace.workload.operators if op.kind == "gemm")
    for fidelity in ("analytic", "cycle"):
        operations = machine().simulate(trace, fidelity=fidelity).operations
        assert operations == 2 * (found + gemms)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_two_products_run_without_softmax(share: float) -> None:
    q, k, v = sample(2)
    keep = np.random.default_rng(3).random((1, 1, 21, 34)) < share
    found = attend(
        machine().settings, q, k, v, MaskArrays.from_bool(keep), scale=1.0, softmax=False
    )
    wanted = exact(q, k, v, keep[0, 0], 1.0, softmax=False)
    scores = np.abs(q @ k.T).max()
    assert np.abs(found.output - wanted).max() <= 34 * np.abs(v).max() * 3 * STEP * scores
    assert np.abs(found.output - wanted).max() < 1e-3 * np.abs(wanted).max()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 1),
    parallel=st.integers(1, 8),
    softmax=st.booleans(),
)
def test_no_order_of_the_scheduler_changes_a_bit(
    seed: int, share: float, parallel: int, softmax: bool
) -> None:
    q, k, v = sample(seed)
    mask = MaskArrays.from_bool(np.random.default_rng(seed).random((1, 1, 21, 34)) < share)
    results = [
        attend(
            machine(
                detector__parallel_queries=parallel,
                scheduler__dataflow=dataflow,
                scheduler__split=split,
            ).settings,
            q, k, v, mask, softmax=softmax,
        )
        for dataflow, split in (
            ("row_by_row", True), ("in_order", True), ("out_of_order", True),
            ("out_of_order", False),
        )
    ]  # fmt: skip
    for other in results[1:]:
        assert np.array_equal(results[0].output, other.output)
        assert results[0].multiplications == other.multiplications
    assert results[3].key_loads <= results[1].key_loads <= results[0].key_loads


def test_sizes_are_checked() -> None:
    q, k, v = sample(4)
    mask = MaskArrays.from_bool(np.ones((1, 1, 20, 34), np.bool_))
    with pytest.raises(hardware.MachineError, match=r"must have 20, 34 and 34 rows, got 21, 34"):
        attend(machine().settings, q, k, v, mask)
    with pytest.raises(hardware.MachineError, match="x must be finite"):
        attend(machine().settings, q[:20] * np.inf, k, v, mask)
