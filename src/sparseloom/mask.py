"""``SparseMask``: which (query, key) pairs of an attention are kept."""

from __future__ import annotations

from typing import Any, NoReturn, TypeAlias, final

import torch
from jaxtyping import Bool, Int, Int32, Int64
from torch import Tensor

from sparseloom import _mask_pairs, _mask_rows
from sparseloom._mask_formats import MaskFormats
from sparseloom._mask_pairs import KeyPadding, allowed_pairs

__all__ = ["SparseMask", "allowed_pairs"]

BlockSize: TypeAlias = tuple[int, int]


@final
class SparseMask(MaskFormats):
    """The kept (query, key) pairs, as ragged lists of key blocks.

    For each (batch, head, query block) the mask holds the ascending list of the key blocks
    that are kept: row ``(b, h, i)`` is ``indices[offsets[b, h, i] : offsets[b, h, i + 1]]``.
    Block ``(i, j)`` covers the queries ``i * bq … i * bq + bq - 1`` and the keys
    ``j * bk … j * bk + bk - 1``, cut off at ``q_len`` and ``kv_len``. Fine-grained masks have
    ``block_size`` (1, 1), column vectors (8, 1), row vectors (1, n), blocks (64, 64).

    Causality and padding are not stored: they are arguments of the computation. ``batch`` and
    ``heads`` may be 1 (shared), and ``heads`` may divide the number of query heads: query head
    ``h`` of ``H`` then uses mask head ``h * heads // H``. A row that keeps nothing gives zeros.

    Args:
        indices: int32 ``(nnz,)``, kept key blocks, strictly ascending within each row.
        offsets: int64 ``(batch, heads, q_blocks + 1)``, absolute positions in ``indices``: the
            first is 0, the last is ``nnz``, and each (batch, head) starts where the one before
            it ends.
        block_size: ``(bq, bk)``, queries and keys per block.
        q_len: number of queries.
        kv_len: number of keys.
        validate: check all of the above. With False the caller vouches for it; inside
            ``torch.compile`` it must be False, because the checks look at values.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape or a value is wrong; the sentence names the first offending position.
    """

    indices: Int32[Tensor, " nnz"]
    offsets: Int64[Tensor, "batch heads q_blocks_plus_1"]
    block_size: BlockSize
    q_len: int
    kv_len: int
    _transposed: tuple[SparseMask, Tensor] | None

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        indices: Int32[Tensor, " nnz"],
        offsets: Int64[Tensor, "batch heads q_blocks_plus_1"],
        *,
        block_size: BlockSize = (1, 1),
        q_len: int,
        kv_len: int,
        validate: bool = True,
    ) -> None:
        if validate:
            rows, columns = _mask_rows.grid(block_size, q_len, kv_len)
            if indices.dtype != torch.int32:
                raise TypeError(f"indices must be int32, got {indices.dtype}")
            if offsets.dtype != torch.int64:
                raise TypeError(f"offsets must be int64, got {offsets.dtype}")
            _mask_rows.check_rows(indices, offsets, rows, columns)
        # The class is frozen, so the attributes are set past its own __setattr__.
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "block_size", (int(block_size[0]), int(block_size[1])))
        object.__setattr__(self, "q_len", q_len)
        object.__setattr__(self, "kv_len", kv_len)
        object.__setattr__(self, "_transposed", None)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"SparseMask is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"SparseMask is immutable: cannot delete {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        # The transpose can be made again: copies and pickles leave it behind.
        return {**self.__dict__, "_transposed": None}

    # ------------------------------------------------------------------ sizes

    @property
    def batch(self) -> int:
        """Batch entries stored; 1 may be shared by all."""
        return self.offsets.shape[0]

    @property
    def heads(self) -> int:
        """Heads stored: 1 (shared), the key/value heads, or the query heads."""
        return self.offsets.shape[1]

    @property
    def q_blocks(self) -> int:
        """Query blocks, ``ceil(q_len / bq)``: the rows of the mask."""
        return self.offsets.shape[2] - 1

    @property
    def kv_blocks(self) -> int:
        """Key blocks, ``ceil(kv_len / bk)``: the columns of the mask."""
        return -(-self.kv_len // self.block_size[1])

    @property
    def nnz(self) -> int:
        """Kept blocks over all batch entries and heads."""
        return self.indices.shape[0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, q_len, kv_len)``."""
        return (self.batch, self.heads, self.q_len, self.kv_len)

    @property
    def counts(self) -> Int64[Tensor, "batch heads q_blocks"]:
        """Kept key blocks of each query block."""
        return self.offsets.diff(dim=-1)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.indices.device

    # ------------------------------------------------------- padded index lists

    @classmethod
    def from_padded(
        cls,
        indices: Int[Tensor, "*batch_heads q_blocks k"],
        counts: Int[Tensor, "*batch_heads q_blocks"] | None = None,
        *,
        block_size: BlockSize = (1, 1),
        q_len: int,
        kv_len: int,
        validate: bool = True,
    ) -> SparseMask:
        """A mask from equally wide rows, the form of top-k and of FlexAttention.

        Args:
            indices: key blocks ``(batch, heads, q_blocks, k)`` or ``(q_blocks, k)``, ascending.
                Without ``counts`` the empty places at the end of a row hold -1.
            counts: kept blocks per row; what stands behind them in ``indices`` is ignored.
            validate: False skips the checks of the values (see the class).

        Raises:
            ValueError: a -1 before the end of a row, a count outside [0, k], or what the
                constructor refuses.
        """
        flat, offsets = _mask_rows.flatten(indices, counts, validate=validate)
        return cls._from_rows(flat, offsets, block_size, q_len, kv_len, validate=validate)

    def padded(
        self,
    ) -> tuple[Int32[Tensor, "batch heads q_blocks k"], Int32[Tensor, "batch heads q_blocks"]]:
        """Equally wide rows: ``(indices, counts)``, -1 where a row has ended.

        ``k`` is the longest row. Where all rows have that length, ``indices`` is a view.
        """
        counts = self.counts
        lead = counts.shape
        width = int(counts.max()) if self.nnz else 0
        if self.nnz == counts.numel() * width:
            return self.indices.view(*lead, width), counts.to(torch.int32)
        wide = self.indices.new_full((counts.numel(), width), -1)
        wide[torch.arange(width, device=self.device) < counts.reshape(-1, 1)] = self.indices
        return wide.view(*lead, width), counts.to(torch.int32)

    # ------------------------------------------------------------ boolean arrays

    @classmethod
    def from_bool(
        cls, keep: Bool[Tensor, "*batch_heads q_len kv_len"], *, block_size: BlockSize = (1, 1)
    ) -> SparseMask:
        """A mask from a boolean array ``(batch, heads, q_len, kv_len)`` or ``(q_len, kv_len)``.

        Raises:
            ValueError: a block is kept in part (blocks cut off at the edges are fine).
        """
        keep = _mask_rows.four_dims(keep, "keep")
        q_len, kv_len = keep.shape[-2:]
        _mask_rows.grid(block_size, q_len, kv_len)
        blocks = _mask_rows.whole_blocks(keep, block_size)
        return cls.from_block_bool(blocks, block_size=block_size, q_len=q_len, kv_len=kv_len)

    def to_bool(self) -> Bool[Tensor, "batch heads q_len kv_len"]:
        """The mask as a boolean array, True = kept."""
        keep = self.to_block_bool()
        if self.block_size[0] > 1:
            keep = keep.repeat_interleave(self.block_size[0], -2)
        if self.block_size[1] > 1:
            keep = keep.repeat_interleave(self.block_size[1], -1)
        return keep[..., : self.q_len, : self.kv_len]

    @classmethod
    def from_block_bool(
        cls,
        keep_blocks: Bool[Tensor, "*batch_heads q_blocks kv_blocks"],
        *,
        block_size: BlockSize,
        q_len: int,
        kv_len: int,
    ) -> SparseMask:
        """A mask from one boolean per block.

        Raises:
            ValueError: the array does not have ``ceil(q_len / bq)`` rows and
                ``ceil(kv_len / bk)`` columns.
        """
        keep = _mask_rows.four_dims(keep_blocks, "keep_blocks")
        wanted = _mask_rows.grid(block_size, q_len, kv_len)
        if keep.shape[-2:] != wanted:
            raise ValueError(
                f"keep_blocks must end in {wanted} for q_len {q_len}, kv_len {kv_len} and "
                f"block_size {block_size}, got shape {tuple(keep_blocks.shape)}"
            )
        columns = keep.reshape(-1, wanted[1]).nonzero()[:, 1].to(torch.int32)
        offsets = _mask_rows.offsets_from_counts(keep.sum(-1))
        return cls._from_rows(columns, offsets, block_size, q_len, kv_len, validate=False)

    def to_block_bool(self) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
        """One boolean per block, True = kept."""
        keep = torch.zeros(
            (*self.offsets.shape[:2], self.q_blocks, self.kv_blocks),
            dtype=torch.bool,
            device=self.device,
        )
        keep.view(-1)[self.entry_rows() * self.kv_blocks + self.indices] = True
        return keep

    @classmethod
    def full(
        cls,
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        heads: int = 1,
        block_size: BlockSize = (1, 1),
        device: torch.device | str | None = None,
    ) -> SparseMask:
        """The mask that keeps everything."""
        rows, columns = _mask_rows.grid(block_size, q_len, kv_len)
        one_row = torch.arange(columns, dtype=torch.int32, device=device)
        counts = torch.full((batch, heads, rows), columns, dtype=torch.int64, device=device)
        offsets = _mask_rows.offsets_from_counts(counts)
        indices = one_row.repeat(batch * heads * rows)
        return cls._from_rows(indices, offsets, block_size, q_len, kv_len, validate=False)

    # ------------------------------------------------------------------- counting

    def kept_pairs(
        self, *, is_causal: bool = False, key_padding: KeyPadding | None = None
    ) -> Int64[Tensor, "batch heads"]:
        """Kept pairs that are allowed too, counted from the index lists.

        Args:
            is_causal: query ``i`` sees key ``j`` if ``j <= i + kv_len - q_len``.
            key_padding: True = attend. A mask shared over the batch is counted once per row
                of ``key_padding``.
        """
        return _mask_pairs.kept_pairs(self, is_causal=is_causal, key_padding=key_padding)

    def density(self, *, is_causal: bool = False, key_padding: KeyPadding | None = None) -> float:
        """Kept pairs over allowed pairs, all batch entries and heads; 0 if none is allowed."""
        kept = self.kept_pairs(is_causal=is_causal, key_padding=key_padding)
        allowed = _mask_pairs.allowed_pairs(
            self.q_len, self.kv_len, is_causal=is_causal, key_padding=key_padding
        )
        total = int(allowed.expand(kept.shape[0]).sum()) * self.heads
        return int(kept.sum()) / total if total else 0.0

    def entry_rows(self) -> Int64[Tensor, " nnz"]:
        """Flat row ``(b * heads + h) * q_blocks + i`` of each entry of ``indices``."""
        counts = self.counts.reshape(-1)
        rows = torch.arange(counts.numel(), device=self.device)
        return rows.repeat_interleave(counts, output_size=self.nnz)

    # ------------------------------------------------------------- other views of it

    def expand(self, batch: int, heads: int) -> SparseMask:
        """The mask repeated to ``batch`` entries and ``heads`` heads (mask head h * Hm // heads).

        This copies the index lists: computations take shared masks as they are.

        Raises:
            ValueError: ``batch`` is neither kept nor grown from 1, or ``heads`` is not a multiple.
        """
        if batch < 1 or self.batch not in (1, batch):
            raise ValueError(f"batch must be {self.batch} (only 1 can be expanded), got {batch}")
        if heads < 1 or heads % self.heads:
            raise ValueError(f"heads must be a multiple of {self.heads}, got {heads}")
        batches = [0] * batch if self.batch == 1 else list(range(batch))
        return self._choose(batches, [h * self.heads // heads for h in range(heads)])

    def __getitem__(self, key: int | slice | tuple[int | slice, int | slice]) -> SparseMask:
        """``mask[b, h]`` and ``mask[b]``: integers or slices; both dimensions stay."""
        b, h = key if isinstance(key, tuple) else (key, slice(None))
        return self._choose(
            _mask_rows.as_list(b, self.batch, "batch"), _mask_rows.as_list(h, self.heads, "head")
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseMask:
        """The mask on ``device``; itself if it is there already."""
        indices = self.indices.to(device, non_blocking=non_blocking)
        offsets = self.offsets.to(device, non_blocking=non_blocking)
        if indices is self.indices and offsets is self.offsets:
            return self
        return self._like(indices, offsets)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseMask):
            return NotImplemented
        return (
            (self.shape, self.block_size, self.nnz) == (other.shape, other.block_size, other.nnz)
            and torch.equal(self.offsets, other.offsets.to(self.device))
            and torch.equal(self.indices, other.indices.to(self.device))
        )

    def __repr__(self) -> str:
        share = self.nnz / (self.batch * self.heads * self.q_blocks * self.kv_blocks)
        return (
            f"SparseMask(batch={self.batch}, heads={self.heads}, q_len={self.q_len}, "
            f"kv_len={self.kv_len}, block_size={self.block_size}, kept={share:.2%})"
        )

    def transpose(self) -> SparseMask:
        """The key-major form: which query blocks each key block meets. Cached.

        A mask with queries and keys exchanged, in lengths and in ``block_size``.
        """
        return self._transpose()[0]

    def transpose_order(self) -> Int64[Tensor, " nnz"]:
        """Place in ``indices`` of each entry of the transpose: values follow with ``v[order]``."""
        return self._transpose()[1]

    # ---------------------------------------------------------------------- private

    @classmethod
    def _from_rows(
        cls,
        flat: Tensor,
        offsets: Tensor,
        block_size: BlockSize,
        q_len: int,
        kv_len: int,
        *,
        validate: bool = True,
    ) -> SparseMask:
        # Checked before the cast to int32, which would wrap values out of range around.
        if validate:
            rows, columns = _mask_rows.grid(block_size, q_len, kv_len)
            _mask_rows.check_rows(flat, offsets, rows, columns)
        return cls(
            flat.to(torch.int32),
            offsets,
            block_size=block_size,
            q_len=q_len,
            kv_len=kv_len,
            validate=False,
        )

    def _like(self, indices: Tensor, offsets: Tensor) -> SparseMask:
        size = (self.block_size, self.q_len, self.kv_len)
        return SparseMask._from_rows(indices, offsets, *size, validate=False)

    def _choose(self, batches: list[int], heads: list[int]) -> SparseMask:
        """These batch entries and heads, in this order."""
        return self._like(*_mask_rows.choose(self.indices, self.offsets, batches, heads))

    def _transpose(self) -> tuple[SparseMask, Tensor]:
        if self._transposed is None:
            indices, offsets, order = _mask_rows.transposed_rows(
                self.indices,
                self.entry_rows(),
                (self.batch, self.heads, self.q_blocks, self.kv_blocks),
            )
            (bq, bk), lengths = self.block_size, (self.kv_len, self.q_len)
            mask = SparseMask._from_rows(indices, offsets, (bk, bq), *lengths, validate=False)
            object.__setattr__(self, "_transposed", (mask, order))
            return mask, order
        return self._transposed
