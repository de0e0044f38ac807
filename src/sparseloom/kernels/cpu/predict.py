"""Prediction and selection in C++: hidden states to codes, codes to the kept keys of each block.

`encode` is the first stage (quantise X, multiply with P·W̃, rotate, quantise q̃ and k̃); the second
multiplies codes, pools and selects, in `top_keys` or `keys_above`, and with `pooled_scores` stops
before it selects.  The rules are those of `methods/`, whose plain torch is the reference: integer
products are exact, so codes and scores are the same numbers.

Memory beyond the arguments and results is a few bytes per key and head, and about 70 bytes per
key and thread; every function returns how much it was.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int8, Int32, Int64
from torch import Tensor

from sparseloom.kernels.cpu import native
from sparseloom.kernels.prediction import Blocks, Codes, Encoded, Rotation, offsets_of

POOLINGS = {"mass": 1, "max": 2, "mean": 3}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PANEL = 16


class Weights(NamedTuple):
    """Codes of P·[W̃_Q, W̃_K] as products read them, and the scale of each column."""

    codes: Int8[Tensor, "panels groups 16 4"]
    sums: Int32[Tensor, " columns"]
    scale: Float[Tensor, " outputs"]
    hidden_size: int


def pack_weights(
    codes: Float[Tensor, "hidden_size outputs"], scale: Float[Tensor, " outputs"]
) -> Weights:
    """Pack integer-valued codes: panels of 16 columns, four codes of a column side by side."""
    depth, outputs = codes.shape
    padded = int(native.library().predict_depth(depth))
    wide = torch.nn.functional.pad(codes, (0, -outputs % _PANEL, 0, padded - depth))
    panels = wide.to(torch.int8).view(padded // 4, 4, -1, _PANEL).permute(2, 0, 3, 1).contiguous()
    sums = (128 * wide.sum(0)).to(torch.int32)
    return Weights(panels, sums, scale.contiguous(), depth)


def encode(
    hidden: Float[Tensor, "batch length hidden_size"],
    weights: Weights,
    *,
    bits: int,
    heads: int,
    width: int,
    input_scale: float,
    key_scale: Float[Tensor, " heads"],
    rotation: Rotation | None = None,
) -> Encoded | None:
    """Codes of q̃ and k̃ from hidden states of fp32, bf16 or fp16.

    Returns:
        The codes, or None where a number is not finite.
    """
    batch, length, hidden_size = hidden.shape
    if hidden_size != weights.hidden_size:
        raise ValueError(f"hidden must end in {weights.hidden_size}, got {tuple(hidden.shape)}")
    if hidden.dtype not in _DTYPES:
        hidden = hidden.float()
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    q = torch.empty(batch, heads, length, width, dtype=torch.int8)
    k = torch.empty_like(q)
    q_scale = torch.empty(batch, heads, length, 1)
    scale = weights.scale * input_scale
    key_scale = key_scale.contiguous()
    cos = sin = chosen = None
    if rotation is not None:
        cos, sin = (side.float().expand(batch, length, -1) for side in rotation[:2])
        if cos.stride(-1) != 1 or sin.stride() != cos.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        chosen = rotation.chosen.contiguous()
    finite, scratch = native.library().predict_encode(
        hidden.data_ptr(),
        _DTYPES[hidden.dtype],
        batch,
        length,
        hidden_size,
        hidden.stride(0),
        hidden.stride(1),
        input_scale,
        float(2 ** (bits - 1) - 1),
        weights.codes.data_ptr(),
        weights.sums.data_ptr(),
        scale.data_ptr(),
        weights.codes.shape[1] * 4,
        weights.codes.shape[0] * _PANEL,
        _address(cos),
        _address(sin),
        0 if cos is None else cos.stride(0),
        0 if cos is None else cos.stride(1),
        _address(chosen),
        0 if chosen is None else len(chosen),
        key_scale.data_ptr(),
        heads,
        width,
        bits,
        1 / math.sqrt(width),
        q.data_ptr(),
        k.data_ptr(),
        q_scale.data_ptr(),
        torch.get_num_threads(),
    )
    return Encoded(q, k, q_scale, scratch) if finite else None


def top_keys(
    codes: Codes,
    blocks: Blocks,
    offsets: Int64[Tensor, "batch heads q_blocks_plus_1"],
    *,
    pooling: str,
    voters: Bool[Tensor, "#batch q_len"] | None = None,
    total: int | None = None,
) -> tuple[Int32[Tensor, " nnz"], int]:
    """The best key blocks of each query block, `blocks.budget` of them, and the bytes of scratch.

    Ties go to the lowest key.  Pooled scores may differ from the reference by rounding.
    `total` is the last of the offsets, where it is known.
    """
    out = torch.empty(int(offsets[-1, -1, -1]) if total is None else total, dtype=torch.int32)
    rule = 0 if blocks.block_size == (1, 1) else POOLINGS[pooling]
    return out, _run(codes, blocks, rule, voters, offsets=offsets, out=out)


def pooled_scores(
    codes: Codes,
    blocks: Blocks,
    *,
    pooling: str,
    voters: Bool[Tensor, "#batch q_len"] | None = None,
) -> Float[Tensor, "batch heads q_blocks kv_blocks"]:
    """The scores that `top_keys` compares, up to a factor per query block; -inf where a block may
    not be kept.  For tests and measurements: the result is as large as the score matrix."""
    batch, heads = codes.q.shape[:2]
    columns = -(-codes.k.shape[2] // blocks.block_size[1])
    pooled = torch.empty(batch, heads, len(blocks.diagonal), columns)
    _run(codes, blocks, POOLINGS[pooling], voters, pooled=pooled)
    return pooled


def keys_above(
    codes: Codes, blocks: Blocks, thresholds: Float[Tensor, " heads"]
) -> tuple[Int32[Tensor, " nnz"], Int64[Tensor, "batch heads q_blocks_plus_1"], int]:
    """All key blocks with a pair whose score reaches the threshold of its head, the best key of
    each row and the diagonal; indices, offsets and bytes of scratch."""
    batch, heads = codes.q.shape[:2]
    level = thresholds.to(torch.float32).contiguous()
    counts = torch.empty(batch, heads, len(blocks.diagonal), dtype=torch.int64)
    _run(codes, blocks, 0, None, thresholds=level, counts=counts)
    offsets = offsets_of(counts)
    out = torch.empty(int(offsets[-1, -1, -1]), dtype=torch.int32)
    scratch = _run(codes, blocks, 0, None, thresholds=level, offsets=offsets, out=out)
    return out, offsets, scratch


def _run(
    codes: Codes,
    blocks: Blocks,
    rule: int,
    voters: Tensor | None,
    *,
    offsets: Tensor | None = None,
    thresholds: Tensor | None = None,
    counts: Tensor | None = None,
    out: Tensor | None = None,
    pooled: Tensor | None = None,
) -> int:
    q, k, q_scale = codes.q.contiguous(), codes.k.contiguous(), codes.q_scale.contiguous()
    k_scale = codes.k_scale.contiguous()
    batch, heads, q_len, width = q.shape
    kv_len = k.shape[2]
    padding = _bytes("key_padding", blocks.key_padding, batch, kv_len)
    speak = _bytes("voters", voters, batch, q_len)
    visible, budget = blocks.visible.contiguous(), blocks.budget.contiguous()
    diagonal = blocks.diagonal.contiguous()
    return native.library().predict_select(
        q.data_ptr(),
        k.data_ptr(),
        q_scale.data_ptr(),
        k_scale.data_ptr(),
        batch,
        heads,
        q_len,
        kv_len,
        width,
        *blocks.block_size,
        blocks.is_causal,
        rule,
        _address(padding),
        _batch_stride(padding),
        _address(speak),
        _batch_stride(speak),
        visible.data_ptr(),
        _batch_stride(visible),
        budget.data_ptr(),
        _batch_stride(budget),
        diagonal.data_ptr(),
        _address(offsets),
        _address(thresholds),
        _address(counts),
        _address(out),
        _address(pooled),
        torch.get_num_threads(),
    )


def _bytes(name: str, flags: Tensor | None, batch: int, length: int) -> Tensor | None:
    if flags is None:
        return None
    if flags.shape not in ((1, length), (batch, length)):
        raise ValueError(
            f"{name} must be ({batch}, {length}) or (1, {length}), got {tuple(flags.shape)}"
        )
    return flags.to("cpu", torch.bool).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _batch_stride(tensor: Tensor | None) -> int:
    """Elements from one batch entry to the next; 0 where all share one."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.shape[-1]
