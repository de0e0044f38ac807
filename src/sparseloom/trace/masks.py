"""Kept pairs as plain arrays: the form in which a mask leaves torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sparseloom.trace.errors import TraceError

# Keys per group of queries are marked a piece at a time; this many cells are 16 MB.
_CELLS = 1 << 24


def allowed_pairs(
    q_len: int,
    kv_len: int,
    *,
    is_causal: bool = False,
    key_padding: Bool[np.ndarray, "batch kv_len"] | None = None,
    group: int = 1,
) -> Int64[np.ndarray, "batch"]:
    """Pairs (query, key) that causality (bottom-right aligned) and padding allow, per sequence.

    `key_padding` is True where a key may be attended. Without it the result has one entry.
    With `group` > 1 a key counts once for each `group` consecutive queries that may see it.
    """
    ends = _visible_ends(q_len, kv_len, is_causal)
    if group > 1:
        # The last query of a group sees all that the others see.
        ends = ends[np.minimum(np.arange(group - 1, q_len + group - 1, group), q_len - 1)]
    return _prefix(key_padding, kv_len)[:, ends].sum(axis=1, dtype=np.int64)


@dataclass(frozen=True, eq=False, repr=False)
class MaskArrays:
    """The kept key blocks of every query block, with the layout of `sparseloom.SparseMask`.

    Row (b, h, i) keeps the key blocks `indices[offsets[b, h, i] : offsets[b, h, i + 1]]`, in
    ascending order. Batch and heads may be 1 (shared) or the heads may be the number of KV heads.
    Causality is recorded beside the kept blocks and not applied to them: a kept block may hold
    pairs that causality forbids, and those are never counted.

    Raises:
        TraceError: the arrays contradict each other; the message names the first position.
    """

    indices: Int32[np.ndarray, "kept"]
    offsets: Int64[np.ndarray, "batch heads rows_and_one"]
    block_size: tuple[int, int]
    q_len: int
    kv_len: int
    is_causal: bool = False

    def __post_init__(self) -> None:
        if min(self.block_size) < 1 or self.q_len < 1 or self.kv_len < 1:
            raise TraceError(
                "block_size, q_len and kv_len must be at least 1, got "
                f"{self.block_size}, {self.q_len} and {self.kv_len}"
            )
        for name, wanted, axes in (("indices", np.int32, 1), ("offsets", np.int64, 3)):
            array = getattr(self, name)
            if array.dtype != wanted or array.ndim != axes:
                raise TraceError(
                    f"{name} must be {np.dtype(wanted)} with {axes} axes, "
                    f"got {array.dtype} with {array.ndim}"
                )
        if self.offsets.shape[2] != self.q_blocks + 1:
            raise TraceError(
                f"offsets must have {self.q_blocks + 1} entries per head for {self.q_len} queries "
                f"in blocks of {self.block_size[0]}, got {self.offsets.shape[2]}"
            )
        _check_offsets(self.offsets, self.indices.size)
        _check_indices(self.indices, self.offsets, self.kv_blocks)

    @property
    def batch(self) -> int:
        """Sequences that the mask tells apart (1 = shared)."""
        return self.offsets.shape[0]

    @property
    def heads(self) -> int:
        """Heads that the mask tells apart (1 = shared, or the number of KV heads)."""
        return self.offsets.shape[1]

    @property
    def q_blocks(self) -> int:
        """Query blocks, the last of which may be ragged."""
        return -(-self.q_len // self.block_size[0])

    @property
    def kv_blocks(self) -> int:
        """Key blocks, the last of which may be ragged."""
        return -(-self.kv_len // self.block_size[1])

    @property
    def nnz(self) -> int:
        """Kept blocks over all rows."""
        return self.indices.size

    def row_lengths(self) -> Int64[np.ndarray, "batch heads q_blocks"]:
        """Kept key blocks per query block."""
        return np.diff(self.offsets, axis=2)

    def kept_pairs(
        self, key_padding: Bool[np.ndarray, "batch kv_len"] | None = None
    ) -> Int64[np.ndarray, "mask_batch heads"]:
        """Kept pairs that causality and padding allow, per sequence and mask head.

        Nothing of size q_len × kv_len is made. The batch of the result is the larger one of the
        mask and the padding.
        """
        rows, keys = self.block_size
        whole = self.q_len % rows == 0 and self.kv_len % keys == 0
        if whole and not self.is_causal and key_padding is None:
            return (self.offsets[:, :, -1] - self.offsets[:, :, 0]) * (rows * keys)
        prefix = _prefix(key_padding, self.kv_len)
        ends = _visible_ends(self.q_len, self.kv_len, self.is_causal)
        batch = _broadcast_batch(self.batch, prefix.shape[0])
        lengths = self.row_lengths()
        kept = np.zeros((batch, self.heads), np.int64)
        for b, h in np.ndindex(batch, self.heads):
            mask_b = min(b, self.batch - 1)
            seen = prefix[min(b, prefix.shape[0] - 1)]
            span = slice(self.offsets[mask_b, h, 0], self.offsets[mask_b, h, -1])
            first = self.indices[span].astype(np.int64) * keys
            last = np.minimum(first + keys, self.kv_len)
            row = np.repeat(np.arange(self.q_blocks) * rows, lengths[mask_b, h])
            for inside in range(rows):
                query = row + inside
                real = query < self.q_len
                end = np.minimum(last, ends[np.minimum(query, self.q_len - 1)])
                pairs = seen[np.maximum(end, first)] - seen[first]
                kept[b, h] += int(pairs[real].sum())
        return kept

    def distinct_keys(
        self, group: int, key_padding: Bool[np.ndarray, "batch kv_len"] | None = None
    ) -> Int64[np.ndarray, "mask_batch heads"]:
        """Keys needed by each `group` consecutive queries, counted once per group, summed.

        It is the least number of key loads of hardware that works on `group` queries together.
        """
        if group < 1:
            raise ValueError(f"group must be at least 1, got {group}")
        valid = np.ones((1, self.kv_len), np.bool_) if key_padding is None else key_padding
        batch = _broadcast_batch(self.batch, valid.shape[0])
        found = np.zeros((batch, self.heads), np.int64)
        # Pieces of whole groups and whole query blocks.
        rows = self.block_size[0]
        unit = int(np.lcm(rows, group))
        step = max(1, _CELLS * group // self.kv_len // unit) * unit // rows
        for b, h in np.ndindex(batch, self.heads):
            for first in range(0, self.q_blocks, step):
                last = min(first + step, self.q_blocks)
                needed = self._needed(min(b, self.batch - 1), h, first, last, group)
                if key_padding is not None:
                    needed &= valid[min(b, valid.shape[0] - 1)]
                found[b, h] += np.count_nonzero(needed)
        return found

    def query_keys(
        self, b: int, h: int, valid: Bool[np.ndarray, "kv_len"] | None = None
    ) -> tuple[Int64[np.ndarray, "q_len_and_one"], Int32[np.ndarray, "_"]]:
        """The keys that each query of one head keeps, causality applied.

        Args:
            b, h: sequence and head of the mask.
            valid: True where padding leaves a key; None leaves all.

        Returns:
            `(offsets, keys)`: query i keeps `keys[offsets[i] : offsets[i + 1]]`, ascending. The
            offsets need not begin at 0.
        """
        rows, width = self.block_size
        offsets = self.offsets[b, h]
        if (rows, width) == (1, 1) and not self.is_causal and valid is None:
            return offsets, self.indices
        # Every query of a block has the block's list, and every entry of it `width` keys.
        block = np.arange(self.q_len) // rows
        lengths = np.diff(offsets)[block]
        entry = np.arange(lengths.sum()) + np.repeat(
            offsets[block] - np.cumsum(lengths) + lengths, lengths
        )
        first = self.indices[entry].astype(np.int64) * width
        keys = (first[:, None] + np.arange(width)).reshape(-1)
        query = np.repeat(np.arange(self.q_len), lengths * width)
        ends = _visible_ends(self.q_len, self.kv_len, self.is_causal)
        seen = keys < ends[query]
        if valid is not None:
            seen[seen] = valid[keys[seen]]
        counts = np.bincount(query[seen], minlength=self.q_len)
        found = np.zeros(self.q_len + 1, np.int64)
        np.cumsum(counts, out=found[1:])
        return found, keys[seen].astype(np.int32)

    def to_bool(self) -> Bool[np.ndarray, "batch heads q_len kv_len"]:
        """Every kept pair as True, causality and padding not applied."""
        keep = np.zeros((self.batch, self.heads, self.q_len, self.kv_len), np.bool_)
        for b, h in np.ndindex(self.batch, self.heads):
            keep[b, h] = self._rows(b, h, 0, self.q_blocks)
        return keep

    @classmethod
    def from_bool(
        cls,
        keep: Bool[np.ndarray, "batch heads q_len kv_len"],
        *,
        block_size: tuple[int, int] = (1, 1),
        is_causal: bool = False,
    ) -> MaskArrays:
        """Read a boolean mask; a block that is partly kept is an error."""
        batch, heads, q_len, kv_len = keep.shape
        rows, keys = block_size
        q_blocks, kv_blocks = -(-q_len // rows), -(-kv_len // keys)
        pad = ((0, 0), (0, 0), (0, q_blocks * rows - q_len), (0, kv_blocks * keys - kv_len))
        shape = (batch, heads, q_blocks, rows, kv_blocks, keys)
        some = np.pad(keep, pad, constant_values=False).reshape(shape).any(axis=(3, 5))
        every = np.pad(keep, pad, constant_values=True).reshape(shape).all(axis=(3, 5))
        if (some != every).any():
            where = tuple(int(i) for i in np.argwhere(some != every)[0])
            raise TraceError(f"block (batch, head, row, key) {where} is only partly kept")
        offsets = np.zeros((batch, heads, q_blocks + 1), np.int64)
        counts = some.sum(axis=3, dtype=np.int64)
        ends = np.cumsum(counts.reshape(-1)).reshape(counts.shape)
        offsets[:, :, 1:] = ends
        offsets[:, :, 0] = ends[:, :, 0] - counts[:, :, 0]
        indices = np.nonzero(some)[3].astype(np.int32)
        return cls(indices, offsets, (rows, keys), q_len, kv_len, is_causal)

    def _needed(
        self, b: int, h: int, first: int, last: int, group: int
    ) -> Bool[np.ndarray, "groups kv_len"]:
        """Which keys each group of queries needs, for the query blocks first … last − 1."""
        rows, keys = self.block_size
        base = first * rows // group
        stop = min(last * rows, self.q_len)
        needed = np.zeros((-(-stop // group) - base, self.kv_len), np.bool_)
        ends = _visible_ends(self.q_len, self.kv_len, self.is_causal)
        offsets = self.offsets[b, h, first : last + 1]
        row = np.repeat(np.arange(first, last), np.diff(offsets)) * rows
        key = self.indices[offsets[0] : offsets[-1]].astype(np.int64) * keys
        row_end = np.minimum(row + rows, self.q_len)
        for later in range(-(-(rows - 1) // group) + 1):
            at = row // group + later
            # The last query of the group that lies in this block sees the most keys.
            query = np.minimum((at + 1) * group, row_end) - 1
            inside = at * group < row_end
            end = ends[np.minimum(query, self.q_len - 1)]
            for offset in range(keys):
                seen = inside & (key + offset < end)
                needed[at[seen] - base, key[seen] + offset] = True
        return needed

    def _rows(self, b: int, h: int, first: int, last: int) -> Bool[np.ndarray, "rows kv_len"]:
        """Query blocks first … last − 1 of one head as booleans per query and key."""
        offsets = self.offsets[b, h, first : last + 1]
        blocks = np.zeros((last - first, self.kv_blocks), np.bool_)
        row = np.repeat(np.arange(last - first), np.diff(offsets))
        blocks[row, self.indices[offsets[0] : offsets[-1]]] = True
        rows, keys = self.block_size
        stop = min(last * rows, self.q_len)
        return blocks.repeat(keys, axis=1)[:, : self.kv_len].repeat(rows, axis=0)[
            : stop - first * rows
        ]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskArrays):
            return NotImplemented
        same = ("block_size", "q_len", "kv_len", "is_causal")
        return (
            all(getattr(self, name) == getattr(other, name) for name in same)
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.indices, other.indices)
        )

    def __repr__(self) -> str:
        rows, keys = self.block_size
        return (
            f"MaskArrays({self.batch}x{self.heads} heads, {self.q_len}x{self.kv_len}, blocks of "
            f"{rows}x{keys}, {self.nnz} kept{', causal' if self.is_causal else ''})"
        )


def _visible_ends(q_len: int, kv_len: int, is_causal: bool) -> Int64[np.ndarray, "q_len"]:
    """One past the last key that each query may see."""
    if not is_causal:
        return np.full(q_len, kv_len, np.int64)
    return np.clip(np.arange(q_len, dtype=np.int64) + (kv_len - q_len) + 1, 0, kv_len)


def _prefix(
    key_padding: Bool[np.ndarray, "batch kv_len"] | None, kv_len: int
) -> Int64[np.ndarray, "batch kv_len_and_one"]:
    """Valid keys before each position."""
    valid = np.ones((1, kv_len), np.bool_) if key_padding is None else key_padding
    if valid.shape[1] != kv_len:
        raise ValueError(f"key_padding must have {kv_len} keys, got {valid.shape[1]}")
    return np.pad(np.cumsum(valid, axis=1, dtype=np.int64), ((0, 0), (1, 0)))


def _broadcast_batch(mask: int, padding: int) -> int:
    if mask != padding and 1 not in (mask, padding):
        raise ValueError(f"key_padding must have 1 or {mask} sequences, got {padding}")
    return max(mask, padding)


def _check_offsets(offsets: Int64[np.ndarray, "batch heads rows_and_one"], kept: int) -> None:
    flat = offsets.reshape(-1)
    if flat.size == 0 or flat[0] != 0 or flat[-1] != kept:
        ends = (int(flat[0]), int(flat[-1])) if flat.size else ()
        raise TraceError(f"offsets must run from 0 to {kept} (the kept blocks), got {ends}")
    falling = np.flatnonzero(np.diff(flat) < 0)
    if falling.size:
        where = tuple(int(i) for i in np.unravel_index(falling[0] + 1, offsets.shape))
        raise TraceError(f"offsets must not fall, but do at (batch, head, row) {where}")
    # Rows are contiguous: a head starts where the one before it ended.
    heads = offsets.reshape(-1, offsets.shape[2])
    gaps = np.flatnonzero(heads[1:, 0] != heads[:-1, -1])
    if gaps.size:
        where = divmod(int(gaps[0]) + 1, offsets.shape[1])
        raise TraceError(f"offsets of (batch, head) {where} must start where the one before ends")


def _check_indices(
    indices: Int32[np.ndarray, "kept"],
    offsets: Int64[np.ndarray, "batch heads rows_and_one"],
    kv_blocks: int,
) -> None:
    outside = np.flatnonzero((indices < 0) | (indices >= kv_blocks))
    if outside.size:
        position = int(outside[0])
        raise TraceError(
            f"indices must be in [0, {kv_blocks}), got {int(indices[position])} "
            f"at position {position}"
        )
    ascending = np.diff(indices) > 0
    starts = np.unique(offsets[:, :, :-1])
    starts = starts[(starts > 0) & (starts < indices.size)]
    ascending[starts - 1] = True
    bad = np.flatnonzero(~ascending)
    if bad.size:
        raise TraceError(f"indices must ascend within a row, but do not at position {bad[0] + 1}")
