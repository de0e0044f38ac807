"""The paired bootstrap against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from sparseloom.experiments.bootstrap import paired_bootstrap, paired_bootstrap_of


def test_a_constant_difference_has_no_spread() -> None:
    theirs = np.linspace(1, 2, 20)
    found = paired_bootstrap(theirs + 0.25, theirs)
    assert found.mean == pytest.approx(0.25)
    assert found.upper95 == pytest.approx(0.25)
    assert found.interval95 == pytest.approx((0.25, 0.25))
    assert found.items == 20


def test_the_bound_is_near_the_normal_one() -> None:
    generator = np.random.default_rng(3)
    difference = generator.normal(0.1, 1.0, 400)
    found = paired_bootstrap(difference, np.zeros(400))
    error = difference.std() / 20
    assert found.mean == pytest.approx(difference.mean())
    assert found.upper95 == pytest.approx(difference.mean() + 1.645 * error, abs=0.15 * error)
    assert found.interval95[0] < found.mean < found.upper95 < found.interval95[1]


def test_pairing_removes_what_windows_share() -> None:
    generator = np.random.default_rng(4)
    hard = generator.normal(0, 10, 100)
    found = paired_bootstrap(hard + 0.01, hard)
    assert found.upper95 < 0.011


def test_the_same_seed_gives_the_same_bound() -> None:
    ours, theirs = np.random.default_rng(5).normal(size=(2, 30))
    assert paired_bootstrap(ours, theirs, seed=1) == paired_bootstrap(ours, theirs, seed=1)


@pytest.mark.parametrize(("ours", "theirs"), [(3, 4), (1, 1)])
def test_arrays_that_do_not_pair_are_refused(ours: int, theirs: int) -> None:
    with pytest.raises(ValueError, match="one length"):
        paired_bootstrap(np.zeros(ours), np.zeros(theirs))


def test_of_a_mean_both_forms_agree() -> None:
    ours, theirs, gold = np.random.default_rng(6).normal(size=(3, 200))
    plain = paired_bootstrap(ours, theirs, resamples=2_000)
    metric = paired_bootstrap_of(lambda x, _: float(x.mean()), ours, theirs, gold, resamples=2_000)
    assert metric.mean == pytest.approx(plain.mean)
    assert metric.upper95 == pytest.approx(plain.upper95, abs=0.01)
    assert metric.interval95 == pytest.approx(plain.interval95, abs=0.01)


def test_items_and_gold_are_resampled_together() -> None:
    gold = np.random.default_rng(7).normal(size=100)

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.corrcoef(x, y)[0, 1])

    found = paired_bootstrap_of(correlation, 2 * gold, -gold, gold, resamples=50)
    assert found.mean == pytest.approx(2)
    assert found.interval95 == pytest.approx((2, 2))


def test_negated_is_the_difference_the_other_way_round() -> None:
    ours, theirs = np.random.default_rng(8).normal(size=(2, 30))
    found = paired_bootstrap(ours, theirs).negated
    other = paired_bootstrap(theirs, ours)
    assert (found.mean, found.lower95, found.upper95) == pytest.approx(
        (other.mean, other.lower95, other.upper95)
    )
    assert found.interval95 == pytest.approx(other.interval95)
