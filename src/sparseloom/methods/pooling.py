"""One score per block out of the scores of its pairs."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Pooling = Literal["mass", "max", "mean"]
POOLINGS: tuple[Pooling, ...] = ("mass", "max", "mean")


def pool_scores(
    scores: Float[Tensor, "batch heads rows keys"],
    allowed: Bool[Tensor, "#batch 1 rows keys"],
    block_size: tuple[int, int],
    pooling: Pooling,
    voters: Bool[Tensor, "#batch rows"] | None = None,
    mask_heads: int | None = None,
) -> Float[Tensor, "batch mask_heads q_blocks kv_blocks"]:
    """Score of each block of a selection that keeps or drops blocks as a whole.

    Rows compete inside a block, so the first two bring every row to a scale of its own:

    - `"mass"` (default): softmax of the row over its allowed keys; the block's score is the sum
      over its pairs.  The scores are in units of q·k·scale, so this is the attention probability
      that the block is expected to receive, and the best k blocks are those that retain the
      most.  With exact scores no selection of the same size retains more; with predicted ones it
      also retained more than `"max"` in every layer of a small byte model, for (8, 1), (64, 1)
      and (16, 16) alike.
    - `"max"`: the row minus its maximum, over its standard deviation, both over its allowed keys;
      the block's score is the largest of its pairs.  A row with few clear favourites gets them
      even if the others want something else, and no exponential is needed.
    - `"mean"`: the mean of the scores themselves, over the block's pairs.  The cheapest, since it
      is one product of the block's mean query and mean key, and blind to what one row alone wants.

    Args:
        scores: rows start at a block edge; the last block of either axis may be cut off.
            Overwritten.
        allowed: pairs that causality and padding allow; the others have no say.
        voters: False where a row is a padded query, which has no say either.
        mask_heads: heads of the mask, each shared by heads / mask_heads neighbouring ones, whose
            pairs then are pairs of one block; None = as many as the scores have.

    Returns:
        Scores that compare within one query block.
    """
    ranked = allowed if voters is None else allowed & voters[:, None, :, None]
    if pooling == "mass":
        share = scores.masked_fill_(~ranked, -torch.inf).softmax(-1)
        silent = ~ranked.any(-1, keepdim=True)
        if silent.any():
            share = share.masked_fill(silent, 0.0)
        return _heads(_blocks(share, block_size, 0.0).sum((-3, -1)), mask_heads).sum(2)
    if pooling == "mean":
        total = _blocks(scores.masked_fill_(~ranked, 0.0), block_size, 0.0).sum((-3, -1))
        total = _heads(total, mask_heads).mean(2)
        pairs = _blocks(ranked, block_size, False).sum((-3, -1))
        return (total / pairs.clamp(min=1)).masked_fill(pairs == 0, -torch.inf)
    count = ranked.sum(-1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill_(~ranked, 0.0).sum(-1, keepdim=True) / count
    centred = scores - mean
    variance = centred.square().masked_fill(~ranked, 0.0).sum(-1, keepdim=True) / count
    top = centred.masked_fill(~ranked, -torch.inf).amax(-1, keepdim=True)
    unit = variance.sqrt().clamp(min=torch.finfo(scores.dtype).tiny)
    below = ((centred - top) / unit).masked_fill(~ranked, -torch.inf)
    return _heads(_blocks(below, block_size, -torch.inf).amax((-3, -1)), mask_heads).amax(2)


def any_pair(
    pairs: Bool[Tensor, "batch heads rows keys"],
    block_size: tuple[int, int],
    mask_heads: int | None = None,
) -> Bool[Tensor, "batch mask_heads q_blocks kv_blocks"]:
    """Which blocks hold at least one of the pairs, in one of the heads that share a mask."""
    if block_size != (1, 1):
        pairs = _blocks(pairs, block_size, False).any(-1).any(-2)
    return _heads(pairs, mask_heads).any(2)


def _heads(values: Tensor, mask_heads: int | None) -> Tensor:
    """(batch, mask heads, heads that share one, …)."""
    return values.unflatten(1, (values.shape[1] if mask_heads is None else mask_heads, -1))


def _blocks(pairs: Tensor, block_size: tuple[int, int], fill: float | bool) -> Tensor:
    """(batch, heads, q_blocks, bq, kv_blocks, bk), filled up at the far edges."""
    bq, bk = block_size
    rows, keys = pairs.shape[-2:]
    if keys % bk or rows % bq:
        pairs = torch.nn.functional.pad(pairs, (0, -keys % bk, 0, -rows % bq), value=fill)
    return pairs.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bq))
