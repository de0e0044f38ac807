"""Static masks as regions: bands, stripes, rows and blocks, compiled to tiles and runs.

After Dai et al., "Efficient Transformer Inference with Statically Structured Sparse Attention"
(DAC 2023), whose abstract fixes that masks are static, that they partition each attention matrix
into dense regions, and that work outside the regions is skipped and inside them reduced. The
region design (tile grid, shapes, modes, words, ownership) is ours.

The grid has tiles of 16 queries × 32 keys. A head's mask is the union of a few sheared rectangles
(`Region`), in order of priority. Where rectangles overlap, each tile belongs to the first that
claims it, COARSE regions after all others, so that no key counts twice in a row's softmax.

Static masks index positions: keys from `n_valid` on are padding, which clips the regions, and never
a region's own business. Plain numpy, shared by kernels and accelerators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int16, Int64

from sparseloom._region_shapes import band, block, dilated, rows, stripe
from sparseloom._region_words import (
    MAX_REGIONS,
    MAX_REGIONS_COARSE,
    PATTERN_KEYS,
    TILE_KEYS,
    TILE_QUERIES,
    UNIT,
    HeadRegions,
    Mode,
    Region,
    by_priority,
    decode_heads,
    encode_heads,
    region_limit,
)

__all__ = [
    "MAX_REGIONS",
    "MAX_REGIONS_COARSE",
    "PATTERN_KEYS",
    "TILE_KEYS",
    "TILE_QUERIES",
    "UNIT",
    "HeadRegions",
    "Mode",
    "Region",
    "Runs",
    "band",
    "block",
    "by_priority",
    "check_rows",
    "coarse_segments",
    "computed_tiles",
    "decode_heads",
    "density",
    "dilated",
    "encode_heads",
    "exact_pairs",
    "owners",
    "region_limit",
    "rows",
    "runs",
    "runs_of_owners",
    "stripe",
    "tile_cost",
    "tile_grid",
]


class Runs(NamedTuple):
    """Maximal runs of adjacent key tiles, by query tile and then by key tile.

    Arrays of one entry a run: its query tile, first key tile, end of its key tiles, and the region
    that owns it (its place in the head's list).
    """

    query_tile: Int64[np.ndarray, " runs"]
    begin: Int64[np.ndarray, " runs"]
    end: Int64[np.ndarray, " runs"]
    region: Int64[np.ndarray, " runs"]


def tile_grid(q_len: int, kv_len: int) -> tuple[int, int]:
    """Query tiles and key tiles of an attention.

    Raises:
        ValueError: a length below 1.
    """
    for name, value in (("q_len", q_len), ("kv_len", kv_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return -(-q_len // TILE_QUERIES), -(-kv_len // TILE_KEYS)


def owners(
    regions: Sequence[Region], q_len: int, kv_len: int, n_valid: int | None = None
) -> Int16[np.ndarray, "query_tiles key_tiles"]:
    """Which region owns each tile: its place in `regions`, or −1 where no work is done.

    Regions claim in their order, COARSE ones after all others; who comes first owns.

    Args:
        regions: of one head.
        q_len: queries. With `kv_len` of another size causality is aligned to the bottom right.
        kv_len: keys.
        n_valid: keys before the padding, in [0, kv_len]; all by default.

    Raises:
        ValueError: a length is out of range.
    """
    query_tiles, key_tiles = tile_grid(q_len, kv_len)
    n_valid = _valid(n_valid, kv_len)
    t, u = np.arange(query_tiles), np.arange(-(-n_valid // TILE_KEYS))
    first_query = t * TILE_QUERIES + kv_len - q_len
    last_query = np.minimum(first_query + TILE_QUERIES, kv_len) - 1
    owner = np.full((query_tiles, key_tiles), -1, np.int16)
    free = owner[:, : len(u)]
    for i in by_priority(regions):
        region = regions[i]
        start = UNIT * (region.c0 + region.slope * (t - region.r0))
        begin, end = start // TILE_KEYS, -(-(start + UNIT * region.width) // TILE_KEYS)
        if region.causal and region.mode is Mode.COARSE:
            end = np.minimum(end, (first_query + 1) // TILE_KEYS)
        elif region.causal:
            end = np.minimum(end, last_query // TILE_KEYS + 1)
        inside = ((t >= region.r0) & (t < region.r1))[:, None]
        claimed = inside & (u >= begin[:, None]) & (u < end[:, None])
        free[claimed & (free < 0)] = i
    return owner


def runs_of_owners(owner: Int16[np.ndarray, "query_tiles key_tiles"]) -> Runs:
    """Maximal runs of tiles with one owner; −1 ends a run and is none.

    With 0 where a tile is kept these are the runs of any mask of tiles.
    """
    edge = np.full((owner.shape[0], 1), -1, owner.dtype)
    before, after = np.hstack([edge, owner[:, :-1]]), np.hstack([owner[:, 1:], edge])
    query_tile, begin = np.nonzero((owner >= 0) & (owner != before))
    end = np.nonzero((owner >= 0) & (owner != after))[1] + 1
    return Runs(query_tile, begin, end, owner[query_tile, begin].astype(np.int64))


def runs(
    regions: Sequence[Region],
    q_len: int,
    kv_len: int,
    n_valid: int | None = None,
    *,
    merge: bool = False,
) -> Runs:
    """What the regions compute, run by run; arguments and errors as in `owners`.

    Args:
        merge: join adjacent runs of regions that compute alike (mode, segment, pattern and shift);
            the joined run names the first of these regions in the list.
    """
    owner = owners(regions, q_len, kv_len, n_valid)
    if merge and regions:
        kinds = [(r.mode, r.log2s, r.pattern, r.low_precision_shift) for r in regions]
        first_alike = np.array([kinds.index(kind) for kind in kinds] + [-1], np.int16)
        owner = first_alike[owner]
    return runs_of_owners(owner)


# ------------------------------------------------------------------------------- costs


def tile_cost(region: Region) -> float:
    """Work of one tile that the region owns, in tiles: 1, 1/s if coarse, N/8 if strided.

    LOW_PRECISION costs 1: an array of 8-bit multipliers takes the same time for 4-bit codes. Those
    that pack two 4-bit products halve it themselves.
    """
    return _eighths(region) / 8


def computed_tiles(
    regions: Sequence[Region], q_len: int, kv_len: int, n_valid: int | None = None
) -> int:
    """Tiles of work: whole tiles, and per query tile ⌈pooled or strided keys / 32⌉ packed ones.

    Arguments and errors as in `owners`.
    """
    owner = owners(regions, q_len, kv_len, n_valid)
    eighths = np.array([_eighths(region) for region in regions] + [0])[owner]
    whole = (eighths == 8).sum()
    packed = np.where(eighths < 8, eighths, 0).sum(1)
    return int(whole + (-(-packed // 8)).sum())


def density(regions: Sequence[Region], q_len: int, kv_len: int) -> float:
    """`computed_tiles` over all tiles: the share of the dense work, tile alignment included."""
    return computed_tiles(regions, q_len, kv_len) / np.prod(tile_grid(q_len, kv_len)).item()


def _eighths(region: Region) -> int:
    if region.mode is Mode.STRIDED:
        return region.pattern.bit_count()
    return 8 >> region.log2s


# ------------------------------------------------------------------- pairs and segments


def exact_pairs(
    regions: Sequence[Region], q_len: int, kv_len: int, n_valid: int | None = None
) -> Bool[np.ndarray, "q_len kv_len"]:
    """Pairs with a score of their own: those of FULL, STRIDED and LOW_PRECISION regions.

    Arguments and errors as in `owners`.
    """
    owner = owners(regions, q_len, kv_len, n_valid)
    met = _pairs(regions, owner, _positions(q_len, kv_len), kv_len)
    met[:, _valid(n_valid, kv_len) :] = False
    return met


def coarse_segments(
    regions: Sequence[Region], q_len: int, kv_len: int, n_valid: int | None = None
) -> dict[int, Bool[np.ndarray, "query_tiles segments"]]:
    """Which segments of s keys the queries of each tile meet as means, for each s in use.

    Segment J of size s stands for the valid keys among s·J … s·J + s − 1. Arguments and errors as
    in `owners`.
    """
    owner = owners(regions, q_len, kv_len, n_valid)
    found: dict[int, Bool[np.ndarray, "query_tiles segments"]] = {}
    for size in (2, 4, 8):
        mine = [r.mode is Mode.COARSE and r.segment == size for r in regions] + [False]
        tiles = np.array(mine)[owner]
        if tiles.any():
            segments = -(-_valid(n_valid, kv_len) // size)
            met = np.zeros((len(owner), -(-kv_len // size)), np.bool_)
            met[:, :segments] = tiles.repeat(TILE_KEYS // size, 1)[:, :segments]
            found[size] = met
    return found


def check_rows(
    regions: Sequence[Region], q_len: int, kv_len: int, *, padding_rows: bool = False
) -> None:
    """Refuse regions that leave a query without keys for some number of valid keys.

    Query i stands at position i + kv_len − q_len. It must meet a valid key for every `n_valid`
    that it belongs to (position < n_valid); with `padding_rows`, for every n_valid from 1 on.

    Raises:
        ValueError: names the first such query and the n_valid.
    """
    owner = owners(regions, q_len, kv_len)
    coarse = np.array([r.mode is Mode.COARSE for r in regions] + [False])[owner]
    for t in range(len(owner)):
        position = _positions(q_len, kv_len)[t * TILE_QUERIES : (t + 1) * TILE_QUERIES]
        met = _pairs(regions, owner[t : t + 1], position, kv_len)
        met |= coarse[t].repeat(TILE_KEYS)[:kv_len]
        lowest = np.where(met.any(1), met.argmax(1), kv_len)
        needed = np.zeros_like(lowest) if padding_rows else np.maximum(position, 0)
        bad = np.flatnonzero(lowest > needed)
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                f"regions must leave a key to every query, but query {t * TILE_QUERIES + row} has "
                f"none when {int(needed[row]) + 1} of {kv_len} keys are valid"
            )


def _positions(q_len: int, kv_len: int) -> Int64[np.ndarray, " q_len"]:
    """Where the queries stand among the keys: the last one at the last key."""
    return np.arange(kv_len - q_len, kv_len)


def _pairs(
    regions: Sequence[Region],
    owner: Int16[np.ndarray, "query_tiles key_tiles"],
    position: Int64[np.ndarray, " queries"],
    kv_len: int,
) -> Bool[np.ndarray, "queries kv_len"]:
    """Pairs with a score of their own among the queries of some tiles, padding not left out."""
    keys = np.arange(kv_len)
    met = np.zeros((len(position), kv_len), np.bool_)
    for i, region in enumerate(regions):
        if region.mode is Mode.COARSE:
            continue
        mine = (owner == i).repeat(TILE_QUERIES, 0).repeat(TILE_KEYS, 1)
        mine = mine[: len(position), :kv_len]
        if region.mode is Mode.STRIDED:
            mine = mine & (region.pattern >> keys % PATTERN_KEYS & 1).astype(np.bool_)
        if region.causal:
            mine = mine & (keys <= position[:, None])
        met |= mine
    return met


def _valid(n_valid: int | None, kv_len: int) -> int:
    if n_valid is None:
        return kv_len
    if not 0 <= n_valid <= kv_len:
        raise ValueError(f"n_valid must be in [0, {kv_len}], got {n_valid}")
    return n_valid
