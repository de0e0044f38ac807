"""Regions that a search may choose from, and which tiles each of them covers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64

from sparseloom.regions import (
    TILE_QUERIES,
    UNIT,
    Mode,
    Region,
    band,
    block,
    owners,
    rows,
    stripe,
)

WIDTHS = (32, 64, 96, 128, 192)
"""Widths of bands near the diagonal."""
STRIPES = (32, 64, 96)
"""Widths of stripes."""
SEGMENTS = (2, 4, 8)
_NEAR = 64  # bands further off than this may be coarse


@dataclass(frozen=True, eq=False)
class Candidates:
    """Regions and the tiles that they cover when nothing else does.

    Attributes:
        regions: the candidates.
        tiles: which tiles each covers, as 0 and 1.
        coarse: of each candidate log2 of its segment; 0 for FULL ones.
        touched: query tiles that each candidate touches.
    """

    regions: tuple[Region, ...]
    tiles: Float[np.ndarray, "candidates tiles"]
    coarse: Int64[np.ndarray, " candidates"]
    touched: Int64[np.ndarray, " candidates"]


@functools.lru_cache(maxsize=8)
def candidates(length: int, *, is_causal: bool, coarse: bool = True) -> Candidates:
    """The candidates for inputs of `length` tokens.

    Bands at offsets -64 … 64 and, of powers of two and their halves between, further off; stripes;
    rows; blocks of grids of 1, 2, 4, 8 and 16 segments.  Far bands and blocks also come coarse.
    """
    found: dict[bytes, tuple[Region, np.ndarray]] = {}
    for region in _regions(length, is_causal, coarse):
        covered = owners((region,), length, length) >= 0
        if covered.any():  # of those that compute the same tiles in the same way, one is enough
            found.setdefault(covered.tobytes() + bytes([region.log2s]), (region, covered))
    kept = tuple(region for region, _ in found.values())
    covers = np.stack([covered for _, covered in found.values()])  # (C, Qt, Kt)
    return Candidates(
        kept,
        covers.reshape(len(kept), -1).astype(np.float32),
        np.array([region.log2s for region in kept]),
        covers.any(2).sum(1),
    )


def forced_regions(
    length: int, *, is_causal: bool, force: Iterable[str]
) -> tuple[tuple[Region, ...], Bool[np.ndarray, "q_tiles k_tiles"]]:
    """Regions that every head has, and the tiles that they cover.

    Args:
        length: tokens.
        is_causal: whether later keys are hidden.
        force: "diagonal" (the tile on it, without which rows could be empty), "row" (the first
            query tile, where a [CLS] is) and "column" (the first key tile).
    """
    made = {
        "diagonal": band(0, 16, causal=is_causal),
        "row": rows(0, 1, length, causal=is_causal),
        "column": stripe(0, 32, causal=is_causal),
    }
    found = tuple(made[name] for name in force)
    return found, owners(found, length, length) >= 0


def allowed_tiles(length: int, *, is_causal: bool) -> int:
    """Tiles of one head in which any pair is allowed: what density is a share of."""
    everything = stripe(0, -(-length // UNIT) * UNIT, causal=is_causal)
    return int((owners((everything,), length, length) >= 0).sum())


def _regions(length: int, is_causal: bool, coarse: bool) -> Iterator[Region]:
    far = _far_offsets(length)
    for offset in (*range(-_NEAR, _NEAR + 1, 16), *far):
        if is_causal and offset > 0:
            continue
        for width in WIDTHS:
            first = offset - (width // 2) // 16 * 16
            yield band(first, width, causal=is_causal)
            if coarse and abs(offset) > _NEAR:
                yield from _coarse(band(first, width, causal=is_causal))
    for width in STRIPES:
        for first in range(0, length, 32):
            yield stripe(first, width, causal=is_causal)
    if not is_causal:
        yield rows(0, 1, length)
    q_tiles = -(-length // TILE_QUERIES)
    for parts in (1, 2, 4, 8, 16):
        yield from _blocks(length, q_tiles, parts, is_causal, coarse)


def _blocks(
    length: int, q_tiles: int, parts: int, is_causal: bool, coarse: bool
) -> Iterator[Region]:
    """All segment × segment blocks of a grid of `parts` segments; the smallest ones FULL only."""
    size = -(-length // parts // 32) * 32
    if parts > 1 and size * (parts - 1) >= length:
        return
    for r0 in range(0, q_tiles, size // TILE_QUERIES):
        r1 = min(r0 + size // TILE_QUERIES, q_tiles)
        for first in range(0, length, size):
            if is_causal and first >= r1 * TILE_QUERIES:
                continue
            made = block(r0, r1, first, size, causal=is_causal)
            yield made
            if coarse and parts < 16:
                yield from _coarse(made)


def _coarse(region: Region) -> Iterator[Region]:
    for log2s in range(1, len(SEGMENTS) + 1):
        yield Region(
            Mode.COARSE, region.r0, region.r1, region.c0, region.width, region.slope, log2s,
            region.causal,
        )  # fmt: skip


def _far_offsets(length: int) -> Sequence[int]:
    """±96, ±128, ±192, ±256, … below the length."""
    sizes = [96]
    while sizes[-1] < length:
        sizes.append(sizes[-1] * 4 // 3 if sizes[-1] % 3 == 0 else sizes[-1] * 3 // 2)
    return [sign * size for size in sizes if size < length for sign in (-1, 1)]
