"""What a row's scores are measured by where blocks are pooled, and its best key."""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

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


def row_stats(pairs: Pairs, pooling: str) -> Float[Tensor, "batch heads q_len 2"]:
    """Factor f and offset o of each row, so that a product d counts as (d - o)·f: the logarithm of
    its probability to the base 2 (mass), or standard deviations from the largest (max)."""
    batch, heads, q_len, width = pairs.q.shape
    stats = pairs.scale.new_empty(batch, heads, q_len, 2)
    keys = KEYS_OF_TILE if pooling == "mass" else KEYS_OF_TILE // 2  # more would spill registers
    _row_stats[(-(-q_len // TILE), batch * heads)](
        pairs.q, pairs.k, pairs.scale, flags(pairs.attended), stats, heads, q_len,
        pairs.k.shape[2], shared(pairs.attended), WIDTH=width, DEPTH=depth(width),
        CAUSAL=pairs.is_causal, PADDED=pairs.attended is not None, RULE=RULES[pooling],
        ROWS=TILE, KEYS=keys, num_warps=4, num_stages=2,
    )  # fmt: skip
    return stats


def best_keys(pairs: Pairs) -> Int[Tensor, "batch heads q_len"]:
    """The best key of each row, the first of equals; beyond all keys where there is none."""
    batch, heads, q_len, width = pairs.q.shape
    best = torch.empty(batch, heads, q_len, dtype=torch.int32, device=pairs.q.device)
    _best_keys[(-(-q_len // TILE), batch * heads)](
        pairs.q, pairs.k, flags(pairs.attended), best, heads, q_len, pairs.k.shape[2],
        shared(pairs.attended), WIDTH=width, DEPTH=depth(width), CAUSAL=pairs.is_causal,
        PADDED=pairs.attended is not None, ROWS=TILE, KEYS=KEYS_OF_TILE, num_warps=4, num_stages=2,
    )  # fmt: skip
    return best


# --------------------------------------------------------------------------- kernels


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
    limit = limits(row, q_len, kv_len, CAUSAL)
    codes = load_codes(q + bh * q_len * WIDTH, row, row < q_len, WIDTH, DEPTH)
    factor = tl.load(scale + bh * q_len + row, mask=row < q_len, other=1.0)
    if RULE == 1:
        factor *= 1.4426950408889634
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)  # of exponentials, or the mean
    squares = tl.zeros([ROWS], tl.float32)  # of what lies off the mean
    count = tl.zeros([ROWS], tl.float32)
    for at in range(0, tl.minimum(kv_len, tl.max(limit, 0) + 1), KEYS):
        key = at + tl.arange(0, KEYS)
        right = load_codes(k + bh * kv_len * WIDTH, key, key < kv_len, WIDTH, DEPTH)
        product = products(codes, right).to(tl.float32)
        place = places(key, kv_len, attended, batch * attended_stride, PADDED)
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
        total = tl.where(some, total, 1.0)
        top = tl.where(some, top + tl.log2(total) / factor, float("inf"))
    else:
        # The scale of a row cancels. Scores that are all the same lie on their largest one.
        unit = tl.sqrt(squares / tl.maximum(count, 1.0))
        factor = tl.where(unit > 0, 1.0 / tl.where(unit > 0, unit, 1.0), 0.0)
    to = stats + (bh * q_len + row) * 2
    tl.store(to, factor, mask=row < q_len)
    tl.store(to + 1, tl.where(top > float("-inf"), top, 0.0), mask=row < q_len)


@triton.jit
def _best_keys(
    q, k, attended, best, heads, q_len, kv_len, attended_stride, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    batch = (bh // heads).to(tl.int32)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    limit = limits(row, q_len, kv_len, CAUSAL)
    codes = load_codes(q + bh * q_len * WIDTH, row, row < q_len, WIDTH, DEPTH)
    top = tl.full([ROWS], -2147483648, tl.int32)
    found = tl.full([ROWS], 1 << 30, tl.int32)
    for at in range(0, tl.minimum(kv_len, tl.max(limit, 0) + 1), KEYS):
        key = at + tl.arange(0, KEYS)
        right = load_codes(k + bh * kv_len * WIDTH, key, key < kv_len, WIDTH, DEPTH)
        product = products(codes, right).to(tl.int32)
        place = places(key, kv_len, attended, batch * attended_stride, PADDED)
        product = tl.where(place[None] <= limit[:, None], product, -2147483648)
        here = tl.max(product, 1)
        where = tl.min(tl.where(product == here[:, None], place[None], 1 << 30), 1)
        found = tl.where(here > top, where, found)
        top = tl.maximum(top, here)
    tl.store(best + bh * q_len + row, found, mask=row < q_len)
