"""The paired bootstrap against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from sparseloom.experiments.bootstrap import paired_bootstrap


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
