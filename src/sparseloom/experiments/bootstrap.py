"""Paired bootstrap: how sure is a difference of two means, or metrics, over the same items?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of (ours − theirs), or the difference of a metric, with its one-sided 95 % bounds and
    the two-sided interval."""

    mean: float
    lower95: float
    upper95: float
    interval95: tuple[float, float]
    items: int

    @property
    def negated(self) -> PairedDifference:
        """Theirs − ours."""
        low, high = self.interval95
        return PairedDifference(-self.mean, -self.upper95, -self.lower95, (-high, -low), self.items)


def paired_bootstrap(
    ours: Float[np.ndarray, " items"],
    theirs: Float[np.ndarray, " same_items"],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Resample items with replacement and take percentiles of the mean difference.

    Raises ValueError when the arrays differ in length or hold fewer than two items.
    """
    _check(ours, theirs)
    difference = ours - theirs
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, 1_000_000 // len(difference))  # 16 MB at once
    for first in range(0, resamples, step):
        some = means[first : first + step]
        some[:] = difference[
            generator.integers(0, len(difference), (len(some), len(difference)))
        ].mean(1)
    return _percentiles(float(difference.mean()), means, len(difference))


def paired_bootstrap_of(
    metric: Callable[[Float[np.ndarray, " items"], Float[np.ndarray, " items"]], float],
    ours: Float[np.ndarray, " items"],
    theirs: Float[np.ndarray, " same_items"],
    gold: Float[np.ndarray, " same_items"],
    *,
    resamples: int = 1_000,
    seed: int = 0,
) -> PairedDifference:
    """As `paired_bootstrap`, of a metric that is no mean: it is computed anew on every resample.

    Args:
        metric: (values, gold) of some items → the metric, as `Task.value_of`.
        ours, theirs, gold: per item.
    """
    _check(ours, theirs)
    generator = np.random.default_rng(seed)
    found = np.empty(resamples)
    for i in range(resamples):
        some = generator.integers(0, len(ours), len(ours))
        found[i] = metric(ours[some], gold[some]) - metric(theirs[some], gold[some])
    return _percentiles(metric(ours, gold) - metric(theirs, gold), found, len(ours))


def _check(ours: Float[np.ndarray, "..."], theirs: Float[np.ndarray, "..."]) -> None:
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise ValueError(
            "ours and theirs must be two arrays of one length ≥ 2, "
            f"got shapes {ours.shape} and {theirs.shape}"
        )


def _percentiles(
    mean: float, found: Float[np.ndarray, " resamples"], items: int
) -> PairedDifference:
    low, high = np.percentile(found, [2.5, 97.5])
    return PairedDifference(
        mean=mean,
        lower95=float(np.percentile(found, 5)),
        upper95=float(np.percentile(found, 95)),
        interval95=(float(low), float(high)),
        items=items,
    )
