"""Mean codes of blocks: their product is the mean of the scores of a block of pairs."""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float32, Int8
from torch import Tensor

from sparseloom.kernels.triton.sizes import power_of_two

_BLOCKS = 16  # that a program averages


def block_means(
    codes: Int8[Tensor, "batch heads length width"],
    scale: Float32[Tensor, "batch heads length"] | None,
    counted: Bool[Tensor, "#batch length"] | None,
    block: int,
) -> Float32[Tensor, "batch heads blocks width"]:
    """Means of the codes times their scale over blocks of ``block`` rows; 0 where none counts."""
    batch, heads, length, width = codes.shape
    blocks = -(-length // block)
    means = torch.empty(batch, heads, blocks, width, dtype=torch.float32, device=codes.device)
    entry = 0 if counted is None or counted.shape[0] == 1 else length
    _block_means[(-(-blocks // _BLOCKS), batch * heads)](
        codes, scale, None if counted is None else counted.view(torch.uint8), means, heads,
        length, blocks, entry, WIDTH=width, DEPTH=power_of_two(width), BLOCK=block,
        SCALED=scale is not None, PADDED=counted is not None, BLOCKS=_BLOCKS, num_warps=4,
    )  # fmt: skip
    return means


@triton.jit
def _block_means(
    codes, scale, counted, means, heads, length, blocks, entry, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.arange(0, DEPTH)[None]
    total = tl.zeros([BLOCKS, DEPTH], tl.float32)
    count = tl.zeros([BLOCKS], tl.float32)
    for step in range(BLOCK):
        row = block * BLOCK + step
        there = row < length
        if PADDED:
            flag = tl.load(counted + bh // heads * entry + row, mask=there, other=0)
            there = there & (flag != 0)
        at = codes + (bh * length + row)[:, None] * WIDTH + column
        number = tl.load(at, mask=there[:, None] & (column < WIDTH), other=0).to(tl.float32)
        if SCALED:
            number *= tl.load(scale + bh * length + row, mask=there, other=0.0)[:, None]
        total += number
        count += there.to(tl.float32)
    total = total / tl.maximum(count, 1.0)[:, None]
    to = means + (bh * blocks + block)[:, None] * WIDTH + column
    tl.store(to, total, mask=(block < blocks)[:, None] & (column < WIDTH))
