"""From scores to a mask: the best keys of each query block, or all above a threshold."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from sparseloom.mask import SparseMask
from sparseloom.methods._topk import select_rows
from sparseloom.methods.grid import Grid, budgets, keeps_all, kept_blocks
from sparseloom.methods.pooling import Pooling, any_pair, pool_scores
from sparseloom.methods.scores import Scores

__all__ = [
    "Grid",
    "Scores",
    "block_threshold_mask",
    "block_topk_mask",
    "budgets",
    "keeps_all",
    "kept_blocks",
    "pool_scores",
    "threshold_mask",
    "topk_mask",
]


@torch.no_grad()
def topk_mask(
    scores: Scores | Float[Tensor, "batch heads q_len kv_len"],
    *,
    sparsity: float,
    minimum_keys: int = 16,
    block_size: tuple[int, int] = (1, 1),
    is_causal: bool = False,
    key_padding: Bool[Tensor, "#batch kv_len"] | None = None,
    query_padding: Bool[Tensor, "#batch q_len"] | None = None,
    pooling: Pooling = "mass",
    mask_heads: int | None = None,
    tile: int | None = None,
    caps: Float[Tensor, " heads"] | None = None,
) -> SparseMask:
    """Row-wise top-k (Liu et al., IEEE TC 2022, §3): every query block keeps its budget exactly.

    The budget is max(minimum_keys, ⌈(1 - sparsity)·allowed⌉), in whole key blocks and at most
    `allowed`; `allowed` counts what the last query of the block may see, padding excluded.  In
    causal models the diagonal is always kept, as part of the budget; where a block has more
    diagonal keys than budget (tall blocks in short contexts), the budget is raised to them.
    Ties go to the lowest key.  Scores exist a few query rows at a time (`Scores.chunks`).

    Args:
        scores: in units of q·k·scale, where blocks are pooled; else any.
        query_padding: True = a real query; the others have no say in a block's choice.
        pooling: how pairs become one score per block (`pool_scores`); unused for (1, 1) unless
            heads share a mask.
        mask_heads: heads of the mask, each shared by heads / mask_heads neighbouring ones; None:
            as many as the scores have.
        tile: keys of a tile, a multiple of the block's: the budget is split over tiles and spent
            in each of them alone (`Grid.shares`); None: over the whole row.
        caps: a score per head above which all count alike.

    Returns:
        A mask of the scores' batch and of `mask_heads` heads.
    """
    scores = Scores.of(scores)
    heads = scores.heads if mask_heads is None else mask_heads
    grid = _grid(scores, block_size, is_causal, key_padding)
    width = grid.kv_blocks if tile is None else tile // block_size[1]
    shares = grid.budget(sparsity, minimum_keys)[..., None]
    shares = shares if width >= grid.kv_blocks else grid.shares(shares[..., 0], width)
    budget = shares.sum(-1)
    counts = budget[:, None].expand(scores.batch, heads, grid.q_blocks)
    offsets = _offsets(counts)
    out = torch.empty(int(offsets[-1, -1, -1]), dtype=torch.int32, device=scores.device)
    for start, stop in scores.chunks(block_size[0]):
        keys = grid.keys_of(stop)
        if not keys:
            continue
        first, last = start // block_size[0], -(-stop // block_size[0])
        chunk = scores.rows(start, stop, keys)
        if caps is not None:
            chunk = chunk.minimum(caps.to(chunk.device)[:, None, None])
        if block_size != (1, 1) or heads != scores.heads:
            voters = None if query_padding is None else query_padding[:, start:stop]
            pairs = grid.allowed_pairs(start, stop, keys)
            chunk = pool_scores(chunk, pairs, block_size, pooling, voters, heads)
        _select_tiles(chunk, grid, shares, width, (first, last), offsets, out)
    if shares.shape[-1] > 1:  # tiles counted their keys from 0
        counts = shares[:, None].expand(scores.batch, heads, -1, -1)
        first_key = torch.arange(0, grid.kv_blocks, width, dtype=torch.int32, device=out.device)
        out += first_key.expand(counts.shape).flatten().repeat_interleave(counts.flatten())
    return _mask(out, offsets, grid)


def _select_tiles(
    scores: Float[Tensor, "batch heads rows keys"],
    grid: Grid,
    shares: Int64[Tensor, "_ q_blocks tiles"],
    width: int,
    rows: tuple[int, int],
    offsets: Int64[Tensor, "batch heads q_blocks_plus_1"],
    out: Int32[Tensor, " nnz"],
) -> None:
    """The best of each tile of `width` key blocks, counted from the tile's first."""
    first, last = rows
    starts = offsets[:, :, first:last]
    for number in range(-(-scores.shape[-1] // width)):
        some = slice(number * width, min((number + 1) * width, scores.shape[-1]))
        select_rows(
            scores[..., some],
            (grid.visible[:, first:last] - some.start).clamp(min=0, max=width),
            shares[:, first:last, number],
            (grid.diagonal[first:last] - some.start).clamp(min=0, max=width),
            None if grid.attended is None else grid.attended[:, some],
            starts,
            out,
        )
        starts = starts + shares[:, None, first:last, number]


@torch.no_grad()
def threshold_mask(
    scores: Scores | Float[Tensor, "batch heads q_len kv_len"],
    threshold: float | Float[Tensor, " heads"],
    *,
    probability: bool = False,
    strict: bool = False,
    block_size: tuple[int, int] = (1, 1),
    is_causal: bool = False,
    key_padding: Bool[Tensor, "#batch kv_len"] | None = None,
    mask_heads: int | None = None,
) -> SparseMask:
    """Every pair whose score reaches the threshold (Liu et al., IEEE TC 2022, §3).

    Each row also keeps its best key (the lowest of equals), and in causal models its diagonal, so
    that no row that may attend to something is empty.  A block is kept if one of its pairs is.

    Args:
        threshold: one number, or one per head, in the units of the scores.
        probability: compare the softmax of each row over its allowed keys instead of the score.
        strict: the score must exceed the threshold, not just reach it.
        mask_heads: heads of the mask; one that several heads share keeps what any of them does.
    """
    scores = Scores.of(scores)
    heads = scores.heads if mask_heads is None else mask_heads
    grid = _grid(scores, block_size, is_causal, key_padding)
    level: Tensor | float = threshold
    if isinstance(threshold, Tensor):
        level = threshold.to(scores.device).float()[:, None, None]
    elif probability:
        level = math.log(threshold)
    found: list[Tensor] = []
    counts: list[Tensor] = []
    for start, stop in scores.chunks(block_size[0]):
        keys = grid.keys_of(stop)
        first, last = start // block_size[0], -(-stop // block_size[0])
        if not keys:
            counts.append(_no_counts(scores, heads, last - first))
            found.append(torch.empty(0, dtype=torch.int32, device=scores.device))
            continue
        may = grid.allowed_pairs(start, stop, keys)
        chunk = scores.rows(start, stop, keys).masked_fill_(~may, -torch.inf)
        if probability:
            chunk = chunk.log_softmax(-1)
        keep = chunk > level if strict else chunk >= level
        keep.scatter_(-1, chunk.argmax(-1, keepdim=True), True)
        kept = any_pair(keep & may, block_size, heads)
        if is_causal:
            must = grid.diagonal_blocks(first, last, kept.shape[-1])
            kept = kept | (must & grid.allowed_blocks(first, last, kept.shape[-1]))
        counts.append(kept.sum(-1))
        found.append(kept.flatten(0, 2).nonzero()[:, 1].to(torch.int32))
    offsets = _offsets(torch.cat(counts, -1))
    return _mask(_gather_chunks(found, counts, offsets), offsets, grid)


@torch.no_grad()
def block_topk_mask(
    scores: Float[Tensor, "batch heads q_blocks kv_blocks"],
    grid: Grid,
    *,
    sparsity: float,
    minimum_keys: int,
) -> SparseMask:
    """`topk_mask` from one score per block."""
    budget = grid.budget(sparsity, minimum_keys)
    offsets = _offsets(budget[:, None].expand(*scores.shape[:2], grid.q_blocks))
    out = torch.empty(int(offsets[-1, -1, -1]), dtype=torch.int32, device=scores.device)
    starts = offsets[..., :-1]
    select_rows(scores, grid.visible, budget, grid.diagonal, grid.attended, starts, out)
    return _mask(out, offsets, grid)


@torch.no_grad()
def block_threshold_mask(
    scores: Float[Tensor, "batch heads q_blocks kv_blocks"], grid: Grid, threshold: float
) -> SparseMask:
    """Every block whose share of the softmax over its row's allowed blocks reaches the threshold,
    the row's best block, and in causal models those on the diagonal."""
    may = grid.allowed_blocks(0, grid.q_blocks, grid.kv_blocks)
    share = scores.float().masked_fill(~may, torch.finfo(torch.float32).min).softmax(-1)
    keep = (share >= threshold).scatter_(-1, share.argmax(-1, keepdim=True), True)
    if grid.is_causal:
        keep = keep | grid.diagonal_blocks(0, grid.q_blocks, grid.kv_blocks)
    keep = keep & may
    found = keep.flatten(0, 2).nonzero()[:, 1].to(torch.int32)
    return _mask(found, _offsets(keep.sum(-1)), grid)


def _grid(
    scores: Scores, block_size: tuple[int, int], is_causal: bool, key_padding: Tensor | None
) -> Grid:
    return Grid(
        scores.q_len,
        scores.kv_len,
        block_size=block_size,
        is_causal=is_causal,
        key_padding=key_padding,
        device=scores.device,
    )


def _offsets(counts: Int64[Tensor, "batch heads rows"]) -> Int64[Tensor, "batch heads rows_plus_1"]:
    """Absolute places of rows of these lengths, one after the other."""
    ends = counts.reshape(-1).cumsum(0).view(counts.shape)
    return torch.cat([ends[..., :1] - counts[..., :1], ends], -1)


def _gather_chunks(
    found: list[Tensor], counts: list[Tensor], offsets: Int64[Tensor, "batch heads rows_plus_1"]
) -> Tensor:
    """The chunks' entries, each in (batch, head, row) order, in the order of the whole mask."""
    out = torch.empty(int(offsets[-1, -1, -1]), dtype=torch.int32, device=offsets.device)
    first = 0
    for entries, lengths in zip(found, counts, strict=True):
        flat = lengths.reshape(-1)
        last = first + lengths.shape[-1]
        shift = offsets[..., first:last].reshape(-1) - (flat.cumsum(0) - flat)
        place = torch.arange(len(entries), device=out.device)
        out[place + shift.repeat_interleave(flat, output_size=len(entries))] = entries
        first = last
    return out


def _no_counts(scores: Scores, heads: int, rows: int) -> Tensor:
    shape = (scores.batch, heads, rows)
    return torch.zeros(shape, dtype=torch.int64, device=scores.device)


def _mask(indices: Tensor, offsets: Tensor, grid: Grid) -> SparseMask:
    return SparseMask(
        indices,
        offsets,
        block_size=grid.block_size,
        q_len=grid.q_len,
        kv_len=grid.kv_len,
        validate=False,
    )
