"""One head of a region search: what its regions are worth, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from sparseloom.methods.region_candidates import Candidates
from sparseloom.regions import Mode, Region, computed_tiles, owners, region_limit

OPENING = 1 / 16
"""Tiles that a region costs for each query tile it touches: 4 of the 64 cycles of a tile.  It
steers the choice and is not part of the density."""


class Move(NamedTuple):
    """A change of a head's regions: what they then are, what it gains and costs in tiles."""

    ratio: float
    gain: float
    cost: int
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
        """Value and tiles of work of a list of regions."""
        segments = self._segments(regions)
        value = sum(float(self.worth[k][segments == k].sum()) for k in range(len(self.worth)))
        return value, computed_tiles(regions, self.length, self.length)

    def best_move(self, room: int) -> Move | None:
        """The change with the most gain per cost that fits into `room` tiles, or None.

        A region is added; where the head has as many as it may, one is given up for another.
        """
        if best := self._best_addition(self.regions, self.value, self.tiles, room):
            return best
        if len(self.regions) < region_limit(self.regions):
            return None
        moves: list[Move] = []
        for i, region in enumerate(self.regions):
            if region in self.forced:
                continue
            rest = self.regions[:i] + self.regions[i + 1 :]
            if move := self._best_addition(rest, self.value, self.tiles, room, tries=2):
                moves.append(move)
        return max(moves, key=lambda move: move.ratio, default=None)

    def best_single(self, room: int) -> Move | None:
        """The addition with the most gain that fits into `room` tiles, or None."""
        gains, costs = self._margins(self._segments(self.regions))
        gains[costs > room] = -1.0
        c = int(gains.argmax())
        if gains[c] <= 0:
            return None
        ratio = gains[c] / max(costs[c], OPENING)
        chosen = self.slimmed((*self.regions, self.offered.regions[c]))
        return Move(float(ratio), float(gains[c]), int(costs[c]), chosen)

    def slimmed(self, regions: Sequence[Region]) -> tuple[Region, ...]:
        """The regions without those whose tiles the others compute as well."""
        kept = list(regions)
        wanted = self._segments(kept)
        for region in tuple(kept):
            rest = [other for other in kept if other is not region]
            if rest and np.array_equal(self._segments(rest), wanted):
                kept = rest
        return tuple(kept)

    def _best_addition(
        self, regions: tuple[Region, ...], value: float, tiles: int, room: int, tries: int = 8
    ) -> Move | None:
        """The best candidate on top of `regions`, against a state of this value and cost."""
        gains, costs = self._margins(self._segments(regions))
        base_value, base_tiles = (
            (value, tiles) if regions is self.regions else self.score(regions)
        )
        gains = gains + base_value - value
        costs = costs + base_tiles - tiles
        ratios = gains / (np.maximum(costs, 0.0) + OPENING * self.offered.touched)
        ratios[(gains <= 1e-12 * max(value, 1e-30)) | (costs > room)] = -1.0
        for c in np.argsort(-ratios)[:tries]:
            if ratios[c] <= 0:
                return None
            chosen = self.slimmed((*regions, self.offered.regions[c]))
            if len(chosen) <= region_limit(chosen):
                return Move(float(ratios[c]), float(gains[c]), int(costs[c]), chosen)
        return None

    def _margins(
        self, segments: Int64[np.ndarray, "q_tiles k_tiles"]
    ) -> tuple[Float[np.ndarray, " candidates"], Float[np.ndarray, " candidates"]]:
        """Gain and cost in tiles of every candidate on top of a state."""
        offered = self.offered
        full, free = segments == 0, segments < 0
        now = np.choose(segments + 1, [np.zeros_like(self.worth[0]), *self.worth])
        eighths = np.choose(segments + 1, [0, 0, 4, 2, 1])  # of coarse tiles
        # Products with the candidates' tiles, query tile by query tile.
        columns = [~full, eighths, (self.worth[0] - now) * ~full]
        columns += [self.worth[k] * free for k in (1, 2, 3)] + [free]
        sums = offered.tiles @ np.stack(columns, -1).astype(np.float32)  # (Qt, C, 7)
        packed = eighths.sum(1)[:, None]  # (Qt, 1)
        coarse = offered.coarse
        new_full, taken, fresh = sums[..., 0], sums[..., 1], sums[..., 6]
        added = np.choose(coarse, [0, 4, 2, 1]) * fresh
        after = np.where(coarse == 0, packed - taken, packed + added)
        cost = np.ceil(after / 8) - np.ceil(packed / 8) + np.where(coarse == 0, new_full, 0)
        by_kind = sums.sum(0)  # (C, 7)
        gain = by_kind[np.arange(len(coarse)), 2 + coarse]
        return gain.astype(np.float64), cost.sum(0)

    def _segments(self, regions: Sequence[Region]) -> Int64[np.ndarray, "q_tiles k_tiles"]:
        """Of each tile log2 of the segment that it is computed with; -1 where it is not."""
        kinds = np.array([region.log2s for region in regions] + [-1])
        return kinds[owners(regions, self.length, self.length)]


def full_rows(regions: Sequence[Region], length: int) -> Bool[np.ndarray, " q_tiles"]:
    """Which query tiles have a key tile that is computed in full."""
    full = np.array([region.mode is Mode.FULL for region in regions] + [False])
    return full[owners(regions, length, length)].any(1)
