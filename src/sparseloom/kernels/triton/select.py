"""The best of each row, exactly: radix selection on ranks, then the kept places in order.

A rank is an unsigned integer that compares as the score does (``rank.py`` makes them): 0 may not
be kept, the largest one must.  The level, the smallest kept rank, is found digit by digit from
the top: one pass counts how often each digit occurs behind the digits found so far (Liu et al.,
IEEE TC 2022, §5: histogram, then emit).  Of the ranks equal to the level the first are kept, so
ties go to the lowest key.  A row is cut into tiles that are searched alone (local top-k), and a
tile into parts for as many programs, so that one long row fills the GPU too.

Memory: 2 kB and a few numbers for each tile.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int32, Int64, Shaped
from torch import Tensor

from sparseloom.kernels.triton.sizes import power_of_two

_RADIX = 7  # bits of a digit
_CHUNK = 1024  # ranks that a program looks at together
_PROGRAMS = 1024  # enough to fill a GPU
_MOST_PARTS = 64


class Rows(NamedTuple):
    """Ranks to choose from, a row for each query block of each head.

    Args:
        ranks: (rows, stride), int16 for up to 15 bits, else int32 that holds unsigned numbers.
        ends: one past the last place of each row that is looked at.
        tile: places that are searched together; `stride` or more for whole rows.
        tiles: tiles of a row.
        bits: width of the ranks.
    """

    ranks: Shaped[Tensor, "rows stride"]
    ends: Int32[Tensor, " rows"]
    tile: int
    tiles: int
    bits: int


class Levels(NamedTuple):
    """What is kept of each tile: the ranks above a level, and the first so many equal to it."""

    level: Int32[Tensor, " tiles_of_all_rows"]
    room: Int32[Tensor, " tiles_of_all_rows"]


def scratch_bytes(bits: int, tiles: int) -> int:
    """What selecting from a row of tiles takes beside the ranks."""
    return tiles * (-(-bits // _RADIX) * (4 << _RADIX) + 8)


def find_levels(rows: Rows, budget: Int32[Tensor, " tiles_of_all_rows"]) -> Levels:
    """The level that leaves ``budget`` ranks of each tile (at most as many as are not 0)."""
    many, parts, span = _parts(rows)
    digits = -(-rows.bits // _RADIX)
    counts = budget.new_zeros(many, digits, 1 << _RADIX)
    for digit in range(digits):
        _count_digit[(many, parts)](
            rows.ranks, rows.ends, budget, counts, rows.ranks.stride(0), rows.tile, rows.tiles,
            span, DIGIT=digit, DIGITS=digits, RADIX=_RADIX, CHUNK=_CHUNK, num_warps=4,
        )  # fmt: skip
    level, room = torch.empty_like(budget), torch.empty_like(budget)
    _find_level[(many,)](budget, counts, level, room, DIGITS=digits, RADIX=_RADIX, num_warps=1)
    return Levels(level, room)


def count_kept(rows: Rows, levels: Levels) -> Int32[Tensor, "tiles_of_all_rows parts 2"]:
    """How many ranks of each part of each tile lie above the level, and on it."""
    many, parts, span = _parts(rows)
    kept = levels.level.new_zeros(many, parts, 2)
    _count_kept[(many, parts)](
        rows.ranks, rows.ends, levels.level, kept, rows.ranks.stride(0), rows.tile, rows.tiles,
        span, CHUNK=_CHUNK, num_warps=4,
    )  # fmt: skip
    return kept


def emit(
    rows: Rows,
    levels: Levels,
    starts: Int64[Tensor, " tiles_of_all_rows"],
    out: Int32[Tensor, " nnz"],
) -> None:
    """Write the kept places of each tile, ascending and counted from the row's first, from
    ``starts`` on."""
    _go_through(rows, levels, starts, out)


def clear_rest(rows: Rows, levels: Levels) -> None:
    """Set all ranks to 0 but the kept ones."""
    _go_through(rows, levels, None, None)


def _go_through(rows: Rows, levels: Levels, starts: Tensor | None, out: Tensor | None) -> None:
    many, parts, span = _parts(rows)
    kept = count_kept(rows, levels) if parts > 1 else None
    _emit[(many, parts)](
        rows.ranks, rows.ends, levels.level, levels.room, kept, starts, out,
        rows.ranks.stride(0), rows.tile, rows.tiles, span, parts,
        PARTS=power_of_two(parts), EMIT=out is not None, CHUNK=_CHUNK, num_warps=4,
    )  # fmt: skip


def _parts(rows: Rows) -> tuple[int, int, int]:
    """Tiles of all rows, parts of each, and places of a part."""
    many, tile = len(rows.ends) * rows.tiles, min(rows.tile, rows.ranks.shape[1])
    parts = min(_MOST_PARTS, -(-_PROGRAMS // max(1, many)), -(-tile // _CHUNK))
    span = -(-tile // (max(1, parts) * _CHUNK)) * _CHUNK
    return many, -(-tile // max(1, span)), span


# --------------------------------------------------------------------------- kernels


@triton.jit
def _descend(counts, left, DONE: tl.constexpr, RADIX: tl.constexpr):
    """The first DONE digits of the level, and how many ranks that begin with them are kept."""
    BINS: tl.constexpr = 1 << RADIX
    level = tl.zeros([], tl.uint32)
    digit = tl.arange(0, BINS)
    for done in tl.static_range(DONE):
        count = tl.load(counts + done * BINS + digit)
        above = tl.sum(count, 0) - tl.cumsum(count, 0)
        here = (above < left) & (above + count >= left)  # one digit, or none where nothing is kept
        level = (level << RADIX) | tl.sum(tl.where(here, digit, 0), 0).to(tl.uint32)
        left -= tl.sum(tl.where(here, above, 0), 0)
    return level, left


@triton.jit
def _bounds(ends, tile, tiles, span):
    """The row of this program's part, and its first place and one past its last."""
    row = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * tile
    end = tl.minimum(first + tile, tl.load(ends + row))
    start = first + tl.program_id(1) * span
    return row.to(tl.int64), start, tl.minimum(start + span, end)


