"""The unfused three: SDDMM, sparse softmax and SpMM on the block layout of ``SparseMask``.

They compute only kept blocks and compose to the same result as the fused attention:

    scores = sddmm(query, key, mask)          # S = scale · Q Kᵀ on the kept blocks
    probs = sparse_softmax(scores, mask)      # softmax over each query row
    out = spmm(probs, mask, value)            # P V

**Values** are one tile per kept block, ``(nnz, bq, bk)``: ``values[n, r, c]`` belongs to the
n-th entry of ``mask.indices``, that is to query ``i * bq + r`` and key ``mask.indices[n] * bk + c``
where i is the query block of that entry (entries run over batch, head, query block, ascending key
block). Pairs of a kept block that lie past q_len or kv_len, or that causality or padding forbid,
hold −inf as scores and 0 as probabilities. Values are fp32 (fp64 for fp64 inputs).

The mask must have the batch and heads of the query: shared ones are spread by ``mask.expand``.
Tiles are gathered in chunks, so the extra memory is bounded; gradients of any order are the same
three operations again (the derivative of SDDMM is SpMM, and the other way round).

Without gradients and in fp32 or less, the C++ library computes the three on a CPU and Triton on a
GPU, where they are there; the PyTorch forms here define what they return.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.kernels.common import CHUNK_ELEMENTS, accumulation_dtype, blocked
from sparseloom.kernels.cpu import unfused as cpu
from sparseloom.mask import SparseMask


def sddmm(
    query: Float[Tensor, "batch heads q_len head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    mask: SparseMask,
    *,
    is_causal: bool = False,
    key_padding: Bool[Tensor, "batch kv_len"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "nnz block_q block_k"]:
    """Sampled dense-dense product: the scores scale · Q Kᵀ of the kept blocks.

    Args:
        query: (batch, heads, q_len, head_dim).
        key: (batch, kv_heads, kv_len, head_dim); ``kv_heads`` divides ``heads``.
        mask: batch and heads as the query.
        is_causal: forbid keys after query i + kv_len − q_len.
        key_padding: bool (batch, kv_len), True = attend.
        scale: by default 1/√head_dim.

    Raises:
        ValueError: sizes do not fit.
    """
    _check_fit(mask, query, "query", rows=mask.q_len, heads=mask.heads)
    _check_fit(mask, key, "key", rows=mask.kv_len, heads=None)
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"key must have head_dim {query.shape[3]} as query, got {key.shape[3]}")
    _check_padding(key_padding, mask)
    bq, bk = mask.block_size
    dtype = accumulation_dtype(query.dtype)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    if _native(mask, query, key):
        return cpu.sddmm(
            query, key, mask, is_causal=is_causal, key_padding=key_padding, scale=scale
        )
    card = _on_card(mask, query, key)
    if card is not None:
        return card.sddmm(
            query, key, mask, is_causal=is_causal, key_padding=key_padding, scale=scale
        )
    rows = mask.entry_rows()
    scores = _tile_products(
        blocked(query.to(dtype) * scale, bq),
        blocked(key.to(dtype), bk),
        rows,
        _key_rows(mask, rows, key.shape[1]),
    )
    forbidden = _forbidden(mask, rows, is_causal=is_causal, key_padding=key_padding)
    return scores if forbidden is None else scores.masked_fill(forbidden, -torch.inf)


def sparse_softmax(
    values: Float[Tensor, "nnz block_q block_k"], mask: SparseMask
) -> Float[Tensor, "nnz block_q block_k"]:
    """Softmax over the kept keys of each query; rows with only −inf become 0.

    Raises:
        ValueError: ``values`` do not belong to the mask.
    """
    _check_values(values, mask)
    if values.dtype == torch.float32 and _native(mask, values):
        return cpu.sparse_softmax(values, mask)
    if values.dtype == torch.float32 and (card := _on_card(mask, values)) is not None:
        return card.sparse_softmax(values, mask)
    rows = mask.entry_rows()
    count = mask.offsets[..., 1:].numel()
    tops = values.new_full((count, mask.block_size[0]), -torch.inf)
    places = rows[:, None].expand(-1, tops.shape[1])
    tops.scatter_reduce_(0, places, values.detach().amax(-1), "amax")
    # The shift cancels in the quotient, so it takes no part in the derivative.
    tops = tops.masked_fill(tops == -torch.inf, 0)
    powers = (values - tops[rows, :, None]).exp()
    sums = powers.new_zeros(tops.shape).index_add(0, rows, powers.sum(-1))
    return powers / sums.masked_fill(sums == 0, 1)[rows, :, None]


def spmm(
    values: Float[Tensor, "nnz block_q block_k"],
    mask: SparseMask,
    value: Float[Tensor, "batch kv_heads kv_len value_dim"],
) -> Float[Tensor, "batch heads q_len value_dim"]:
    """Sparse-dense product: P V with P given on the kept blocks.

    Args:
        values: probabilities, 0 where a pair is not allowed.
        mask: the mask that ``values`` belong to.
        value: (batch, kv_heads, kv_len, value_dim); ``kv_heads`` divides ``mask.heads``.

    Returns:
        (batch, heads, q_len, value_dim) in the dtype of ``value``.

    Raises:
        ValueError: sizes do not fit.
    """
    _check_values(values, mask)
    _check_fit(mask, value, "value", rows=mask.kv_len, heads=None)
    if values.dtype == torch.float32 and _native(mask, values, value):
        return cpu.spmm(values, mask, value)
    if values.dtype == torch.float32 and (card := _on_card(mask, values, value)) is not None:
        return card.spmm(values, mask, value)
    rows = mask.entry_rows()
    out = _tile_sums(
        values,
        blocked(value.to(values.dtype), mask.block_size[1]),
        rows,
        _key_rows(mask, rows, value.shape[1]),
        mask.batch * mask.heads * mask.q_blocks,
    )
    out = out.reshape(mask.batch, mask.heads, -1, value.shape[3])
    return out[:, :, : mask.q_len].to(value.dtype)


class _TileProducts(torch.autograd.Function):
    """Products of tiles, ``left[rows[n]] @ right[columns[n]]ᵀ`` for each n."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(left, right, rows, columns)
        out = left.new_empty(rows.shape[0], left.shape[1], right.shape[1])
        with torch.autocast(left.device.type, enabled=False):
            for part in _chunks(left, right, rows):
                torch.bmm(left[rows[part]], right[columns[part]].mT, out=out[part])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right, rows, columns = ctx.saved_tensors
        needs_left, needs_right = ctx.needs_input_grad[:2]
        grad = grads[0]
        by_left = _tile_sums(grad, right, rows, columns, left.shape[0]) if needs_left else None
        by_right = _tile_sums(grad.mT, left, columns, rows, right.shape[0]) if needs_right else None
        return by_left, by_right, None, None


