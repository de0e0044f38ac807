"""Dense attention by the C++ library: without a mask, or over large tiles of one."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseloom.kernels.common import AttentionCall, ForwardResult
from sparseloom.kernels.cpu import native
from sparseloom.kernels.cpu.tensors import TYPES, address, rows, view

TILE = (16, 32)
"""Blocks of the masks that it takes."""
_FEW_QUERIES = 64


def suits(call: AttentionCall, *, importance: bool) -> bool:
    """Whether this is the kernel for a call with a mask: blocks of 16 x 32.

    It gathers nothing. Of four neighbouring query blocks (AVX-512; AMX: of two, below: of one) it
    computes for a tile of keys those from the first that keeps it to the last, on AMX both. On
    random tiles that takes as long as gathering in fp32, and less in bf16. Few queries would not
    earn the layout of the keys back.
    """
    if call.block_size != TILE or call.dropout_p != 0.0 or importance or call.q_len < _FEW_QUERIES:
        return False
    # A library that was built from older sources (SPARSELOOM_CPU_LIBRARY) gathers all keys.
    return hasattr(native.library(), "dense_tiles_forward")


def forward(
    call: AttentionCall,
    lse: bool,
    importance: bool,
    runs: tuple[Tensor, Tensor] | None = None,
) -> ForwardResult:
    """Attention over all pairs that the mask, causality and padding allow.

    The column sums of the probabilities take a second pass over the scores, which needs the
    log-sum-exp of the first: about half again of the time.

    Args:
        call: fp32, bf16 or fp16 on the CPU, without dropout; without a mask, or one
            of blocks of 16 x 32.
        lse: also return the log-sum-exp of each row.
        importance: also return the column sums of the probabilities and Σ|out|.
        runs: in place of a mask, the table and the offsets of ``KeyRuns``; no importance then.
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
    shared = (
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
    )
    library, threads = native.library(), torch.get_num_threads()
    if runs is not None:
        table, starts = runs
        where = address(table), address(starts), starts.shape[0]
        library.dense_runs_forward(*shared, threads, *where)
    elif indices is None or offsets is None:
        library.dense_forward(*shared, address(columns), address(magnitude), threads)
    else:
        mask = address(indices), address(offsets), *offsets.shape[:2]
        library.dense_tiles_forward(*shared, threads, *mask)
    return ForwardResult(
        out=out,
        lse=sums if lse else None,
        key_importance=columns,
        head_importance=None if magnitude is None else magnitude.sum(-1),
    )
