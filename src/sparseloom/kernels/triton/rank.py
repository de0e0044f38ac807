"""Codes to ranks: products, pooled over blocks, as unsigned integers that compare as scores do.

Three rules (``methods/pooling.py`` defines the poolings):

- one product per block (``rank_products``): codes themselves for blocks of one pair, or the mean
  codes of a query and a key block, whose product is the mean of the block's scores;
- all products of a block (``rank_blocks``): each row's softmax summed over the block, or its
  largest score in the row's standard deviations; what rows need for it comes from ``row_stats``;
- a threshold (``flag_blocks``): rank 1 where a pair reaches it or is its row's best, else 0.

A rank of 0 says that causality or padding forbid the block, the largest rank that it must be
kept (the diagonal).  Products of codes are exact: int8 tensor cores sum in int32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Float32, Int, Int64, Shaped
from torch import Tensor

_TILE = 64  # rows of a tile of products, but for blocks of more queries
_KEYS = 128  # keys of a tile
_NARROWEST = 32  # columns that an int8 product needs
_RULES = {"mass": 1, "max": 2}


class Pairs(NamedTuple):
    """The products of a call, and which pairs and blocks compete.

    Args:
        q, k: int8 codes, or fp8 ones of the same numbers.
        scale: of each row's products.
        voters: rows that have a say; None: all.
        attended: keys that are no padding; None: all.
        attended_blocks: key blocks with such a key; None: all.
        visible: one past the last key block of each query block.
        diagonal: first and one past the last key block that must be kept.
    """

    q: Shaped[Tensor, "batch heads q_len width"]
    k: Shaped[Tensor, "batch heads kv_len width"]
    scale: Float32[Tensor, "batch heads q_len"]
    block_size: tuple[int, int]
    is_causal: bool
    voters: Bool[Tensor, "#batch q_len"] | None
    attended: Bool[Tensor, "#batch kv_len"] | None
    attended_blocks: Bool[Tensor, "#batch kv_blocks"] | None
    visible: Int64[Tensor, "#batch q_blocks"]
    diagonal: Int64[Tensor, "q_blocks 2"]


def rank_products(
    q: Shaped[Tensor, "batch heads q_blocks width"],
    k: Shaped[Tensor, "batch heads kv_blocks width"],
    pairs: Pairs,
    bound: int,
    first: int,
    ranks: Shaped[Tensor, "batch heads rows stride"],
) -> None:
    """Ranks of the query blocks from ``first`` on, one product each.

    Args:
        bound: largest absolute product of integers; 0 for numbers, which take 32 bits.
    """
    batch, heads, kv_blocks, width = k.shape
    rows, stride = ranks.shape[2:]
    grid = (-(-stride // _KEYS), -(-rows // _TILE), batch * heads)
    _rank_products[grid](
        q, k, _flags(pairs.attended_blocks), pairs.visible, pairs.diagonal, ranks, heads,
        q.shape[2], kv_blocks, first, rows, stride, _shared(pairs.attended_blocks),
        _shared(pairs.visible), bound, WIDTH=width, DEPTH=depth(width),
        PADDED=pairs.attended_blocks is not None, EXACT=bound > 0, ROWS=_TILE, KEYS=_KEYS,
        num_warps=4, num_stages=2,
    )  # fmt: skip


def row_stats(pairs: Pairs, pooling: str) -> Float[Tensor, "batch heads q_len 2"]:
    """Factor f and offset o of each row, so that a product d counts as (d - o)·f: the logarithm of
    its probability to the base 2 (mass), or standard deviations from the largest (max)."""
    batch, heads, q_len, width = pairs.q.shape
    stats = pairs.scale.new_empty(batch, heads, q_len, 2)
    _row_stats[(-(-q_len // _TILE), batch * heads)](
        pairs.q, pairs.k, pairs.scale, _flags(pairs.attended), stats, heads, q_len,
        pairs.k.shape[2], _shared(pairs.attended), WIDTH=width, DEPTH=depth(width),
        CAUSAL=pairs.is_causal, PADDED=pairs.attended is not None, RULE=_RULES[pooling],
        ROWS=_TILE, KEYS=_KEYS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return stats


def best_keys(pairs: Pairs) -> Int[Tensor, "batch heads q_len"]:
    """The best key of each row, the first of equals; beyond all keys where there is none."""
    batch, heads, q_len, width = pairs.q.shape
    best = torch.empty(batch, heads, q_len, dtype=torch.int32, device=pairs.q.device)
    _best_keys[(-(-q_len // _TILE), batch * heads)](
        pairs.q, pairs.k, _flags(pairs.attended), best, heads, q_len, pairs.k.shape[2],
        _shared(pairs.attended), WIDTH=width, DEPTH=depth(width), CAUSAL=pairs.is_causal,
        PADDED=pairs.attended is not None, ROWS=_TILE, KEYS=_KEYS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return best


def rank_blocks(
    pairs: Pairs,
    stats: Float[Tensor, "batch heads q_len 2"],
    pooling: str,
    first: int,
    ranks: Shaped[Tensor, "batch heads rows stride"],
) -> None:
    """Ranks of 32 bits of the query blocks from ``first`` on, all products of each."""
    _blocks(pairs, _RULES[pooling], first, ranks, stats=stats)


def flag_blocks(
    pairs: Pairs,
    best: Int[Tensor, "batch heads q_len"],
    thresholds: Float32[Tensor, " heads"],
    first: int,
    ranks: Shaped[Tensor, "batch heads rows stride"],
) -> None:
    """1 where a block has a pair whose score reaches the threshold of its head or is the row's
    best, or lies on the diagonal; else 0."""
    _blocks(pairs, 0, first, ranks, best=best, thresholds=thresholds)


def depth(width: int) -> int:
    """Columns of a product, zeros included."""
    return max(_NARROWEST, triton.next_power_of_2(width))


def _blocks(
    pairs: Pairs,
    rule: int,
    first: int,
    ranks: Tensor,
    *,
    stats: Tensor | None = None,
    best: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> None:
    batch, heads, q_len, width = pairs.q.shape
    (bq, bk), (rows, stride) = pairs.block_size, ranks.shape[2:]
    # Blocks are padded to powers of two; a tile has some small ones or a part of a large one.
    tall, wide = triton.next_power_of_2(bq), triton.next_power_of_2(bk)
    blocks, keys = max(1, _TILE // tall), max(_KEYS, wide)
    columns = keys // wide
    grid = (-(-stride // columns), -(-rows // blocks), batch * heads)
    _rank_blocks[grid](
        pairs.q, pairs.k, pairs.scale, stats, best, thresholds, _flags(pairs.voters),
        _flags(pairs.attended), _flags(pairs.attended_blocks), pairs.visible, pairs.diagonal,
        ranks, heads, q_len, pairs.k.shape[2], pairs.diagonal.shape[0], first, rows, stride,
        _shared(pairs.voters), _shared(pairs.attended), _shared(pairs.attended_blocks),
        _shared(pairs.visible),
        WIDTH=width, DEPTH=depth(width), CAUSAL=pairs.is_causal,
        VOTERS=pairs.voters is not None, PADDED=pairs.attended is not None, RULE=rule, BQ=bq,
        BK=bk, BLOCKS=blocks, TALL=min(tall, _TILE), PARTS=max(1, tall // _TILE), WIDE=wide,
        COLUMNS=columns, num_warps=4, num_stages=1,
    )  # fmt: skip


def _shared(tensor: Tensor | None) -> int:
    """Elements from one batch entry to the next; 0 where all share one."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def _flags(tensor: Tensor | None) -> Tensor | None:
    """Booleans as bytes."""
    return None if tensor is None else tensor.view(torch.uint8)