class _TileSums(torch.autograd.Function):
    """Sums of tile products, ``out[rows[n]] += tiles[n] @ right[columns[n]]`` over all n."""

    @staticmethod
    def forward(
        ctx: Any, tiles: Tensor, right: Tensor, rows: Tensor, columns: Tensor, count: int
    ) -> Tensor:
        ctx.save_for_backward(tiles, right, rows, columns)
        out = right.new_zeros(count, tiles.shape[1], right.shape[2])
        with torch.autocast(tiles.device.type, enabled=False):
            for part in _chunks(tiles, right, rows):
                out.index_add_(0, rows[part], tiles[part] @ right[columns[part]])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tiles, right, rows, columns = ctx.saved_tensors
        needs_tiles, needs_right = ctx.needs_input_grad[:2]
        grad = grads[0]
        by_tiles = _tile_products(grad, right, rows, columns) if needs_tiles else None
        by_right = (
            _tile_sums(tiles.mT, grad, columns, rows, right.shape[0]) if needs_right else None
        )
        return by_tiles, by_right, None, None, None


def _tile_products(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return cast("Tensor", _TileProducts.apply(left, right, rows, columns))


def _tile_sums(tiles: Tensor, right: Tensor, rows: Tensor, columns: Tensor, count: int) -> Tensor:
    return cast("Tensor", _TileSums.apply(tiles, right, rows, columns, count))


def _chunks(left: Tensor, right: Tensor, rows: Tensor) -> Iterator[slice]:
    """Entries whose gathered tiles hold at most CHUNK_ELEMENTS elements (or one entry)."""
    per_entry = (left.shape[1] + right.shape[1]) * right.shape[2]
    step = max(1, CHUNK_ELEMENTS // per_entry)
    for first in range(0, rows.shape[0], step):
        yield slice(first, min(first + step, rows.shape[0]))


def _key_rows(mask: SparseMask, rows: Tensor, kv_heads: int) -> Int64[Tensor, " nnz"]:
    """Where each entry's key block lies among the blocks of (batch, kv_heads, kv_blocks)."""
    # (b·H + h) // (H / kv_heads) is b·kv_heads + the key head of h.
    key_head = rows // mask.q_blocks // (mask.heads // kv_heads)
    return key_head * mask.kv_blocks + mask.indices


def _forbidden(
    mask: SparseMask, rows: Tensor, *, is_causal: bool, key_padding: Tensor | None
) -> Bool[Tensor, "nnz block_q block_k"] | None:
    """Pairs of the kept blocks that lie past an edge, or that causality or padding forbid."""
    bq, bk = mask.block_size
    device = mask.device
    if key_padding is None and not is_causal and not (mask.q_len % bq or mask.kv_len % bk):
        return None
    query = (rows % mask.q_blocks * bq)[:, None] + torch.arange(bq, device=device)
    key = (mask.indices * bk).to(torch.int64)[:, None] + torch.arange(bk, device=device)
    query, key = query[:, :, None], key[:, None, :]
    forbidden = (query >= mask.q_len) | (key >= mask.kv_len)
    if is_causal:
        forbidden |= key > query + (mask.kv_len - mask.q_len)
    if key_padding is not None:
        batch = rows // (mask.q_blocks * mask.heads)
        inside = key.clamp(max=mask.kv_len - 1)
        forbidden |= ~key_padding[batch[:, None, None], inside]
    return forbidden


def _native(mask: SparseMask, *tensors: Tensor) -> bool:
    """Whether the C++ library takes the step."""
    return not torch.compiler.is_compiling() and mask.nnz > 0 and cpu.takes(*tensors)


def _on_card(mask: SparseMask, *tensors: Tensor) -> ModuleType | None:
    """The Triton kernels, if they take the step."""
    if torch.compiler.is_compiling() or mask.nnz == 0 or not tensors[0].is_cuda:
        return None
    from sparseloom.kernels.triton import unavailable

    if unavailable() is not None:
        return None
    from sparseloom.kernels.triton import unfused as card

    return card if card.takes(mask, *tensors) else None


def _check_padding(key_padding: Tensor | None, mask: SparseMask) -> None:
    if key_padding is None:
        return
    if key_padding.dtype != torch.bool:
        raise TypeError(f"key_padding must be bool (True = attend), got {key_padding.dtype}")
    if key_padding.shape != (mask.batch, mask.kv_len):
        raise ValueError(
            f"key_padding must have shape {(mask.batch, mask.kv_len)}, "
            f"got {tuple(key_padding.shape)}"
        )


def _check_fit(
    mask: SparseMask, tensor: Tensor, name: str, *, rows: int, heads: int | None
) -> None:
    if tensor.dim() != 4 or tensor.shape[2] != rows or tensor.shape[0] != mask.batch:
        raise ValueError(
            f"{name} must have shape ({mask.batch}, heads, {rows}, dim) as the mask, "
            f"got {tuple(tensor.shape)}; a shared mask must be spread with "
            "mask.expand(batch, heads)"
        )
    if heads is not None and tensor.shape[1] != heads:
        raise ValueError(
            f"{name} must have {heads} heads as the mask, got {tensor.shape[1]}; a shared mask "
            "must be spread with mask.expand(batch, heads)"
        )
    if mask.heads % tensor.shape[1]:
        raise ValueError(
            f"{name} must have a number of heads that divides the {mask.heads} of the mask, "
            f"got {tensor.shape[1]}"
        )


def _check_values(values: Tensor, mask: SparseMask) -> None:
    wanted = (mask.nnz, *mask.block_size)
    if values.shape != wanted:
        raise ValueError(f"values must have shape {wanted} as the mask, got {tuple(values.shape)}")
