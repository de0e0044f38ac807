"""Prediction and selection on a GPU: hidden states to codes, codes to the kept keys of each block.

The interface and the rules are those of the C++ backend (``kernels/cpu/predict.py``).  Codes come
from ``project.py``.  Then some query blocks of all heads are ranked (``rank.py``), the best of each
are picked (``select.py``) straight into the indices of a mask, and the next follow (``chunks.py``).

Memory beyond the arguments and results: the ranks at hand, ``chunks.RANK_BYTES`` or one query
block of each head, and a few numbers for each query and each key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from sparseloom.kernels.prediction import Blocks, Codes, offsets_of
from sparseloom.kernels.triton import arithmetic, select
from sparseloom.kernels.triton.chunks import Chunks
from sparseloom.kernels.triton.means import block_means
from sparseloom.kernels.triton.products import Pairs
from sparseloom.kernels.triton.project import Weights, encode, pack_weights
from sparseloom.kernels.triton.rank import flag_blocks, rank_blocks, rank_products
from sparseloom.kernels.triton.row_stats import best_keys, row_stats

__all__ = ["Weights", "encode", "keys_above", "pack_weights", "top_keys"]

_Fill = Callable[[int, Tensor], None]


def top_keys(
    codes: Codes,
    blocks: Blocks,
    offsets: Int64[Tensor, "batch heads q_blocks_plus_1"],
    *,
    pooling: str,
    voters: Bool[Tensor, "#batch q_len"] | None = None,
    total: int | None = None,
    tile: int | None = None,
    shares: Int64[Tensor, "#batch q_blocks tiles"] | None = None,
) -> tuple[Int32[Tensor, " nnz"], int]:
    """The best key blocks of each query block, `blocks.budget` of them, and the bytes of scratch.

    Ties go to the lowest key.  Pooled scores may differ from the reference by rounding.

    Args:
        total: the last of ``offsets``, where it is known; else the device is waited for.
        tile: local top-k: so many key blocks are searched alone, for their ``shares`` of the
            budget.
    """
    pairs = _pairs(codes, blocks, voters)
    device = codes.q.device
    out = torch.empty(
        int(offsets[-1, -1, -1]) if total is None else total, dtype=torch.int32, device=device
    )
    fill, bits, scratch = _ranker(codes, pairs, pooling)
    budget = blocks.budget[..., None] if shares is None else shares
    before = budget.cumsum(-1) - budget  # what the tiles before keep
    chunks = Chunks(pairs, bits=bits, tile=tile, tiles=budget.shape[-1])
    for first, last, ranks in chunks:
        fill(first, ranks)
        rows = chunks.rows(first, last, ranks)
        levels = select.find_levels(rows, chunks.spread(budget, first, last).to(torch.int32))
        starts = offsets[..., first:last, None] + before[:, None, first:last]
        select.emit(rows, levels, starts.reshape(-1), out)
    return out, scratch + chunks.scratch_bytes


def keys_above(
    codes: Codes, blocks: Blocks, thresholds: Float[Tensor, " heads"]
) -> tuple[Int32[Tensor, " nnz"], Int64[Tensor, "batch heads q_blocks_plus_1"], int]:
    """All key blocks with a pair whose score reaches the threshold of its head, the best key of
    each row and the diagonal; indices, offsets and bytes of scratch.

    Flags of pairs are made twice, to count and to emit.
    """
    pairs = _pairs(codes, blocks, None)
    (batch, heads), device = codes.q.shape[:2], codes.q.device
    level = thresholds.to(device, torch.float32).contiguous()
    best = best_keys(pairs)
    chunks = Chunks(pairs, bits=1)
    counts = torch.zeros(batch, heads, chunks.q_blocks, dtype=torch.int64, device=device)
    for first, last, flags in chunks:
        flag_blocks(pairs, best, level, first, flags)
        kept = select.count_kept(chunks.rows(first, last, flags), chunks.every_flag(flags))
        counts[..., first:last] = kept[..., 0].sum(-1).view(batch, heads, -1)
    offsets = offsets_of(counts)
    out = torch.empty(int(offsets[-1, -1, -1]), dtype=torch.int32, device=device)
    for first, last, flags in chunks:
        flag_blocks(pairs, best, level, first, flags)
        rows, starts = chunks.rows(first, last, flags), offsets[..., first:last].reshape(-1)
        select.emit(rows, chunks.every_flag(flags), starts, out)
    return out, offsets, chunks.scratch_bytes + 4 * best.numel()


def _ranker(codes: Codes, pairs: Pairs, pooling: str) -> tuple[_Fill, int, int]:
    """What ranks the query blocks from one on, the bits of its ranks, and the bytes it holds."""
    bq, bk = pairs.block_size
    if bq == bk == 1:
        bound = codes.q.shape[3] << 2 * (codes.bits - 1)

        def products(first: int, ranks: Tensor) -> None:
            rank_products(pairs.q, pairs.k, pairs, bound, first, ranks)

        return products, (2 * bound + 2).bit_length(), 0
    if pooling == "mean":
        # A block that may, but need not be kept is one that each of its queries sees whole: the
        # mean of its scores is a product of means.
        q = block_means(codes.q.contiguous(), pairs.scale, pairs.voters, bq)
        k = codes.k.contiguous()
        k = k if bk == 1 else block_means(k, None, pairs.attended, bk)

        def means(first: int, ranks: Tensor) -> None:
            rank_products(q, k, pairs, 0, first, ranks)

        return means, 32, 4 * (q.numel() + (k.numel() if bk > 1 else 0))
    stats = row_stats(pairs, pooling)

    def pooled(first: int, ranks: Tensor) -> None:
        rank_blocks(pairs, stats, pooling, first, ranks)

    return pooled, 32, 4 * stats.numel()


def _pairs(codes: Codes, blocks: Blocks, voters: Tensor | None) -> Pairs:
    batch, _, q_len, _ = codes.q.shape
    kv_len, device = codes.k.shape[2], codes.q.device
    arithmetic.check(codes.bits, device)
    dtype = arithmetic.code_dtype()
    padding = _checked("key_padding", blocks.key_padding, batch, kv_len, device)
    return Pairs(
        codes.q.to(dtype).contiguous(),
        codes.k.to(dtype).contiguous(),
        (codes.q_scale[..., 0] * codes.k_scale[:, None]).contiguous(),
        blocks.block_size,
        blocks.is_causal,
        _checked("voters", voters, batch, q_len, device),
        padding,
        _any_in_block(padding, blocks.block_size[1]),
        blocks.visible.contiguous(),
        blocks.diagonal.contiguous(),
    )


def _checked(
    name: str, flags: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor | None:
    if flags is None:
        return None
    if flags.shape not in ((1, length), (batch, length)):
        raise ValueError(
            f"{name} must be ({batch}, {length}) or (1, {length}), got {tuple(flags.shape)}"
        )
    return flags.to(device, torch.bool).contiguous()


def _any_in_block(flags: Tensor | None, block: int) -> Tensor | None:
    if flags is None or block == 1:
        return flags
    wide = torch.nn.functional.pad(flags, (0, -flags.shape[1] % block))
    return wide.view(len(flags), -1, block).any(-1)