@triton.jit
def _count_digit(
    ranks, ends, budget, counts, stride, tile, tiles, span,
    DIGIT: tl.constexpr, DIGITS: tl.constexpr, RADIX: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    BINS: tl.constexpr = 1 << RADIX
    SHIFT: tl.constexpr = (DIGITS - 1 - DIGIT) * RADIX
    segment = tl.program_id(0).to(tl.int64)
    row, start, stop = _bounds(ends, tile, tiles, span)
    counts += segment * DIGITS * BINS
    level, _left = _descend(counts, tl.load(budget + segment), DIGIT, RADIX)
    found = tl.zeros([BINS], tl.int32)
    for at in range(start, stop, CHUNK):
        place = at + tl.arange(0, CHUNK)
        rank = tl.load(ranks + row * stride + place, mask=place < stop, other=0).to(tl.uint32)
        live = place < stop
        if DIGIT > 0:
            live = live & ((rank >> (SHIFT + RADIX)) == level)
        digit = ((rank >> SHIFT) & (BINS - 1)).to(tl.int32)
        found += tl.histogram(digit, BINS, mask=live).to(tl.int32)
    tl.atomic_add(counts + DIGIT * BINS + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@triton.jit
def _find_level(budget, counts, level, room, DIGITS: tl.constexpr, RADIX: tl.constexpr):
    BINS: tl.constexpr = 1 << RADIX
    segment = tl.program_id(0).to(tl.int64)
    wanted = tl.load(budget + segment)
    found, left = _descend(counts + segment * DIGITS * BINS, wanted, DIGITS, RADIX)
    # Nothing is kept: above the largest rank lies none.
    found = tl.where(wanted > 0, found.to(tl.int32), -1)
    tl.store(level + segment, found)
    tl.store(room + segment, tl.where(wanted > 0, left, 0))


@triton.jit
def _count_kept(ranks, ends, level, kept, stride, tile, tiles, span, CHUNK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    row, start, stop = _bounds(ends, tile, tiles, span)
    least = tl.load(level + segment).to(tl.uint32)
    above = tl.zeros([CHUNK], tl.int32)
    equal = tl.zeros([CHUNK], tl.int32)
    for at in range(start, stop, CHUNK):
        place = at + tl.arange(0, CHUNK)
        rank = tl.load(ranks + row * stride + place, mask=place < stop, other=0).to(tl.uint32)
        above += (rank > least).to(tl.int32)
        equal += ((rank == least) & (place < stop)).to(tl.int32)
    to = kept + (segment * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(to, tl.sum(above, 0))
    tl.store(to + 1, tl.sum(equal, 0))


@triton.jit
def _emit(
    ranks, ends, level, room, kept, starts, out, stride, tile, tiles, span, parts,
    PARTS: tl.constexpr, EMIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    row, start, stop = _bounds(ends, tile, tiles, span)
    least = tl.load(level + segment).to(tl.uint32)
    left = tl.load(room + segment)
    to = tl.zeros([], tl.int64)
    if EMIT:
        to = tl.load(starts + segment)
    if PARTS > 1:  # what the parts before this one keep
        part = tl.arange(0, PARTS)
        before = part < tl.program_id(1)
        sums = kept + (segment * parts + part) * 2
        equal = tl.sum(tl.load(sums + 1, mask=before, other=0), 0)
        to += tl.sum(tl.load(sums, mask=before, other=0), 0) + tl.minimum(equal, left)
        left -= tl.minimum(equal, left)
    for at in range(start, stop, CHUNK):
        place = at + tl.arange(0, CHUNK)
        rank = tl.load(ranks + row * stride + place, mask=place < stop, other=0).to(tl.uint32)
        equal = ((rank == least) & (place < stop)).to(tl.int32)
        ties = tl.cumsum(equal, 0)
        keep = ((rank > least) | ((equal > 0) & (ties <= left))).to(tl.int32)
        if EMIT:
            tl.store(out + to + tl.cumsum(keep, 0) - 1, place, mask=keep > 0)
            to += tl.sum(keep, 0)
        else:
            tl.store(ranks + row * stride + place, 0, mask=(place < stop) & (keep == 0))
        left -= tl.minimum(tl.sum(equal, 0), left)
