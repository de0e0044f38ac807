"""One decoding step in reference form: the arithmetic that ``decode_attention`` promises."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.kernels.common import accumulation_dtype, fold_groups, unfold_groups
from sparseloom.kernels.decode_call import DecodeCall
from sparseloom.kernels.planes import PlaneCache


class DecodeStats(NamedTuple):
    """What each query row read."""

    keys_read: Int64[Tensor, "batch heads q_len"]
    values_read: Int64[Tensor, "batch heads q_len"]
    refetched: Bool[Tensor, "batch heads q_len"]


class DecodeOutput(NamedTuple):
    """What ``decode_attention`` returns when more than the output is asked for."""

    out: Float[Tensor, "batch heads q_len value_dim"]
    key_importance: Float[Tensor, "batch heads kv_len"] | None = None
    head_importance: Float[Tensor, "batch heads"] | None = None
    stats: DecodeStats | None = None


def decode(call: DecodeCall) -> Tensor | DecodeOutput:
    """One step by plain PyTorch operations; differentiable.

    Raises:
        IndexError: ``keep`` names a key that is not in the cache.
    """
    query, key, planes, value_keep = call.query, call.key, call.planes, call.value_keep
    dtype = accumulation_dtype(query.dtype)
    heads, q_len = query.shape[1:3]
    positions = None if call.keep is None else _positions(call.keep, key)
    allowed = _allowed(positions, key, q_len, call.is_causal, call.key_padding)
    with torch.autocast(query.device.type, enabled=False):
        scaled = query.to(dtype) * call.scale
        if planes is None:
            probs = _probabilities(scaled, _gather(key, positions).to(dtype), allowed)
            refetched = probs.new_zeros(probs.shape[:3], dtype=torch.bool)
        else:
            probs, refetched = _progressive(scaled, planes, positions, allowed, call.progressive)
        weights = probs if value_keep is None else _prune(probs, allowed, value_keep)
        if call.renormalise:
            total = weights.sum(-1, keepdim=True)
            weights = weights / total.masked_fill(total == 0, 1)
        values = _values(call, positions, dtype)
        out = unfold_groups(fold_groups(weights, values.shape[1]) @ values, heads)

    if not (call.return_importance or call.return_stats):
        return out.to(query.dtype)
    stats = None
    if call.return_stats:
        count = _per_query_head(allowed, probs).sum(-1)
        read = count if value_keep is None else _value_budget(count, value_keep)
        stats = DecodeStats(count, read, refetched)
    return DecodeOutput(
        out.to(query.dtype),
        _spread(probs.sum(2), positions, key.shape[2]) if call.return_importance else None,
        out.abs().sum((-2, -1)) if call.return_importance else None,
        stats,
    )


def wrong_position(keep: Tensor, place: int, kv_len: int) -> IndexError:
    """The error for the entry number ``place`` of ``keep``."""
    rest, n = divmod(place, keep.shape[2])
    b, h = divmod(rest, keep.shape[1])
    return IndexError(
        f"keep must be in [0, {kv_len}) or -1, got {int(keep[b, h, n])} at batch {b}, "
        f"head {h}, position {n}"
    )


def _positions(keep: Tensor, key: Tensor) -> Int64[Tensor, "batch read_heads kept"]:
    """``keep`` checked, with as many heads as keys are gathered for: kv_heads or heads."""
    kv_heads, kv_len = key.shape[1:3]
    if not torch.compiler.is_compiling():
        wrong = (keep < -1) | (keep >= kv_len)
        if bool(wrong.any()):
            raise wrong_position(keep, int(wrong.flatten().nonzero()[0]), kv_len)
    keep = keep.to(torch.int64)
    return keep.expand(-1, kv_heads, -1) if keep.shape[1] == 1 else keep


def _gather(tensor: Tensor, positions: Tensor | None) -> Tensor:
    """Rows of (batch, kv_heads, kv_len, dim) at the positions of (batch, read_heads, kept)."""
    if positions is None:
        return tensor
    batch, read_heads, _ = positions.shape
    b = torch.arange(batch, device=tensor.device)[:, None, None]
    h = torch.arange(read_heads, device=tensor.device) * tensor.shape[1] // read_heads
    return tensor[b, h[:, None], positions.clamp(min=0)]


def _allowed(
    positions: Tensor | None, key: Tensor, q_len: int, is_causal: bool, key_padding: Tensor | None
) -> Tensor | None:
    """Which gathered keys each query may attend to, (batch|1, read_heads|1, q_len|1, keys)."""
    device, kv_len = key.device, key.shape[2]
    where = torch.arange(kv_len, device=device)[None, None] if positions is None else positions
    allowed = None if positions is None else (positions >= 0)[:, :, None]
    if key_padding is not None:
        b = torch.arange(key.shape[0], device=device)[:, None, None]
        attend = key_padding[b, where.clamp(min=0)][:, :, None]
        allowed = attend if allowed is None else allowed & attend
    if is_causal and q_len > 1:
        last = torch.arange(kv_len - q_len, kv_len, device=device)
        seen = where[:, :, None] <= last[:, None]
        allowed = seen if allowed is None else allowed & seen
    return allowed


def _per_query_head(allowed: Tensor | None, like: Tensor) -> Tensor:
    """``allowed`` with the shape of the probabilities."""
    if allowed is None:
        return torch.ones_like(like, dtype=torch.bool)
    heads = like.shape[1]
    if allowed.shape[1] not in (1, heads):
        allowed = allowed.repeat_interleave(heads // allowed.shape[1], dim=1)
    return allowed.expand(like.shape)


def _probabilities(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the allowed keys; 0 in rows without one."""
    heads = query.shape[1]
    scores = unfold_groups(fold_groups(query, key.shape[1]) @ key.mT, heads)
    if allowed is None:
        return scores.softmax(-1)
    forbidden = ~_per_query_head(allowed, scores)
    # A finite floor instead of −inf keeps rows without a key free of NaN.
    floor = torch.finfo(scores.dtype).min
    return scores.masked_fill(forbidden, floor).softmax(-1).masked_fill(forbidden, 0)


