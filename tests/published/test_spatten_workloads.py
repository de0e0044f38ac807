"""The arithmetic of SpAtten's workloads: published counts, and the authors' traces.

The traces are not part of the project; where SPARSELOOM_DATA has them, they are read.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sparseloom.results import read_results
from sparseloom.tasks.data import find_data
from sparseloom.trace import Trace
from sparseloom.trace.index_models import Uniform
from sparseloom.trace.kept_keys import with_keys
from sparseloom.trace.spatten_benchmarks import benchmark, benchmarks, lengths
from sparseloom.trace.traffic import trace_traffic

SMALL = "summary-gpt2-small-wikitext2-per8.csv"
SMALL_DENSE = "summary-gpt2-small-wikitext2-per8-step1+dedic.csv"
LENGTHS = Path(__file__).parents[2] / "results" / "benchmark_lengths.json"


def published(name: str) -> Trace:
    try:
        folder = find_data("spatten_traces", files=(name,))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    file = folder / name
    return Trace.from_spatten_csv(file if file.is_file() else folder / f"{name}.gz")


@cache
def made(name: str) -> Trace:
    return benchmark(name).trace()


def equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is not None and other is not None and np.array_equal(one, other)


def fetched(trace: Trace, selection: str) -> tuple[int, int, int]:
    """Key rows, value rows and low-bit rows over all calls."""
    calls = trace.selection(selection).calls
    keys = values = low = 0
    for call in calls:
        assert call.key_counts is not None
        assert call.value_counts is not None
        keys += int(call.key_counts.sum())
        values += int(call.value_counts.sum())
        if call.lsb_refetch is not None:
            low += int((call.key_counts * call.lsb_refetch).sum())
    return keys, values, low


def test_thirty_benchmarks() -> None:
    found = benchmarks()
    assert len(found) == len({one.name for one in found}) == 30
    assert sum(one.shape.family == "bert" for one in found) == 22
    for one in found:
        assert one.shape.hidden_size == one.shape.heads * one.shape.head_dim
    with pytest.raises(ValueError, match="benchmark must be one of bert-base-cola, "):
        benchmark("bert-base-wnli")


def test_lengths_are_those_measured() -> None:
    measured = {
        row["benchmark"]: round(row["mean_tokens"])
        for row in (one.model_dump() for one in read_results(LENGTHS).rows)
    }
    table = lengths()
    assert measured == {t: n.tokens for t, n in table.items() if n.origin == "measured"}
    assert [task for task, one in table.items() if one.origin != "measured"] == ["qqp"]


def test_dense_gpt2_medium() -> None:
    # Table IV: attention 3.3 GFLOP, FC 19.3 GFLOP; fp32 keys and values of 32 steps 6.345 GB.
    trace = benchmark("gpt2-medium-ptb").trace(scope="model")
    operators = trace.workload.operators
    attention = 2 * sum(op.macs for op in operators if op.is_attention)
    linear = 2 * sum(op.macs for op in operators if op.kind == "gemm")
    assert attention == 24 * 16 * 64 * 4 * sum(range(993, 1025)) == pytest.approx(3.17e9, rel=1e-3)
    assert linear == 24 * 12 * 1024**2 * 2 * 32 == pytest.approx(19.33e9, rel=1e-3)
    dense = trace_traffic(trace, "dense")
    assert dense.useful == dense.fetched == pytest.approx(6.345e9, rel=1e-4)


def test_the_head_and_the_prompt_are_optional() -> None:
    medium = benchmark("gpt2-medium-ptb")
    trace = medium.trace(scope="model", prompt=True, head=True)
    assert trace.workload.operators[0].rows == 992
    vocabulary = [op for op in trace.workload.operators if op.role == "head"]
    assert [op.rows for op in vocabulary] == [992] + [1] * 32
    assert {op.columns for op in vocabulary} == {50257}
    attention = trace.workload.attention()
    assert [op.q_len for op in attention[:25]] == [992] * 24 + [1]
    assert [op.step for op in attention[:25]] == [0] * 24 + [1]
    calls = trace.selection("spatten").calls
    assert calls[0].key_counts is None
    without = made("gpt2-medium-ptb").selection("spatten").calls
    for mine, other in zip(calls[24:], without, strict=True):
        assert equal(mine.key_counts, other.key_counts)
        assert mine.token_keep == other.token_keep


def test_the_small_trace_is_generated_as_published() -> None:
    ours, theirs = made("gpt2-small-ptb"), published(SMALL)
    assert len(ours.workload.operators) == 32 * 12
    operators = zip(ours.workload.attention(), theirs.workload.attention(), strict=True)
    assert all(mine == other for mine, other in operators)
    alike = (
        *("key_bits", "value_bits", "query_bits", "lsb_bits", "lsb_threshold", "token_keep"),
        *("accumulates_importance", "rescales_importance"),
    )
    for mine, other in zip(ours.selection("spatten").calls, theirs.selection().calls, strict=True):
        assert equal(mine.key_counts, other.key_counts)
        assert equal(mine.value_counts, other.value_counts)
        assert [getattr(mine, name) for name in alike] == [getattr(other, name) for name in alike]
        assert mine.lsb_refetch is not None
        assert other.lsb_refetch is not None
        assert mine.lsb_refetch.sum() == other.lsb_refetch.sum()


def small_statistics(trace: Trace, selection: str) -> None:
    keys, values, low = fetched(trace, selection)
    dense, pruned = trace_traffic(trace, "dense"), trace_traffic(trace, selection)
    length = sum(op.kv_len * op.heads for op in trace.workload.attention())
    assert dense.useful == length * 512 == pytest.approx(2379e6, rel=1e-3)
    # With the low bits 28.87 times fewer bytes than fp32, without them 32.2.
    assert dense.useful / pruned.useful == pytest.approx(28.87, abs=0.005)
    assert dense.useful / (pruned.useful - pruned.useful_lsb) == pytest.approx(32.22, abs=0.005)
    assert pruned.useful == 48 * (keys + values) + 32 * low == pytest.approx(82.4e6, rel=1e-3)
    assert keys / length == pytest.approx(0.276, abs=5e-4)
    assert values / length == pytest.approx(0.055, abs=5e-4)
    assert 128 * (keys + values) == pytest.approx(0.197e9, rel=2e-3)
    # Low bits: 6.84 bits per key code, 6.70 over keys and values.
    assert 6 + 4 * low / keys == pytest.approx(6.84, abs=0.005)
    assert 6 + 4 * low / (keys + values) == pytest.approx(6.70, abs=0.005)
    # Keys are packed in pairs; values, pruned by each head alone, cost a third more.
    assert pruned.fetched_key == pruned.useful_key
    assert pruned.fetched_value / pruned.useful_value == pytest.approx(4 / 3)
    rows = [call.lsb_refetch for call in trace.selection(selection).calls]
    assert sum(int(row.sum()) for row in rows if row is not None) == 323
    assert sum(row.size for row in rows if row is not None) == 4608


def test_statistics_of_the_published_small_trace() -> None:
    trace = published(SMALL)
    small_statistics(trace, "spatten")
    first = trace.selection().calls[:12]
    for call in first:
        # ⌊0.2 · 1024⌋, not ⌊0.2 · 993⌋ = 198.
        assert call.value_counts is not None
        assert call.value_counts.ravel().tolist() == [204] * 12
    # Key ids change none of them.
    chosen = with_keys(trace, None, Uniform())
    again = trace_traffic(Trace(trace.workload, {"spatten": chosen}))
    assert again == trace_traffic(trace)


def test_statistics_of_our_small_trace() -> None:
    small_statistics(made("gpt2-small-ptb"), "spatten")


def test_the_published_dense_small_trace() -> None:
    trace = published(SMALL_DENSE)
    keys, values, low = fetched(trace, "spatten")
    assert (keys, values, low) == (12 * 12 * sum(range(993, 1025)),) * 2 + (0,)
    assert 128 * (keys + values) == pytest.approx(1.190e9, rel=1e-3)
    assert trace_traffic(trace).useful == trace_traffic(trace, "dense").useful


def test_statistics_of_the_medium_profile() -> None:
    # The trace itself is not at hand; its statistics are those that were taken from it.
    trace = made("gpt2-medium-ptb")
    keys, values, _ = fetched(trace, "spatten-static")
    operators, calls = trace.workload.attention(), trace.selection("spatten-static").calls
    present = sum(
        op.kv_len * (op.heads if call.heads_alive is None else int(call.heads_alive.sum()))
        for op, call in zip(operators, calls, strict=True)
    )
    whole = sum(op.kv_len * op.heads for op in operators)
    assert keys / present == pytest.approx(0.538, abs=5e-4)
    assert keys / whole == pytest.approx(0.496, abs=5e-4)
    assert values / present == pytest.approx(0.162, abs=5e-4)
    used = trace_traffic(trace, "spatten-static").useful
    assert used == 96 * keys + 64 * values == pytest.approx(708e6, rel=1e-3)
    assert whole * 512 / used == pytest.approx(8.96, abs=0.005)
    assert present * 512 / used == pytest.approx(8.3, abs=0.05)
    assert 128 * (keys + values) == pytest.approx(1.023e9, rel=1e-3)
    # 32 steps of 24 layers: 16, then 13, then 10 heads.
    rows = [16 if c.heads_alive is None else int(c.heads_alive.sum()) for c in calls]
    assert sum(rows) == 11_328


def test_bert_follows_the_schedule() -> None:
    trace = benchmark("bert-base-squad1").trace()
    calls = trace.selection("spatten").calls
    alive = np.array([c.tokens_alive.sum() for c in calls if c.tokens_alive is not None])
    assert (alive[:2] == 187).all()
    assert (np.diff(alive) <= 0).all()
    assert alive.mean() / 187 == pytest.approx(0.65, abs=0.005)
    heads = [12 if c.heads_alive is None else int(c.heads_alive.sum()) for c in calls]
    # ⌈0.3 · 12⌉ layers with all heads; flooring takes half a head more on average.
    assert heads[:4] == [12] * 4
    assert np.mean(heads) / 12 == pytest.approx(0.9, abs=0.05)
    before = None
    for call, count in zip(calls, alive, strict=True):
        tokens = call.tokens_alive
        assert tokens is not None
        assert call.key_counts is not None
        assert tokens[0, 0]  # [CLS]
        assert before is None or not (tokens & ~before).any()
        before = tokens
        # Rows of live tokens keep all live tokens.
        assert set(call.key_counts[0, 0, tokens[0]].tolist()) == {int(count)}
        assert (call.key_counts[0, :, ~tokens[0]] == 0).all()
    assert [c.token_keep for c in calls[:-1]] == [
        int(after) if after < now else None for now, after in pairwise(alive)
    ]
    assert not calls[-1].accumulates_importance


# The four texts of GPT-2 have the same traces.
@pytest.mark.parametrize("name", [one.name for one in benchmarks() if one.task in ("cola", "ptb")])
def test_a_trace_of_every_model(name: str) -> None:
    one, trace = benchmark(name), made(name)
    assert 0.2 < trace.density("spatten") < 0.6
    assert trace.workload.attention()[-1].kv_len == one.length + one.new_tokens
    assert len(trace.workload.attention()) == one.shape.layers * max(one.new_tokens, 1)
    assert trace.selection("spatten").method["index_model"] == "uniform"
