"""How many tokens and heads cascade pruning leaves in each layer."""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import numpy as np
from jaxtyping import Float, Int64

LARGEST_END = 0.95
"""Most that the last layer may lose."""

TOKEN_FRONT, HEAD_FRONT = 0.15, 0.30
"""Layers at the front that lose no tokens and no heads (SpAtten, HPCA 2021, §V-A)."""


def ratio_schedule(
    layers: int,
    keep: float,
    front: float = TOKEN_FRONT,
    *,
    start_ratio: float | None = None,
    largest_ratio: float = LARGEST_END,
) -> Float[np.ndarray, "layers"]:
    """Kept fraction of the original length in each layer, by SpAtten's rule (§V-A).

    The first ⌈front · layers⌉ layers keep everything. In the others the removed fraction goes
    linearly from r_start to r_end with r_start + r_end = 2 · r_avg, where r_avg makes the mean of
    the kept fraction over all layers equal to `keep`. That the ratio is cumulative, and that the
    mean is over all layers, is read off the authors' traces; r_start is not published.

    Args:
        layers: of the model.
        keep: mean kept fraction over all layers, in (0, 1].
        front: fraction of the layers at the front that is left alone, in [0, 1).
        start_ratio: r_start; default half of r_avg, or more where r_end would pass the limit.
        largest_ratio: limit of r_end.

    Raises:
        ValueError: an argument out of range, or a `keep` that the limits cannot reach.
    """
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if not 0 <= front < 1:
        raise ValueError(f"front must be in [0, 1), got {front}")
    whole = front_layers(layers, front)
    pruned = layers - whole
    fractions = np.ones(layers)
    if keep == 1:
        return fractions
    if pruned < 1:
        raise ValueError(f"keep must be 1 where no layer prunes, got {keep}")
    mean = (1 - keep) * layers / pruned
    if mean > largest_ratio:
        least = 1 - largest_ratio * pruned / layers
        raise ValueError(f"keep must be at least {least:.3g} with {pruned} layers, got {keep}")
    first = max(mean / 2, 2 * mean - largest_ratio) if start_ratio is None else start_ratio
    last = 2 * mean - first
    if pruned == 1:
        first = last = mean
    if not 0 <= first <= last + 1e-9 <= largest_ratio + 2e-9:  # as closely as sums are exact
        raise ValueError(
            f"start_ratio must be in [{max(0.0, 2 * mean - largest_ratio):.3g}, {mean:.3g}], "
            f"got {start_ratio}"
        )
    fractions[whole:] -= np.linspace(first, last, pruned)
    return fractions


def kept_fractions(
    name: str,
    keep: float | tuple[float, ...] | None,
    layers: int,
    front: float,
    *,
    start_ratio: float | None = None,
) -> Float[np.ndarray, "layers"]:
    """Kept fraction of each layer: all of them, listed, or from a mean by `ratio_schedule`.

    Args:
        name: of the setting, for errors.
        keep: None = all; one fraction per layer, never rising; or the mean over layers.
        layers, front, start_ratio: as in `ratio_schedule`.

    Raises:
        ValueError: fractions that do not fit the layers, are no fractions, or rise.
    """
    if keep is None:
        return np.ones(layers)
    if not isinstance(keep, tuple):
        return ratio_schedule(layers, keep, front, start_ratio=start_ratio)
    if len(keep) != layers:
        raise ValueError(f"{name} must have one share for each of {layers} layers, got {len(keep)}")
    check_fractions(name, keep)
    return np.array(keep, np.float64)


def check_fractions(name: str, keep: float | tuple[float, ...] | None) -> None:
    """Raise a ValueError unless `keep` is None, a fraction, or fractions that never rise."""
    shares = keep if isinstance(keep, tuple) else () if keep is None else (keep,)
    if isinstance(keep, tuple) and not keep:
        raise ValueError(f"{name} must name at least one share, got ()")
    if any(not 0 < share <= 1 for share in shares):
        raise ValueError(f"{name} must be in (0, 1], got {keep}")
    if any(later > earlier for earlier, later in pairwise(shares)):
        raise ValueError(f"{name} must not rise from layer to layer, got {keep}")


def front_layers(layers: int, front: float) -> int:
    """⌈front · layers⌉: the layers that the rule leaves alone."""
    return ceil(front * layers - 1e-9)


def kept_counts(fractions: Float[np.ndarray, "layers"], total: int) -> Int64[np.ndarray, "layers"]:
    """⌊fraction · total⌋ per layer, as in the authors' traces, and at least 1."""
    # 0.9 · 10 must not become 8 because of the last bit.
    counts = np.floor(np.asarray(fractions) * total + 1e-9)
    return np.maximum(counts, 1).astype(np.int64)
