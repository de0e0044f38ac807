"""The top-k engine: exact, the published mean cycles, and one truth in its two forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.units import topk
from sparseloom.hardware.units.topk import filter_cycles, filter_pass, make_rng, quick_select

_Row = NDArray[Any]


def _kept(values: _Row, k: int, lanes: int = 16, seed: int = 0) -> list[int]:
    n = len(values)
    threshold, n_equal, _, _ = quick_select(values, 0, n, k, lanes, make_rng(seed))
    ids = np.full(n, -1, np.int64)
    found = filter_pass(values, 0, n, threshold, n_equal, ids)
    return ids[:found].tolist()


def _sorted_top_k(values: _Row, k: int) -> list[int]:
    """A stable sort: among equal values the first one ranks higher."""
    return sorted(np.argsort(-values, kind="stable")[:k].tolist())


def _mean_cycles(values: _Row, k: int, lanes: int, runs: int, rng: NDArray[np.uint64]) -> float:
    n = len(values)
    return float(np.mean([quick_select(values, 0, n, k, lanes, rng)[2] for _ in range(runs)]))


def test_example_of_the_slides() -> None:
    """SpAtten, HPCA 2021 slides: the top 4 of [7 2 6 4 9 1 3 5] are [7 6 9 5]."""
    values = np.array([7, 2, 6, 4, 9, 1, 3, 5])
    assert quick_select(values, 0, 8, 4, 16, make_rng(3))[:2] == (5, 1)
    assert [int(values[i]) for i in _kept(values, 4)] == [7, 6, 9, 5]


def test_example_of_the_figure() -> None:
    """SpAtten Fig. 9: the top 3 of [0.6 0.1 0.5 1.2 0.6], where Algorithm 3 as printed fails."""
    values = np.array([0.6, 0.1, 0.5, 1.2, 0.6])
    for seed in range(20):
        assert quick_select(values, 0, 5, 3, 16, make_rng(seed))[:2] == (0.6, 2)
        assert _kept(values, 3, seed=seed) == [0, 3, 4]
        assert _kept(values, 2, seed=seed) == [0, 3]  # a tie: the first one in the input stays


_rows = st.integers(0, 1024).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, n), st.sampled_from([0, 1, 3, 40, 4095, 10**12]))
)


@settings(deadline=None)  # the first example compiles
@given(_rows, st.integers(0, 2**32), st.integers(1, 32), st.booleans())
def test_equals_a_stable_sort(
    row: tuple[int, int, int], seed: int, lanes: int, as_float: bool
) -> None:
    n, k, top = row
    values = np.random.default_rng(seed).integers(0, top + 1, n)
    if as_float:
        values = values / 7 - 1.0
    assert _kept(values, k, lanes, seed) == _sorted_top_k(values, k)


def test_only_the_row_is_read() -> None:
    values = np.array([99, 3, 1, 2, 99])
    threshold, n_equal, cycles, rounds = quick_select(values, 1, 3, 2, 1, make_rng(0))
    assert (threshold, n_equal) == (2, 1)
    assert cycles >= 3 + 3
    assert rounds >= 1
    ids = np.zeros(3, np.int64)
    assert filter_pass(values, 1, 3, threshold, n_equal, ids) == 2
    assert ids[:2].tolist() == [0, 2]
    assert values.tolist() == [99, 3, 1, 2, 99]


@pytest.mark.parametrize(("n", "k"), [(0, 0), (5, 0), (5, 5), (5, 9)])
def test_the_engine_is_bypassed_when_there_is_nothing_to_select(n: int, k: int) -> None:
    values, rng = np.array([3, 1, 4, 1, 5])[:n], make_rng(7)
    assert quick_select(values, 0, n, k, 16, rng)[2:] == (0, 0)
    assert rng[0] == 7  # no pivot was drawn
    assert _kept(values, k) == list(range(min(n, k)))


@pytest.mark.parametrize(
    ("scanned", "expected"), [(0, 13), (200, 13), (208, 13), (209, 14), (1024, 64)]
)
def test_filter_cycles(scanned: int, expected: int) -> None:
    assert filter_cycles(102, 8, scanned, 16) == expected


# Mean cycles for distinct values, derived from the rule of the authors' simulator
# (ceil(n / 16) + 3 a round, random pivots).
_MEANS = {
    (1024, 512): 256, (1024, 204): 232, (921, 184): 214, (716, 143): 174, (993, 307): 243,
    (614, 184): 162, (512, 256): 146, (307, 92): 96, (256, 128): 86, (204, 40): 68,
    (128, 64): 56, (102, 20): 45, (64, 32): 37, (32, 16): 26,
}  # fmt: skip


@pytest.mark.parametrize(("n", "k"), _MEANS)
def test_mean_cycles_of_distinct_values(n: int, k: int) -> None:
    values = np.random.default_rng(0).permutation(n)
    assert _mean_cycles(values, k, 16, 8000, make_rng(1)) == pytest.approx(_MEANS[n, k], rel=0.03)


@pytest.mark.parametrize(
    ("lanes", "mean"), [(1, 3465), (2, 1765), (4, 899), (8, 474), (16, 255), (32, 151)]
)
def test_mean_cycles_by_lanes(lanes: int, mean: int) -> None:
    values = np.random.default_rng(0).permutation(1024)
    assert _mean_cycles(values, 512, lanes, 8000, make_rng(2)) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("spread", [2.0, 2.4, 2.8])
def test_ties_of_12_bit_probabilities_shorten_the_search(spread: float) -> None:
    """Normal scores of deviation 2 to 2.8, softmax, rounded to 1/4096: near 921 keys most
    probabilities share a few small codes, and 94 to 140 cycles do where distinct values take 214.
    """
    random, rng, means = np.random.default_rng(0), make_rng(3), list[float]()
    for _ in range(100):
        weights = np.exp(random.normal(0, spread, 921))
        codes = np.rint(4096 * weights / weights.sum()).astype(np.int64)
        means.append(_mean_cycles(codes, 184, 16, 40, rng))
    assert 94 <= np.mean(means) <= 140


def test_compiled_code_may_call_the_engine() -> None:
    @inlined
    def total(values: _Row, runs: int, rng: _Row) -> int:
        cycles = 0
        for _ in range(runs):
            cycles += quick_select(values, 0, 64, 32, 16, rng)[2]
        return cycles

    values = np.random.default_rng(0).permutation(64)
    assert total(values, 50, make_rng(5)) == round(
        50 * _mean_cycles(values, 32, 16, 50, make_rng(5))
    )


# ----------------------------------------------------------------------------- cycle by cycle


@settings(deadline=None, max_examples=40)  # the first example compiles
@given(
    st.integers(0, 150),
    st.floats(0, 1),
    st.sampled_from([0, 1, 3, 40, 10**12]),
    st.integers(0, 2**32),
    st.integers(1, 32),
    st.booleans(),
)
@example(1024, 0.5, 10**12, 1, 16, False)
@example(1024, 0.2, 60, 2, 32, True)
def test_both_forms_agree_cycle_by_cycle(
    n: int, keep: float, top: int, seed: int, lanes: int, as_float: bool
) -> None:
    k = round(keep * n)
    values = np.random.default_rng(seed).integers(0, top + 1, n)
    if as_float:
        values = values.astype(np.float64)
    whole, stepped = make_rng(seed), make_rng(seed)
    threshold, n_equal, cycles, rounds = quick_select(values, 0, n, k, lanes, whole)
    engine = topk.make_topk(lanes, -(-max(n, 1) // lanes), values.dtype.type)
    topk.start(engine, values, 0, n, k, stepped)
    control, steps, ends, sizes = engine.control, 0, list[int](), [n]
    while control.phase[0] != topk.DONE:
        before = int(control.rounds[0])
        topk.step(engine, stepped)
        steps += 1
        # Every candidate of the round is somewhere: unread, in the pipeline, in a FIFO, or equal.
        if control.rounds[0] == before and control.phase[0] == topk.SELECT:
            assert _everywhere(engine) == sizes[-1]
        if control.rounds[0] > before:
            ends.append(steps)
            sizes.append(int(control.unread[0]))
    assert steps == cycles == control.cycles[0]
    assert control.rounds[0] == rounds
    assert (engine.threshold[0], control.n_equal[0]) == (threshold, n_equal)
    assert whole[0] == stepped[0]  # the same pivots in the same order
    lengths = np.diff([0, *ends, steps]) if rounds else []
    assert [*lengths] == [-(-size // lanes) + 3 for size in sizes[:rounds]]


def _everywhere(engine: topk.TopK) -> int:
    c, moving = engine.control, int(engine.n_read[0] + engine.n_compared[0])
    if engine.packed_valid[0]:
        moving += int(engine.n_packed.sum() + engine.packed_equal[0])
    # The FIFO that is read still holds what is unread; a row's buffer is not counted in `used`.
    unread = int(c.unread[0]) if c.source[0] == topk.ROW else 0
    return int(unread + engine.used.sum() + moving + c.equal[0])


def test_a_row_longer_than_the_fifos_is_refused() -> None:
    engine = topk.make_topk(4, 2)
    with pytest.raises(ValueError, match="n must fit"):
        topk.start(engine, np.arange(9), 0, 9, 3, make_rng(0))
    topk.start(engine, np.arange(8), 0, 8, 3, make_rng(0))
    with pytest.raises(ValueError, match="still selecting"):
        topk.start(engine, np.arange(8), 0, 8, 3, make_rng(0))


def test_a_step_without_a_row_does_nothing() -> None:
    engine, rng = topk.make_topk(), make_rng(0)
    topk.step(engine, rng)
    assert engine.control.cycles[0] == 0
    assert rng[0] == 0


@pytest.mark.parametrize(
    ("lanes", "depth", "dtype", "message"),
    [
        (0, 64, np.int64, "lanes must be in"),
        (33, 64, np.int64, "lanes must be in"),
        (16, 0, np.int64, "depth must be at least 1, got 0"),
        (16, 64, np.float32, "dtype must be"),
    ],
)
def test_what_cannot_be_built(lanes: int, depth: int, dtype: type, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        topk.make_topk(lanes, depth, dtype)