# --------------------------------------------------------------------------- kernels


@triton.jit
def _codes(base, row, valid, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """Rows of codes, filled up with zeros."""
    column = tl.arange(0, DEPTH)
    at = base + row.to(tl.int64)[:, None] * WIDTH + column[None]
    return tl.load(at, mask=valid[:, None] & (column[None] < WIDTH), other=0.0)


@triton.jit
def _products(q, k):
    """All products of two sets of rows: exact integers of int8, in int32, else fp32."""
    if q.dtype == tl.int8:
        return tl.dot(q, tl.trans(k), out_dtype=tl.int32)
    elif q.dtype == tl.float32:
        return tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="tf32x3")
    else:
        return tl.dot(q, tl.trans(k))  # fp8


@triton.jit
def _limits(row, q_len, kv_len, CAUSAL: tl.constexpr):
    """The last key that each query may see."""
    if CAUSAL:
        last = row + kv_len - q_len
    else:
        last = tl.zeros_like(row) + kv_len - 1
    return tl.where(row < q_len, last, -1)


@triton.jit
def _places(key, kv_len, attended, entry, PADDED: tl.constexpr):
    """Keys to compare with limits: those that nobody may see lie behind all limits."""
    there = key < kv_len
    if PADDED:
        there = there & (tl.load(attended + entry + key, mask=there, other=0) != 0)
    return tl.where(there, key, 1 << 30)


