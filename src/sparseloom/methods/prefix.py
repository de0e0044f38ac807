"""Attention whose scores are products of non-negative features, in time linear in the length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 128  # tokens whose pairs are multiplied out, rather than a state kept for each


def feature_attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, epsilon: float = 0.0
) -> Tensor:
    """o_i = Σ_j (φq_i·φk_j) v_j / (Σ_j φq_i·φk_j + epsilon), over j ≤ i + kv_len - q_len if causal.

    Args:
        query: φ(q), (batch, heads, q_len, features), non-negative.
        key: φ(k), (batch, heads, kv_len, features), non-negative; zero rows take no part.
        value: (batch, heads, kv_len, value_dim).
        is_causal: sums over earlier tokens only, aligned bottom right.
        epsilon: added to every normaliser.

    Returns:
        (batch, heads, q_len, value_dim); zeros where no key takes part.
    """
    ones = value.new_ones(1).expand(*value.shape[:-1], 1)
    both = torch.cat([value, ones], -1)  # the last column sums the weights
    if is_causal:
        summed = _causal(query, key, both)
    else:
        summed = query @ (key.transpose(-1, -2) @ both)
    total = summed[..., -1:] + epsilon
    return summed[..., :-1] / total.masked_fill(total == 0, 1.0)


def drop_keys(value: Tensor, dropout_p: float) -> Tensor:
    """Attention dropout where there is no matrix to drop entries of: whole keys leave the sums.

    A key is dropped for all queries of a head at once, and the others are scaled up, so that the
    expected sums stay; the normaliser keeps all keys, as dropout after a softmax does.
    """
    if not dropout_p:
        return value
    return value * functional.dropout(value.new_ones(*value.shape[:-1], 1), dropout_p)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Σ_{j ≤ i} (φq_i·φk_j) v_j by chunks: a state of all earlier chunks, pairs within one."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_len > kv_len:
        raise ValueError(f"a causal call needs a key for each of its {q_len} queries, got {kv_len}")
    old = kv_len - q_len  # keys of a cache: every query sees them
    state = key[:, :, :old].transpose(-1, -2) @ value[:, :, :old]  # (B, H, F, Dv)
    key, value = key[:, :, old:], value[:, :, old:]
    pad = -q_len % _CHUNK if q_len > _CHUNK else 0
    width = min(_CHUNK, q_len)
    query, key, value = (
        functional.pad(part, (0, 0, 0, pad)).unflatten(2, (-1, width))
        for part in (query, key, value)
    )  # (B, H, chunks, width, ·)
    own = key.transpose(-1, -2) @ value  # (B, H, chunks, F, Dv)
    before = own.cumsum(2) - own + state[:, :, None]
    inside = (query @ key.transpose(-1, -2)).tril()
    return (query @ before + inside @ value).flatten(2, 3)[:, :, :q_len]
