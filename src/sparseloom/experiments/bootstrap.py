"""Paired bootstrap: how sure is a difference of two means over the same items?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of (ours − theirs) with a one-sided 95 % upper bound and the two-sided interval."""

    mean: float
    upper95: float
    interval95: tuple[float, float]
    items: int


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
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise ValueError(
            "ours and theirs must be two arrays of one length ≥ 2, "
            f"got shapes {ours.shape} and {theirs.shape}"
        )
    difference = ours - theirs
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, 1_000_000 // len(difference))  # 16 MB at once
    for first in range(0, resamples, step):
        some = means[first : first + step]
        some[:] = difference[
            generator.integers(0, len(difference), (len(some), len(difference)))
        ].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return PairedDifference(
        mean=float(difference.mean()),
        upper95=float(np.percentile(means, 95)),
        interval95=(float(low), float(high)),
        items=len(difference),
    )