def _progressive(
    query: Tensor,
    planes: PlaneCache,
    positions: Tensor | None,
    allowed: Tensor | None,
    threshold: float | None,
) -> tuple[Tensor, Tensor]:
    """Probabilities from the bit planes, and the rows that fetched the low bits for them."""
    msb = _gather(planes.key_msb, positions)
    if threshold is None:
        probs = _full_probabilities(query, planes, msb, positions, allowed)
        return probs, probs.new_zeros(probs.shape[:3], dtype=torch.bool)
    high = _scaled(planes.high_keys(msb), planes, positions, query.dtype)
    probs = _probabilities(query, high, allowed)
    # Without any key there is no maximum, and the sum is 0 as well.
    top = probs.amax(-1) if probs.shape[-1] else probs.sum(-1)
    flat = (top < threshold) & (top > 0)  # a row without keys has nothing to fetch
    if torch.compiler.is_compiling() or bool(flat.any()):
        full = _full_probabilities(query, planes, msb, positions, allowed)
        probs = torch.where(flat[..., None], full, probs)
    return probs, flat


def _full_probabilities(
    query: Tensor, planes: PlaneCache, msb: Tensor, positions: Tensor | None, allowed: Tensor | None
) -> Tensor:
    """Probabilities from both planes; ``msb`` has been gathered already."""
    lsb = None if planes.key_lsb is None else _gather(planes.key_lsb, positions)
    codes = planes.full_keys(msb, lsb)
    return _probabilities(query, _scaled(codes, planes, positions, query.dtype), allowed)


def _scaled(
    codes: Tensor, planes: PlaneCache, positions: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Gathered codes of keys times their scale."""
    return codes.to(dtype) * _factors(planes.key_scale, planes.key_msb, positions).to(dtype)


def _factors(scale: Tensor, like: Tensor, positions: Tensor | None) -> Tensor:
    """A scale of (batch, kv_heads, kv_len, dim) for the gathered rows."""
    if positions is None:
        return scale
    return _gather(scale.expand(*like.shape[:3], scale.shape[-1]), positions)


def _values(call: DecodeCall, positions: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gathered values."""
    if call.planes is None:
        return _gather(call.value, positions).to(dtype)
    stored, scale = call.planes.value, call.planes.value_scale
    values = _gather(stored, positions).to(dtype)
    return values if scale is None else values * _factors(scale, stored, positions).to(dtype)


def _value_budget(count: Tensor, value_keep: float) -> Tensor:
    """⌊value_keep · count⌋, at least one of what there is."""
    # The small term undoes representation error, as in 0.29 · 100 = 28.999….
    budget = (count.to(torch.float64) * value_keep + 1e-9).floor().to(torch.int64)
    return budget.clamp(min=1).minimum(count)


def _prune(probs: Tensor, allowed: Tensor | None, value_keep: float) -> Tensor:
    """Probabilities with all but the largest of each row set to 0."""
    open_ = _per_query_head(allowed, probs)
    budget = _value_budget(open_.sum(-1, keepdim=True), value_keep)
    order = probs.masked_fill(~open_, -1).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(probs.shape[-1], device=probs.device).expand(order.shape)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return probs.masked_fill(rank >= budget, 0)


def _spread(per_key: Tensor, positions: Tensor | None, kv_len: int) -> Tensor:
    """(batch, heads, gathered keys) back to their places among all keys."""
    if positions is None:
        return per_key
    heads = per_key.shape[1]
    places = positions.clamp(min=0).repeat_interleave(heads // positions.shape[1], dim=1)
    return per_key.new_zeros(*per_key.shape[:2], kv_len).scatter_add(-1, places, per_key)
