"""What the kernel backends share: the call they answer, the mask of a few rows, dropout bits.

Backends never import each other; arithmetic that more than one of them needs stands here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

# Query rows are processed so that one (batch, heads, rows, kv_len) array of scores holds at most
# this many elements (16 MB in fp32), but never less than one row. About six such arrays live at
# once, whatever q_len is.
CHUNK_ELEMENTS = 1 << 22

_MIX1, _MIX2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


class AttentionCall(NamedTuple):
    """One validated attention call, as every backend receives it.

    ``indices`` and ``offsets`` are those of a ``SparseMask`` (None: every pair is kept). Its
    batch and head dimensions may be shared: query head ``h`` of ``H`` uses mask head
    ``h * Hm // H``. ``seed`` (one int64 on the CPU) drives the dropout.
    """

    query: Float[Tensor, "batch heads q_len head_dim"]
    key: Float[Tensor, "batch kv_heads kv_len head_dim"]
    value: Float[Tensor, "batch kv_heads kv_len value_dim"]
    indices: Int32[Tensor, " nnz"] | None
    offsets: Int64[Tensor, "mask_batch mask_heads q_blocks_plus_1"] | None
    block_size: tuple[int, int]
    key_padding: Bool[Tensor, "batch kv_len"] | None
    is_causal: bool
    scale: float
    dropout_p: float = 0.0
    seed: Int64[Tensor, "1"] | None = None

    @property
    def q_len(self) -> int:
        """Number of queries per head."""
        return self.query.shape[2]

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.key.shape[2]

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.query.shape[1] // self.key.shape[1]


class ForwardResult(NamedTuple):
    """What a backend computes; fields that were not asked for are None.

    ``lse`` and the importances have ``accumulation_dtype``, ``out`` the dtype of the query.
    """

    out: Float[Tensor, "batch heads q_len value_dim"]
    lse: Float[Tensor, "batch heads q_len"] | None
    key_importance: Float[Tensor, "batch heads kv_len"] | None
    head_importance: Float[Tensor, "batch heads"] | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores and sums are held: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_chunks(call: AttentionCall) -> Iterator[tuple[int, int, int]]:
    """Chunks of query rows as ``(first row, end row, end key)``.

    Under causality no row of a chunk sees a key at or after ``end key`` (at least 1, so that
    chunks without any visible key still have a column to mask).
    """
    batch, heads, q_len, _ = call.query.shape
    rows = max(1, CHUNK_ELEMENTS // (batch * heads * call.kv_len))
    for first in range(0, q_len, rows):
        end = min(first + rows, q_len)
        visible = call.kv_len - q_len + end if call.is_causal else call.kv_len
        yield first, end, max(1, visible)


def allowed_rows(call: AttentionCall, first: int, end: int, kv_end: int) -> Tensor | None:
    """Which keys ``0 … kv_end - 1`` the query rows ``first … end - 1`` attend to.

    Returns:
        bool, broadcastable to (batch, heads, end - first, kv_end), or None if all do. Heads are
        1, or the heads of the mask repeated to those of the query.
    """
    allowed: Tensor | None = None
    if call.indices is not None and call.offsets is not None:
        allowed = kept_rows(call.indices, call.offsets, call.block_size, first, end, call.kv_len)
        allowed = allowed[..., :kv_end]
        heads = call.query.shape[1]
        if allowed.shape[1] not in (1, heads):
            allowed = allowed.repeat_interleave(heads // allowed.shape[1], dim=1)
    if call.is_causal and kv_end > call.kv_len - call.q_len + first + 1:
        seen = causal_rows(first, end, kv_end, call.kv_len - call.q_len, call.query.device)
        allowed = seen if allowed is None else allowed & seen
    if call.key_padding is not None:
        attend = call.key_padding[:, None, None, :kv_end]
        allowed = attend if allowed is None else allowed & attend
    return allowed


def causal_rows(
    first: int, end: int, kv_end: int, shift: int, device: torch.device
) -> Bool[Tensor, "rows kv_end"]:
    """Bottom-right aligned causality: query ``i`` sees key ``j`` if ``j <= i + shift``."""
    rows = torch.arange(first + shift, end + shift, device=device)
    return torch.arange(kv_end, device=device) <= rows[:, None]


def kept_rows(
    indices: Int32[Tensor, " nnz"],
    offsets: Int64[Tensor, "mask_batch mask_heads q_blocks_plus_1"],
    block_size: tuple[int, int],
    first: int,
    end: int,
    kv_len: int,
) -> Bool[Tensor, "mask_batch mask_heads rows kv_len"]:
    """The query rows ``first … end - 1`` of a mask as booleans, True = kept."""
    bq, bk = block_size
    block0, block1, columns = first // bq, -(-end // bq), -(-kv_len // bk)
    starts, ends = offsets[..., block0:block1], offsets[..., block0 + 1 : block1 + 1]
    counts = (ends - starts).reshape(-1)
    stops = counts.cumsum(0)
    total = int(stops[-1])
    device = indices.device
    row = torch.arange(counts.numel(), device=device).repeat_interleave(counts, output_size=total)
    # Rows of one (batch, head) adjoin in `indices`, but the chunk skips the rest of each head.
    shift = starts.reshape(-1) - (stops - counts)
    column = indices[torch.arange(total, device=device) + shift[row]]
    keep = torch.zeros((*starts.shape, columns), dtype=torch.bool, device=device)
    keep.view(-1)[row * columns + column] = True
    if bq > 1:
        keep = keep.repeat_interleave(bq, dim=2)
    if bk > 1:
        keep = keep.repeat_interleave(bk, dim=3)
    return keep[:, :, first - block0 * bq : end - block0 * bq, :kv_len]


def dropout_rows(
    call: AttentionCall, first: int, end: int, kv_end: int
) -> Bool[Tensor, "batch heads rows kv_end"]:
    """Which probabilities survive dropout, for the query rows ``first … end - 1``.

    Pair (b, h, i, j) survives when the upper 24 bits of the splitmix64 finaliser (Steele et al.,
    OOPSLA 2014) of ``seed + golden * (((b*H + h)*q_len + i)*kv_len + j)`` reach
    ``round(dropout_p * 2**24)``. Counting rather than drawing makes the bits the same for every
    backend, device and chunk size, and lets the backward pass make them again.
    """
    assert call.seed is not None
    batch, heads, q_len, _ = call.query.shape
    device = call.query.device
    base = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1) * q_len
    pair = (base + torch.arange(first, end, device=device)[:, None]) * call.kv_len
    bits = (pair + torch.arange(kv_end, device=device)).mul_(_GOLDEN).add_(int(call.seed))
    bits ^= (bits >> 30) & ((1 << 34) - 1)
    bits *= _MIX1
    bits ^= (bits >> 27) & ((1 << 37) - 1)
    bits *= _MIX2
    # The finaliser's last step does not reach the upper 24 bits.
    return ((bits >> 40) & ((1 << 24) - 1)) >= round(call.dropout_p * (1 << 24))


def fold_groups(
    per_query_head: Float[Tensor, "batch heads rows dim"], kv_heads: int
) -> Float[Tensor, "batch kv_heads group_rows dim"]:
    """Lay the rows of the query heads that share a key head one under another.

    A product with (batch, kv_heads, …) then needs no repeated keys. Undo with ``unfold_groups``.
    """
    batch, heads, rows, dim = per_query_head.shape
    return per_query_head.reshape(batch, kv_heads, heads // kv_heads * rows, dim)


def unfold_groups(
    folded: Float[Tensor, "batch kv_heads group_rows dim"], heads: int
) -> Float[Tensor, "batch heads rows dim"]:
    """The inverse of ``fold_groups``."""
    batch, kv_heads, group_rows, dim = folded.shape
    return folded.reshape(batch, heads, group_rows * kv_heads // heads, dim)


def blocked(
    tensor: Float[Tensor, "batch heads length dim"], block: int
) -> Float[Tensor, "rows block dim"]:
    """Cut the length into blocks, zero-padded at the end, and number them over batch and heads."""
    length = tensor.shape[2]
    return F.pad(tensor, (0, 0, 0, -length % block)).reshape(-1, block, tensor.shape[3])
