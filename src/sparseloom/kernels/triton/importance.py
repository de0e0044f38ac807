"""Column sums of the probabilities: what cascade pruning ranks keys by.

A probability needs the final sum of its row, so this is a second pass over the scores, after the
log-sum-exp is known. Each query block leaves one number per kept key; ``by_key`` adds them up.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sparseloom.kernels.common import AttentionCall
from sparseloom.kernels.triton.by_key import sum_by_key, unit_starts
from sparseloom.kernels.triton.configs import forward_tiles
from sparseloom.kernels.triton.launch import LOG2E, Launch, adjacent, strides
from sparseloom.kernels.triton.tiles import (
    forbid,
    kept_list,
    load_rows,
    owned_rows,
    product,
    tile_positions,
    visible_keys,
)


@triton.jit
def column_sums(
    query_ptr, key_ptr, norm_ptr, parts, starts, indices, offsets, order, padding,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    first_unit, units, heads, q_len, kv_len, q_blocks, mask_heads, scale,
    MASK_BATCH: tl.constexpr, MASK_GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    SPLIT: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    AXIS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The share of one query block in the sums of its kept keys."""
    unit, mask_row, block, part, head, position, there = owned_rows(
        order, first_unit, units, mask_heads, q_blocks, q_len,
        MASK_BATCH, MASK_GROUP, BLOCK_Q, TILE_Q, SPLIT, PACK, ROWS,
    )  # fmt: skip
    start, count = kept_list(
        indices, offsets, mask_row, block, part, q_blocks, q_len, kv_len,
        BLOCK_Q, BLOCK_K, TILE_Q, CAUSAL,
    )  # fmt: skip
    limit = position + (kv_len - q_len)
    batch = (unit // units).to(tl.int64)
    kv_head = (unit % units * PACK // KEY_GROUP).to(tl.int64)
    row = head.to(tl.int64) * query_head + position.to(tl.int64) * query_row
    query = load_rows(query_ptr + batch * query_batch, row, there, DIM, WIDTH, True)
    norm = tl.load(norm_ptr + (batch * heads + head) * q_len + position, mask=there, other=float("inf"))  # noqa: E501  # fmt: skip
    key_base = key_ptr + batch * key_batch + kv_head * key_head
    padding += batch * kv_len
    slot = tl.load(starts + unit) - tl.load(offsets + mask_row * (q_blocks + 1)) + start
    for tile in tl.range(0, tl.cdiv(count * BLOCK_K, TILE_K), num_stages=STAGES):
        place, listed = tile_positions(indices + start, count, tile, BLOCK_K, TILE_K, True)
        seen = visible_keys(place, listed, padding, kv_len, PADDED)
        key = load_rows(key_base, place.to(tl.int64) * key_row, seen, DIM, WIDTH, True)
        scores = product(query, key, PRECISION, AXIS)
        scores = forbid(scores, place, seen, limit, CAUSAL, AXIS)
        probs = tl.exp2(scores * scale - tl.expand_dims(norm, AXIS))
        sums = tl.sum(probs, 1 - AXIS)
        at = tile * TILE_K + tl.arange(0, TILE_K)
        at = ((slot + at // BLOCK_K) * SPLIT + part) * BLOCK_K + at % BLOCK_K
        tl.store(parts + at, sums, mask=listed)


def key_importance(
    call: AttentionCall, lse: Float[Tensor, "batch heads q_len"]
) -> Float[Tensor, "batch heads kv_len"]:
    """Column sums of the probabilities, of each query head."""
    query, key = adjacent(call.query), adjacent(call.key)
    launch = Launch.make(call, forward_tiles, pack=False)
    starts = unit_starts(launch)
    batch, heads = query.shape[:2]
    block_k = call.block_size[1]
    parts = shares(launch, batch * heads, block_k)
    arguments = launch.arguments()
    del arguments["VALUE_DIM"], arguments["VALUE_WIDTH"]
    column_sums[launch.grid()](
        query, key, row_norms(lse), parts, starts,
        **strides(query=query, key=key), **arguments,
    )  # fmt: skip
    kv_blocks = -(-call.kv_len // block_k)
    out = query.new_empty(batch * heads, kv_blocks, block_k, dtype=torch.float32)
    sum_by_key(launch, parts, out, starts)
    return out.view(batch, heads, -1)[..., : call.kv_len]


def row_norms(lse: Float[Tensor, "batch heads q_len"]) -> Float[Tensor, "batch heads q_len"]:
    """What the exponent of a score is lessened by, base 2; rows without a key get no share."""
    return lse.masked_fill(lse == -torch.inf, torch.inf) * LOG2E


def shares(launch: Launch, units: int, columns: int, entries: int | None = None) -> Tensor:
    """A buffer of ``columns`` fp32 numbers for each entry and program of so many units.

    Under causality, what lies past the last visible key is never written and must be 0.
    """
    call = launch.call
    assert call.indices is not None
    assert call.offsets is not None
    if entries is None:  # every mask row is used equally often
        entries = call.indices.shape[0] * units // call.offsets[..., 0].numel()
    make = torch.zeros if call.is_causal else torch.empty
    size = entries * launch.split * columns
    return make(size, dtype=torch.float32, device=call.query.device)
