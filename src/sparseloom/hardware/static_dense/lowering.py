"""Runs lowered to passes: one query tile over one chunk of keys, and the operands that it needs.

The weight buffer holds K and V of as many keys as the probability buffer has room for (512 at 64
dimensions). Longer inputs are cut into chunks of keys: every chunk makes a pass over the query
tiles that have a run in it, and the outputs of a query tile's passes are merged as those of regions
are, by their maxima and sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from sparseloom.hardware.static_dense.config import StaticDenseConfig
from sparseloom.hardware.static_dense.runs import HeadRuns, packed_tiles
from sparseloom.regions import TILE_KEYS, TILE_QUERIES, Mode

PARTIAL_BYTES = 3
"""Of an output that a later chunk of keys adds to: the 24 bits of a latch."""


@dataclass(frozen=True)
class HeadSize:
    """Sizes of a head: queries and keys in tokens, widths in numbers of 8 bits."""

    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True, eq=False)
class Passes:
    """Passes of one head, ordered by chunk, then query tile.

    Args:
        query_tile, chunk: of every pass.
        tiles: tiles of work; whole ones first, then packed pieces.
        runs: that begin in the pass.
        opens, ends: whether it is the query tile's first and its last pass (0 or 1).
        starts: per tile of work, the runs that begin with it.
        unit: per tile of work, the last operand that it needs, in the order of first use.
        used_pass, used_unit: pairs of a pass and an operand that it uses.
        unit_pass: per operand, the first pass that uses it.
    An operand is 32 rows of K, and as many of V; pooled rows are operands of their own.
    """

    query_tile: Int64[np.ndarray, " passes"]
    chunk: Int64[np.ndarray, " passes"]
    tiles: Int64[np.ndarray, " passes"]
    runs: Int64[np.ndarray, " passes"]
    opens: Int64[np.ndarray, " passes"]
    ends: Int64[np.ndarray, " passes"]
    starts: Int64[np.ndarray, " tiles"]
    unit: Int64[np.ndarray, " tiles"]
    used_pass: Int64[np.ndarray, " uses"]
    used_unit: Int64[np.ndarray, " uses"]
    unit_pass: Int64[np.ndarray, " units"]

    @property
    def count(self) -> int:
        """Number of passes."""
        return self.tiles.size

    def incoming(self, size: HeadSize) -> Int64[np.ndarray, " passes"]:
        """Bytes that each pass reads: its queries, and the output so far."""
        partial = (1 - self.opens) * size.value_dim * PARTIAL_BYTES
        return self.queries(size) * (size.head_dim + partial)

    def outgoing(self, size: HeadSize) -> Int64[np.ndarray, " passes"]:
        """Bytes that each pass writes: outputs, whole or to be added to."""
        width = np.where(self.ends == 1, 1, PARTIAL_BYTES)
        return self.queries(size) * size.value_dim * width

    def queries(self, size: HeadSize) -> Int64[np.ndarray, " passes"]:
        """Queries of each pass."""
        return np.minimum(TILE_QUERIES, size.q_len - self.query_tile * TILE_QUERIES)


def lower(config: StaticDenseConfig, runs: HeadRuns, size: HeadSize) -> Passes:
    """The passes of a head; query tiles without a run have none.

    Pooled rows lie beside the others in the weight buffer: where both together do not fit, chunks
    are made smaller until they do.
    """
    chunk_tiles = config.chunk_tiles(size.head_dim, size.value_dim)
    room = int(config.buffers.weight_kib * 1024) // (TILE_KEYS * (size.head_dim + size.value_dim))
    while True:
        found = _lower(runs, chunk_tiles)
        held = np.bincount(found.chunk[found.unit_pass]).max(initial=0)
        if held <= room or chunk_tiles == 1:
            return found
        chunk_tiles -= 1


def _lower(runs: HeadRuns, chunk_tiles: int) -> Passes:
    pieces, chunk = runs.cut(chunk_tiles)
    known, index = np.unique(chunk * runs.query_tiles + pieces.query_tile, return_inverse=True)
    index = index.astype(np.int64)
    eighths = np.array([kind.eighths for kind in runs.classes], np.int64)[pieces.work]
    lengths = pieces.end - pieces.begin
    tiles = packed_tiles(eighths, lengths, index, known.size)
    tile = known % runs.query_tiles
    opens, ends = np.zeros(known.size, np.int64), np.zeros(known.size, np.int64)
    opens[np.unique(tile, return_index=True)[1]] = 1
    ends[tile.size - 1 - np.unique(tile[::-1], return_index=True)[1]] = 1

    # Every key tile of every piece, in the order in which its pass works on it.
    source = np.repeat(np.arange(lengths.size), lengths)
    within = np.arange(source.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    order = np.lexsort((np.arange(source.size), eighths[source] < 8, index[source]))
    source, within = source[order], within[order]
    of_pass, part = index[source], eighths[source]
    first_tile = np.cumsum(tiles) - tiles
    begin = np.cumsum(part) - part
    begin -= begin[np.searchsorted(of_pass, np.arange(known.size))][of_pass]
    at = first_tile[of_pass] + begin // 8
    until = first_tile[of_pass] + (begin + part - 1) // 8
    starts = np.bincount(at[within == 0], minlength=int(tiles.sum())).astype(np.int64)

    unit, unit_pass = _operands(runs, pieces, chunk, source, within, of_pass)
    needed = np.zeros(int(tiles.sum()), np.int64)
    np.maximum.at(needed, at, unit)
    np.maximum.at(needed, until, unit)
    uses = np.unique(of_pass * max(1, unit_pass.size) + unit)
    return Passes(
        tile,
        known // runs.query_tiles,
        tiles,
        np.bincount(index, minlength=known.size).astype(np.int64),
        opens,
        ends,
        starts,
        needed,
        uses // max(1, unit_pass.size),
        uses % max(1, unit_pass.size),
        unit_pass,
    )


def _operands(
    runs: HeadRuns,
    pieces: HeadRuns,
    chunk: Int64[np.ndarray, " pieces"],
    source: Int64[np.ndarray, " parts"],
    within: Int64[np.ndarray, " parts"],
    of_pass: Int64[np.ndarray, " parts"],
) -> tuple[Int64[np.ndarray, " parts"], Int64[np.ndarray, " units"]]:
    """The operand of every key tile, numbered by first use, and each operand's first pass."""
    pooled = np.array(
        [kind.log2s if kind.mode is Mode.COARSE else 0 for kind in runs.classes], np.int64
    )[pieces.work][source]
    row = (pieces.begin[source] + within) >> pooled
    code = (chunk[source] * 4 + pooled) * runs.key_tiles + row
    _, first, unit = np.unique(code, return_index=True, return_inverse=True)
    rank = np.empty(first.size, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(first.size)
    return rank[unit], of_pass[np.sort(first)]


def deal(cost: Int64[np.ndarray, " passes"], pes: int) -> Int64[np.ndarray, " passes"]:
    """The PE of each pass: the largest first, each to the PE with the least work so far (LPT)."""
    found = np.zeros(cost.size, np.int64)
    if pes > 1:
        load = np.zeros(pes, np.int64)
        for i in np.argsort(-cost, kind="stable"):
            found[i] = int(load.argmin())
            load[found[i]] += cost[i]
    return found
