"""Mask selection: regions of all layers and heads under one budget, from calibration statistics.

After Dai et al. (DAC 2023), whose abstract names static masks of dense regions; how they are found
is ours.  Covered value is monotone and submodular up to shared costs, so regions are chosen by
lazy greedy gain per cost over all heads at once.  Heads get unequal shares of the one budget.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from sparseloom.methods.region_candidates import allowed_tiles, candidates, forced_regions
from sparseloom.methods.region_head import Head, Move, full_rows
from sparseloom.methods.region_polish import polish
from sparseloom.methods.region_tiles import top_tiles
from sparseloom.methods.tile_statistics import TileStatistics
from sparseloom.regions import HeadRegions, check_rows, computed_tiles, owners

By = Literal["saliency", "mass"]
Budget = Literal["global", "head"]
Cover = Literal["regions", "tiles"]
FORCE = ("diagonal", "row", "column")


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How masks are chosen.

    Attributes:
        density: tiles of work over the allowed tiles of all layers and heads.
        by: what tiles are valued by: `"saliency"` (with `mass_share` of mass) or `"mass"`.
        mass_share: weight of mass beside saliency.
        coarse: whether regions may be coarse.
        budget: one `"global"` budget, or the same for every `"head"`.
        force: what every head keeps; the diagonal is always among it.
        cover: descriptors found by the greedy search (`"regions"`), or the cheap fallback that
            takes the best `"tiles"` and covers them run by run, with no limit on their number.
        polishing: rounds of merging, swapping and dropping afterwards.
    """

    density: float = 0.4
    by: By = "saliency"
    mass_share: float = 0.2
    coarse: bool = True
    budget: Budget = "global"
    force: tuple[str, ...] = FORCE
    cover: Cover = "regions"
    polishing: int = 2

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if not 0.0 <= self.mass_share <= 1.0:
            raise ValueError(f"mass_share must be in [0, 1], got {self.mass_share}")
        for name, kind in {"by": By, "budget": Budget, "cover": Cover}.items():
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                words = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} must be {words}, got {value!r}")
        if "diagonal" not in self.force or not set(self.force) <= set(FORCE):
            raise ValueError(
                f"force must hold 'diagonal' and may hold 'row' and 'column', got {self.force!r}"
            )


@dataclass(frozen=True, slots=True)
class Found:
    """Regions by layer and head, and what the search knows of them.

    Attributes:
        regions: of each layer, of each of its heads.
        tiles, budget: of work over all heads, and what was allowed.
        value: share of the value of all tiles that they cover.
    """

    regions: tuple[tuple[HeadRegions, ...], ...]
    tiles: int
    budget: int
    value: float


def tile_values(
    statistics: TileStatistics, settings: SearchSettings
) -> Float[np.ndarray, "layers heads q_tiles k_tiles"]:
    """What each tile is worth; all tiles of all heads add up to 1.

    Selection by mass alone gives every row the same weight and drops rows that the answer hangs
    on, such as a [CLS]'s.

    Raises:
        ValueError: nothing was calibrated.
    """
    if not statistics.mass.any():
        raise ValueError("statistics must hold at least one calibration input, got none")
    mass = statistics.mass / statistics.mass.sum()
    total = statistics.saliency.sum()
    if settings.by == "mass" or total == 0:
        return mass
    share = settings.mass_share
    return (1.0 - share) * statistics.saliency / total + share * mass


def least_density(settings: SearchSettings, length: int, *, is_causal: bool) -> float:
    """Share of the allowed tiles that what is forced takes at a length, in tokens."""
    _, covered = _forced(settings, length, is_causal=is_causal)
    return float(covered.sum() / allowed_tiles(length, is_causal=is_causal))


def forced_within(settings: SearchSettings, length: int, *, is_causal: bool) -> HeadRegions:
    """The regions that every head has at a length.

    Raises:
        ValueError: the density does not hold them.
    """
    least = least_density(settings, length, is_causal=is_causal)
    if least > settings.density + 1e-9:  # 0.6 · 660 is 396
        raise ValueError(
            f"density must be at least {least:.4f} at {length} tokens to hold what every head "
            f"keeps ({', '.join(settings.force)}), got {settings.density}; force='diagonal' alone "
            "needs the least, and longer inputs need less"
        )
    return _forced(settings, length, is_causal=is_causal)[0]


def _forced(
    settings: SearchSettings, length: int, *, is_causal: bool
) -> tuple[HeadRegions, Bool[np.ndarray, "q_tiles k_tiles"]]:
    # Under a causal mask the first row holds the first token alone.
    force = tuple(f for f in settings.force if f != "row" or not is_causal)
    return forced_regions(length, is_causal=is_causal, force=force)


