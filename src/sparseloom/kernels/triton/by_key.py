"""Sums over the query blocks that keep a key, without atomics: the same bits every time.

Kernels over query blocks leave their share for each kept key in a buffer, in the order of the
mask. Here each key adds up its shares in the order of the key-major form.
"""
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from sparseloom.kernels.triton.launch import Launch
from sparseloom.kernels.triton.tiles import mask_row_of
from sparseloom.kernels.triton.transpose import key_major


@triton.jit
def add_by_key(
    parts, out, starts, offsets, key_order, key_offsets, first_unit, units, mask_heads, q_blocks,
    kv_blocks,
    MASK_BATCH: tl.constexpr, MASK_GROUP: tl.constexpr, PACK: tl.constexpr, LISTS: tl.constexpr,
    SPLIT: tl.constexpr, COLUMNS: tl.constexpr, TILE_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One key block, and ``LISTS`` units of heads, whose shares make one sum."""
    key_block = tl.program_id(0) % kv_blocks
    group = tl.program_id(0) // kv_blocks
    column = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    total = tl.zeros([TILE_C], tl.float32)
    for member in range(LISTS):
        unit = first_unit + group * LISTS + member
        mask_row = mask_row_of(unit, units, mask_heads, MASK_BATCH, MASK_GROUP, PACK)
        row = key_offsets + mask_row * (kv_blocks + 1) + key_block
        start, end = tl.load(row), tl.load(row + 1)
        # Where the entries of this unit begin in `parts`, less where those of its mask row do.
        shift = tl.load(starts + unit) - tl.load(starts + first_unit)
        shift -= tl.load(offsets + mask_row * (q_blocks + 1))
        for first in range(start, end, TILE):
            place = first + tl.arange(0, TILE)
            slot = shift + tl.load(key_order + place, mask=place < end, other=0)
            for part in range(SPLIT):
                at = (slot * SPLIT + part)[:, None] * COLUMNS + column[None, :]
                there = (place < end)[:, None] & (column < COLUMNS)[None, :]
                total += tl.sum(tl.load(parts + at, mask=there, other=0.0), 0)
    at = (group.to(tl.int64) * kv_blocks + key_block) * COLUMNS + column
    tl.store(out + at, total.to(out.dtype.element_ty), mask=column < COLUMNS)


def unit_starts(launch: Launch) -> Int64[Tensor, " units_plus_1"]:
    """Where the entries of each unit of heads begin, if all units are laid one after another."""
    offsets = launch.call.offsets
    assert offsets is not None
    counts = offsets[..., -1] - offsets[..., 0]
    batch, heads = launch.call.query.shape[:2]
    first_head = torch.arange(0, heads, launch.tiles.pack, device=offsets.device)
    counts = counts[:, first_head * offsets.shape[1] // heads].expand(batch, -1)
    return torch.nn.functional.pad(counts.reshape(-1).cumsum(0), (1, 0))


def sum_by_key(
    launch: Launch,
    parts: Float[Tensor, " size"],
    out: Float[Tensor, "groups kv_blocks columns"],
    starts: Int64[Tensor, " units_plus_1"],
    *,
    lists: int = 1,
    first_unit: int = 0,
) -> None:
    """Write the sums of the shares of a run of units.

    Args:
        launch: that of the kernel which wrote the shares.
        parts: ``columns`` numbers per entry of the mask and program of a query block.
        out: written; one group for ``lists`` neighbouring units.
        starts: ``unit_starts``.
        lists: units that add up.
        first_unit: of the run.
    """
    call, (groups, kv_blocks, columns) = launch.call, out.shape
    assert call.indices is not None
    assert call.offsets is not None
    form = key_major(call.indices, call.offsets, call.block_size, call.q_len, call.kv_len)
    tile_c = min(128, triton.next_power_of_2(columns))
    add_by_key[(groups * kv_blocks, triton.cdiv(columns, tile_c))](
        parts, out, starts, call.offsets, form.order, form.offsets,
        first_unit, launch.units, call.offsets.shape[1], call.offsets.shape[2] - 1, kv_blocks,
        MASK_BATCH=call.offsets.shape[0] > 1,
        MASK_GROUP=call.query.shape[1] // call.offsets.shape[1],
        PACK=launch.tiles.pack, LISTS=lists, SPLIT=launch.split,
        COLUMNS=columns, TILE_C=tile_c, TILE=max(1, 1024 // tile_c), num_warps=4,
    )  # fmt: skip
