"""Gradients of key blocks that fill a tile by themselves, over the key-major form of the mask."""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseloom.kernels.common import AttentionCall
from sparseloom.kernels.triton.configs import key_tiles, width
from sparseloom.kernels.triton.launch import (
    LOG2E,
    capability,
    compiler_options,
    mask_arguments,
    precision,
    strides,
)
from sparseloom.kernels.triton.tiles import (
    count_before,
    forbid,
    load_rows,
    mask_row_of,
    product,
    tile_positions,
    visible_keys,
)
from sparseloom.kernels.triton.transpose import key_major

KEYS_FILL_A_TILE = 16


@triton.jit
def backward_keys(
    query_ptr, key_ptr, value_ptr, grad_ptr, norm_ptr, centre_ptr, bias_ptr,
    grad_key_ptr, grad_value_ptr, indices, offsets, order, padding,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row, grad_batch, grad_head, grad_row,
    kv_heads, q_len, kv_len, kv_blocks, mask_heads, scale, plain_scale,
    MASK_BATCH: tl.constexpr, MASK_GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One tile of a key block: all its queries, of all heads that share the key head."""
    ranks = kv_blocks * SPLIT
    unit = tl.program_id(0) // ranks
    rank = tl.program_id(0) % ranks
    batch = (unit // kv_heads).to(tl.int64)
    kv_head = unit % kv_heads
    order_row = kv_head.to(tl.int64)
    if MASK_BATCH:
        order_row += batch * kv_heads
    block = tl.load(order + order_row * kv_blocks + rank // SPLIT)
    place = rank % SPLIT * TILE_K + tl.arange(0, ROWS)
    position = block * BLOCK_K + place
    there = (tl.arange(0, ROWS) < TILE_K) & (place < BLOCK_K) & (position < kv_len)
    seen = visible_keys(position, there, padding + batch * kv_len, kv_len, PADDED)
    row = position.to(tl.int64)
    base = key_ptr + batch * key_batch + kv_head.to(tl.int64) * key_head
    key = load_rows(base, row * key_row, seen, DIM, WIDTH, True)
    base = value_ptr + batch * value_batch + kv_head.to(tl.int64) * value_head
    value = load_rows(base, row * value_row, seen, VALUE_DIM, VALUE_WIDTH, True)
    key_acc = tl.zeros([ROWS, WIDTH], tl.float32)
    value_acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for member in range(KEY_GROUP):
        head = kv_head * KEY_GROUP + member
        mask_row = mask_row_of(batch * kv_heads * KEY_GROUP + head, kv_heads * KEY_GROUP, mask_heads, MASK_BATCH, MASK_GROUP, 1)  # noqa: E501  # fmt: skip
        bounds = offsets + mask_row * (kv_blocks + 1) + block
        start, end = tl.load(bounds), tl.load(bounds + 1)
        if CAUSAL:  # blocks that end before the first query that sees a key of this tile
            first = block * BLOCK_K + rank % SPLIT * TILE_K - (kv_len - q_len)
            start += count_before(indices, start, end, tl.maximum(first, 0) // BLOCK_Q)
        count = (end - start).to(tl.int32)
        head64 = head.to(tl.int64)
        query_base = query_ptr + batch * query_batch + head64 * query_head
        grad_base = grad_ptr + batch * grad_batch + head64 * grad_head
        sums = (batch * kv_heads * KEY_GROUP + head64) * q_len
        if HAS_BIAS:
            bias = tl.load(
                bias_ptr + (batch * kv_heads * KEY_GROUP + head64) * kv_len + position,
                mask=there, other=0.0,
            )  # fmt: skip
        for tile in tl.range(0, tl.cdiv(count * BLOCK_Q, TILE_Q), num_stages=STAGES):
            at, listed = tile_positions(indices + start, count, tile, BLOCK_Q, TILE_Q, True)
            listed = listed & (at < q_len)
            at64 = at.to(tl.int64)
            query = load_rows(query_base, at64 * query_row, listed, DIM, WIDTH, True)
            grad = load_rows(grad_base, at64 * grad_row, listed, VALUE_DIM, VALUE_WIDTH, True)
            norm = tl.load(norm_ptr + sums + at, mask=listed, other=float("inf"))
            centre = tl.load(centre_ptr + sums + at, mask=listed, other=0.0)
            scores = product(key, query, PRECISION, 1)
            scores = forbid(scores, position, seen, at + (kv_len - q_len), CAUSAL, 0)
            probs = tl.exp2(scores * scale - norm[None, :])
            steps = product(value, grad, PRECISION, 1)
            if HAS_BIAS:
                steps += bias[:, None]
            value_acc = tl.dot(probs.to(grad.dtype), grad, value_acc, input_precision=PRECISION)
            steps = probs * (steps - centre[None, :])
            key_acc = tl.dot(steps.to(query.dtype), query, key_acc, input_precision=PRECISION)
    place = (batch * kv_heads + kv_head) * kv_len + position
    column = tl.arange(0, WIDTH)[None, :]
    tl.store(
        grad_key_ptr + place[:, None] * DIM + column,
        (key_acc * plain_scale).to(grad_key_ptr.dtype.element_ty),
        mask=there[:, None] & (column < DIM),
    )
    column = tl.arange(0, VALUE_WIDTH)[None, :]
    tl.store(
        grad_value_ptr + place[:, None] * VALUE_DIM + column,
        value_acc.to(grad_value_ptr.dtype.element_ty),
        mask=there[:, None] & (column < VALUE_DIM),
    )


def key_gradients(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    norm: Tensor,
    centre: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value.

    Args:
        call: whose mask has blocks of ``KEYS_FILL_A_TILE`` keys or more.
        query: as the other tensors with neighbouring dims adjacent.
        key: (batch, kv_heads, kv_len, head_dim).
        value: (batch, kv_heads, kv_len, value_dim).
        grad: of the output.
        norm: of each row, ``row_norms``.
        centre: of each row, what the gradient of a score is lessened by.
        bias: added to the gradient of the probabilities, per query head and key.
    """
    arguments = key_arguments(call)
    programs = call.key.shape[0] * arguments["kv_heads"] * arguments["kv_blocks"]
    grads = key.new_empty(key.shape), value.new_empty(value.shape)
    backward_keys[(programs * arguments["SPLIT"],)](
        query, key, value, grad, norm, centre, centre if bias is None else bias, *grads,
        **strides(query=query, key=key, value=value, grad=grad), **arguments,
        HAS_BIAS=bias is not None,
    )  # fmt: skip
    return grads


def key_arguments(call: AttentionCall) -> dict[str, Any]:
    """What the kernel takes beside its tensors and their strides."""
    assert call.indices is not None
    assert call.offsets is not None
    form = key_major(call.indices, call.offsets, call.block_size, call.q_len, call.kv_len)
    dims = call.query.shape[3], call.value.shape[3]
    block_k = call.block_size[1]
    tiles = key_tiles(block_k, max(map(width, dims)), call.query.dtype, capability(call.query))
    mask = {**mask_arguments(call), "indices": form.indices, "offsets": form.offsets}
    del mask["q_blocks"]
    return {
        **mask,
        "order": _longest_first(call, form.offsets),
        "kv_heads": call.key.shape[1],
        "kv_blocks": form.offsets.shape[2] - 1,
        "scale": call.scale * LOG2E,
        "plain_scale": call.scale,
        "KEY_GROUP": call.groups,
        "TILE_Q": tiles.tile_q,
        "TILE_K": tiles.tile_k,
        "SPLIT": -(-block_k // tiles.tile_k),
        "ROWS": tiles.rows,
        "DIM": dims[0],
        "WIDTH": width(dims[0]),
        "VALUE_DIM": dims[1],
        "VALUE_WIDTH": width(dims[1]),
        "PRECISION": precision(),
        "STAGES": tiles.stages,
        **compiler_options(tiles),
    }


def _longest_first(call: AttentionCall, offsets: Tensor) -> Tensor:
    """The key blocks of each key head, those that most query blocks keep first."""
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    used = torch.arange(heads, device=offsets.device) * offsets.shape[1] // heads
    counts = offsets.diff(dim=-1)[:, used].unflatten(1, (kv_heads, -1)).sum(2)
    return counts.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
