"""How good a mask is: keys that it shares with the oracle, and probability that it retains."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparseloom.mask import SparseMask
from sparseloom.methods.grid import allowed_pairs
from sparseloom.methods.scores import Scores, row_chunks


@torch.no_grad()
def overlap(
    mask: SparseMask,
    oracle_mask: SparseMask,
    *,
    is_causal: bool = False,
    key_padding: Bool[Tensor, "batch kv_len"] | None = None,
) -> Float[Tensor, "batch heads"]:
    """|mask ∩ oracle| / |oracle| in allowed pairs, per batch entry and head, in [0, 1].

    The masks may differ in block size; one with a single batch entry or head is compared with
    all of the other's.  Where the oracle keeps nothing, the overlap is 1.
    """
    if (mask.q_len, mask.kv_len) != (oracle_mask.q_len, oracle_mask.kv_len):
        raise ValueError(
            f"oracle_mask must have the lengths of mask {(mask.q_len, mask.kv_len)}, "
            f"got {(oracle_mask.q_len, oracle_mask.kv_len)}"
        )
    batch = max(mask.batch, oracle_mask.batch, 1 if key_padding is None else len(key_padding))
    heads = max(mask.heads, oracle_mask.heads)
    diagonal = mask.kv_len - mask.q_len if is_causal else None
    both = torch.zeros(batch, heads, dtype=torch.int64, device=mask.device)
    there = both.clone()
    block_rows = math.lcm(mask.block_size[0], oracle_mask.block_size[0])
    row_size = batch * heads * mask.kv_len
    for start, stop in row_chunks(mask.q_len, row_size, block_rows, mask.device):
        may = allowed_pairs(start, stop, mask.kv_len, diagonal, key_padding, mask.device)
        wanted = kept_rows(oracle_mask, start, stop, heads) & may
        both += (wanted & kept_rows(mask, start, stop, heads)).sum((-2, -1))
        there += wanted.sum((-2, -1))
    return torch.where(there > 0, both / there.clamp(min=1), 1.0)


@torch.no_grad()
def retained_mass(
    query: Float[Tensor, "batch heads q_len head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    mask: SparseMask,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_padding: Bool[Tensor, "batch kv_len"] | None = None,
    query_padding: Bool[Tensor, "batch q_len"] | None = None,
) -> Float[Tensor, "batch heads"]:
    """Share of the true attention probability that the mask keeps: mean over queries, in [0, 1].

    Queries that may attend to nothing, and padded ones where `query_padding` (True = real) is
    given, do not count.  `scale` defaults to 1/√head_dim.  Where no query counts, the share is 1.
    """
    default = 1 / math.sqrt(query.shape[-1])
    scores = Scores.from_query_key(query, key, default if scale is None else scale)
    if (mask.q_len, mask.kv_len) != (scores.q_len, scores.kv_len):
        raise ValueError(
            f"mask must have q_len {scores.q_len} and kv_len {scores.kv_len}, "
            f"got {mask.q_len} and {mask.kv_len}"
        )
    diagonal = mask.kv_len - mask.q_len if is_causal else None
    total = torch.zeros(scores.batch, scores.heads, device=query.device)
    rows = torch.zeros(scores.batch, 1, device=query.device)
    for start, stop in scores.chunks(mask.block_size[0]):
        may = allowed_pairs(start, stop, scores.kv_len, diagonal, key_padding, query.device)
        counted = may.any(-1)  # (B, 1, R)
        if query_padding is not None:
            counted = counted & query_padding[:, None, start:stop]
        chunk = scores.rows(start, stop, scores.kv_len).masked_fill_(~may, -torch.inf)
        share = chunk.softmax(-1).masked_fill_(~kept_rows(mask, start, stop, scores.heads), 0.0)
        total += share.sum(-1).masked_fill(~counted, 0.0).sum(-1)
        rows += counted.sum(-1)
    return torch.where(rows > 0, total / rows.clamp(min=1), 1.0)


def kept_rows(
    mask: SparseMask, start: int, stop: int, heads: int | None = None
) -> Bool[Tensor, "batch heads rows kv_len"]:
    """The queries start … stop - 1 of a mask as booleans; `start` lies on a block edge.

    With `heads`, each mask head is repeated for the heads that share it.
    """
    bq, bk = mask.block_size
    if start % bq:
        raise ValueError(f"start must be a multiple of {bq}, got {start}")
    first, last = start // bq, -(-stop // bq)
    counts = mask.counts[..., first:last].reshape(-1)
    rows = torch.arange(len(counts), device=mask.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    shift = mask.offsets[..., first:last].reshape(-1) - before
    place = torch.arange(len(rows), device=mask.device) + shift[rows]
    keep = torch.zeros(len(counts), mask.kv_blocks, dtype=torch.bool, device=mask.device)
    keep[rows, mask.indices[place].long()] = True
    keep = keep.view(mask.batch, mask.heads, last - first, mask.kv_blocks)
    keep = keep.repeat_interleave(bq, 2) if bq > 1 else keep
    keep = keep.repeat_interleave(bk, 3) if bk > 1 else keep
    keep = keep[:, :, : stop - start, : mask.kv_len]
    repeats = 1 if heads is None else heads // mask.heads
    return keep.repeat_interleave(repeats, 1) if repeats > 1 else keep