@triton.jit
def _store_ranks(
    rank, block, column, attended, entry, visible, diagonal, ranks, bh, first, rows, stride,
    q_blocks, largest, PADDED: tl.constexpr,
):  # fmt: skip
    """Write a tile of ranks, with those of blocks that may not or must be kept."""
    here = block < tl.minimum(first + rows, q_blocks)
    end = tl.load(visible + block, mask=here, other=0).to(tl.int32)
    start = tl.load(diagonal + block * 2, mask=here, other=0).to(tl.int32)
    stop = tl.load(diagonal + block * 2 + 1, mask=here, other=0).to(tl.int32)
    seen = column[None] < end[:, None]  # the others are not looked at
    may = seen
    if PADDED:
        here_attended = tl.load(attended + entry + column, mask=column < tl.max(end, 0), other=0)
        may = seen & (here_attended != 0)[None]
    must = (column[None] >= start[:, None]) & (column[None] < stop[:, None])
    rank = tl.where(may, tl.where(must, largest, rank), 0)
    to = (bh.to(tl.int64) * rows + block - first)[:, None] * stride + column[None]
    tl.store(ranks + to, rank.to(ranks.dtype.element_ty), mask=seen)


@triton.jit
def _ordered(x):
    """fp32 numbers as integers that compare alike, when their bits are read as unsigned."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return bits ^ ((bits >> 31) | -2147483648)


@triton.jit
def _rank_products(
    q, k, attended, visible, diagonal, ranks, heads, q_blocks, kv_blocks, first, rows, stride,
    attended_stride, visible_stride, bound, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    PADDED: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(2)
    batch = bh // heads
    block = first + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    visible += batch * visible_stride
    ends = tl.load(visible + block, mask=block < q_blocks, other=0)
    if tl.max(ends, 0) > tl.program_id(0) * KEYS:
        left = _codes(q + bh.to(tl.int64) * q_blocks * WIDTH, block, block < q_blocks, WIDTH, DEPTH)
        keys = k + bh.to(tl.int64) * kv_blocks * WIDTH
        right = _codes(keys, column, column < kv_blocks, WIDTH, DEPTH)
        product = _products(left, right)
        if EXACT:
            rank = product.to(tl.int32) + (bound + 1)
            largest = 2 * bound + 2
        else:
            rank = _ordered(product.to(tl.float32))
            largest = -1
        _store_ranks(
            rank, block, column, attended, batch * attended_stride, visible, diagonal, ranks, bh,
            first, rows, stride, q_blocks, largest, PADDED,
        )  # fmt: skip


@triton.jit
def _row_stats(
    q, k, scale, attended, stats, heads, q_len, kv_len, attended_stride, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, RULE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    batch = (bh // heads).to(tl.int32)
    # Long rows first: where rows grow, the last ones take longest.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    limit = _limits(row, q_len, kv_len, CAUSAL)
    codes = _codes(q + bh * q_len * WIDTH, row, row < q_len, WIDTH, DEPTH)
    factor = tl.load(scale + bh * q_len + row, mask=row < q_len, other=0.0)
    if RULE == 1:
        factor *= 1.4426950408889634
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)  # of exponentials, or the mean
    squares = tl.zeros([ROWS], tl.float32)  # of what lies off the mean
    count = tl.zeros([ROWS], tl.float32)
    for at in range(0, tl.minimum(kv_len, tl.max(limit, 0) + 1), KEYS):
        key = at + tl.arange(0, KEYS)
        right = _codes(k + bh * kv_len * WIDTH, key, key < kv_len, WIDTH, DEPTH)
        product = _products(codes, right).to(tl.float32)
        place = _places(key, kv_len, attended, batch * attended_stride, PADDED)
        ok = place[None] <= limit[:, None]
        new_top = tl.maximum(top, tl.max(tl.where(ok, product, float("-inf")), 1))
        if RULE == 1:
            base = tl.where(new_top > float("-inf"), new_top, 0.0)
            e = tl.exp2(tl.where(ok, (product - base[:, None]) * factor[:, None], float("-inf")))
            total = total * tl.exp2((top - base) * factor) + tl.sum(e, 1)
        else:  # tiles are joined by their means (Chan et al., 1979)
            here = tl.sum(ok.to(tl.float32), 1)
            mean = tl.sum(tl.where(ok, product, 0.0), 1) / tl.maximum(here, 1.0)
            off = tl.where(ok, product - mean[:, None], 0.0)
            both = tl.maximum(count + here, 1.0)
            apart = mean - total
            squares += tl.sum(off * off, 1) + apart * apart * count * here / both
            total += apart * here / both
            count += here
        top = new_top
    some = top > float("-inf")
    if RULE == 1:
        top = tl.where(some, top + tl.log2(total) / factor, float("inf"))
    else:
        # The scale of a row cancels, but for rows whose scores are all the same.
        unit = tl.sqrt(squares / tl.maximum(count, 1.0)) * factor
        factor = factor / tl.maximum(unit, 1.1754943508222875e-38)
    to = stats + (bh * q_len + row) * 2
    tl.store(to, factor, mask=row < q_len)
    tl.store(to + 1, top, mask=row < q_len)


@triton.jit
def _best_keys(
    q, k, attended, best, heads, q_len, kv_len, attended_stride, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    batch = (bh // heads).to(tl.int32)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    limit = _limits(row, q_len, kv_len, CAUSAL)
    codes = _codes(q + bh * q_len * WIDTH, row, row < q_len, WIDTH, DEPTH)
    top = tl.full([ROWS], -2147483648, tl.int32)
    found = tl.full([ROWS], 1 << 30, tl.int32)
    for at in range(0, tl.minimum(kv_len, tl.max(limit, 0) + 1), KEYS):
        key = at + tl.arange(0, KEYS)
        right = _codes(k + bh * kv_len * WIDTH, key, key < kv_len, WIDTH, DEPTH)
        product = _products(codes, right).to(tl.int32)
        place = _places(key, kv_len, attended, batch * attended_stride, PADDED)
        product = tl.where(place[None] <= limit[:, None], product, -2147483648)
        here = tl.max(product, 1)
        where = tl.min(tl.where(product == here[:, None], place[None], 1 << 30), 1)
        found = tl.where(here > top, where, found)
        top = tl.maximum(top, here)
    tl.store(best + bh * q_len + row, found, mask=row < q_len)


@triton.jit
def _rank_blocks(
    q, k, scale, stats, best, thresholds, voters, attended, attended_blocks, visible, diagonal,
    ranks, heads, q_len, kv_len, q_blocks, first, rows, stride, voters_stride, attended_stride,
    attended_blocks_stride, visible_stride, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    CAUSAL: tl.constexpr, VOTERS: tl.constexpr, PADDED: tl.constexpr, RULE: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, TALL: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(2).to(tl.int64)
    batch = (bh // heads).to(tl.int32)
    block = first + tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    visible += batch * visible_stride
    ends = tl.load(visible + block, mask=block < q_blocks, other=0)
    if tl.max(ends, 0) > tl.program_id(0) * COLUMNS:
        # Places in a tile: block after block, each filled up to a power of two.
        i = tl.arange(0, BLOCKS * TALL)
        j = tl.arange(0, COLUMNS * WIDE)
        key = (tl.program_id(0) * COLUMNS + j // WIDE) * BK + j % WIDE
        key = tl.where((j % WIDE < BK) & (key < kv_len), key, kv_len)
        right = _codes(k + bh * kv_len * WIDTH, key, key < kv_len, WIDTH, DEPTH)
        place = _places(key, kv_len, attended, batch * attended_stride, PADDED)
        pooled = tl.full([BLOCKS, COLUMNS], float("-inf") if RULE == 2 else 0.0, tl.float32)
        for part in tl.static_range(PARTS):
            inside = part * TALL + i % TALL
            row = (first + tl.program_id(1) * BLOCKS + i // TALL) * BQ + inside
            row = tl.where(inside < BQ, row, q_len)
            limit = _limits(row, q_len, kv_len, CAUSAL)
            if VOTERS and RULE > 0:
                speaks = tl.load(voters + batch * voters_stride + row, mask=row < q_len, other=0)
                limit = tl.where(speaks != 0, limit, -1)
            codes = _codes(q + bh * q_len * WIDTH, row, row < q_len, WIDTH, DEPTH)
            product = _products(codes, right)
            ok = place[None] <= limit[:, None]
            at = bh * q_len + row
            if RULE == 0:
                factor = tl.load(scale + at, mask=row < q_len, other=0.0)
                favourite = tl.load(best + at, mask=row < q_len, other=-1)
                level = tl.load(thresholds + bh % heads)
                reached = product.to(tl.float32) * factor[:, None] >= level
                x = (ok & (reached | (place[None] == favourite[:, None]))).to(tl.float32)
            else:
                factor = tl.load(stats + at * 2, mask=row < q_len, other=1.0)
                offset = tl.load(stats + at * 2 + 1, mask=row < q_len, other=0.0)
                x = (product.to(tl.float32) - offset[:, None]) * factor[:, None]
                x = tl.where(ok, x, float("-inf"))
                if RULE == 1:
                    x = tl.exp2(x)
            if WIDE > 1:
                x = tl.reshape(x, [BLOCKS * TALL, COLUMNS, WIDE])
                x = tl.sum(x, 2) if RULE == 1 else tl.max(x, 2)
            x = tl.reshape(x, [BLOCKS, TALL, COLUMNS])
            if RULE == 1:
                pooled += tl.sum(x, 1)
            else:
                pooled = tl.maximum(pooled, tl.max(x, 1))
        if RULE == 0:
            rank = pooled.to(tl.int32)
            largest = 1
        else:
            rank = _ordered(pooled)
            largest = -1
        _store_ranks(
            rank, block, column, attended_blocks, batch * attended_blocks_stride, visible,
            diagonal, ranks, bh, first, rows, stride, q_blocks, largest, PADDED,
        )  # fmt: skip
