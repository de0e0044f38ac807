"""SDDMM, sparse softmax and SpMM by the C++ library, in fp32 and without gradients.

``kernels.unfused`` defines the three, checks the arguments, and comes here where it can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseloom.kernels.cpu import native
from sparseloom.kernels.cpu.tensors import TYPES, address, rows, view
from sparseloom.mask import SparseMask

_SDDMM, _SOFTMAX, _SPMM = range(3)
_NOTHING = (0, 0, 0, 0)


def takes(*tensors: Tensor) -> bool:
    """Whether the library is there and computes what these ask for."""
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plain = all(t.device.type == "cpu" and t.dtype in TYPES for t in tensors)
    return plain and not grad and native.missing_reason() is None


def sddmm(
    query: Tensor,
    key: Tensor,
    mask: SparseMask,
    *,
    is_causal: bool,
    key_padding: Tensor | None,
    scale: float,
) -> Tensor:
    """Scores of the kept blocks, (nnz, bq, bk)."""
    query, key = rows(query.float()), rows(key.float())
    out = torch.empty(mask.nnz, *mask.block_size)
    padding = None if key_padding is None else key_padding.contiguous()
    _run(_SDDMM, mask, out, query=query, key=key, padding=padding, scale=scale, causal=is_causal)
    return out


def sparse_softmax(values: Tensor, mask: SparseMask) -> Tensor:
    """Softmax over the kept keys of each query, (nnz, bq, bk)."""
    values = values.float().contiguous()
    out = torch.empty_like(values)
    _run(_SOFTMAX, mask, out, values=values)
    return out


def spmm(values: Tensor, mask: SparseMask, value: Tensor) -> Tensor:
    """P V with P on the kept blocks, (batch, heads, q_len, value_dim)."""
    values, wide = values.float().contiguous(), rows(value.float())
    out = torch.empty(mask.batch, mask.heads, mask.q_len, value.shape[3])
    _run(_SPMM, mask, out, values=values, key=wide)
    return out.to(value.dtype)


def _run(
    step: int,
    mask: SparseMask,
    out: Tensor,
    *,
    values: Tensor | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    padding: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
) -> None:
    indices, offsets = mask.indices.contiguous(), mask.offsets.contiguous()
    native.library().unfused(
        step,
        (
            address(indices),
            address(offsets),
            mask.batch,
            mask.heads,
            mask.q_blocks,
            *mask.block_size,
            mask.q_len,
            mask.kv_len,
        ),
        _NOTHING if query is None else view(query),
        _NOTHING if key is None else view(key),
        0 if key is None else key.shape[1],
        0 if key is None else key.shape[3],
        address(values),
        address(out),
        address(padding),
        scale,
        causal,
        torch.get_num_threads(),
    )
