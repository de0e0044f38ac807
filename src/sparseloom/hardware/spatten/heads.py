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
    heads: list[int],
    probabilities: np.ndarray | None,
) -> Head | None:
    """What one load reads and its rows; None where nothing is kept."""
    if operator.q_len == 1:
        return _generated(operator, call, padding, sequence, heads, probabilities)
    valid = _valid(operator, call, padding, sequence)
    queries = np.arange(operator.q_len)
    if operator.q_len == operator.kv_len:
        queries = queries[valid]
    union = valid
    if call.mask is not None:
        union = np.zeros_like(valid)
        for head in {head * call.mask.heads // operator.heads for head in heads}:
            union |= _kept(call.mask, sequence, head, operator, queries).any(axis=0)
        union &= valid
    ids = np.flatnonzero(union)
    seen = np.full(queries.size, ids.size, np.int64)
    if operator.is_causal:
        ends = queries + operator.kv_len - operator.q_len + 1
        seen = np.searchsorted(ids, ends).astype(np.int64)
    seen = np.tile(seen[seen > 0], len(heads))
    if seen.size == 0:
        return None
    return Head(ids, seen, seen, np.zeros(seen.size, np.int64), [], [])


def _generated(
    operator: Operator,
    call: AttentionCall,
    padding: np.ndarray | None,
    sequence: int,
    heads: list[int],
    probabilities: np.ndarray | None,
) -> Head | None:
    """One new token: heads of a load score all its keys, and each uses the values it kept."""
    each: list[np.ndarray] = []
    if call.mask is None:
        ids = np.flatnonzero(_valid(operator, call, padding, sequence))
    else:
        each = [_row(call.mask, sequence, head, operator) for head in heads]
        ids = each[0]
        for other in each[1:]:
            if other is not ids and not np.array_equal(other, ids):
                ids = np.union1d(ids, other)
        if padding is not None:
            ids = ids[_valid(operator, call, padding, sequence)[ids]]
    if ids.size == 0:
        return None
    value_ids = each or [ids] * len(heads)
    if call.value_mask is not None:
        value_ids = [_row(call.value_mask, sequence, head, operator) for head in heads]
    if padding is not None:
        value_ids = [np.intersect1d(mine, ids) for mine in value_ids]
    refetch = np.zeros(len(heads), np.int64)
    if call.lsb_refetch is not None:
        refetch[:] = call.lsb_refetch[sequence, heads, 0]
    rows: list[np.ndarray] = []
    if probabilities is not None:
        mine = probabilities[min(sequence, probabilities.shape[0] - 1), :, 0]
        rows = [mine[head, ids] for head in heads]
    values = np.array([mine.size for mine in value_ids], np.int64)
    return Head(ids, np.full(len(heads), ids.size, np.int64), values, refetch, value_ids, rows)


def _valid(
    operator: Operator, call: AttentionCall, padding: np.ndarray | None, sequence: int
) -> np.ndarray:
    valid = np.ones(operator.kv_len, np.bool_)
    if padding is not None:
        valid &= padding[min(sequence, padding.shape[0] - 1)]
    if call.tokens_alive is not None:
        valid &= call.tokens_alive[sequence]
    return valid


def _row(mask: MaskArrays, sequence: int, head: int, operator: Operator) -> np.ndarray:
    """Key ids that the one query of a head keeps."""
    b = min(sequence, mask.batch - 1)
    h = head * mask.heads // operator.heads
    start, end = mask.offsets[b, h, 0], mask.offsets[b, h, 1]
    blocks = mask.indices[start:end]
    keys = mask.block_size[1]
    if keys == 1:
        return blocks
    ids = (blocks[:, None] * keys + np.arange(keys)).reshape(-1)
    return ids[ids < operator.kv_len]


def _kept(
    mask: MaskArrays, sequence: int, h: int, operator: Operator, queries: np.ndarray
) -> np.ndarray:
    """Kept pairs (queries, keys) of one head of the mask, blocks unfolded."""
    b = min(sequence, mask.batch - 1)
    rows, keys = mask.block_size
    offsets = mask.offsets[b, h]
    blocks = np.zeros((mask.q_blocks, mask.kv_blocks), np.bool_)
    row = np.repeat(np.arange(mask.q_blocks), np.diff(offsets))
    blocks[row, mask.indices[offsets[0] : offsets[-1]]] = True
    kept = blocks.repeat(keys, axis=1)[:, : operator.kv_len][queries // rows]
    if operator.is_causal:
        ends = queries + operator.kv_len - operator.q_len
        kept = kept & (np.arange(operator.kv_len) <= ends[:, None])
    return kept
