"""After the greedy choice: merge regions, change how they are computed, drop the weak, refill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

from sparseloom.methods.region_head import OPENING, Head, slimmed
from sparseloom.regions import Mode, Region, region_limit, tile_grid

Fill = Callable[[list[Head], int], float]

MERGE_SHARE = 0.02
"""A merge may add less than this share of a head's tiles."""


def polish(heads: list[Head], budget: int, price: float, rounds: int, fill: Fill) -> None:
    """Improve the choice in place; what a round makes worse is taken back.

    Args:
        heads: with their regions.
        budget: tiles of all of them.
        price: value per tile at which the greedy choice ended.
        rounds: at most so many, fewer where nothing changes.
        fill: chooses further regions until nothing fits.
    """
    for _ in range(rounds):
        before = [head.regions for head in heads]
        value, tiles = _totals(heads)
        for head in heads:
            others = _totals(heads)[1] - head.tiles
            _merge(head, budget - others)
            _swap(head, budget - others, price)
            _drop(head, price)
        price = fill(heads, budget) or price
        after, after_tiles = _totals(heads)
        if after < value or (after == value and after_tiles >= tiles):
            for head, regions in zip(heads, before, strict=True):
                head.take(regions)
            return


def _merge(head: Head, room: int) -> None:
    """Join two regions of a kind where the hull of both adds few tiles: a descriptor comes free."""
    most = MERGE_SHARE * _grid(head)
    changed = True
    while changed:
        changed = False
        for one, other in combinations(_chosen(head), 2):
            if (joined := hull(one, other)) is None:
                continue
            rest = tuple(r for r in head.regions if r not in (one, other))
            regions = slimmed((*rest, joined), head.length)
            value, tiles = head.score(regions)
            if tiles - head.tiles < most and tiles <= room and value >= head.value:
                head.take(regions)
                changed = True
                break


def _swap(head: Head, room: int, price: float) -> None:
    """Compute a region in another way where that gains more than its cost would elsewhere."""
    for region in _chosen(head):
        for other in _other_modes(region) if head.offered.coarse.any() else ():
            if region not in head.regions:
                break
            regions = head.without(region, other)
            if len(regions) > region_limit(regions):
                continue
            value, tiles = head.score(regions)
            if tiles <= room and value - head.value > price * (tiles - head.tiles):
                head.take(regions)


def _drop(head: Head, price: float) -> None:
    """Give up regions whose tiles are worth more elsewhere."""
    for region in _chosen(head):
        regions = head.without(region)
        if len(regions) > region_limit(regions):
            continue
        value, tiles = head.score(regions)
        if tiles > head.tiles:  # a finer coarse region beneath takes its place
            continue
        touched = OPENING * min(region.r1 - region.r0, tile_grid(head.length, head.length)[0])
        if head.value - value < price * (head.tiles - tiles + touched):
            head.take(regions)


def hull(one: Region, other: Region) -> Region | None:
    """The smallest region of their kind that covers both, or None where their kinds differ."""
    if _kind(one) != _kind(other):
        return None
    slope = one.slope
    starts = [region.c0 - slope * region.r0 for region in (one, other)]  # at query tile 0
    ends = [start + region.width for start, region in zip(starts, (one, other), strict=True)]
    r0, r1 = min(one.r0, other.r0), max(one.r1, other.r1)
    c0 = min(starts)
    return replace(one, r0=r0, r1=r1, c0=c0 + slope * r0, width=max(ends) - c0)


def _kind(region: Region) -> tuple[object, ...]:
    return region.mode, region.log2s, region.slope, region.causal, region.pattern


def _other_modes(region: Region) -> Iterator[Region]:
    for log2s in range(4):
        if log2s != region.log2s:
            yield replace(region, mode=Mode.COARSE if log2s else Mode.FULL, log2s=log2s)


def _chosen(head: Head) -> list[Region]:
    """Regions that are not forced."""
    return [region for region in head.regions if region not in head.forced]


def _totals(heads: list[Head]) -> tuple[float, int]:
    return sum(head.value for head in heads), sum(head.tiles for head in heads)


def _grid(head: Head) -> int:
    q_tiles, k_tiles = tile_grid(head.length, head.length)
    return q_tiles * k_tiles
