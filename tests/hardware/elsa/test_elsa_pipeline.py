"""ELSA's cycles for one head: published limits, laws, and both fidelities against each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom import hardware
from sparseloom.hardware.elsa import Elsa
from sparseloom.hardware.elsa.config import ElsaConfig
from sparseloom.hardware.elsa.jobs import hasher_of
from sparseloom.hardware.elsa.pipeline import (
    CAUSES,
    Head,
    closed_form,
    cycle_by_cycle,
    make_unit_log,
    rates,
    units_of,
)

BUSY = CAUSES.index("busy")


def config(**changes: object) -> ElsaConfig:
    machine = hardware.load("elsa_isca_2021", **changes)
    assert isinstance(machine, Elsa)
    return machine.settings


def head(queries: int, keys: int, share: float, *, causal: bool = False, seed: int = 0) -> Head:
    may = np.ones((queries, keys), np.bool_)
    if causal:
        may = np.tril(may, keys - queries)
    kept = may & (np.random.default_rng(seed).random(may.shape) < share)
    return Head(kept, may.sum(1))


def run(one: Head, made: ElsaConfig, *, dim: int = 64, start: int = 0) -> tuple[int, np.ndarray]:
    log = make_unit_log(made)
    log.running[:, 1] = start
    end = cycle_by_cycle(one, made, rates(made, hasher_of(made, dim), dim, dim), log, start)
    return end - start, log.totals


def test_cycles_of_the_modules() -> None:
    made = config()
    assert rates(made, hasher_of(made, 64), 64, 64) == (3, 1, 1, 1, 4, 16)
    # Narrow heads are charged in full; wide ones take turns, with longer hashes.
    assert rates(made, hasher_of(made, 8), 8, 8) == (3, 1, 1, 1, 4, 16)
    assert rates(made, hasher_of(made, 128), 128, 64) == (8, 2, 2, 2, 8, 16)
    base = config(**{"search.mode": "base"})
    assert rates(base, hasher_of(base, 64), 64, 64) == (0, 1, 1, 0, 4, 16)
    orthogonal = config(**{"search.form": "orthogonal"})
    assert rates(orthogonal, hasher_of(orthogonal, 64), 64, 64).hash == 4096 // 256


@pytest.mark.parametrize(
    ("share", "per_query"), [(1.0, 128), (0.0, 16)], ids=["everything", "nothing"]
)
def test_published_cycles_per_query(share: float, per_query: int) -> None:
    """n = 512: 128 cycles a query without approximation, 16 at least with it, 3·(n + 1) before."""
    one, made = head(64, 512, share), config()
    timing = closed_form(one, made, rates(made, hasher_of(made, 64), 64, 64))
    assert timing.preprocessing == 3 * 513
    assert timing.cycles == 3 * 513 + 64 * per_query + 4 + 16
    cycles, _ = run(one, made)
    # A cycle or two to fill the pipeline, nothing per query.
    assert 0 <= cycles - timing.cycles <= 2
    twice, _ = run(head(128, 512, share), made)
    assert twice - cycles == 64 * per_query


def test_a_fifth_of_the_keys_takes_a_twentieth_of_n() -> None:
    """Evenly spread candidates: 0.05 · n cycles a query at retention 0.2."""
    kept = np.zeros((32, 2000), np.bool_)
    kept[:, :] = (np.arange(2000) // 4) % 5 == 0
    one, made = Head(kept, np.full(32, 2000)), config()
    timing = closed_form(one, made, rates(made, hasher_of(made, 64), 64, 64))
    assert timing.cycles - timing.preprocessing == 32 * 100 + 20
    assert timing.lost == 0


def test_imbalance_is_what_the_fullest_bank_adds() -> None:
    kept = np.zeros((10, 512), np.bool_)
    kept[:, :160:4] = True  # all of them in bank 0
    one, made = Head(kept, np.full(10, 512)), config()
    timing = closed_form(one, made, rates(made, hasher_of(made, 64), 64, 64))
    assert timing.cycles - timing.preprocessing == 10 * 40 + 20
    assert timing.lost == 10 * (40 - 16)  # ten a bank would hide behind the scan
    assert timing.slowest == (0, 0, 10, 0)
    cycles, totals = run(one, made)
    assert cycles >= 10 * 40 + 1539
    waits = dict(zip(units_of(made), totals, strict=True))
    assert waits["attention 1"][CAUSES.index("banks")] > 200
    assert waits["attention 0"][CAUSES.index("banks")] == 0


@settings(deadline=None, max_examples=40)
@given(
    queries=st.integers(1, 12),
    keys=st.integers(1, 90),
    share=st.floats(0, 1),
    causal=st.booleans(),
    banks=st.sampled_from([1, 3, 4]),
    selectors=st.sampled_from([1, 8]),
    queue=st.integers(1, 5),
    run_ahead=st.integers(0, 2),
    buffer=st.integers(1, 4),
    dim=st.sampled_from([8, 64, 128]),
    seed=st.integers(0, 1000),
)
def test_cycles_keep_the_laws(
    queries: int,
    keys: int,
    share: float,
    causal: bool,
    banks: int,
    selectors: int,
    queue: int,
    run_ahead: int,
    buffer: int,
    dim: int,
    seed: int,
) -> None:
    one = head(queries, keys, share, causal=causal, seed=seed)
    made = config(
        **{
            "selection.banks": banks,
            "selection.selectors": selectors,
            "selection.queue": queue,
            "selection.run_ahead": run_ahead,
            "selection.query_buffer": buffer,
        }
    )
    rate = rates(made, hasher_of(made, dim), dim, dim)
    cycles, totals = run(one, made, dim=dim, start=7)
    # Busy, stalled and idle cycles of every unit add up to the run, and no work is lost.
    assert (totals.sum(axis=1) == cycles).all()
    names = units_of(made)
    busy = dict(zip(names, totals[:, BUSY].tolist(), strict=True))
    assert busy["hash"] == rate.hash * (keys + queries)
    assert busy["division"] == rate.divide * queries
    columns = np.arange(keys)
    for b in range(banks):
        norms = rate.norm * np.count_nonzero(columns % banks == b)
        mine = rate.attend * int(one.kept[:, b::banks].sum())
        assert busy[f"attention {b}"] == norms + mine
        for c in range(selectors):
            own = (columns % banks == b) & (columns // banks % selectors == c)
            looked = sum(int(np.count_nonzero(own[:seen])) for seen in one.seen)
            assert busy[f"selector {b}.{c}"] == rate.compare * looked
    # No faster than the busiest unit, no slower than everything one after another.
    timing = closed_form(one, made, rate)
    scan = rate.compare * -(-one.seen // (banks * selectors))
    assert cycles >= timing.preprocessing + max(n for name, n in busy.items() if name[0] == "d")
    work = [rate.attend * int(one.kept[:, b::banks].sum()) for b in range(banks)]
    assert cycles >= timing.preprocessing + max(*work, int(scan.sum()))
    every = rate.attend * one.kept.sum(1) + scan + rate.hash + rate.divide + 6
    assert cycles <= timing.preprocessing + int(every.sum()) + rate.depth + 2


@settings(deadline=None, max_examples=20)
@given(
    share=st.floats(0, 1),
    keys=st.integers(1, 300),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_deep_queues_are_no_slower_than_the_closed_form(
    share: float, keys: int, causal: bool, seed: int
) -> None:
    queries = min(keys, 20)
    one = head(queries, keys, share, causal=causal, seed=seed)
    made = config(**{"selection.queue": 128, "selection.run_ahead": 2})
    rate = rates(made, hasher_of(made, 64), 64, 64)
    timing = closed_form(one, made, rate)
    cycles, _ = run(one, made)
    # A candidate waits a cycle before it is served, and its output one before it is divided.
    assert cycles <= timing.cycles + 4


def test_deeper_queues_help() -> None:
    one = head(40, 2000, 0.2)
    cycles = [run(one, config(**{"selection.queue": queue}))[0] for queue in (1, 2, 4, 16, 64)]
    assert cycles == sorted(cycles, reverse=True)
    assert cycles[0] > 1.1 * cycles[-1]


def test_banks_wait_for_each_other_no_longer_than_buffers_allow() -> None:
    one = head(60, 512, 0.2)
    cycles = [
        run(one, config(**{"attention.output_buffer": outputs, "selection.query_buffer": 12}))[0]
        for outputs in (1, 2, 8)
    ]
    assert cycles == sorted(cycles, reverse=True)
    assert cycles[0] > cycles[-1]
