"""The region sequencer as hardware: descriptors scanned one by one against a bitmap of claims.

It must emit the runs that the compiler (`sparseloom.regions`) lists; a test compares them. The
compiler works on a whole grid at once, the sequencer on one query tile with what it has: words of
64 bits, one bit for every key tile, no sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sparseloom.hardware.static_dense.runs import HeadRuns, WorkClass, runs_of_map
from sparseloom.regions import TILE_KEYS, TILE_QUERIES, UNIT, HeadRegions, Mode, Region


def scan(
    regions: Sequence[Region], query_tile: int, q_len: int, kv_len: int, n_valid: int
) -> list[tuple[int, Region]]:
    """Bitmaps of the key tiles that a query tile works on, by region, in the order of the claims.

    Args:
        regions: in order of priority, coarse ones last, as the words of a head lie in memory.
        query_tile: of 16 queries.
        q_len, kv_len, n_valid: sizes; keys from `n_valid` on are padding.
    """
    claimed, found = 0, list[tuple[int, Region]]()
    newest = (query_tile * TILE_QUERIES) + kv_len - q_len
    for region in regions:
        if not region.r0 <= query_tile < region.r1:
            continue
        start = UNIT * (region.c0 + region.slope * (query_tile - region.r0))
        stop = min(start + UNIT * region.width, n_valid)
        if region.causal:
            # A mean must not hold later keys: coarse tiles end before the tile's first query.
            coarse = region.mode is Mode.COARSE
            last = min(newest + TILE_QUERIES, kv_len)
            stop = min(stop, (newest + 1) // TILE_KEYS * TILE_KEYS if coarse else last)
        first, past = max(start, 0) // TILE_KEYS, -(-max(stop, 0) // TILE_KEYS)
        mine = ((1 << past) - 1) & ~((1 << first) - 1) if past > first else 0
        new = mine & ~claimed
        claimed |= new
        if new:
            found.append((new, region))
    return found


def sequence(regions: Sequence[Region], q_len: int, kv_len: int, n_valid: int) -> HeadRuns:
    """All runs of a head, as the sequencer emits them tile after tile.

    Regions that compute alike share a bitmap, so that runs which touch are one.
    """
    return _sequence(tuple(regions), q_len, kv_len, n_valid)


# Heads repeat from sequence to sequence and from layer to layer.
@lru_cache(maxsize=1024)
def _sequence(regions: HeadRegions, q_len: int, kv_len: int, n_valid: int) -> HeadRuns:
    classes = tuple(dict.fromkeys(WorkClass.of(region) for region in regions))
    owner = np.full((-(-q_len // TILE_QUERIES), -(-kv_len // TILE_KEYS)), -1, np.int16)
    for t in range(owner.shape[0]):
        for bits, region in scan(regions, t, q_len, kv_len, n_valid):
            place = classes.index(WorkClass.of(region))
            for u in range(bits.bit_length()):
                if bits >> u & 1:
                    owner[t, u] = place
    return runs_of_map(owner, classes, len(regions))
