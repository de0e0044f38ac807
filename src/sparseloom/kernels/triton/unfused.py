"""SDDMM, sparse softmax and SpMM on the GPU, without gradients.

``kernels.unfused`` defines the three, checks the arguments, and comes here where it can. A program
owns one query block and walks its kept keys tile by tile; values are written and read in between,
as in the three kernels of Liu et al. (IEEE TC 2022, section 5), whose gains table 3 has.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseloom.kernels.triton.compile_report import Variant
from sparseloom.mask import SparseMask

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_BLOCK = 128  # queries
_LARGEST_DIM = 256
_ROWS = 16  # of a product, at least
_TILE_BYTES = 1 << 14  # of keys: 128 of 64 dims in half precision


@triton.jit
def _kept_keys(offsets, row, q_blocks, BLOCK_K: tl.constexpr):
    """First entry of a row of the mask, and how many keys it keeps."""
    place = offsets + row // q_blocks * (q_blocks + 1) + row % q_blocks
    start = tl.load(place)
    return start, ((tl.load(place + 1) - start) * BLOCK_K).to(tl.int32)


@triton.jit
def _places(start, lane, at, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the values of some rows of a query block and of some of its kept keys lie."""
    entry = start + at // BLOCK_K
    return entry[None, :] * (BLOCK_Q * BLOCK_K) + lane[:, None] * BLOCK_K + at[None, :] % BLOCK_K


