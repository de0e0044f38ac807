"""Sparse attention over a given mask by the C++ library."""

from __future__ import annotations

import torch

from sparseloom.kernels.common import AttentionCall, ForwardResult
from sparseloom.kernels.cpu import native
from sparseloom.kernels.cpu.tensors import TYPES, address, rows, view


def forward(call: AttentionCall, *, lse: bool, importance: bool) -> ForwardResult:
    """Attention over the kept pairs; memory beside the output grows with kv_len only.

    Importance takes a second pass over the scores, because a probability needs the final sum of
    its row.

    Args:
        call: fp32, bf16 or fp16 on the CPU, with a mask; dims as ``unsupported`` has them.
        lse: also return the log-sum-exp of each row.
        importance: also return the column sums of the probabilities and Σ|out|.
    """
    assert call.indices is not None
    assert call.offsets is not None
    query, key, value = rows(call.query), rows(call.key), rows(call.value)
    indices, offsets = call.indices.contiguous(), call.offsets.contiguous()
    padding = None if call.key_padding is None else call.key_padding.contiguous()
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    out = query.new_empty(batch, heads, q_len, value_dim)
    sums = torch.empty(batch, heads, q_len) if lse else None
    columns = torch.zeros(batch, heads, kv_len) if importance else None
    magnitude = torch.zeros(batch, heads) if importance else None
    native.library().attention_forward(
        TYPES[query.dtype],
        view(query),
        view(key),
        view(value),
        view(out),
        batch,
        heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
        value_dim,
        indices.data_ptr(),
        offsets.data_ptr(),
        offsets.shape[0],
        offsets.shape[1],
        *call.block_size,
        address(padding),
        call.is_causal,
        call.scale,
        address(sums),
        address(columns),
        address(magnitude),
        0 if call.seed is None else int(call.seed) % (1 << 64),
        round(call.dropout_p * (1 << 24)),
        0.0 if call.dropout_p == 1.0 else 1.0 / (1.0 - call.dropout_p),
        torch.get_num_threads(),
    )
    return ForwardResult(out, sums, columns, magnitude)
