"""Codes to ranks: products, pooled over blocks, as unsigned integers that compare as scores do.

Three rules (``methods/pooling.py`` defines the poolings):

- one product per block (``rank_products``): codes themselves for blocks of one pair, or the mean
  codes of a query and a key block, whose product is the mean of the block's scores;
- all products of a block (``rank_blocks``): each row's softmax summed over the block, or its
  largest score in the row's standard deviations; what rows need for it comes from ``row_stats.py``;
- a threshold (``flag_blocks``): rank 1 where a pair reaches it or is its row's best, else 0.

A rank of 0 says that causality or padding forbid the block, the largest rank that it must be
kept (the diagonal).  Products of codes are exact: int8 tensor cores sum in int32.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int, Shaped
from torch import Tensor

from sparseloom.kernels.triton.order import ordered
from sparseloom.kernels.triton.products import (
    KEYS_OF_TILE,
    RULES,
    TILE,
    Pairs,
    depth,
    flags,
    limits,
    load_codes,
    places,
    products,
    shared,
)
from sparseloom.kernels.triton.sizes import power_of_two


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
    grid = (-(-stride // KEYS_OF_TILE), -(-rows // TILE), batch * heads)
    _rank_products[grid](
        q, k, flags(pairs.attended_blocks), pairs.visible, pairs.diagonal, ranks, heads,
        q.shape[2], kv_blocks, first, rows, stride, shared(pairs.attended_blocks),
        shared(pairs.visible), bound, WIDTH=width, DEPTH=depth(width),
        PADDED=pairs.attended_blocks is not None, EXACT=bound > 0, ROWS=TILE, KEYS=KEYS_OF_TILE,
        num_warps=4, num_stages=2,
    )  # fmt: skip


def rank_blocks(
    pairs: Pairs,
    stats: Float[Tensor, "batch heads q_len 2"],
    pooling: str,
    first: int,
    ranks: Shaped[Tensor, "batch heads rows stride"],
) -> None:
    """Ranks of 32 bits of the query blocks from ``first`` on, all products of each."""
    _blocks(pairs, RULES[pooling], first, ranks, stats=stats)


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
    tall, wide = power_of_two(bq), power_of_two(bk)
    blocks, keys = max(1, TILE // tall), max(KEYS_OF_TILE, wide)
    columns = keys // wide
    grid = (-(-stride // columns), -(-rows // blocks), batch * heads)
    _rank_blocks[grid](
        pairs.q, pairs.k, pairs.scale, stats, best, thresholds, flags(pairs.voters),
        flags(pairs.attended), flags(pairs.attended_blocks), pairs.visible, pairs.diagonal,
        ranks, heads, q_len, pairs.k.shape[2], pairs.diagonal.shape[0], first, rows, stride,
        shared(pairs.voters), shared(pairs.attended), shared(pairs.attended_blocks),
        shared(pairs.visible),
        WIDTH=width, DEPTH=depth(width), CAUSAL=pairs.is_causal,
        VOTERS=pairs.voters is not None, PADDED=pairs.attended is not None, RULE=rule, BQ=bq,
        BK=bk, BLOCKS=blocks, TALL=min(tall, TILE), PARTS=max(1, tall // TILE), WIDE=wide,
        COLUMNS=columns, num_warps=4, num_stages=1,
    )  # fmt: skip


# --------------------------------------------------------------------------- kernels


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
        left = load_codes(
            q + bh.to(tl.int64) * q_blocks * WIDTH, block, block < q_blocks, WIDTH, DEPTH
        )
        keys = k + bh.to(tl.int64) * kv_blocks * WIDTH
        right = load_codes(keys, column, column < kv_blocks, WIDTH, DEPTH)
        product = products(left, right)
        if EXACT:
            rank = product.to(tl.int32) + (bound + 1)
            largest = 2 * bound + 2
        else:
            rank = ordered(product.to(tl.float32))
            largest = -1
        _store_ranks(
            rank, block, column, attended, batch * attended_stride, visible, diagonal, ranks, bh,
            first, rows, stride, q_blocks, largest, PADDED,
        )  # fmt: skip


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
        right = load_codes(k + bh * kv_len * WIDTH, key, key < kv_len, WIDTH, DEPTH)
        place = places(key, kv_len, attended, batch * attended_stride, PADDED)
        pooled = tl.full([BLOCKS, COLUMNS], float("-inf") if RULE == 2 else 0.0, tl.float32)
        for part in tl.static_range(PARTS):
            inside = part * TALL + i % TALL
            row = (first + tl.program_id(1) * BLOCKS + i // TALL) * BQ + inside
            row = tl.where(inside < BQ, row, q_len)
            limit = limits(row, q_len, kv_len, CAUSAL)
            if VOTERS and RULE > 0:
                speaks = tl.load(voters + batch * voters_stride + row, mask=row < q_len, other=0)
                limit = tl.where(speaks != 0, limit, -1)
            codes = load_codes(q + bh * q_len * WIDTH, row, row < q_len, WIDTH, DEPTH)
            product = products(codes, right)
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
            rank = ordered(pooled)
            largest = -1
        _store_ranks(
            rank, block, column, attended_blocks, batch * attended_blocks_stride, visible,
            diagonal, ranks, bh, first, rows, stride, q_blocks, largest, PADDED,
        )  # fmt: skip
