"""Sparse attention on the GPU: scores, online softmax and values of kept pairs in one kernel.

Query rows are packed until they fill a tile. With 64 rows or more they take the M side of the
tensor-core products; with fewer, as in the paper's (8, 1) and (4, 1), the gathered keys take it:
Sᵀ = K Qᵀ and Outᵀ = Vᵀ Pᵀ, with the rows as a narrow N.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparseloom.kernels.common import AttentionCall, ForwardResult
from sparseloom.kernels.triton.configs import forward_tiles
from sparseloom.kernels.triton.importance import key_importance
from sparseloom.kernels.triton.launch import Launch, adjacent, strides
from sparseloom.kernels.triton.tiles import (
    accumulate,
    forbid,
    kept_list,
    load_rows,
    owned_rows,
    product,
    tile_positions,
    visible_keys,
)


@triton.jit
def _attend(
    acc, total, top, query, key_base, value_base, key_row, value_row, padding,
    entries, count, first, end, limit, kv_len, scale,
    BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    PADDED: tl.constexpr, AXIS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tiles ``first … end - 1``; ``scale`` includes log2 e."""
    # The few masked tiles at the end get no buffers beyond those of the others.
    for tile in tl.range(first, end, num_stages=2 if MASKED else STAGES):
        place, there = tile_positions(entries, count, tile, BLOCK_K, TILE_K, MASKED)
        if MASKED:
            there = visible_keys(place, there, padding, kv_len, PADDED)
        row = place.to(tl.int64)
        key = load_rows(key_base, row * key_row, there, DIM, WIDTH, MASKED)
        scores = product(query, key, PRECISION, AXIS)
        if MASKED:
            scores = forbid(scores, place, there, limit, CAUSAL, AXIS)
        risen = tl.maximum(top, tl.max(scores, AXIS) * scale)
        shift = risen
        if MASKED:
            shift = tl.where(risen == -float("inf"), 0.0, risen)  # nothing seen so far
        probs = tl.exp2(scores * scale - tl.expand_dims(shift, AXIS))
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(probs, AXIS)
        top = risen
        value = load_rows(value_base, row * value_row, there, VALUE_DIM, VALUE_WIDTH, MASKED)
        acc = acc * tl.expand_dims(fade, AXIS)
        acc = accumulate(acc, probs.to(value.dtype), value, PRECISION, AXIS)
    return acc, total, top


@triton.jit
def attention_forward(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, indices, offsets, order, padding,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    first_unit, units, heads, q_len, kv_len, q_blocks, mask_heads, margin, scale,
    MASK_BATCH: tl.constexpr, MASK_GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    SPLIT: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, AXIS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """One tile of query rows. The first tiles of its list need no mask: all but ``margin`` keys
    at the end are visible to every row."""
    unit, mask_row, block, part, head, position, there = owned_rows(
        order, first_unit, units, mask_heads, q_blocks, q_len,
        MASK_BATCH, MASK_GROUP, BLOCK_Q, TILE_Q, SPLIT, PACK, ROWS,
    )  # fmt: skip
    start, count = kept_list(
        indices, offsets, mask_row, block, part, q_blocks, q_len, kv_len,
        BLOCK_Q, BLOCK_K, TILE_Q, CAUSAL,
    )  # fmt: skip
    whole = tl.maximum(count * BLOCK_K - margin, 0) // TILE_K
    limit = position + (kv_len - q_len)  # the last key that a row sees
    batch = (unit // units).to(tl.int64)
    kv_head = (unit % units * PACK // KEY_GROUP).to(tl.int64)
    row = head.to(tl.int64) * query_head + position.to(tl.int64) * query_row
    query = load_rows(query_ptr + batch * query_batch, row, there, DIM, WIDTH, True)
    key_base = key_ptr + batch * key_batch + kv_head * key_head
    value_base = value_ptr + batch * value_batch + kv_head * value_head
    padding += batch * kv_len

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if AXIS == 0:
        acc = tl.zeros([VALUE_WIDTH, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    acc, total, top = _attend(
        acc, total, top, query, key_base, value_base, key_row, value_row, padding,
        indices + start, count, 0, whole, limit, kv_len, scale,
        BLOCK_K, TILE_K, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH,
        CAUSAL, PADDED, AXIS, PRECISION, STAGES, False,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, query, key_base, value_base, key_row, value_row, padding,
        indices + start, count, whole, tl.cdiv(count * BLOCK_K, TILE_K), limit, kv_len, scale,
        BLOCK_K, TILE_K, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH,
        CAUSAL, PADDED, AXIS, PRECISION, STAGES, True,
    )  # fmt: skip

    some = tl.where(total == 0.0, 1.0, total)
    if AXIS == 0:
        out = tl.trans(acc / some[None, :])
    else:
        out = acc / some[:, None]
    place = (batch * heads + head) * q_len + position
    column = tl.arange(0, VALUE_WIDTH)[None, :]
    tl.store(
        out_ptr + place[:, None] * VALUE_DIM + column,
        out.to(out_ptr.dtype.element_ty),
        mask=there[:, None] & (column < VALUE_DIM),
    )
    if HAS_LSE:
        lse = tl.where(total == 0.0, -float("inf"), (top + tl.log2(some)) * 0.6931471805599453)
        tl.store(lse_ptr + place, lse, mask=there)


def forward(call: AttentionCall, *, lse: bool, importance: bool) -> ForwardResult:
    """Attention over the kept pairs; see ``reference.forward`` for the meaning.

    Beside the results it allocates one number per query block (their order), and for importance
    one per kept key of each query block.
    """
    query, key, value = (adjacent(t) for t in call[:3])
    launch = Launch.make(call, forward_tiles)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    sums = query.new_empty(query.shape[:3], dtype=torch.float32) if lse or importance else None
    attention_forward[launch.grid()](
        query, key, value, out, out if sums is None else sums,
        **strides(query=query, key=key, value=value),
        **launch.arguments(), margin=_margin(call, launch.tiles.tile_q),
        HAS_LSE=sums is not None,
    )  # fmt: skip
    if not importance:
        return ForwardResult(out, sums, None, None)
    assert sums is not None
    columns = key_importance(call, sums)
    magnitude = torch.linalg.vector_norm(out, 1, (-2, -1), dtype=torch.float32)
    return ForwardResult(out, sums if lse else None, columns, magnitude)


def _margin(call: AttentionCall, tile_q: int) -> int:
    """Keys at the end of a list that some row of a tile may not see.

    Keys ascend, and the list ends with the block of the last visible key: what the first row does
    not see are at most as many keys as rows follow it, and the rest of that block.
    """
    block_k = call.block_size[1]
    if call.key_padding is not None:
        return 1 << 30
    if call.is_causal:
        return tile_q + block_k - 2
    return block_k - 1 if call.kv_len % block_k else 0
