"""The best k keys of each row, exactly: ties go to the lowest key, on every device the same."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from sparseloom.methods import _topk_numba


def select_rows(
    scores: Float[Tensor, "batch heads rows keys"],
    visible: Int64[Tensor, "#batch rows"],
    budget: Int64[Tensor, "#batch rows"],
    diagonal: Int64[Tensor, "rows 2"],
    attended: Bool[Tensor, "#batch keys"] | None,
    starts: Int64[Tensor, "batch heads rows"],
    out: Int32[Tensor, " nnz"],
) -> None:
    """Write the kept keys of each row, ascending, into `out` from place `starts` on.

    Args:
        scores: fp32; NaN ranks as the smallest finite number.
        visible: only the first `visible` keys of a row may be kept.
        budget: keys to keep; at most as many as may be kept, and at least as many as must.
        diagonal: the keys diagonal[r, 0] … diagonal[r, 1] - 1 are kept before all others.
        attended: False where a key is padding, which may never be kept.
        starts: place of each row in `out`.
        out: written to; rows that are not in `starts` stay as they are.
    """
    if scores.device.type == "cpu":
        _topk_numba.select_rows(scores, visible, budget, diagonal, attended, starts, out)
        return
    keep = keep_rows(scores, visible, budget, diagonal, attended)
    counts = keep.sum(-1).reshape(-1)
    found = keep.reshape(-1, keep.shape[-1]).nonzero()[:, 1].to(torch.int32)
    shift = starts.reshape(-1) - (counts.cumsum(0) - counts)
    place = torch.arange(len(found), device=out.device)
    out[place + shift.repeat_interleave(counts, output_size=len(found))] = found


def keep_rows(
    scores: Float[Tensor, "batch heads rows keys"],
    visible: Int64[Tensor, "#batch rows"],
    budget: Int64[Tensor, "#batch rows"],
    diagonal: Int64[Tensor, "rows 2"],
    attended: Bool[Tensor, "#batch keys"] | None,
) -> Bool[Tensor, "batch heads rows keys"]:
    """The same as a boolean array, in plain torch: the definition, and the way on a GPU.

    `torch.topk` promises nothing about ties, so it gives only the k-th value; keys above it are
    kept, and keys equal to it from the left until the budget is full.
    """
    column = torch.arange(scores.shape[-1], device=scores.device)
    may = (column < visible[..., None])[:, None]
    if attended is not None:
        may = may & attended[:, None, None, :]
    start, stop = diagonal[None, None, :, :, None].unbind(-2)
    must = (column >= start) & (column < stop) & may
    finite = torch.finfo(scores.dtype)
    ranked = scores.nan_to_num(finite.min, finite.max, finite.min)
    ranked = ranked.masked_fill(~may, -torch.inf).masked_fill(must, torch.inf)
    wanted = budget[:, None, :, None].expand(*scores.shape[:-1], 1)
    most = int(budget.max()) if budget.numel() else 0
    if most == 0:
        return torch.zeros_like(ranked, dtype=torch.bool)
    best = ranked.topk(most, dim=-1).values
    kth = best.gather(-1, (wanted - 1).clamp(min=0))
    above = ranked > kth
    ties = ranked == kth
    room = wanted - above.sum(-1, keepdim=True)
    return (above | (ties & (ties.cumsum(-1) <= room))) & (wanted > 0)
