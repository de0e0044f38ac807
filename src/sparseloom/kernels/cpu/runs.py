"""Attention over runs of key tiles, taken as they are or as means, by the C++ library.

All runs of a query tile share one softmax: means over segments of keys are made once per key head,
lie one after the other, and are walked like keys, their scores higher by the log of their keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int16, Int32, Int64
from torch import Tensor

from sparseloom.kernels.common import AttentionCall
from sparseloom.kernels.cpu import dense, native
from sparseloom.regions import runs_of_owners


class KeyRuns(NamedTuple):
    """Runs of adjacent key tiles by head and query tile, on the grid of ``sparseloom.regions``.

    table: (runs, 3): first key tile, end, log2 of the keys per mean (0: keys as they are). Within
        a query tile by that log2 and then by tile; no tile twice.
    offsets: (heads, query_tiles + 1), where the runs of each query tile begin in the table.
    """

    table: Int32[Tensor, "runs 3"]
    offsets: Int64[Tensor, "heads query_tiles_plus_1"]


def key_runs(log2s: Int16[np.ndarray, "heads query_tiles key_tiles"]) -> KeyRuns:
    """The runs of tiles that are taken alike.

    Args:
        log2s: of the keys per mean, for each tile: 0 … 3, or −1 where it is left out.
    """
    tables, counts = [], []
    for head in log2s:
        query_tile, begin, end, log2 = runs_of_owners(head)
        order = np.lexsort((begin, log2, query_tile))
        tables.append(np.stack([begin, end, log2], 1)[order])
        counts.append(np.bincount(query_tile, minlength=len(head)))
    ends = np.cumsum(counts).reshape(len(log2s), -1)
    starts = np.hstack([np.zeros((1, 1), np.int64), ends[:-1, -1:].T]).T
    return KeyRuns(
        torch.from_numpy(np.concatenate(tables).astype(np.int32)),
        torch.from_numpy(np.hstack([starts, ends]).astype(np.int64)),
    )


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the library is there and knows runs (one built from older sources does not)."""
    return native.missing_reason() is None and hasattr(native.library(), "dense_runs_forward")


@torch.library.custom_op("sparseloom::attention_runs", mutates_args=())
def attention_runs_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    offsets: Tensor,
    key_padding: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (empty unless `lse`) over `KeyRuns`; no derivative.

    Inputs as in an ``AttentionCall`` that the backend supports; the heads of the runs divide those
    of the query. Causality is asked of keys, not of means.
    """
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        indices=None,
        offsets=None,
        block_size=dense.TILE,
        key_padding=key_padding,
        is_causal=is_causal,
        scale=scale,
    )
    found = dense.forward(call, lse, importance=False, runs=(table, offsets))
    return found.out, query.new_empty(0, dtype=torch.float32) if found.lse is None else found.lse


@attention_runs_op.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    batch, heads, q_len, _ = query.shape
    return (
        query.new_empty(batch, heads, q_len, value.shape[3]),
        query.new_empty((batch, heads, q_len) if rest[-1] else 0, dtype=torch.float32),
    )
