"""Dense attention by the C++ library: without a mask, or over large tiles of one."""

from __future__ import annotations

import torch

from sparseloom.kernels.common import AttentionCall, ForwardResult
from sparseloom.kernels.cpu import native
from sparseloom.kernels.cpu.tensors import TYPES, address, rows, view


TILE = (16, 32)
"""Blocks of the masks that it takes."""
_FEW_QUERIES = 64


def takes_mask(call: AttentionCall, *, importance: bool) -> bool:
    """Whether a call with a mask is one for it: bf16 on AMX, blocks of 16 x 32.

    Keys and values are then laid out once for all queries, instead of being gathered by each query
    block; few queries would not earn that back.
    """
    return (
        call.block_size == TILE
        and call.dropout_p == 0.0
        and not importance
        and call.q_len >= _FEW_QUERIES
        and bool(native.library().dense_takes_mask(TYPES[call.query.dtype]))
    )


def forward(call: AttentionCall, lse: bool, importance: bool) -> ForwardResult:
    """Attention over all pairs that the mask, causality and padding allow.

    The column sums of the probabilities take a second pass over the scores, which needs the
    log-sum-exp of the first: about half again of the time.

    Args:
        call: fp32, bf16 or fp16 on the CPU, without dropout; without a mask, or one that
            ``takes_mask`` accepts.
        lse: also return the log-sum-exp of each row.
        importance: also return the column sums of the probabilities and Σ|out|.
    """
    assert call.dropout_p == 0.0
    indices = None if call.indices is None else call.indices.contiguous()
    offsets = None if call.offsets is None else call.offsets.contiguous()
    query, key, value = (rows(t.detach()) for t in (call.query, call.key, call.value))
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    padding = None if call.key_padding is None else call.key_padding.contiguous()
    out = query.new_empty(batch, heads, q_len, value_dim)
    sums = torch.empty(batch, heads, q_len) if lse or importance else None
    columns = torch.empty(batch, heads, kv_len) if importance else None
    magnitude = torch.empty(batch, heads, q_len) if importance else None
    native.library().dense_forward(
        TYPES[query.dtype],
        view(query),
        view(key),
        view(value),
        out.data_ptr(),
        batch,
        heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
        value_dim,
        address(padding),
        call.is_causal,
        call.scale,
        address(sums),
        address(columns),
        address(magnitude),
        address(indices),
        address(offsets),
        *((0, 0) if offsets is None else offsets.shape[:2]),
        torch.get_num_threads(),
    )
    return ForwardResult(
        out=out,
        lse=sums if lse else None,
        key_importance=columns,
        head_importance=None if magnitude is None else magnitude.sum(-1),
    )
