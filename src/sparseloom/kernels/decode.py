"""``decode_attention``: a few new queries against a cache; here its reference form.

What SpAtten (HPCA 2021) does to one decoding step, each part optional:

- only the kept keys are read (``keep``: the survivors of cascade token pruning, §III-A);
- probabilities come from the high bits of the keys; where the largest probability of a row is
  under a threshold, the row is flat, rounding errors are not damped by the softmax, and it is
  computed once more with the low bits (``progressive``, §III-D);
- only the largest probabilities read their values (``value_keep``, §III-C).

The C++ form is in ``kernels/cpu``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from sparseloom.errors import unknown_name
from sparseloom.kernels.api import check_inputs, check_key_padding
from sparseloom.kernels.common import accumulation_dtype, fold_groups, unfold_groups
from sparseloom.kernels.cpu import decode as cpu
from sparseloom.kernels.cpu.decode import DecodeCall
from sparseloom.kernels.planes import PlaneCache

MAXIMUM_QUERIES = 16
BACKENDS = ("auto", "cpu", "reference")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def decode_attention(
    query: Float[Tensor, "batch heads q_len head_dim"],
    cache: tuple[
        Float[Tensor, "batch kv_heads kv_len head_dim"],
        Float[Tensor, "batch kv_heads kv_len value_dim"],
    ]
    | PlaneCache,
    *,
    keep: Int[Tensor, "batch keep_heads kept"] | None = None,
    value_keep: float | None = None,
    progressive: float | None = None,
    renormalise: bool = False,
    is_causal: bool = True,
    key_padding: Bool[Tensor, "batch kv_len"] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_importance: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "batch heads q_len value_dim"] | DecodeOutput:
    """Attention of 1 to 16 new queries to a cache that already holds their keys and values.

    A query that may attend to nothing gives 0. Works under ``torch.compile(fullgraph=True)`` in
    its reference form, where the values of ``keep`` are not checked.

    Args:
        query: (batch, heads, q_len, head_dim), the last ``q_len`` tokens.
        cache: ``(key, value)`` in the dtype of the query, or a ``PlaneCache`` with quantised
            keys, in one or two bit planes.
        keep: key positions to read, distinct, in any order, −1 = empty; (batch, keep_heads,
            kept) with keep_heads 1, kv_heads or heads. None reads all keys.
        value_keep: fraction in (0, 1] of the keys of each row whose values are read: the
            ⌊value_keep · n⌋ most probable of the n keys that it may attend to, at least one,
            ties to the key listed first. None reads the values of all.
        progressive: threshold in [0, 1] on the largest probability of a row (0.1 is typical);
            rows under it are computed once more with the low bits. Needs a ``PlaneCache`` with
            two planes. None reads all bits at once.
        renormalise: divide the probabilities left by ``value_keep`` by their sum. The paper
            mentions no such step, so it is off.
        is_causal: query i sees key j if j <= i + kv_len − q_len.
        key_padding: bool (batch, kv_len), True = attend.
        scale: factor of the scores, by default 1/√head_dim.
        enable_gqa: allow ``kv_heads`` to divide ``heads``.
        return_importance: also return the probabilities summed over the queries, per key
            (0 for keys not read), and Σ|out| per head.
        return_stats: also return how many keys and values each row read, and whether it
            fetched the low bits.
        backend: "cpu" (C++: no gradients, fp32, bf16 or fp16), "reference" (plain PyTorch), or
            "auto", which takes "cpu" where it can.

    Returns:
        (batch, heads, q_len, value_dim) in the dtype of the inputs, or a ``DecodeOutput`` if
        ``return_importance`` or ``return_stats`` is set.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or a value does not fit.
        IndexError: ``keep`` names a key that is not in the cache.
        NotImplementedError: backend "cpu" cannot run this call, here or anywhere.
    """
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if isinstance(cache, PlaneCache):
        planes, key, value = cache, cache.key_msb, cache.value
    else:
        planes, (key, value) = None, cache
    if not _plainly_fits(query, key, value, planes, enable_gqa):
        if planes is not None:
            key, value = _stand_ins(query, planes)
        query, key, value = check_inputs(query, key, value, enable_gqa=enable_gqa)
    _check_options(query, planes, value_keep, progressive)
    if key_padding is not None:
        check_key_padding(key_padding, key)
    if keep is not None:
        _check_keep(keep, query, key)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    call = DecodeCall(
        query, key, value, planes, keep, value_keep, progressive, renormalise, is_causal,
        key_padding, scale, return_importance, return_stats,
    )  # fmt: skip
    if backend != "reference":
        refusal = cpu.refusal(call)
        if refusal is None:
            return _from_cpu(call)
        if backend == "cpu":
            raise NotImplementedError(f"backend 'cpu' cannot run this call: {refusal}")
    return _reference(call)


def _plainly_fits(
    query: Tensor, key: Tensor, value: Tensor, planes: PlaneCache | None, enable_gqa: bool
) -> bool:
    """Whether ``check_inputs`` would neither refuse nor cast: the usual call, answered quickly.

    Between two steps of a model the interpreter has left the caches of the processor, so that
    every line here is felt.
    """
    shape, keys, values, dtype = query.shape, key.shape, value.shape, query.dtype
    if len(shape) != 4 or len(keys) != 4 or len(values) != 4:
        return False
    if planes is None and not (key.dtype == dtype == value.dtype):
        return False
    return (
        dtype in _FLOATS
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and keys[0] == shape[0]
        and keys[3] == shape[3]
        and values[:3] == keys[:3]
        and 0 not in shape
        and 0 not in keys
        and values[3] > 0
        and (shape[1] == keys[1] or (enable_gqa and shape[1] % keys[1] == 0))
        and not torch.is_autocast_enabled("cpu")
    )


def _stand_ins(query: Tensor, planes: PlaneCache) -> tuple[Tensor, Tensor]:
    """Views of one number in place of the quantised tensors, where only their shapes matter.

    They have the dtype that autocast gives the query, so that there is nothing to cast.
    """
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return planes.stand_ins(dtype)


def _from_cpu(call: DecodeCall) -> Tensor | DecodeOutput:
    result = cpu.decode(call)
    if isinstance(result, int):
        assert call.keep is not None
        raise _wrong_position(call.keep, result, call.kv_len)
    if not (call.return_importance or call.return_stats):
        return result.out
    stats = None
    if result.keys_read is not None:
        assert result.values_read is not None
        assert result.refetched is not None
        stats = DecodeStats(result.keys_read, result.values_read, result.refetched)
    return DecodeOutput(result.out, result.key_importance, result.head_importance, stats)


def _reference(call: DecodeCall) -> Tensor | DecodeOutput:
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


def _check_options(
    query: Tensor, planes: PlaneCache | None, value_keep: float | None, progressive: float | None
) -> None:
    if query.shape[2] > MAXIMUM_QUERIES:
        raise ValueError(
            f"query must have 1 to {MAXIMUM_QUERIES} rows (attention takes more), "
            f"got {query.shape[2]}"
        )
    if value_keep is not None and not 0.0 < value_keep <= 1.0:
        raise ValueError(f"value_keep must be in (0, 1], got {value_keep}")
    if progressive is not None:
        if not 0.0 <= progressive <= 1.0:
            raise ValueError(f"progressive must be in [0, 1], got {progressive}")
        if planes is None:
            raise ValueError(
                f"progressive must be None for a cache of plain tensors, got {progressive}: it "
                "needs bit planes (PlaneCache.from_tensors)"
            )
        if planes.lsb_bits == 0:
            raise ValueError(
                f"progressive must be None for a cache with one plane (lsb_bits = 0), "
                f"got {progressive}"
            )


def _check_keep(keep: Tensor, query: Tensor, key: Tensor) -> None:
    """Refuse lists of keys of a wrong type or shape."""
    if keep.dtype == torch.bool or keep.is_floating_point() or keep.is_complex():
        raise TypeError(f"keep must hold integers, got {keep.dtype}")
    (batch, heads), kv_heads = query.shape[:2], key.shape[1]
    shape = keep.shape
    if len(shape) != 3 or shape[0] != batch or shape[1] not in (1, kv_heads, heads):
        raise ValueError(
            f"keep must have shape ({batch}, heads, kept) with heads in "
            f"{sorted({1, kv_heads, heads})}, got {tuple(shape)}"
        )


def _wrong_position(keep: Tensor, place: int, kv_len: int) -> IndexError:
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
            raise _wrong_position(keep, int(wrong.flatten().nonzero()[0]), kv_len)
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