@triton.jit
def _sddmm(
    query, key, values, indices, offsets, padding, q_len, kv_len, q_blocks, heads, scale,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    KEY_GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = row // q_blocks % heads
    batch = row // q_blocks // heads
    lane, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    wide = column[None, :] < DIM
    position = row % q_blocks * BLOCK_Q + lane
    owned = (lane < BLOCK_Q) & (position < q_len)
    base = query + batch * query_batch + head * query_head
    q = tl.load(
        base + position[:, None] * query_row + column[None, :],
        mask=owned[:, None] & wide,
        other=0.0,
    )
    start, count = _kept_keys(offsets, row, q_blocks, BLOCK_K)
    base = key + batch * key_batch + head // KEY_GROUP * key_head
    for first in range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < count
        block = tl.load(indices + start + at // BLOCK_K, mask=inside, other=0).to(tl.int64)
        there = block * BLOCK_K + at % BLOCK_K
        seen = inside & (there < kv_len)
        if PADDED:
            seen = seen & (tl.load(padding + batch * kv_len + there, mask=seen, other=0) != 0)
        k = tl.load(
            base + there[:, None] * key_row + column[None, :], mask=seen[:, None] & wide, other=0.0
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        allowed = owned[:, None] & seen[None, :]
        if CAUSAL:
            allowed = allowed & (there[None, :] <= position[:, None] + (kv_len - q_len))
        scores = tl.where(allowed, scores, -float("inf"))
        place = values + _places(start, lane, at, BLOCK_Q, BLOCK_K)
        tl.store(place, scores, mask=(lane < BLOCK_Q)[:, None] & inside[None, :])


@triton.jit
def _softmax(
    values, out, offsets, q_blocks,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start, count = _kept_keys(offsets, row, q_blocks, BLOCK_K)
    lane = tl.arange(0, ROWS)
    owned = (lane < BLOCK_Q)[:, None]
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        place = values + _places(start, lane, at, BLOCK_Q, BLOCK_K)
        scores = tl.load(place, mask=owned & (at < count)[None, :], other=-float("inf"))
        risen = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(risen == -float("inf"), 0.0, risen)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        top = risen
    shift = tl.where(top == -float("inf"), 0.0, top)
    share = 1.0 / tl.where(total > 0.0, total, 1.0)  # a row without a key is 0 as it is
    for first in range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        place = _places(start, lane, at, BLOCK_Q, BLOCK_K)
        inside = owned & (at < count)[None, :]
        scores = tl.load(values + place, mask=inside, other=-float("inf"))
        tl.store(out + place, tl.exp(scores - shift[:, None]) * share[:, None], mask=inside)


@triton.jit
def _spmm(
    values, value, out, indices, offsets, q_len, kv_len, q_blocks, heads,
    value_batch, value_head, value_row,
    KEY_GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = row // q_blocks % heads
    batch = row // q_blocks // heads
    lane, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    wide = column[None, :] < DIM
    start, count = _kept_keys(offsets, row, q_blocks, BLOCK_K)
    base = value + batch * value_batch + head // KEY_GROUP * value_head
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < count
        block = tl.load(indices + start + at // BLOCK_K, mask=inside, other=0).to(tl.int64)
        there = block * BLOCK_K + at % BLOCK_K
        seen = inside & (there < kv_len)
        v = tl.load(
            base + there[:, None] * value_row + column[None, :],
            mask=seen[:, None] & wide, other=0.0,
        )  # fmt: skip
        place = values + _places(start, lane, at, BLOCK_Q, BLOCK_K)
        probs = tl.load(place, mask=(lane < BLOCK_Q)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(probs.to(v.dtype), v, total, input_precision=PRECISION)
    position = row % q_blocks * BLOCK_Q + lane
    owned = (lane < BLOCK_Q) & (position < q_len)
    place = out + (row // q_blocks * q_len + position[:, None]) * DIM + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=owned[:, None] & wide)


def takes(mask: SparseMask, *tensors: Tensor) -> bool:
    """Whether the kernels compute what these ask for."""
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plain = all(t.dtype in _TYPES and t.shape[-1] <= _LARGEST_DIM for t in tensors)
    return plain and not grad and mask.block_size[0] <= _LARGEST_BLOCK


def sddmm(
    query: Tensor,
    key: Tensor,
    mask: SparseMask,
    *,
    is_causal: bool,
    key_padding: Tensor | None,
    scale: float,
) -> Tensor:
    """Scores of the kept blocks, (nnz, bq, bk)."""
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    values = query.new_empty(mask.nnz, *mask.block_size, dtype=torch.float32)
    # Without padding it is not read, but something must be passed.
    padding = mask.indices if key_padding is None else key_padding.contiguous().view(torch.uint8)
    _launch(
        _sddmm, mask, query, key, values, *_lists(mask), padding, mask.q_len, mask.kv_len,
        mask.q_blocks, mask.heads, scale, *query.stride()[:3], *key.stride()[:3],
        KEY_GROUP=mask.heads // key.shape[1], **_sizes(mask, query.shape[3], query.dtype),
        CAUSAL=is_causal, PADDED=key_padding is not None, PRECISION=_precision(),
    )  # fmt: skip
    return values


def sparse_softmax(values: Tensor, mask: SparseMask) -> Tensor:
    """Softmax over the kept keys of each query, (nnz, bq, bk)."""
    values = values.contiguous()
    out = torch.empty_like(values)
    sizes = _sizes(mask, 64, values.dtype)
    del sizes["DIM"], sizes["WIDTH"]
    _launch(_softmax, mask, values, out, mask.offsets.contiguous(), mask.q_blocks, **sizes)
    return out


def spmm(values: Tensor, mask: SparseMask, value: Tensor) -> Tensor:
    """P V with P on the kept blocks, (batch, heads, q_len, value_dim).

    P is rounded to the dtype of ``value``; sums are fp32.
    """
    value = value if value.stride(-1) == 1 else value.contiguous()
    out = value.new_empty(mask.batch, mask.heads, mask.q_len, value.shape[3])
    _launch(
        _spmm, mask, values.contiguous(), value, out, *_lists(mask), mask.q_len, mask.kv_len,
        mask.q_blocks, mask.heads, *value.stride()[:3], KEY_GROUP=mask.heads // value.shape[1],
        **_sizes(mask, value.shape[3], value.dtype), PRECISION=_precision(),
    )  # fmt: skip
    return out


def _launch(kernel: Any, mask: SparseMask, *arguments: Any, **constants: Any) -> None:
    """A program for each query block."""
    kernel[(mask.batch * mask.heads * mask.q_blocks,)](*arguments, **constants)


def _lists(mask: SparseMask) -> tuple[Tensor, Tensor]:
    return mask.indices.contiguous(), mask.offsets.contiguous()


def _sizes(mask: SparseMask, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes that the kernels are compiled for; tiles of keys take as many bytes at any width."""
    width = max(16, _power_of_2(dim))
    rows = max(_ROWS, _power_of_2(mask.block_size[0]))
    return {
        "BLOCK_Q": mask.block_size[0],
        "BLOCK_K": mask.block_size[1],
        "ROWS": rows,
        "TILE": max(32, min(128, _TILE_BYTES // dtype.itemsize // max(width, 2 * rows))),
        "DIM": dim,
        "WIDTH": width,
    }


def _power_of_2(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


def _precision() -> str:
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[
        torch.get_float32_matmul_precision()
    ]


def compiled_variants() -> Iterator[Variant]:
    """The three at the shapes of table 3: heads of 64, vectors of 1, 4 and 8 queries."""
    number = {"q_len": "i32", "kv_len": "i32", "q_blocks": "i32", "heads": "i32", "scale": "fp32"}
    lists = {"indices": "*i32:16", "offsets": "*i64:16"}
    for bq in (1, 4, 8):
        mask = SparseMask.full(2000, 1, heads=1, block_size=(bq, 1))
        for name, kind in (("fp16", torch.float16), ("fp32", torch.float32)):
            sizes, dtype = _sizes(mask, 64, kind), f"*{name}:16"
            common = {**number, **lists, "values": "*fp32:16"}
            tensors = {"query": dtype, "key": dtype, "value": dtype, "out": dtype}
            strides = {
                f"{tensor}_{axis}": "i32:16"
                for tensor in ("query", "key", "value")
                for axis in ("batch", "head", "row")
            }
            types = {**common, **tensors, **strides, "padding": "*u8:16"}
            constants = {**sizes, "KEY_GROUP": 1, "PRECISION": "ieee"}
            for step, kernel, more in (
                ("SDDMM", _sddmm, {"CAUSAL": False, "PADDED": False}),
                ("SpMM", _spmm, {}),
            ):
                yield _variant(f"{step} {bq}x1 d64 {name}", kernel, types, {**constants, **more})
        sizes = _sizes(mask, 64, torch.float32)
        yield _variant(f"softmax {bq}x1", _softmax, {**common, "out": "*fp32:16"}, sizes)


def _variant(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Variant:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    return Variant(name, kernel, signature, {n: constants[n] for n in names if n in constants})
