"""Gradients of sparse attention: probabilities are made again from the log-sum-exp, tile by tile.

The gradient of the queries follows the rows of the mask. Those of keys and values are sums over
the query blocks that keep a key, and nothing is added atomically, so every call gives the same
bits. There are two ways:

- key blocks of 16 and more fill a tile by themselves: they walk the key-major form of the mask;
- single gathered keys do not (64 neighbouring keys are kept by almost every query block), but
  the kernel over query blocks has them in dense tiles anyway: it leaves its share for each kept
  key in a buffer, and ``by_key`` adds these up. The buffer has head_dim + value_dim fp32 numbers
  per kept key of a query block; units of heads take turns with it where it would be too long.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sparseloom.kernels.common import AttentionCall
from sparseloom.kernels.triton.by_key import sum_by_key, unit_starts
from sparseloom.kernels.triton.configs import backward_tiles
from sparseloom.kernels.triton.forward import forward
from sparseloom.kernels.triton.importance import row_norms, shares
from sparseloom.kernels.triton.key_gradients import KEYS_FILL_A_TILE, key_gradients
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

SHARE_BYTES = 1 << 30
"""What the shares of a run of heads may take; a single key head takes what it needs."""


@triton.jit
def backward_queries(
    query_ptr, key_ptr, value_ptr, grad_ptr, norm_ptr, centre_ptr, bias_ptr,
    grad_query_ptr, key_parts, value_parts, starts, indices, offsets, order, padding,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row, grad_batch, grad_head, grad_row,
    first_unit, units, heads, q_len, kv_len, q_blocks, mask_heads, scale, plain_scale,
    MASK_BATCH: tl.constexpr, MASK_GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    SPLIT: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, AXIS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of query rows, and with ``SHARES`` what it adds to its keys' ones.

    ``bias`` is added to the gradient of the probabilities, per head and key.
    """
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
    row = head.to(tl.int64) * grad_head + position.to(tl.int64) * grad_row
    grad = load_rows(grad_ptr + batch * grad_batch, row, there, VALUE_DIM, VALUE_WIDTH, True)
    place = (batch * heads + head) * q_len + position
    norm = tl.load(norm_ptr + place, mask=there, other=float("inf"))
    centre = tl.load(centre_ptr + place, mask=there, other=0.0)
    key_base = key_ptr + batch * key_batch + kv_head * key_head
    value_base = value_ptr + batch * value_batch + kv_head * value_head
    padding += batch * kv_len
    bias_row = (batch * heads + head) * kv_len
    if SHARES:
        slot = tl.load(starts + unit) - tl.load(starts + first_unit) + start
        slot -= tl.load(offsets + mask_row * (q_blocks + 1))
    if AXIS == 0:
        acc = tl.zeros([WIDTH, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in tl.range(0, tl.cdiv(count * BLOCK_K, TILE_K), num_stages=STAGES):
        at, listed = tile_positions(indices + start, count, tile, BLOCK_K, TILE_K, True)
        seen = visible_keys(at, listed, padding, kv_len, PADDED)
        key = load_rows(key_base, at.to(tl.int64) * key_row, seen, DIM, WIDTH, True)
        value = load_rows(
            value_base, at.to(tl.int64) * value_row, seen, VALUE_DIM, VALUE_WIDTH, True
        )
        scores = forbid(product(query, key, PRECISION, AXIS), at, seen, limit, CAUSAL, AXIS)
        probs = tl.exp2(scores * scale - tl.expand_dims(norm, AXIS))
        steps = product(grad, value, PRECISION, AXIS)
        if HAS_BIAS:
            biased = tl.expand_dims(bias_row, AXIS) + tl.expand_dims(at, 1 - AXIS)
            live = tl.expand_dims(there, AXIS) & tl.expand_dims(seen, 1 - AXIS)
            steps += tl.load(bias_ptr + biased, mask=live, other=0.0)
        steps = (probs * (steps - tl.expand_dims(centre, AXIS))).to(key.dtype)
        acc = accumulate(acc, steps, key, PRECISION, AXIS)
        if SHARES:
            probs = probs.to(key.dtype)
            if AXIS == 1:
                probs = tl.trans(probs)
                steps = tl.trans(steps)
            lane = tile * TILE_K + tl.arange(0, TILE_K)
            lane = ((slot + lane // BLOCK_K) * SPLIT + part) * BLOCK_K + lane % BLOCK_K
            column = tl.arange(0, VALUE_WIDTH)[None, :]
            tl.store(
                value_parts + lane[:, None] * VALUE_DIM + column,
                tl.dot(probs, grad, input_precision=PRECISION),
                mask=listed[:, None] & (column < VALUE_DIM),
            )
            column = tl.arange(0, WIDTH)[None, :]
            tl.store(
                key_parts + lane[:, None] * DIM + column,
                tl.dot(steps, query, input_precision=PRECISION) * plain_scale,
                mask=listed[:, None] & (column < DIM),
            )
    if AXIS == 0:
        acc = tl.trans(acc)
    column = tl.arange(0, WIDTH)[None, :]
    tl.store(
        grad_query_ptr + place[:, None] * DIM + column,
        (acc * plain_scale).to(grad_query_ptr.dtype.element_ty),
        mask=there[:, None] & (column < DIM),
    )


def backward(
    call: AttentionCall,
    out: Float[Tensor, "batch heads q_len value_dim"],
    lse: Float[Tensor, "batch heads q_len"],
    grad_out: Float[Tensor, "batch heads q_len value_dim"],
    grad_lse: Float[Tensor, "batch heads q_len"] | None,
    grad_key_importance: Float[Tensor, "batch heads kv_len"] | None,
    grad_head_importance: Float[Tensor, "batch heads"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, for the cases of ``reference.backward``.

    As in FlashAttention, the row sums of P ∘ dP are ``grad_out · out``, so ``out`` is used as it
    was rounded.
    """
    query, key, value = (adjacent(t) for t in call[:3])
    if grad_head_importance is not None:
        grad_out = grad_out.float() + out.sign().float() * grad_head_importance[..., None, None]
    centre = (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        centre -= grad_lse.masked_fill(lse == -torch.inf, 0)
    if grad_key_importance is not None:
        # Σ_j P[i, j] g[j] is attention with g as the values.
        weighted = call._replace(
            key=call.key.repeat_interleave(call.groups, 1),
            value=grad_key_importance[..., None].to(query.dtype),
        )
        centre += forward(weighted, lse=False, importance=False).out[..., 0].float()
        grad_key_importance = grad_key_importance.float().contiguous()
    grad = adjacent(grad_out.to(query.dtype))
    norm = row_norms(lse)
    launch = Launch.make(call, backward_tiles)
    grad_query = query.new_empty(query.shape)
    whole = call.block_size[1] >= KEYS_FILL_A_TILE
    nothing = centre  # in place of what a kernel does not touch
    bias = centre if grad_key_importance is None else grad_key_importance
    inputs = {
        **strides(query=query, key=key, value=value, grad=grad),
        "plain_scale": call.scale,
        "SHARES": not whole,
        "HAS_BIAS": grad_key_importance is not None,
    }

    def run(first: int, units: int, key_parts: Tensor, value_parts: Tensor, starts: Tensor) -> None:
        backward_queries[launch.grid(units)](
            query, key, value, grad, norm, centre, bias, grad_query,
            key_parts, value_parts, starts,
            **inputs, **launch.arguments(first),
        )  # fmt: skip

    if whole:
        run(0, query.shape[0] * launch.units, nothing, nothing, nothing)
        found = key_gradients(call, query, key, value, grad, norm, centre, grad_key_importance)
        return grad_query, *found
    return grad_query, *_from_shares(launch, run)


def _from_shares(launch: Launch, run: Callable[..., None]) -> tuple[Tensor, Tensor]:
    """Gradients of key and value, from what ``run`` leaves for each kept key."""
    call = launch.call
    (batch, kv_heads, kv_len, dim), value_dim = call.key.shape, call.value.shape[3]
    block_k = call.block_size[1]
    lists = call.groups // launch.tiles.pack  # units of one key head
    kv_blocks = -(-kv_len // block_k)
    starts = unit_starts(launch)
    grads = [
        call.key.new_empty(batch * kv_heads, kv_blocks, block_k * width)
        for width in (dim, value_dim)
    ]
    for first, end, entries in _runs(launch, starts, lists, block_k * (dim + value_dim)):
        units = (end - first) * lists
        parts = [shares(launch, units, block_k * width, entries) for width in (dim, value_dim)]
        run(first * lists, units, *parts, starts)
        for part, grad in zip(parts, grads, strict=True):
            sum_by_key(launch, part, grad[first:end], starts, lists=lists, first_unit=first * lists)
    key, value = (g.view(batch, kv_heads, kv_blocks * block_k, -1)[:, :, :kv_len] for g in grads)
    return key, value


def _runs(
    launch: Launch, starts: Tensor, lists: int, columns: int
) -> list[tuple[int, int, int | None]]:
    """Key heads (of all batch entries) whose shares fit together: first, end, their entries.

    Only where not all fit at once are the lengths of the lists looked at on the host.
    """
    call = launch.call
    assert call.indices is not None
    assert call.offsets is not None
    groups = call.query.shape[0] * launch.units // lists
    most = SHARE_BYTES // (4 * launch.split * columns)
    if call.indices.shape[0] * groups * lists <= most * call.offsets[..., 0].numel():
        return [(0, groups, None)]
    ends = starts[::lists].tolist()
    runs: list[tuple[int, int, int | None]] = []
    first = 0
    for group in range(1, groups + 1):
        if group == groups or ends[group + 1] - ends[first] > most:
            runs.append((first, group, ends[group] - ends[first]))
            first = group
    return runs