def search(statistics: TileStatistics, settings: SearchSettings) -> Found:
    """Regions for every layer and head, such that their work fits the budget.

    Raises:
        ValueError: the budget does not hold what is forced, or there are no statistics.
    """
    value, length = tile_values(statistics, settings), statistics.length
    causal = {"is_causal": statistics.is_causal}
    layers, heads = value.shape[:2]
    forced = forced_within(settings, length, **causal)
    budget = int(settings.density * (layers * heads * allowed_tiles(length, **causal)) + 1e-6)
    if settings.cover == "tiles":
        found = top_tiles(value, forced, length, budget, **causal)
    else:
        offered = candidates(length, coarse=settings.coarse, **causal)
        even = statistics.evenness
        state = [
            Head(length, value[layer, head], even[:, layer, head], offered, forced)
            for layer in range(layers)
            for head in range(heads)
        ]
        share = [budget] if settings.budget == "global" else [budget // len(state)] * len(state)
        pools = [state] if settings.budget == "global" else [[head] for head in state]
        for pool, room in zip(pools, share, strict=True):
            single = _best_single(pool, room)
            price = fill(pool, room)
            if single is not None and single[0] > sum(head.value for head in pool):
                for number, head in enumerate(pool):
                    head.take(single[2].regions if number == single[1] else head.forced)
                price = fill(pool, room) or single[2].ratio
            polish(pool, room, price, settings.polishing, fill)
        found = [head.regions for head in state]
    by_layer = tuple(tuple(found[i * heads : (i + 1) * heads]) for i in range(layers))
    tiles = sum(computed_tiles(regions, length, length) for regions in found)
    kept = _kept_value(by_layer, statistics, value)
    result = Found(by_layer, tiles, budget, kept)
    validate(result, length)
    return result


def fill(heads: list[Head], budget: int) -> float:
    """Choose regions greedily until nothing more fits; returns the last ratio of gain to cost.

    A heap holds the best move of every head.  Moves of a head depend on the others through the
    room that is left alone, so one is found anew where it no longer fits.
    """
    room = budget - sum(head.tiles for head in heads)
    heap: list[tuple[float, int, Move]] = []
    price = 0.0

    def push(number: int) -> None:
        move = heads[number].best_move(room)
        if move is not None:
            heapq.heappush(heap, (-move.ratio, number, move))

    for number in range(len(heads)):
        push(number)
    while heap:
        _, number, move = heapq.heappop(heap)
        head = heads[number]
        left = room + head.tiles - head.score(move.regions)[1]
        if left >= 0:
            price, room = move.ratio, left
            head.take(move.regions)
        push(number)
    return price


def validate(found: Found, length: int) -> None:
    """Refuse masks over budget, query tiles without a FULL key tile, and rows that may be empty.

    Raises:
        ValueError: names what is wrong.
    """
    if found.tiles > found.budget:
        raise ValueError(f"tiles must be at most the budget of {found.budget}, got {found.tiles}")
    for regions in {head for layer in found.regions for head in layer}:
        rows = full_rows(regions, length)
        if not rows.all():
            raise ValueError(f"query tile {int(rows.argmin())} has no FULL key tile")
        check_rows(regions, length, length)


def _best_single(heads: list[Head], budget: int) -> tuple[float, int, Move] | None:
    """Of heads that have what is forced alone: the addition that gains most, whatever it costs.

    Greedy by ratio, and this, are together what bounds such a choice from below.
    """
    room, value = budget - sum(head.tiles for head in heads), sum(head.value for head in heads)
    found: list[tuple[float, int, Move]] = []
    for number, head in enumerate(heads):
        if move := head.best_single(room):
            found.append((value + move.gain, number, move))
    return max(found, key=lambda one: one[0], default=None)


def _kept_value(
    regions: tuple[tuple[HeadRegions, ...], ...],
    statistics: TileStatistics,
    value: Float[np.ndarray, "layers heads q_tiles k_tiles"],
) -> float:
    """Share of the value that regions cover; coarse tiles keep η of theirs."""
    worth = np.concatenate([value[None], statistics.evenness * value])  # by log2 of the segment
    length, total = statistics.length, 0.0
    for layer, heads in enumerate(regions):
        for head, own in enumerate(heads):
            owner = owners(own, length, length)
            for i, region in enumerate(own):
                total += float(worth[region.log2s, layer, head][owner == i].sum())
    return total / float(value.sum())
