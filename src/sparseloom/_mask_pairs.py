"""Counting the pairs of a mask from its index lists, without an (q_len, kv_len) array.

With ``P(x)`` the number of attended keys before ``x``, query ``i`` of a block of keys
``c0 … c1 - 1`` is left with ``P(clamp(e, c0, c1)) - P(c0)`` pairs, where ``e`` is one past the
last key that it may see: ``kv_len``, or ``i + 1 + kv_len - q_len`` under causality. Summed over
the queries of a block this needs only ``P`` and its running sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

if TYPE_CHECKING:
    import sparseloom.mask

KeyPadding: TypeAlias = Bool[Tensor, "padding_batch kv_len"]  # True = attend

_CHUNK = 1 << 21  # entries counted at a time: bounds the int64 temporaries to some 200 MB


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
    first: int,
    last: int,
    *,
    is_causal: bool,
    key_padding: Tensor | None,
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Allowed pairs in each of the entries ``first … last - 1``, and the entries' flat rows.

    ``key_padding`` has one row, or one per batch entry of the mask.
    """
    prefix = _Prefix(key_padding, mask.kv_len, mask.device)
    return _entry_pairs(mask, prefix, first, last, is_causal)


def _entry_pairs(
    mask: sparseloom.mask.SparseMask, prefix: _Prefix, first: int, last: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    bq, bk = mask.block_size
    starts = mask.offsets[..., :-1].reshape(-1).contiguous()
    entry = torch.arange(first, last, device=mask.device)
    row = torch.searchsorted(starts, entry, right=True) - 1
    c0 = mask.indices[first:last].to(torch.int64) * bk
    r0 = row % mask.q_blocks * bq
    pairs = prefix.pairs(
        row // (mask.q_blocks * mask.heads),
        (r0, (r0 + bq).clamp(max=mask.q_len)),
        (c0, (c0 + bk).clamp(max=mask.kv_len)),
        mask.kv_len - mask.q_len if is_causal else None,
    )
    return pairs, row


def kept_pairs(
    mask: sparseloom.mask.SparseMask,
    *,
    is_causal: bool,
    key_padding: KeyPadding | None,
) -> Int64[Tensor, "batch heads"]:
    """See ``SparseMask.kept_pairs``."""
    if key_padding is not None:
        check_key_padding(key_padding, mask.batch, mask.kv_len)
        if mask.batch == 1 and key_padding.shape[0] > 1:
            each = [
                kept_pairs(mask, is_causal=is_causal, key_padding=one[None]) for one in key_padding
            ]
            return torch.cat(each)
    prefix = _Prefix(key_padding, mask.kv_len, mask.device)
    total = torch.zeros(mask.batch * mask.heads, dtype=torch.int64, device=mask.device)
    for first in range(0, mask.nnz, _CHUNK):
        last = min(first + _CHUNK, mask.nnz)
        pairs, row = _entry_pairs(mask, prefix, first, last, is_causal)
        total.index_add_(0, row // mask.q_blocks, pairs)
    return total.view(mask.batch, mask.heads)


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
