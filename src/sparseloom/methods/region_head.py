"""One head of a region search: what its regions are worth, and what they cost."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from sparseloom.methods.region_candidates import Candidates
from sparseloom.regions import Mode, Region, by_priority, owners, region_limit

OPENING = 1 / 16
"""Tiles that a region costs for each query tile it touches: 4 of the 64 cycles of a tile.  It
steers the choice and is not part of the density."""

_TRIES = 12  # best candidates looked at, where some need more regions or tiles than there are
_EIGHTHS = np.array([8, 4, 2, 1, 0])  # of a tile's work, by log2 of its segment; last: not computed


class Move(NamedTuple):
    """A change of a head's regions: gain over cost, the gain, and what the regions then are."""

    ratio: float
    gain: float
    regions: tuple[Region, ...]


class Head:
    """Values of the tiles of one head, and the regions chosen so far.

    Args:
        length: tokens.
        value: of every tile when it is computed in full; (query tiles, key tiles).
        even: η for segments of 2, 4 and 8, the share of the value that a coarse tile keeps.
        offered: what may be chosen.
        forced: regions that stay.
    """

    def __init__(
        self,
        length: int,
        value: Float[np.ndarray, "q_tiles k_tiles"],
        even: Float[np.ndarray, "3 q_tiles k_tiles"],
        offered: Candidates,
        forced: Sequence[Region],
    ) -> None:
        self.length, self.offered = length, offered
        self.worth = np.concatenate([value[None], even * value])  # by log2 of the segment
        self.forced = tuple(forced)
        self.regions: tuple[Region, ...] = ()
        self.value, self.tiles = 0.0, 0
        self.take(self.forced)

    def take(self, regions: Sequence[Region]) -> None:
        """Have these regions from now on."""
        self.regions = tuple(regions)
        self.value, self.tiles = self.score(self.regions)

    def score(self, regions: Sequence[Region]) -> tuple[float, int]:
        """Value, and tiles of work as `regions.computed_tiles` counts them."""
        return self._score(segments_of(tuple(regions), self.length))

    def best_move(self, room: int) -> Move | None:
        """The change with the most gain per cost that fits into `room` tiles, or None.

        A region is added; where the head has as many as it may, one is given up for another; where
        neither helps, one grows by a tile.
        """
        if best := self._best([self.regions], room):
            return best
        if len(self.regions) < region_limit(self.regions):
            return self._growth(room)
        rests = [self.without(region) for region in self.regions if region not in self.forced]
        return (self._best(rests, room) if rests else None) or self._growth(room)

    def _growth(self, room: int) -> Move | None:
        """The best way to let one region grow by a key tile on a side or by a query tile."""
        found: list[Move] = []
        for region in self.regions:
            for larger in _larger(region):
                regions = self.without(region, larger)
                value, tiles = self.score(regions)
                gained, cost = value - self.value, tiles - self.tiles
                fits = 0 < cost <= room and len(regions) <= region_limit(regions)
                if fits and gained > 1e-6 * self.value:
                    found.append(Move(gained / cost, gained, regions))
        return max(found, key=lambda move: move.ratio, default=None)

    def without(self, region: Region, instead: Region | None = None) -> tuple[Region, ...]:
        """The regions with another in one's place, or none; what is forced stays covered."""
        rest = [other for other in self.regions if other is not region]
        rest += [] if instead is None else [instead]
        missing = [other for other in self.forced if other not in rest]
        return slimmed((*missing, *rest), self.length)

    def best_single(self, room: int) -> Move | None:
        """The addition with the most gain, whatever its ratio, that fits into `room` tiles."""
        gains, costs = (part[0] for part in self._margins([segments_of(self.regions, self.length)]))
        gains[costs + self.offered.touched > room] = -1.0  # room enough however keys are packed
        c = int(gains.argmax())
        if gains[c] <= 0:
            return None
        ratio = float(gains[c] / max(costs[c], OPENING))
        return Move(ratio, float(gains[c]), self._with(self.regions, c))

    def _best(self, states: Sequence[tuple[Region, ...]], room: int) -> Move | None:
        """The best candidate on top of any of these lists, held against what the head has."""
        segments = [segments_of(state, self.length) for state in states]
        scores = np.array([self._score(one) for one in segments])  # (states, 2)
        gains, costs = self._margins(segments)  # (states, C)
        gains += scores[:, :1] - self.value
        costs += scores[:, 1:] - self.tiles
        ratios = gains / (np.maximum(costs, 0.0) + OPENING * self.offered.touched)
        ratios[(gains <= 1e-9 * self.value) | (costs > room)] = -1.0
        for place in np.argsort(-ratios, axis=None)[:_TRIES]:
            state, c = np.unravel_index(place, ratios.shape)
            if ratios[state, c] <= 0:
                return None
            chosen = self._with(states[state], int(c))
            after, tiles = self.score(chosen)  # exact, and pooled keys packed
            gained = after - self.value
            fits = tiles - self.tiles <= room and len(chosen) <= region_limit(chosen)
            if fits and gained > 1e-6 * self.value:
                return Move(float(ratios[state, c]), gained, chosen)
        return None

    def _with(self, regions: tuple[Region, ...], c: int) -> tuple[Region, ...]:
        return slimmed((*regions, self.offered.regions[c]), self.length)

    def _score(self, segments: Int64[np.ndarray, "q_tiles k_tiles"]) -> tuple[float, int]:
        value = sum(float(self.worth[k][segments == k].sum()) for k in range(len(self.worth)))
        eighths = _EIGHTHS[segments]  # -1 is the last
        packed = np.where(eighths < 8, eighths, 0).sum(1)
        return value, int((eighths == 8).sum() + (-(-packed // 8)).sum())

    def _margins(
        self, states: Sequence[Int64[np.ndarray, "q_tiles k_tiles"]]
    ) -> tuple[Float[np.ndarray, "states c"], ...]:
        """Of every candidate on top of every state its gain, and its cost in tiles before pooled
        keys are packed into whole ones."""
        offered = self.offered
        columns: list[np.ndarray] = []
        for segments in states:
            free = segments < 0
            now = np.where(free, 0.0, np.take_along_axis(self.worth, segments[None], 0)[0])
            columns += [self.worth[0] - now, 8 - _EIGHTHS[segments]]
            columns += [self.worth[k] * free for k in (1, 2, 3)] + [free]
        wide = np.stack([column.reshape(-1) for column in columns], -1).astype(np.float32)
        sums = (offered.tiles @ wide).reshape(len(offered.coarse), len(states), 6)  # one product
        sums = sums.transpose(1, 0, 2).astype(np.float64)
        coarse, every = offered.coarse, np.arange(len(offered.coarse))
        gain = np.where(coarse == 0, sums[..., 0], sums[:, every, 1 + np.maximum(coarse, 1)])
        cost = np.where(coarse == 0, sums[..., 1] / 8, sums[..., 5] * _EIGHTHS[coarse] / 8)
        return gain, cost


def segments_of(regions: tuple[Region, ...], length: int) -> Int64[np.ndarray, "q_tiles k_tiles"]:
    """Of each tile log2 of the segment that it is computed with (0: in full); -1 where it is not.

    Of FULL and COARSE regions, whose ownership `regions.owners` defines.
    """
    found = np.full(_cover(regions[0], length).shape, -1)
    for i in by_priority(regions):
        cover = _cover(regions[i], length)
        found[cover & (found < 0)] = regions[i].log2s
    return found


def slimmed(regions: tuple[Region, ...], length: int) -> tuple[Region, ...]:
    """The regions without FULL ones that others cover, oldest first, and COARSE ones without a
    tile of their own."""
    covers = [_cover(region, length) for region in regions]
    full = [region.mode is Mode.FULL for region in regions]
    times = np.zeros(covers[0].shape, np.int64)
    for cover, is_full in zip(covers, full, strict=True):
        if is_full:
            times += cover
    taken = times > 0
    kept: list[Region] = []
    for region, cover, is_full in zip(regions, covers, full, strict=True):
        if is_full and times[cover].min() > 1:
            times -= cover
        elif is_full or not taken[cover].all():
            kept.append(region)
            if not is_full:
                taken = taken | cover
    return tuple(kept)


def _larger(region: Region) -> Iterator[Region]:
    """One key tile wider on either side, or one query tile higher or lower."""
    if region.width <= 1021:
        yield replace(region, width=region.width + 2)
        if region.c0 >= 0:
            yield replace(region, c0=region.c0 - 2, width=region.width + 2)
    if region.r0:
        yield replace(region, r0=region.r0 - 1, c0=region.c0 - region.slope)
    if region.r1 < 512:
        yield replace(region, r1=region.r1 + 1)


def full_rows(regions: Sequence[Region], length: int) -> Bool[np.ndarray, " q_tiles"]:
    """Which query tiles have a key tile that is computed in full."""
    full = np.array([region.mode is Mode.FULL for region in regions] + [False])
    return np.any(full[owners(regions, length, length)], axis=1)


@functools.lru_cache(maxsize=16384)
def _cover(region: Region, length: int) -> Bool[np.ndarray, "q_tiles k_tiles"]:
    return owners((region,), length, length) >= 0
