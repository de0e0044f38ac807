"""Run lists of a head: the key tiles that each query tile works on, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int16, Int64

from sparseloom.regions import TILE_KEYS, TILE_QUERIES, Mode, Region, runs_of_owners
from sparseloom.trace import MaskArrays


class WorkClass(NamedTuple):
    """Regions that compute alike: their runs are one where they touch."""

    mode: Mode = Mode.FULL
    log2s: int = 0
    pattern: int = 0
    low_precision_shift: int = 0

    @property
    def eighths(self) -> int:
        """Work of a tile, in eighths: 8 / s if coarse, the kept columns of 8 if strided."""
        return self.pattern.bit_count() if self.mode is Mode.STRIDED else 8 >> self.log2s

    @classmethod
    def of(cls, region: Region) -> WorkClass:
        """The class of a region."""
        return cls(region.mode, region.log2s, region.pattern, region.low_precision_shift)


@dataclass(frozen=True, eq=False)
class HeadRuns:
    """The runs of one head.

    Args:
        query_tile, begin, end: of every run; [begin, end) are key tiles. Ordered by query tile,
            then by key tile.
        work: the run's place in `classes`.
        classes: kinds of work.
        query_tiles, key_tiles: size of the grid.
        descriptors: how many the sequencer scans for every query tile; 0 = the dense counter.
    """

    query_tile: Int64[np.ndarray, " runs"]
    begin: Int64[np.ndarray, " runs"]
    end: Int64[np.ndarray, " runs"]
    work: Int64[np.ndarray, " runs"]
    classes: tuple[WorkClass, ...]
    query_tiles: int
    key_tiles: int
    descriptors: int

    @property
    def count(self) -> int:
        """Number of runs."""
        return int(self.query_tile.size)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for heads whose runs are equal."""
        arrays = (self.query_tile, self.begin, self.end, self.work)
        sizes = (self.query_tiles, self.key_tiles, self.descriptors)
        return (*(part.tobytes() for part in arrays), self.classes, *sizes)

    def cut(self, tiles: int) -> tuple[HeadRuns, Int64[np.ndarray, " runs"]]:
        """The same with every run cut at multiples of `tiles`, and the chunk of each piece.

        Pieces are ordered by chunk, then query tile.
        """
        first = self.begin // tiles
        pieces = (self.end - 1) // tiles - first + 1
        source = np.repeat(np.arange(self.count), pieces)
        within = np.arange(source.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        chunk = first[source] + within
        order = np.lexsort((source, self.query_tile[source], chunk))
        source, chunk = source[order], chunk[order]
        found = HeadRuns(
            self.query_tile[source],
            np.maximum(self.begin[source], chunk * tiles),
            np.minimum(self.end[source], (chunk + 1) * tiles),
            self.work[source],
            self.classes,
            self.query_tiles,
            self.key_tiles,
            self.descriptors,
        )
        return found, chunk

    def map(self) -> Int16[np.ndarray, "query_tiles key_tiles"]:
        """The class of each tile, −1 where it is skipped."""
        found = np.full((self.query_tiles, self.key_tiles), -1, np.int16)
        lengths = self.end - self.begin
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tiles = np.repeat(self.begin, lengths) + within
        found[np.repeat(self.query_tile, lengths), tiles] = np.repeat(self.work, lengths)
        return found


def packed_tiles(
    eighths: Int64[np.ndarray, " runs"],
    lengths: Int64[np.ndarray, " runs"],
    group: Int64[np.ndarray, " runs"],
    groups: int,
) -> Int64[np.ndarray, " groups"]:
    """Tiles of work of each group of runs: whole tiles, and pieces packed into as few as hold them.

    Pieces of different tiles, classes too, share one tile of work, within a group.
    """
    whole = np.bincount(group, np.where(eighths == 8, lengths, 0), groups)
    pieces = np.bincount(group, np.where(eighths < 8, lengths * eighths, 0), groups)
    return (whole + np.ceil(pieces / 8)).astype(np.int64)


def runs_of_map(
    owner: Int16[np.ndarray, "query_tiles key_tiles"],
    classes: Sequence[WorkClass],
    descriptors: int,
) -> HeadRuns:
    """The maximal runs of a map of classes (−1: skipped)."""
    query_tile, begin, end, work = (part.astype(np.int64) for part in runs_of_owners(owner))
    rows, keys = owner.shape
    return HeadRuns(query_tile, begin, end, work, tuple(classes), rows, keys, descriptors)


def runs_of_tiles(keep: Bool[np.ndarray, "query_tiles key_tiles"], descriptors: int) -> HeadRuns:
    """The runs of whole tiles; without descriptors it is the dense accelerator's loop."""
    return runs_of_map(np.where(keep, 0, -1).astype(np.int16), (WorkClass(),), descriptors)


def kept_tiles(mask: MaskArrays, sequence: int, head: int) -> Bool[np.ndarray, "_ _"]:
    """Tiles of 16 queries by 32 keys that hold a kept block, whatever causality forbids.

    `head` is one of the mask's own.
    """
    rows, keys = mask.block_size
    tiles = (-(-mask.q_len // TILE_QUERIES), -(-mask.kv_len // TILE_KEYS))
    offsets = mask.offsets[min(sequence, mask.batch - 1), head]
    row = np.repeat(np.arange(mask.q_blocks), np.diff(offsets)) * rows
    key = mask.indices[offsets[0] : offsets[-1]].astype(np.int64) * keys
    t0, t1 = row // TILE_QUERIES, -(-np.minimum(row + rows, mask.q_len) // TILE_QUERIES)
    u0, u1 = key // TILE_KEYS, -(-np.minimum(key + keys, mask.kv_len) // TILE_KEYS)
    # Corners of each rectangle of tiles; their running sums count the rectangles over a tile.
    corners = np.zeros((tiles[0] + 1, tiles[1] + 1), np.int64)
    for t, u, sign in ((t0, u0, 1), (t0, u1, -1), (t1, u0, -1), (t1, u1, 1)):
        np.add.at(corners, (t, u), sign)
    return corners.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0


def allowed_tiles(
    q_len: int, kv_len: int, n_valid: int, *, is_causal: bool
) -> Bool[np.ndarray, "query_tiles key_tiles"]:
    """Tiles that hold a pair which causality (bottom-right aligned) and `n_valid` keys allow."""
    last = np.arange(TILE_QUERIES - 1, q_len + TILE_QUERIES - 1, TILE_QUERIES)
    last = np.minimum(last, q_len - 1)
    ends = np.full(last.size, n_valid)
    if is_causal:
        ends = np.minimum(ends, last + kv_len - q_len + 1)
    return np.arange(0, kv_len, TILE_KEYS)[None, :] < ends[:, None]
