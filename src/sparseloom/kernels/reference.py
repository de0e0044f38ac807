"""The reference backend: plain PyTorch that defines what every other backend must return.

With S = scale · Q Kᵀ over the pairs that mask, causality and padding allow:

    P = softmax(S),   out = dropout(P) V,   lse = log Σ exp(S),
    key_importance[j] = Σ_i P[i, j],   head_importance = Σ |out|.

A row without any allowed key gives out 0, P 0 and lse −inf, and no gradient. Half-precision
inputs are computed in fp32 and rounded once; fp32 and fp64 stay as they are.

Scores are dense and masked, one chunk of query rows at a time (``common.CHUNK_ELEMENTS``), so
the time does not depend on the density, and the memory does not grow with q_len.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sparseloom.kernels.common import (
    AttentionCall,
    ForwardResult,
    accumulation_dtype,
    allowed_rows,
    dropout_rows,
    fold_groups,
    row_chunks,
    unfold_groups,
)

HAS_BACKWARD = True


def unavailable() -> str | None:
    """Why the backend cannot run on this machine (None: it can)."""
    return None


def unsupported(call: AttentionCall, *, lse: bool, importance: bool, grad: bool) -> str | None:  # noqa: ARG001
    """Why the backend refuses this call (None: it does not)."""
    return None


def profitable(call: AttentionCall) -> bool:  # noqa: ARG001
    """Whether "auto" should take it: yes, when no backend before it does."""
    return True


def forward(call: AttentionCall, *, lse: bool, importance: bool) -> ForwardResult:
    """Attention over the kept pairs.

    Every step is an ordinary autograd operation, so first and higher derivatives are available
    here (and checked in fp64), at the price of saving all scores. ``backward`` gives the first
    derivative chunk by chunk.

    Args:
        call: the call.
        lse: also return the log-sum-exp of each row, (batch, heads, q_len).
        importance: also return the column sums of the probabilities before dropout,
            (batch, heads, kv_len), and Σ|out|, (batch, heads): the scores of cascade token and
            head pruning (SpAtten, HPCA 2021, Alg. 2).
    """
    dtype = accumulation_dtype(call.query.dtype)
    kv_heads, heads = call.key.shape[1], call.query.shape[1]
    query, key, value = (t.to(dtype) for t in (call.query, call.key, call.value))
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    columns = query.new_zeros(*query.shape[:2], call.kv_len) if importance else None
    for first, end, kv_end in row_chunks(call):
        scores, live = _scores(call, query[:, :, first:end], key[:, :, :kv_end], first)
        if lse:
            row_lse = scores.logsumexp(-1)
            lses.append(row_lse if live is None else row_lse.masked_fill(~live[..., 0], -torch.inf))
        probs = scores.softmax(-1)
        if columns is not None:
            seen = probs.sum(-2) if live is None else _live_sum(probs, live)
            columns = columns + F.pad(seen, (0, call.kv_len - kv_end))
        probs = _drop(call, probs, first)
        out = unfold_groups(fold_groups(probs, kv_heads) @ value[:, :, :kv_end], heads)
        outs.append(out if live is None else out.masked_fill(~live, 0))
    out = torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]
    return ForwardResult(
        out=out.to(call.query.dtype),
        lse=torch.cat(lses, dim=2) if lse else None,
        key_importance=columns,
        head_importance=out.abs().sum((-2, -1)) if importance else None,
    )


def backward(
    call: AttentionCall,
    out: Float[Tensor, "batch heads q_len value_dim"],
    lse: Float[Tensor, "batch heads q_len"],
    grad_out: Float[Tensor, "batch heads q_len value_dim"],
    grad_lse: Float[Tensor, "batch heads q_len"] | None,
    grad_key_importance: Float[Tensor, "batch heads kv_len"] | None,
    grad_head_importance: Float[Tensor, "batch heads"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, one chunk of rows at a time.

    The probabilities are made again from ``lse`` (as in FlashAttention), so nothing of size
    q_len · kv_len is saved between forward and backward.
    """
    dtype = accumulation_dtype(call.query.dtype)
    kv_heads, heads = call.key.shape[1], call.query.shape[1]
    query, key, value = (t.to(dtype) for t in (call.query, call.key, call.value))
    grad_out = grad_out.to(dtype)
    if grad_head_importance is not None:
        grad_out = grad_out + out.sign().to(dtype) * grad_head_importance[..., None, None]
    empty = lse == -torch.inf
    norm = lse.masked_fill(empty, torch.inf)  # exp(S - inf) = 0: P of rows without a key
    grad_query, grad_key, grad_value = (torch.zeros_like(t) for t in (query, key, value))
    for first, end, kv_end in row_chunks(call):
        rows, keys = slice(first, end), slice(0, kv_end)
        chunk_query, chunk_grad = query[:, :, rows], grad_out[:, :, rows]
        scores, _ = _scores(call, chunk_query, key[:, :, keys], first)
        probs = (scores - norm[:, :, rows, None]).exp()
        folded_grad = fold_groups(chunk_grad, kv_heads)
        grad_probs = unfold_groups(folded_grad @ value[:, :, keys].mT, heads)
        dropped = _drop(call, probs, first)
        grad_value[:, :, keys] += fold_groups(dropped, kv_heads).mT @ folded_grad
        grad_probs = _drop(call, grad_probs, first)
        if grad_key_importance is not None:
            grad_probs = grad_probs + grad_key_importance[:, :, None, keys]
        centre = (probs * grad_probs).sum(-1, keepdim=True)
        if grad_lse is not None:
            centre = centre - grad_lse[:, :, rows].masked_fill(empty[:, :, rows], 0)[..., None]
        grad_scores = fold_groups(probs * (grad_probs - centre), kv_heads) * call.scale
        grad_query[:, :, rows] = unfold_groups(grad_scores @ key[:, :, keys], heads)
        grad_key[:, :, keys] += grad_scores.mT @ fold_groups(chunk_query, kv_heads)
    inputs = (call.query, call.key, call.value)
    grads = (grad_query, grad_key, grad_value)
    return tuple(g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))  # pyright: ignore[reportReturnType]


def _scores(
    call: AttentionCall, query: Tensor, key: Tensor, first: int
) -> tuple[Tensor, Tensor | None]:
    """Scores of some rows with −inf at pairs that are not allowed, and which rows see any key.

    Rows that see none keep their raw scores, so that softmax stays finite; the caller zeroes
    them. The second value is None when every row sees a key.
    """
    kv_heads, heads = key.shape[1], query.shape[1]
    scores = unfold_groups((fold_groups(query, kv_heads) * call.scale) @ key.mT, heads)
    allowed = allowed_rows(call, first, first + query.shape[2], key.shape[2])
    if allowed is None:
        return scores, None
    live = allowed.any(-1, keepdim=True)
    return scores.masked_fill(~(allowed | ~live), -torch.inf), live


def _live_sum(probs: Tensor, live: Tensor) -> Tensor:
    """Column sums over the rows that see a key, as a product with their 0/1 row."""
    counted = live.mT.to(probs.dtype).expand(*probs.shape[:2], 1, probs.shape[2])
    return (counted @ probs)[:, :, 0]


def _drop(call: AttentionCall, probs: Tensor, first: int) -> Tensor:
    """Inverted dropout of the rows from ``first`` on."""
    if call.dropout_p == 0.0:
        return probs
    if call.dropout_p == 1.0:
        return torch.zeros_like(probs)
    keep = dropout_rows(call, first, first + probs.shape[2], probs.shape[3])
    return (probs * keep).div(1.0 - call.dropout_p)
