"""Hidden states to the codes of q̃ and k̃, in three kernels (`methods/predictor.py`, equation 5):

quantise X, multiply its codes with those of P·W̃ on the tensor cores, then rotate, scale and
quantise the rows of each head.  The products are exact, and the rest rounds where the reference
rounds (no fused multiply-add, correctly rounded division), so the codes are the same.

Between them stand X's codes, a quarter to a half of X, and the products in fp32.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Shaped
from torch import Tensor

from sparseloom.kernels.prediction import Encoded, Rotation
from sparseloom.kernels.triton import arithmetic
from sparseloom.kernels.triton.sizes import power_of_two

# Tiles of the product, and what is loaded ahead; checked by compiling for sm_80 and sm_90.
TILES = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}
LAUNCH = {"num_warps": 8, "num_stages": 3}
_ROWS = 16  # of a head that one program encodes


class Weights(NamedTuple):
    """Codes of P·[W̃_Q, W̃_K], a row for each column of it, filled up to whole tiles of zeros."""

    codes: Shaped[Tensor, "padded_outputs depth"]
    scale: Float[Tensor, " outputs"]
    hidden_size: int


def pack_weights(
    codes: Float[Tensor, "hidden_size outputs"], scale: Float[Tensor, " outputs"]
) -> Weights:
    """Pack integer-valued codes such that both sides of the product lie along its depth."""
    depth, outputs = codes.shape
    wide = torch.nn.functional.pad(
        codes.to(torch.int8), (0, -outputs % TILES["BLOCK_N"], 0, -depth % TILES["BLOCK_K"])
    )
    return Weights(wide.T.contiguous(), scale.contiguous(), depth)


def encode(
    hidden: Float[Tensor, "batch length hidden_size"],
    weights: Weights,
    *,
    bits: int,
    heads: int,
    width: int,
    input_scale: float | Tensor,
    key_scale: Float[Tensor, " heads"],
    rotation: Rotation | None = None,
) -> Encoded | None:
    """Codes of q̃ and k̃ from hidden states of fp32, bf16 or fp16.

    Args:
        input_scale: a number, or a tensor of one on the device, which then is not waited for.

    Returns:
        The codes, or None where a number is not finite.  In a CUDA graph nobody can look: there
        what is not finite gets code 0.
    """
    batch, length, hidden_size = hidden.shape
    if hidden_size != weights.hidden_size:
        raise ValueError(f"hidden must end in {weights.hidden_size}, got {tuple(hidden.shape)}")
    device = hidden.device
    arithmetic.check(bits, device)
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        hidden = hidden.float()
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    unit = torch.as_tensor(input_scale, dtype=torch.float32, device=device).reshape(1)
    odd = torch.zeros(1, dtype=torch.int32, device=device)
    depth, dtype = weights.codes.shape[1], arithmetic.code_dtype()
    codes = torch.empty(batch * length, depth, dtype=dtype, device=device)
    _quantise[(batch * length,)](
        hidden, unit, codes, odd, length, hidden.stride(0), hidden.stride(1),
        float(2 ** (bits - 1) - 1), SIZE=hidden_size, DEPTH=depth,
        BLOCK=min(4096, power_of_two(depth)), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    low = _multiply(codes, weights.codes.to(dtype), len(weights.scale))
    q = torch.empty(batch, heads, length, width, dtype=torch.int8, device=device)
    k = torch.empty_like(q)
    q_scale = torch.empty(batch, heads, length, 1, dtype=torch.float32, device=device)
    cos = sin = chosen = None
    if rotation is not None:
        cos, sin = (side.float().expand(batch, length, -1) for side in rotation[:2])
        if cos.stride(-1) != 1 or sin.stride() != cos.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        chosen = rotation.chosen.contiguous()
    _encode[(-(-length // _ROWS), heads, batch)](
        low, weights.scale * unit, cos, sin, chosen, key_scale.contiguous(), q, k, q_scale,
        length, 0 if cos is None else cos.stride(0), 0 if cos is None else cos.stride(1),
        0 if chosen is None else len(chosen), float(2 ** (bits - 1) - 1), 1 / math.sqrt(width),
        HEADS=heads, WIDTH=width, DEPTH=max(2, power_of_two(width)),
        ROTATE=rotation is not None, TERNARY=bits == 2, ROWS=_ROWS, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not capturing and int(odd):
        return None
    return Encoded(q, k, q_scale, codes.numel() + 4 * low.numel())


def _multiply(
    codes: Shaped[Tensor, "rows depth"], weights: Shaped[Tensor, "columns depth"], outputs: int
) -> Float[Tensor, "rows outputs"]:
    """Products of codes as fp32 numbers, the first ``outputs`` columns."""
    rows, depth = codes.shape
    low = torch.empty(rows, outputs, dtype=torch.float32, device=codes.device)
    grid = (-(-rows // TILES["BLOCK_M"]) * (len(weights) // TILES["BLOCK_N"]),)
    _product[grid](codes, weights, low, rows, outputs, depth, **TILES, **LAUNCH)
    return low


# --------------------------------------------------------------------------- kernels


@triton.jit
def _code(number, most):
    """The nearest integers, half to even, within ±most."""
    return (tl.minimum(tl.maximum(number, -most), most) + 12582912.0) - 12582912.0


@triton.jit
def _quantise(
    hidden, unit, codes, odd, length, batch_stride, row_stride, most, SIZE: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    hidden += row // length * batch_stride + row % length * row_stride
    scale = tl.load(unit)
    strange = tl.zeros([BLOCK], tl.int32)
    for at in range(0, DEPTH, BLOCK):
        column = at + tl.arange(0, BLOCK)
        number = tl.load(hidden + column, mask=column < SIZE, other=0.0).to(tl.float32)
        finite = tl.abs(number) < float("inf")
        strange |= 1 - finite.to(tl.int32)
        number = tl.where(finite, number, 0.0)
        code = _code(tl.div_rn(number, scale + tl.zeros_like(number)), most)
        tl.store(codes + row * DEPTH + column, code.to(codes.dtype.element_ty), mask=column < DEPTH)
    if tl.max(strange, 0) > 0:
        tl.store(odd, 1)


@triton.jit
def _product(
    codes, weights, low, rows, outputs, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(outputs, BLOCK_N)
    # Neighbouring programs share the codes of eight tiles of rows, which then lie in the cache.
    group = tl.program_id(0) // (8 * across)
    down = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * 8, 8)
    inside = tl.program_id(0) % (8 * across)
    row = (group * 8 + inside % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = inside // down * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left = codes + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * depth + k[None]
    right = weights + column.to(tl.int64)[None] * depth + k[:, None]
    exact: tl.constexpr = codes.dtype.element_ty == tl.int8
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if exact else tl.float32)
    for _at in range(0, depth, BLOCK_K):
        if exact:
            total = tl.dot(tl.load(left), tl.load(right), total, out_dtype=tl.int32)
        else:  # the units sum one tile's products, fp32 the tiles
            total = tl.dot(tl.load(left), tl.load(right), total, max_num_imprecise_acc=BLOCK_K)
        left += BLOCK_K
        right += BLOCK_K
    to = low + row.to(tl.int64)[:, None] * outputs + column[None]
    tl.store(to, total.to(tl.float32), mask=(row < rows)[:, None] & (column < outputs)[None])


@triton.jit
def _encode(
    low, scale, cos, sin, chosen, key_scale, q, k, q_scale, length, batch_stride, row_stride,
    pairs, most, unit, HEADS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    ROTATE: tl.constexpr, TERNARY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DEPTH)[None]
    there = (row < length)[:, None] & (column < WIDTH)
    to = ((batch * HEADS + head) * length + row)[:, None] * WIDTH + column
    turns = batch * batch_stride + row.to(tl.int64)[:, None] * row_stride
    for side in tl.static_range(2):
        first = (side * HEADS + head) * WIDTH
        at = low + (batch * length + row)[:, None] * (2 * HEADS * WIDTH) + first
        factor = scale + first
        x = tl.load(at + column, mask=there, other=0.0)
        x *= tl.load(factor + column, mask=column < WIDTH, other=0.0)
        if ROTATE:  # pairs of columns (j, j + pairs)
            turned = there & (column < 2 * pairs)
            upper = column >= pairs
            other = tl.where(upper, column - pairs, column + pairs)
            y = tl.load(at + other, mask=turned, other=0.0)
            y *= tl.load(factor + other, mask=column < 2 * pairs, other=0.0)
            angle = tl.load(chosen + tl.where(upper, column - pairs, column), mask=turned, other=0)
            c = tl.load(cos + turns + angle, mask=turned, other=1.0)
            s = tl.load(sin + turns + angle, mask=turned, other=0.0)
            x = tl.where(turned, x * c + tl.where(upper, y * s, -(y * s)), x)
        if side == 0:
            size = tl.abs(x)
            top = tl.div_rn(tl.max(size, 1), most + tl.zeros([ROWS], tl.float32))
            own = tl.where(top > 0, top, 1.0)
            if TERNARY:
                own = _ternary(size, own, WIDTH, DEPTH)
            tl.store(q_scale + (batch * HEADS + head) * length + row, own * unit, mask=row < length)
            x = tl.div_rn(x, own[:, None] + tl.zeros_like(x))
            tl.store(q + to, _code(x, most).to(tl.int8), mask=there)
        else:
            x = tl.div_rn(x, tl.load(key_scale + head) + tl.zeros_like(x))
            tl.store(k + to, _code(x, most).to(tl.int8), mask=there)


@triton.jit
def _ternary(size, top, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """Scale of least squared error for codes -1, 0, 1 (`quantize.py`, `_best_ternary`)."""
    largest_first = tl.sort(tl.div_rn(size, top[:, None] + tl.zeros_like(size)), descending=True)
    sums = tl.cumsum(largest_first.to(tl.float64), 1).to(tl.float32)
    number = tl.arange(0, DEPTH)[None]
    count = (number + 1).to(tl.float32) + tl.zeros_like(sums)
    gain = tl.where(number < WIDTH, tl.div_rn(sums * sums, count), -1.0)
    chosen = tl.argmax(gain, 1, tie_break_left=True)
    best = tl.where(number == chosen[:, None], tl.div_rn(sums, count), 0.0)
    scale = tl.sum(best, 1) * top
    return tl.where(scale > 0, scale, top)
