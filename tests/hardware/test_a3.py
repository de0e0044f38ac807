"""A3: what it keeps and puts out against plain numpy, and its cycles in two fidelities."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom import hardware
from sparseloom.hardware.a3 import A3
from sparseloom.hardware.a3_algorithm import (
    FixedPoint,
    attend,
    bitonic_compares,
    choose,
    exponentials,
    greedy_scores,
    quantise,
)
from sparseloom.hardware.a3_pipeline import BUSY, Jobs, closed_form, cycle_by_cycle
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Selection,
    Trace,
    TraceError,
    Workload,
    transformer_operators,
)

NUMBER = FixedPoint(4, 4)
MACHINES = ("a3_base_hpca_2020", "a3_hpca_2020", "a3_aggressive_hpca_2020")
SETTING = {"iterations_share": 0.5, "threshold_percent": 5.0, "number": NUMBER}


def trace(
    length: int = 48, *, heads: int = 2, dim: int = 64, causal: bool = False, values: bool = False
) -> Trace:
    shape = ModelShape(
        layers=1,
        hidden_size=heads * dim,
        heads=heads,
        kv_heads=heads,
        head_dim=dim,
        is_causal=causal,
    )
    operators = transformer_operators(shape, q_len=length)
    random = np.random.default_rng(3)
    names = ("query", "key", "value") if values else ()
    tensors = {f"calls.0.{n}": random.standard_normal((1, heads, length, dim)) for n in names}
    keep = np.tril(np.ones((1, heads, length, length), np.bool_))
    mask = MaskArrays.from_bool(keep, is_causal=causal)
    return Trace(
        Workload(shape, operators, name="t"),
        {"m": Selection("m", (AttentionCall(mask),))},
        tensors,
    )


def greedy_by_heaps(query: np.ndarray, key: np.ndarray, iterations: int) -> np.ndarray:
    """The published loop with two priority queues over all partial products of each column."""
    scores = np.zeros(len(key), np.int64)
    products = query * key
    order = np.argsort(products, axis=0, kind="stable")
    largest, smallest = [], []
    for j in range(key.shape[1]):
        # Ties inside a column leave the pointers in the order of the sorted keys.
        rows = np.argsort(key[:, j], kind="stable")
        rows = rows if query[j] >= 0 else rows[::-1]
        smallest.append(list(rows))
        largest.append(list(rows[::-1]))
        assert (products[rows, j] == products[order[:, j], j]).all()
    top = [(-products[rows[0], j], j, 0) for j, rows in enumerate(largest)]
    low = [(products[rows[0], j], j, 0) for j, rows in enumerate(smallest)]
    heapq.heapify(top)
    heapq.heapify(low)
    total = 0
    for _ in range(iterations):
        for heap, columns, sign in ((top, largest, -1), (low, smallest, 1)):
            if (sign == 1 and total < 0) or not heap:
                continue
            value, j, at = heapq.heappop(heap)
            if value < 0:
                scores[columns[j][at]] += sign * value
                total += sign * value
            if at + 1 < len(key):
                heapq.heappush(heap, (sign * products[columns[j][at + 1], j], j, at + 1))
    return scores


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(1, 24),
    dim=st.integers(1, 9),
    share=st.floats(0.05, 1.0),
)
def test_greedy_scores_are_those_of_two_heaps(seed: int, keys: int, dim: int, share: float) -> None:
    random = np.random.default_rng(seed)
    key = random.integers(-8, 8, (keys, dim))
    query = random.integers(-8, 8, dim)
    iterations = max(1, int(share * keys))
    found = greedy_scores(query, key, iterations)
    np.testing.assert_array_equal(found, greedy_by_heaps(query, key, iterations))


def test_candidates_and_threshold_against_numpy() -> None:
    random = np.random.default_rng(0)
    length, dim, scale = 40, 16, 0.25
    query, key = (quantise(random.standard_normal((length, dim)), NUMBER) for _ in range(2))
    visible = np.tril(np.ones((length, length), np.bool_))
    found = choose(query, key, visible, scale=scale, **SETTING)
    for i in range(length):
        seen = key[: i + 1]
        greedy = greedy_by_heaps(query[i], seen, max(1, (i + 1) // 2))
        some = greedy > 0 if (greedy > 0).any() else np.arange(i + 1) == greedy.argmax()
        scores = scale * (seen @ query[i]) / 4.0**NUMBER.fraction_bits
        kept = some & (scores >= scores[some].max() - np.log(20.0))
        assert found.candidates[i] == some.sum()
        np.testing.assert_array_equal(found.kept[i, : i + 1], kept)
        assert not found.kept[i, i + 1 :].any()


def test_a_query_without_positive_scores_keeps_the_best() -> None:
    key = quantise(np.full((5, 4), -1.0), NUMBER)
    query = quantise(np.ones((1, 4)), NUMBER)
    found = choose(query, key, np.ones((1, 5), np.bool_), scale=0.5, **SETTING)
    assert found.candidates[0] == 1
    assert found.kept.sum() == 1
    nothing = choose(query, key, np.zeros((1, 5), np.bool_), scale=0.5, **SETTING)
    assert nothing.candidates[0] == 0
    assert not nothing.kept.any()


@pytest.mark.parametrize(
    ("share", "percent", "candidates", "tolerance", "top"),
    [(0.5, 5.0, 105, 8, (0.80, 0.93)), (0.125, 10.0, 36, 4, (0.38, 0.55))],
)
def test_gaussian_run(
    share: float, percent: float, candidates: int, tolerance: float, top: tuple[float, float]
) -> None:
    """n = 320, d = 64: how many candidates there are, and how often the best key is kept."""
    random = np.random.default_rng(0)
    query, key = (quantise(random.standard_normal((320, 64)), NUMBER) for _ in range(2))
    everything = np.ones((320, 320), np.bool_)
    found = choose(
        query,
        key,
        everything,
        iterations_share=share,
        threshold_percent=percent,
        number=NUMBER,
        scale=0.125,
    )
    assert found.candidates.mean() == pytest.approx(candidates, abs=tolerance)
    best = (query @ key.T).argmax(axis=1)
    assert top[0] <= found.kept[np.arange(320), best].mean() <= top[1]


def test_quantise_rounds_and_saturates() -> None:
    values = np.array([0.03, 0.04, -0.04, 7.96, 100.0, -100.0])
    assert quantise(values, NUMBER).tolist() == [0, 1, -1, 127, 127, -128]


def test_exponentials_from_two_tables() -> None:
    """Each table rounds once and the product once: 1.5 units in the last place and a little."""
    below = np.arange(0, 1 << 14)
    found = exponentials(below, NUMBER, head_dim=64, scale=0.125) / 256
    exact = np.exp(-np.rint(below * 0.125) / 256)
    assert np.abs(found - exact).max() <= 1.51 / 256
    assert found[0] == 1.0
    assert (np.diff(found) <= 1 / 256).all()


def test_output_is_attention_up_to_fixed_point() -> None:
    random = np.random.default_rng(1)
    query, key, value = (random.standard_normal((24, 16)) for _ in range(3))
    kept = np.tril(np.ones((24, 24), np.bool_))
    kept[5] = False
    number = FixedPoint(5, 10)
    found = attend(query, key, value, kept, number=number, scale=0.25)
    scores = np.where(kept, 0.25 * query @ key.T, -np.inf)
    weights = np.exp(scores - np.where(kept.any(axis=1), scores.max(axis=1), 0.0)[:, None])
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
    np.testing.assert_allclose(found, weights @ value, atol=0.01)
    assert not found[5].any()
    coarse = attend(query, key, value, kept, number=NUMBER, scale=0.25)
    assert 0.01 < np.abs(coarse - weights @ value).max() < 0.5


def test_sorting_by_hand() -> None:
    assert bitonic_compares(384, 64) == 737_280
    assert bitonic_compares(512, 64) == 737_280
    assert bitonic_compares(1, 64) == 0


# ---------------------------------------------------------------------------- the pipeline


@pytest.mark.parametrize(
    ("name", "published"), list(zip(MACHINES, (150_912, 77_184, 21_888), strict=True))
)
def test_published_cycles_per_head(name: str, published: int) -> None:
    """384 queries of 64 values: 384 · (n, n/2 or n/8, + 9) without loading and draining."""
    heads = 12
    for fidelity in ("analytic", "cycle"):
        report = hardware.load(name).simulate(trace(384, heads=heads), "dense", fidelity=fidelity)
        (stage,) = report.stages
        # Each head drains the modules behind the slowest one.
        drain = closed_form(jobs_of(name, 384, heads), 1).drain
        assert stage.cycles - stage.stall_cycles - drain == heads * published
        assert report.stalls == {"dram": heads * (768 + 2)}


def jobs_of(name: str, length: int, heads: int) -> Jobs:
    machine = hardware.load(name)
    assert isinstance(machine, A3)
    base = trace(length, heads=heads)
    (operator,) = base.workload.attention()
    from sparseloom.hardware.attention_core import Tally

    work = machine._work(base.workload, operator, AttentionCall(), 0, None, Tally())
    return machine.jobs(operator, work)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    modules=st.integers(1, 4),
    heads=st.integers(1, 4),
    queries=st.integers(1, 12),
    kv=st.integers(1, 60),
    copies=st.integers(1, 2),
)
def test_cycles_keep_the_laws(
    seed: int, modules: int, heads: int, queries: int, kv: int, copies: int
) -> None:
    random = np.random.default_rng(seed)
    service = random.integers(1, 30, (modules, heads * queries))
    jobs = Jobs(service, np.repeat(np.arange(heads), queries), kv, 2)
    found = cycle_by_cycle(jobs, copies, 2)
    # Busy, stalled and idle cycles of every unit add up to the run, and no work is lost.
    assert (found.totals.sum(axis=1) == found.cycles).all()
    np.testing.assert_array_equal(found.totals[:-1, BUSY], service.sum(axis=1))
    assert found.totals[-1, BUSY] == heads * (kv + 2 * queries)
    assert found.cycles >= max(service.sum(axis=1).max(), heads * (kv + 2 * queries))
    # More room and faster memory are never slower.
    assert cycle_by_cycle(jobs, copies, 4).cycles <= found.cycles
    assert (
        cycle_by_cycle(jobs._replace(kv_cycles=max(1, kv // 2)), copies, 2).cycles <= found.cycles
    )
    assert cycle_by_cycle(jobs, 2, 2).cycles <= cycle_by_cycle(jobs, 1, 2).cycles


@settings(deadline=None, max_examples=20)
@given(
    service=st.lists(st.integers(3, 40), min_size=1, max_size=4),
    heads=st.integers(1, 4),
    queries=st.integers(1, 12),
    kv=st.integers(1, 80),
)
def test_both_fidelities_agree_where_queries_are_alike(
    service: list[int], heads: int, queries: int, kv: int
) -> None:
    every = np.repeat(np.array(service)[:, None], heads * queries, axis=1)
    jobs = Jobs(every, np.repeat(np.arange(heads), queries), kv, 2)
    for depth in (1, 4):
        one, other = closed_form(jobs, 1), cycle_by_cycle(jobs, 1, depth)
        assert other.cycles == one.cycles
        assert other.dram == one.dram


def test_real_values_differ_by_what_buffers_hide() -> None:
    for name in MACHINES[1:]:
        machine = hardware.load(name)
        sampled = trace(96, values=True)
        one = machine.simulate(sampled, "dense").cycles
        other = machine.simulate(sampled, "dense", fidelity="cycle").cycles
        assert 0.8 * one <= other <= 1.02 * one


# ---------------------------------------------------------------------------- the machine


def test_bandwidth_and_copies_are_monotone() -> None:
    for fidelity in ("analytic", "cycle"):
        cycles = [
            hardware.load(MACHINES[2], **{"dram.gbytes_per_second": b, "sram.copies": copies})
            .simulate(trace(96), "dense", fidelity=fidelity)
            .cycles
            for b, copies in ((1.0, 1), (8.0, 1), (64.0, 1), (64.0, 2), (256.0, 2))
        ]
        assert cycles == sorted(cycles, reverse=True)
        assert cycles[0] > cycles[2]


def test_bytes_are_all_of_k_and_v() -> None:
    reports = [hardware.load(name).simulate(trace(48), "dense") for name in MACHINES]
    assert {report.dram_bytes for report in reports} == {2 * (2 * 48 * 64 + 2 * 48 * 64)}
    for report in reports:
        read, written = report.actions["dram dram_read 8b"], report.actions["dram dram_write 8b"]
        assert read + written == report.dram_bytes


def test_evidence() -> None:
    sampled = trace(48, values=True)
    searched = hardware.load(MACHINES[1]).simulate(sampled, "dense")
    guessed = hardware.load(MACHINES[1]).simulate(trace(48), "dense")
    assert not any("default" in text for text in searched.assumptions)
    assert any("holds no queries" in text for text in guessed.assumptions)
    assert searched.stages[0].facts["kept"] != guessed.stages[0].facts["kept"]
    followed = hardware.load(MACHINES[1], **{"search.evidence": "selection"}).simulate(
        trace(48, causal=True), "m"
    )
    # 48 · 49 / 2 pairs are 24.5 keys per query, rounded to 24, and never more than it sees.
    assert followed.stages[0].facts["kept"] == 2 * sum(min(24, i + 1) for i in range(48))
    assert not any("is not followed" in text for text in followed.assumptions)


def test_sorting_is_charged_as_said() -> None:
    plain = hardware.load(MACHINES[1]).simulate(trace(48), "dense")
    assert plain.actions["sorting compare 8b"] == 2 * bitonic_compares(48, 64)
    charge: dict[str, Any] = {"preprocessing.time": "charged"}
    once = hardware.load(MACHINES[1], **charge).simulate(trace(48), "dense")
    assert once.cycles - plain.cycles == 2 * bitonic_compares(48, 64) / 64
    each = hardware.load(MACHINES[1], **charge, **{"preprocessing.per": "query"})
    assert each.simulate(trace(48), "dense").components["sorting"] == pytest.approx(
        48 * once.components["sorting"]
    )
    assert "sorting compare 8b" not in hardware.load(MACHINES[0]).simulate(trace(48)).actions


def test_energy_is_actions_or_published_power() -> None:
    counted = hardware.load(MACHINES[1]).simulate(trace(48), "dense")
    assert {"dot_product", "search", "dram", "leakage"} <= set(counted.energy)
    assert "aladdin_40nm" in counted.energy_table
    published = hardware.load(MACHINES[1], **{"energy.source": "published_power"})
    report = published.simulate(trace(48), "dense")
    assert report.total_energy == pytest.approx(0.8216 * report.seconds)
    assert report.total_area == pytest.approx(2.08)


def test_values_of_another_shape_are_refused() -> None:
    good = trace(48, values=True)
    tensors = {**good.tensors, "calls.0.key": np.zeros((1, 2, 47, 64))}
    with pytest.raises(TraceError, match=r"calls.0.key must be \(1, 2, 48, 64\)"):
        hardware.load(MACHINES[1]).simulate(Trace(good.workload, {}, tensors))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"search.mode": "exact"}, "search.mode"),
        ({"search.iterations_share": 0.0}, "search.iterations_share"),
        ({"sram.copies": 3}, "sram.copies"),
        ({"search.top": 3}, "unknown key 'search.top'"),
    ],
)
def test_bad_settings(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(hardware.MachineError, match=message) as caught:
        hardware.load(MACHINES[0], **settings_)
    assert "\n" not in str(caught.value)
