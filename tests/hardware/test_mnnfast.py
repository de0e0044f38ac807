"""MnnFast: equal to attention where nothing is skipped, safe where something is; its cycles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom import hardware
from sparseloom.hardware.mnnfast import Reference, lazy_softmax
from sparseloom.trace import (
    AttentionCall,
    ModelShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)

NAME = "mnnfast_isca_2019"


def trace(length: int = 32, *, heads: int = 2, dim: int = 64, values: bool = False) -> Trace:
    shape = ModelShape(layers=1, hidden_size=heads * dim, heads=heads, kv_heads=heads, head_dim=dim)
    random = np.random.default_rng(3)
    names = ("query", "key", "value") if values else ()
    tensors = {f"calls.0.{n}": random.standard_normal((1, heads, length, dim)) for n in names}
    return Trace(Workload(shape, transformer_operators(shape, q_len=length), name="t"), {}, tensors)


def probabilities(query: np.ndarray, key: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    scores = np.where(allowed, query @ key.T / np.sqrt(query.shape[1]), -np.inf)
    e = np.exp(scores - np.where(allowed.any(axis=1), scores.max(axis=1), 0.0)[:, None])
    return e / np.maximum(e.sum(axis=1, keepdims=True), 1e-300)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    q_len=st.integers(1, 12),
    kv_len=st.integers(1, 40),
    chunk=st.integers(1, 45),
    threshold=st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]),
    spread=st.sampled_from([0.1, 3.0, 100.0]),
)
def test_streaming_is_attention_and_skips_safely(
    seed: int, q_len: int, kv_len: int, chunk: int, threshold: float, spread: float
) -> None:
    random = np.random.default_rng(seed)
    query, key = spread * random.standard_normal((q_len, 8)), random.standard_normal((kv_len, 8))
    value = random.standard_normal((kv_len, 5))
    allowed = random.random((q_len, kv_len)) < 0.8
    p = probabilities(query, key, allowed)

    def run(reference: Reference, theta: float) -> Any:
        return lazy_softmax(
            query, key, value, allowed,
            scale=8**-0.5, threshold=theta, reference=reference, chunk_rows=chunk,
        )  # fmt: skip

    for reference in ("exact", "streaming"):
        whole = run(reference, 0.0)
        np.testing.assert_allclose(whole.output, p @ value, atol=1e-12)
        np.testing.assert_array_equal(whole.kept, allowed)
    exact, streaming = run("exact", threshold), run("streaming", threshold)
    # Weights within rounding of the threshold may fall on either side.
    clear = np.abs(p - threshold) > 1e-12
    np.testing.assert_array_equal(exact.kept[clear], ((p >= threshold) & allowed)[clear])
    assert not (exact.kept & ~streaming.kept & clear).any()
    # Skipped weights stay in the sum.
    for found in (exact, streaming):
        np.testing.assert_allclose(found.output, (p * found.kept) @ value, atol=1e-12)


def test_one_chunk_streams_exactly() -> None:
    random = np.random.default_rng(5)
    query, key, value = (random.standard_normal((20, 8)) for _ in range(3))
    kept = [
        lazy_softmax(
            query, key, value, np.ones((20, 20), np.bool_),
            scale=0.35, threshold=0.05, reference=reference, chunk_rows=20,
        ).kept
        for reference in ("exact", "streaming")
    ]  # fmt: skip
    np.testing.assert_array_equal(*kept)
    assert 0 < kept[0].mean() < 1


def test_published_throughput_in_both_units() -> None:
    """128 · n / (n + 9) counted once: 120 at n = 135, and 249 counted twice at n = 320."""
    for length, once in ((135, 120.0), (320, 124.5)):
        report = hardware.load(NAME).simulate(trace(length))
        assert report.cycles == 2 * length * (length + 9)
        macs = 2 * 2 * length * length * 64
        assert macs / report.seconds / 1e9 == pytest.approx(once, rel=1e-3)


def test_cycles_and_bytes_by_hand() -> None:
    n, heads, share = 32, 2, 0.25
    separate = hardware.load(NAME).simulate(trace(n))
    shared = hardware.load(NAME, **{"engine.arrays": "shared"}).simulate(trace(n))
    assert separate.cycles == heads * n * (n + 9)
    assert shared.cycles == heads * n * (n * (1 + share) / 2 + 9)
    keys = heads * n * 64 * 2
    assert separate.dram_bytes == keys * (1 + share) + 2 * keys
    for fetched, factor in (("all", 1.0), ("union", 1 - (1 - share) ** n)):
        report = hardware.load(NAME, **{"skipping.fetched": fetched}).simulate(trace(n))
        assert report.dram_bytes == round(keys * (1 + factor) + 2 * keys)
        read, written = report.actions["dram dram_read 16b"], report.actions["dram dram_write 16b"]
        assert 2 * (read + written) == pytest.approx(report.dram_bytes, abs=1)
    assert separate.total_energy == pytest.approx(separate.seconds)  # 1 W
    assert separate.total_area == 0


def test_values_decide_what_is_skipped() -> None:
    sampled = trace(values=True)
    shares = []
    for threshold in (0.0, 0.01, 0.1):
        machine = hardware.load(NAME, **{"skipping.threshold": threshold})
        report = machine.simulate(sampled)
        assert not any("default share" in text for text in report.assumptions)
        shares.append(report.stages[0].facts["kept_share"])
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[2] < 0.5
    exact, streaming = (
        hardware.load(NAME, **{"skipping.reference": r, "skipping.chunk_rows": 8}).simulate(sampled)
        for r in ("exact", "streaming")
    )
    assert streaming.stages[0].facts["weighed"] >= exact.stages[0].facts["weighed"]
    guessed = hardware.load(NAME).simulate(trace())
    assert any("holds no queries" in text for text in guessed.assumptions)


def test_a_selection_may_decide() -> None:
    base = trace()
    call = AttentionCall(value_counts=np.full((1, 2, 32), 8, np.int64))
    followed = Trace(base.workload, {"m": Selection("m", (call,))})
    report = hardware.load(NAME, **{"skipping.evidence": "selection"}).simulate(followed)
    assert report.stages[0].facts["kept_share"] == 0.25


def test_bandwidth_is_monotone_and_stalls_are_told() -> None:
    reports = [
        hardware.load(NAME, **{"dram.gbytes_per_second": gbytes}).simulate(trace())
        for gbytes in (0.1, 1.0, 64.0)
    ]
    cycles = [report.cycles for report in reports]
    assert cycles == sorted(cycles, reverse=True)
    assert reports[0].cycles == pytest.approx(reports[0].dram_bytes / 0.1, rel=1e-6)
    assert reports[0].stalls["dram"] == reports[0].cycles - reports[2].cycles
    assert reports[2].stalls == {}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"skipping.threshold": 1.5}, "skipping.threshold"),
        ({"skipping.theta": 0.1}, "unknown key 'skipping.theta'"),
        ({"engine.arrays": "both"}, "'separate' or 'shared'"),
    ],
)
def test_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(hardware.MachineError, match=message) as caught:
        hardware.load(NAME, **setting)
    assert "\n" not in str(caught.value)
