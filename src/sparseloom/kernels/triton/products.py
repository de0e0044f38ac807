"""Products of two sets of codes, tile by tile: exact integers from int8 tensor cores."""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float32, Int64, Shaped
from torch import Tensor

from sparseloom.kernels.triton.sizes import power_of_two

TILE = 64  # rows of a tile of products
KEYS_OF_TILE = 128
RULES = {"mass": 1, "max": 2}
_NARROWEST = 32  # columns that an int8 product needs


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


def depth(width: int) -> int:
    """Columns of a product, zeros included."""
    return max(_NARROWEST, power_of_two(width))


def shared(tensor: Tensor | None) -> int:
    """Elements from one batch entry to the next; 0 where all share one."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def flags(tensor: Tensor | None) -> Tensor | None:
    """Booleans as bytes."""
    return None if tensor is None else tensor.view(torch.uint8)


# --------------------------------------------------------------------------- kernels


@triton.jit
def load_codes(base, row, valid, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """Rows of codes, filled up with zeros."""
    column = tl.arange(0, DEPTH)
    at = base + row.to(tl.int64)[:, None] * WIDTH + column[None]
    return tl.load(at, mask=valid[:, None] & (column[None] < WIDTH), other=0.0)


@triton.jit
def products(q, k):
    """All products of two sets of rows: exact integers of int8, in int32, else fp32."""
    if q.dtype == tl.int8:
        return tl.dot(q, tl.trans(k), out_dtype=tl.int32)
    elif q.dtype == tl.float32:
        return tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="tf32x3")
    else:
        return tl.dot(q, tl.trans(k))  # fp8


@triton.jit
def limits(row, q_len, kv_len, CAUSAL: tl.constexpr):
    """The last key that each query may see."""
    if CAUSAL:
        last = row + kv_len - q_len
    else:
        last = tl.zeros_like(row) + kv_len - 1
    return tl.where(row < q_len, last, -1)


@triton.jit
def places(key, kv_len, attended, entry, PADDED: tl.constexpr):
    """Keys to compare with limits: those that nobody may see lie behind all limits."""
    there = key < kv_len
    if PADDED:
        there = there & (tl.load(attended + entry + key, mask=there, other=0) != 0)
    return tl.where(there, key, 1 << 30)
