"""What the Triton kernels share: which pairs a program owns, and how it reads their rows.

A program owns one query block of a mask, or a part of one, for one query head or for several that
share keys and mask (``PACK``, together a *unit*): GQA then reads each gathered key once for all of
them. Its kept keys lie in one list, which it walks in tiles. Contiguous key blocks are read by
plain addresses; Triton lowers block pointers to the same ones.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mask_row_of(
    unit, units, mask_heads,
    MASK_BATCH: tl.constexpr, MASK_GROUP: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Row (batch, mask head) of the mask for a unit of ``PACK`` heads, ``units`` per batch."""
    row = unit % units * PACK // MASK_GROUP
    if MASK_BATCH:
        row += unit // units * mask_heads
    return row.to(tl.int64)


@triton.jit
def owned_rows(
    order, first_unit, units, mask_heads, q_blocks, q_len,
    MASK_BATCH: tl.constexpr, MASK_GROUP: tl.constexpr, BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr, SPLIT: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Unit, mask row, query block and part of it, and head, query and existence of each lane.

    ``order`` ranks the blocks of each mask row; ``SPLIT`` programs share a block.
    """
    ranks = q_blocks * SPLIT
    unit = tl.program_id(0) // ranks + first_unit
    rank = tl.program_id(0) % ranks
    mask_row = mask_row_of(unit, units, mask_heads, MASK_BATCH, MASK_GROUP, PACK)
    block = tl.load(order + mask_row * q_blocks + rank // SPLIT)
    part = rank % SPLIT
    lane = tl.arange(0, ROWS)
    place = part * TILE_Q + lane % TILE_Q
    query = block * BLOCK_Q + place
    there = (lane < PACK * TILE_Q) & (place < BLOCK_Q) & (query < q_len)
    return unit, mask_row, block, part, unit % units * PACK + lane // TILE_Q, query, there


@triton.jit
def count_before(indices, start, end, bound):
    """How many of the ascending ``indices[start:end]`` are below ``bound``.

    The last one is looked at first: selections made under causality keep no later key.
    """
    last = tl.load(indices + end - 1, mask=end > start, other=0)
    low = tl.where(last < bound, end, start)
    high = end
    while low < high:
        middle = (low + high) // 2
        below = tl.load(indices + middle) < bound
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return (low - start).to(tl.int32)


@triton.jit
def kept_list(
    indices, offsets, mask_row, block, part, q_blocks, q_len, kv_len,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Where the list of a query block starts, and how many blocks of it begin in sight."""
    row = offsets + mask_row * (q_blocks + 1) + block
    start, end = tl.load(row), tl.load(row + 1)
    count = (end - start).to(tl.int32)
    if CAUSAL:
        after = tl.minimum(block * BLOCK_Q + tl.minimum((part + 1) * TILE_Q, BLOCK_Q), q_len)
        seen = tl.maximum(after + kv_len - q_len, 0)  # keys that the last row sees
        count = count_before(indices, start, end, (seen + BLOCK_K - 1) // BLOCK_K)
    return start, count


@triton.jit
def tile_positions(
    entries, count, tile, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr
):
    """Keys (or, key-major, queries) of a tile of a list of kept blocks, and which are there."""
    lane = tl.arange(0, TILE)
    place = tile * TILE + lane
    there = place < count * BLOCK
    if BLOCK % TILE == 0:
        block = tl.load(entries + tile // (BLOCK // TILE))
        position = block * BLOCK + tile % (BLOCK // TILE) * TILE + lane
    elif MASKED:
        block = tl.load(entries + place // BLOCK, mask=there, other=0)
        position = block * BLOCK + place % BLOCK
    else:
        position = tl.load(entries + place // BLOCK) * BLOCK + place % BLOCK
    return position, there


@triton.jit
def visible_keys(key, there, padding, kv_len, PADDED: tl.constexpr):
    """Which keys exist and are not padding."""
    there = there & (key < kv_len)
    if PADDED:
        there = there & (tl.load(padding + key, mask=there, other=0) != 0)
    return there


@triton.jit
def load_rows(base, offset, there, DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """``WIDTH`` numbers from each ``base + offset``, 0 past ``DIM`` and where nothing is there."""
    column = tl.arange(0, WIDTH)[None, :]
    at = base + offset[:, None] + column
    if MASKED and DIM == WIDTH:
        rows = tl.load(at, mask=there[:, None], other=0.0)
    elif MASKED:
        rows = tl.load(at, mask=there[:, None] & (column < DIM), other=0.0)
    elif DIM == WIDTH:
        rows = tl.load(at)
    else:
        rows = tl.load(at, mask=column < DIM, other=0.0)
    return rows


@triton.jit
def product(left, right, PRECISION: tl.constexpr, AXIS: tl.constexpr):
    """``left @ rightᵀ``, the keys (right) on axis 1, or transposed: ``right @ leftᵀ``."""
    if AXIS == 0:
        return tl.dot(right, tl.trans(left), input_precision=PRECISION)
    else:
        return tl.dot(left, tl.trans(right), input_precision=PRECISION)


@triton.jit
def accumulate(acc, weights, rows, PRECISION: tl.constexpr, AXIS: tl.constexpr):
    """``acc + weights @ rows``, the keys on axis 1 of the weights, or all three transposed."""
    if AXIS == 0:
        return tl.dot(tl.trans(rows), weights, acc, input_precision=PRECISION)
    else:
        return tl.dot(weights, rows, acc, input_precision=PRECISION)


@triton.jit
def forbid(scores, key, there, limit, CAUSAL: tl.constexpr, AXIS: tl.constexpr):
    """Scores with −inf where the key is not there, or after the row's ``limit``.

    ``AXIS`` of the scores holds the keys.
    """
    allowed = tl.expand_dims(there, 1 - AXIS)
    if CAUSAL:
        allowed = allowed & (tl.expand_dims(key, 1 - AXIS) <= tl.expand_dims(limit, AXIS))
    return tl.where(allowed, scores, -float("inf"))
