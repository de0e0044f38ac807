"""Counting the pairs of a mask from its index lists, without an (q_len, kv_len) array.

With ``P(x)`` the number of attended keys before ``x``, query ``i`` of a block of keys
``c0 … c1 - 1`` is left with ``P(clamp(e, c0, c1)) - P(c0)`` pairs, where ``e`` is one past the
last key that it may see: ``kv_len``, or ``i + 1 + kv_len - q_len`` under causality. Summed over
the queries of a block this needs only ``P`` and its running sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

if TYPE_CHECKING:
    import sparseloom.mask

KeyPadding: TypeAlias = Bool[Tensor, "padding_batch kv_len"]  # True = attend


def check_key_padding(key_padding: Tensor, batch: int, kv_len: int) -> None:
    """Refuse a padding mask that does not fit (``batch`` 1 fits any)."""
    if key_padding.dtype != torch.bool:
        raise TypeError(f"key_padding must be bool (True = attend), got {key_padding.dtype}")
    if key_padding.dim() != 2 or key_padding.shape[1] != kv_len:
        raise ValueError(
            f"key_padding must have shape (batch, {kv_len}), got {tuple(key_padding.shape)}"
        )
    if key_padding.shape[0] != batch and 1 not in (batch, key_padding.shape[0]):
        raise ValueError(
            f"key_padding must have batch {batch} or 1 as the mask, got {key_padding.shape[0]}"
        )


class _Prefix:
    """``P`` of one padding row or of a batch of them, and its running sum."""

    def __init__(self, key_padding: Tensor | None, kv_len: int, device: torch.device) -> None:
        if key_padding is None:
            before = torch.arange(kv_len + 1, device=device)[None]
        else:
            before = torch.nn.functional.pad(key_padding.to(device).cumsum(-1), (1, 0))
        self.stride = kv_len + 1 if before.shape[0] > 1 else 0
        self.before = before.reshape(-1)
        self.running = before.cumsum(-1).reshape(-1)

    def pairs(
        self,
        batch: Tensor | int,
        rows: tuple[Tensor | int, Tensor | int],
        keys: tuple[Tensor, Tensor],
        shift: int | None,
    ) -> Int64[Tensor, " n"]:
        """Allowed pairs of queries ``rows[0] … rows[1] - 1`` and keys ``keys[0] … keys[1] - 1``.

        ``shift`` is ``kv_len - q_len`` under causality, None without it.
        """
        (r0, r1), (c0, c1) = rows, keys
        base = batch * self.stride
        inside = self.before[base + c1] - self.before[base + c0]
        if shift is None:
            return inside * (r1 - r0)
        # Query i ends at e = i + 1 + shift, so e runs over (r0 + shift, r1 + shift].
        low, high = c0.clamp(min=r0 + shift).minimum(c1), c1.clamp(max=r1 + shift).maximum(c0)
        cut = self.running[base + high] - self.running[base + low]
        cut -= (high - low) * self.before[base + c0]
        whole = (r1 + shift - c1.clamp(min=r0 + shift)).clamp(min=0)
        return cut + whole * inside


def entry_pairs(
    mask: sparseloom.mask.SparseMask,
    entries: Int64[Tensor, " n"],
    rows: Int64[Tensor, " n"],
    *,
    is_causal: bool,
    key_padding: KeyPadding | None,
) -> Int64[Tensor, " n"]:
    """Allowed pairs in each of these places of ``mask.indices``, which lie in these flat rows.

    ``key_padding`` has one row, or one per batch entry of the mask.
    """
    prefix = _Prefix(key_padding, mask.kv_len, mask.device)
    return _entry_pairs(mask, prefix, entries, rows, is_causal)


def _entry_pairs(
    mask: sparseloom.mask.SparseMask,
    prefix: _Prefix,
    entries: Tensor,
    rows: Tensor,
    is_causal: bool,
) -> Tensor:
    bq, bk = mask.block_size
    c0 = mask.indices[entries].to(torch.int64) * bk
    r0 = rows % mask.q_blocks * bq
    return prefix.pairs(
        rows // (mask.q_blocks * mask.heads),
        (r0, (r0 + bq).clamp(max=mask.q_len)),
        (c0, (c0 + bk).clamp(max=mask.kv_len)),
        mask.kv_len - mask.q_len if is_causal else None,
    )


def kept_pairs(
    mask: sparseloom.mask.SparseMask, *, is_causal: bool, key_padding: KeyPadding | None
) -> Int64[Tensor, "batch heads"]:
    """See ``SparseMask.kept_pairs``.

    Rows ascend, so bisection splits each into blocks below the causal edge, blocks that it
    crosses, and blocks beyond it; only the second kind is counted block by block.
    """
    if key_padding is not None:
        check_key_padding(key_padding, mask.batch, mask.kv_len)
        if mask.batch == 1 and key_padding.shape[0] > 1:
            each = [
                kept_pairs(mask, is_causal=is_causal, key_padding=one[None]) for one in key_padding
            ]
            return torch.cat(each)
    bq, bk = mask.block_size
    starts, ends = (part.reshape(-1) for part in (mask.offsets[..., :-1], mask.offsets[..., 1:]))
    rows = torch.arange(starts.shape[0], device=mask.device)
    r0 = rows % mask.q_blocks * bq
    r1 = (r0 + bq).clamp(max=mask.q_len)
    # Key blocks before `inner` are allowed to all queries of the row, those from `outer` on to
    # none. A block cut off at kv_len is never inner: it is counted for itself.
    inner = torch.full_like(rows, mask.kv_len // bk)
    outer = torch.full_like(rows, mask.kv_blocks)
    if is_causal:
        shift = mask.kv_len - mask.q_len
        inner = torch.minimum(inner, ((r0 + shift + 1).clamp(min=0)) // bk)
        outer = torch.minimum(outer, ((r1 + shift).clamp(min=0) + bk - 1) // bk)
    edge = _bisect(mask.indices, starts, ends, inner)
    beyond = _bisect(mask.indices, edge, ends, outer)
    prefix = _Prefix(key_padding, mask.kv_len, mask.device)
    if key_padding is None:
        total = (edge - starts) * bk * (r1 - r0)
    else:
        seen = torch.nn.functional.pad(_attended(mask, prefix).cumsum(0), (1, 0))
        total = (seen[edge] - seen[starts]) * (r1 - r0)
    crossed = beyond - edge
    several = rows.repeat_interleave(crossed)
    first = (edge - crossed.cumsum(0) + crossed)[several]
    entries = first + torch.arange(several.shape[0], device=mask.device)
    total.index_add_(0, several, _entry_pairs(mask, prefix, entries, several, is_causal))
    return total.view(mask.batch, mask.heads, mask.q_blocks).sum(-1)


def _attended(mask: sparseloom.mask.SparseMask, prefix: _Prefix) -> Int64[Tensor, " nnz"]:
    """Attended keys in each kept key block."""
    edges = torch.arange(mask.kv_blocks + 1, device=mask.device) * mask.block_size[1]
    before = prefix.before.view(-1, mask.kv_len + 1)[:, edges.clamp(max=mask.kv_len)]
    per_block = before.diff(dim=-1)
    if per_block.shape[0] == 1:
        return per_block[0][mask.indices]
    batch = mask.entry_rows() // (mask.heads * mask.q_blocks)
    return per_block.view(-1)[batch * mask.kv_blocks + mask.indices]


def _bisect(
    indices: Int32[Tensor, " nnz"],
    starts: Int64[Tensor, " rows"],
    ends: Int64[Tensor, " rows"],
    wanted: Int64[Tensor, " rows"],
) -> Int64[Tensor, " rows"]:
    """The first place in each row whose key block is at least ``wanted``."""
    low, high = starts, ends
    if indices.shape[0] == 0:
        return low
    for _ in range(int((ends - starts).max()).bit_length()):
        middle = (low + high) // 2
        after = (low < high) & (indices[middle.clamp(max=indices.shape[0] - 1)] < wanted)
        low, high = torch.where(after, middle + 1, low), torch.where(after, high, middle)
    return low


def allowed_pairs(
    q_len: int,
    kv_len: int,
    *,
    is_causal: bool = False,
    key_padding: KeyPadding | None = None,
) -> Int64[Tensor, " padding_batch"]:
    """Pairs of one head that causality (bottom-right aligned) and padding allow, per batch row.

    Without ``key_padding`` the result has one entry, which holds for every batch row.
    """
    device = torch.device("cpu") if key_padding is None else key_padding.device
    batch = 1 if key_padding is None else key_padding.shape[0]
    prefix = _Prefix(key_padding, kv_len, device)
    zero = torch.zeros(batch, dtype=torch.int64, device=device)
    shift = kv_len - q_len if is_causal else None
    return prefix.pairs(
        torch.arange(batch, device=device), (0, q_len), (zero, zero + kv_len), shift
    )
