"""Which keys a load reads and which of them its rows see and use, from one attention call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sparseloom.hardware.spatten.config import SpAttenConfig
from sparseloom.trace import AttentionCall, MaskArrays, Operator


class Head(NamedTuple):
    """What one load is made from: ids that are read, and per row what it sees and keeps."""

    ids: np.ndarray
    seen: np.ndarray
    values: np.ndarray
    refetch: np.ndarray
    value_ids: list[np.ndarray]
    probabilities: list[np.ndarray]


def head_groups(
    config: SpAttenConfig, operator: Operator, call: AttentionCall
) -> Iterator[tuple[int, list[int]]]:
    """(KV head, query heads) of each load. Two 6-bit heads with equal keys share one."""
    group = operator.heads // operator.kv_heads
    alive = call.heads_alive
    heads = [
        [h for h in range(kv * group, (kv + 1) * group) if alive is None or alive[h]]
        for kv in range(operator.kv_heads)
    ]
    packed = config.layout.pack_6bit_keys == 2 and call.key_bits == 6 and group == 1
    kv = 0
    while kv < operator.kv_heads:
        if (
            packed
            and kv % 2 == 0
            and kv + 1 < operator.kv_heads
            and heads[kv]
            and heads[kv + 1]
            and operator.q_len == 1
            and _same_keys(call, kv)
        ):
            yield kv, [kv, kv + 1]
            kv += 2
            continue
        if heads[kv]:
            yield kv, heads[kv]
        kv += 1


def _same_keys(call: AttentionCall, head: int) -> bool:
    mask = call.mask
    if mask is None or mask.heads == 1:
        return True
    ends = mask.offsets[:, head : head + 2]
    if not np.array_equal(np.diff(ends[:, 0]), np.diff(ends[:, 1])):
        return False
    return all(
        np.array_equal(
            mask.indices[ends[b, 0, 0] : ends[b, 0, -1]],
            mask.indices[ends[b, 1, 0] : ends[b, 1, -1]],
        )
        for b in range(mask.batch)
    )


def read_head(
    operator: Operator,
    call: AttentionCall,
    padding: np.ndarray | None,
    sequence: int,
    kv_head: tuple[int, list[int]],
    probabilities: np.ndarray | None,
) -> Head | None:
    """What one load reads and its rows; None where nothing is kept."""
    valid = np.ones(operator.kv_len, np.bool_)
    if padding is not None:
        valid &= padding[min(sequence, padding.shape[0] - 1)]
    if call.tokens_alive is not None:
        valid &= call.tokens_alive[sequence]
    queries = np.arange(operator.q_len)
    if operator.q_len > 1 and operator.q_len == operator.kv_len:
        queries = queries[valid]
    union = valid if call.mask is None else np.zeros_like(valid)
    own: list[np.ndarray] = []
    if call.mask is not None:
        for head in kv_head[1]:
            own.append(_kept(call.mask, sequence, head, operator, queries))
            union |= own[-1].any(axis=0)
        union &= valid
    ids = np.flatnonzero(union)
    if ids.size == 0 or queries.size == 0:
        return None
    seen = np.full(queries.size, ids.size, np.int64)
    if operator.is_causal and operator.q_len > 1:
        ends = queries + operator.kv_len - operator.q_len + 1
        seen = np.searchsorted(ids, ends).astype(np.int64)
    seen = seen[seen > 0]
    if seen.size == 0:
        return None
    rows = len(kv_head[1])
    every_seen = np.tile(seen, rows)
    values, value_ids, kept_probabilities = every_seen.copy(), [], []
    refetch = np.zeros(every_seen.size, np.int64)
    if operator.q_len == 1:
        for r, head in enumerate(kv_head[1]):
            if call.value_mask is not None:
                kept = _kept(call.value_mask, sequence, head, operator, queries)[0] & union
                value_ids.append(np.flatnonzero(kept))
            else:
                value_ids.append(ids)
            values[r] = value_ids[-1].size
            if call.lsb_refetch is not None:
                refetch[r] = call.lsb_refetch[sequence, head, 0]
            if probabilities is not None:
                row = probabilities[min(sequence, probabilities.shape[0] - 1), head, 0]
                kept_probabilities.append(row[ids])
    return Head(ids, every_seen, values, refetch, value_ids, kept_probabilities)


def _kept(
    mask: MaskArrays, sequence: int, head: int, operator: Operator, queries: np.ndarray
) -> np.ndarray:
    """Kept pairs (queries, keys) of one head, blocks unfolded."""
    b = min(sequence, mask.batch - 1)
    h = head * mask.heads // operator.heads
    rows, keys = mask.block_size
    if operator.q_len == 1 and keys == 1:
        kept = np.zeros((1, operator.kv_len), np.bool_)
        kept[0, mask.indices[mask.offsets[b, h, 0] : mask.offsets[b, h, 1]]] = True
        return kept
    offsets = mask.offsets[b, h]
    blocks = np.zeros((mask.q_blocks, mask.kv_blocks), np.bool_)
    row = np.repeat(np.arange(mask.q_blocks), np.diff(offsets))
    blocks[row, mask.indices[offsets[0] : offsets[-1]]] = True
    kept = blocks.repeat(keys, axis=1)[:, : operator.kv_len][queries // rows]
    if operator.is_causal:
        ends = queries + operator.kv_len - operator.q_len
        kept = kept & (np.arange(operator.kv_len) <= ends[:, None])
    return kept
