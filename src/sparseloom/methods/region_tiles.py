"""The cheap way to choose a mask: the best tiles of all heads, covered run by run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float

from sparseloom.regions import TILE_KEYS, HeadRegions, Region, block, owners, runs_of_owners, stripe

RUNS = 3
"""Runs of key tiles that a query tile may have beside what is forced."""


def top_tiles(
    value: Float[np.ndarray, "layers heads q_tiles k_tiles"],
    forced: Sequence[Region],
    length: int,
    budget: int,
    *,
    is_causal: bool,
) -> list[HeadRegions]:
    """The `budget` tiles of highest value, those of `forced` among them, as FULL regions.

    Of each query tile the three runs of most value stay.  Equal runs of query tiles that follow
    each other are one region; the number of regions has no limit, so hardware with a table of
    eight per head cannot run what comes out.

    Returns:
        The regions of all heads, layer by layer.
    """
    must = owners(forced, length, length) >= 0
    may = owners((stripe(0, -(-length // 16) * 16, causal=is_causal),), length, length) >= 0
    flat = value.reshape(-1, *must.shape)
    keep = np.broadcast_to(must, flat.shape).copy()
    order = np.argsort(-np.where(may & ~must, flat, -1.0).reshape(-1), kind="stable")
    free = max(0, budget - int(keep.sum()))
    best = order[: min(free, len(flat) * int((may & ~must).sum()))]
    keep.reshape(-1)[best] = True
    return [
        (*forced, *_regions(_three_runs(chosen & ~must, worth), is_causal))
        for chosen, worth in zip(keep, flat, strict=True)
    ]


def best_tiles(
    value: Float[np.ndarray, "*heads q_tiles k_tiles"],
    must: Bool[np.ndarray, "*heads q_tiles k_tiles"],
    density: float,
) -> Bool[np.ndarray, "*heads q_tiles k_tiles"]:
    """The share `density` of all tiles of all heads that is worth most, `must` among it.

    Plain tiles of any grid, with no regions to cover them.
    """
    keep = must.copy()
    free = int(density * keep.size) - int(keep.sum())
    order = np.argsort(-np.where(keep, -1.0, value).reshape(-1), kind="stable")
    keep.reshape(-1)[order[: max(0, free)]] = True
    return keep


def _three_runs(
    chosen: Bool[np.ndarray, "q_tiles k_tiles"], worth: Float[np.ndarray, "q_tiles k_tiles"]
) -> Bool[np.ndarray, "q_tiles k_tiles"]:
    """The runs of most value of each query tile."""
    found = runs_of_owners(np.where(chosen, 0, -1).astype(np.int16))
    kept = np.zeros_like(chosen)
    for t in range(len(chosen)):
        mine = np.flatnonzero(found.query_tile == t)
        sums = [float(worth[t, found.begin[i] : found.end[i]].sum()) for i in mine]
        for i in mine[np.argsort(sums)[::-1][:RUNS]]:
            kept[t, found.begin[i] : found.end[i]] = True
    return kept


def _regions(chosen: Bool[np.ndarray, "q_tiles k_tiles"], is_causal: bool) -> list[Region]:
    """One region for each run, joined downwards while it stays the same."""
    found = runs_of_owners(np.where(chosen, 0, -1).astype(np.int16))
    regions: list[Region] = []
    open_runs: dict[tuple[int, int], int] = {}  # (begin, end) → its region
    for t, begin, end in zip(found.query_tile, found.begin, found.end, strict=True):
        run = int(begin), int(end)
        known = open_runs.get(run)
        if known is not None and regions[known].r1 == t:
            regions[known] = replace(regions[known], r1=int(t) + 1)
            continue
        open_runs[run] = len(regions)
        width = (run[1] - run[0]) * TILE_KEYS
        regions.append(block(int(t), int(t) + 1, run[0] * TILE_KEYS, width, causal=is_causal))
    return regions
