"""Checks and small index arithmetic behind ``SparseMask``; no loops over rows."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Int32, Int64
from torch import Tensor


def grid(block_size: tuple[int, int], q_len: int, kv_len: int) -> tuple[int, int]:
    """Rows and columns of blocks; refuses lengths and block sides below 1."""
    if len(block_size) != 2 or any(not isinstance(n, int) or n < 1 for n in block_size):
        raise ValueError(f"block_size must be two integers of at least 1, got {block_size}")
    for name, value in (("q_len", q_len), ("kv_len", kv_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return -(-q_len // block_size[0]), -(-kv_len // block_size[1])


def check_rows(
    indices: Int[Tensor, " nnz"],
    offsets: Int64[Tensor, "batch heads q_blocks_plus_1"],
    q_blocks: int,
    kv_blocks: int,
) -> None:
    """Refuse index lists that break a rule of ``SparseMask``; name the first offending place."""
    if indices.dim() != 1:
        raise ValueError(f"indices must have one dimension, got shape {tuple(indices.shape)}")
    if offsets.dim() != 3 or offsets.shape[-1] != q_blocks + 1 or offsets.numel() == 0:
        raise ValueError(
            f"offsets must have shape (batch, heads, {q_blocks + 1}), got {tuple(offsets.shape)}"
        )
    if indices.device != offsets.device:
        raise ValueError(
            f"indices and offsets must be on one device, got {indices.device} and {offsets.device}"
        )
    _check_offsets(offsets, indices.shape[0])
    bad = (indices < 0) | (indices >= kv_blocks)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"indices must be in [0, {kv_blocks}), got {int(indices[first])} "
            f"at {_place(offsets, first)}"
        )
    falling = indices[1:] <= indices[:-1]
    starts = offsets[..., :-1].reshape(-1)
    inner = starts[(starts > 0) & (starts < indices.shape[0])]
    falling[inner - 1] = False  # the first entry of a row has no predecessor
    if bool(falling.any()):
        first = int(falling.nonzero()[0]) + 1
        raise ValueError(
            f"indices must ascend within a row, got {int(indices[first])} after "
            f"{int(indices[first - 1])} at {_place(offsets, first)}"
        )


def _check_offsets(offsets: Int64[Tensor, "batch heads rows_plus_1"], nnz: int) -> None:
    if int(offsets[0, 0, 0]) != 0:
        raise ValueError(f"offsets must start at 0, got {int(offsets[0, 0, 0])}")
    steps = offsets.diff(dim=-1)
    if bool((steps < 0).any()):
        b, h, i = (steps < 0).nonzero()[0].tolist()
        raise ValueError(
            f"offsets must not decrease, got {int(offsets[b, h, i + 1])} after "
            f"{int(offsets[b, h, i])} at batch {b}, head {h}, row {i}"
        )
    ends, starts = offsets[..., -1].reshape(-1), offsets[..., 0].reshape(-1)
    gaps = starts[1:] != ends[:-1]
    if bool(gaps.any()):
        first = int(gaps.nonzero()[0]) + 1
        b, h = divmod(first, offsets.shape[1])
        raise ValueError(
            f"offsets must continue from one (batch, head) to the next, got "
            f"{int(starts[first])} after {int(ends[first - 1])} at batch {b}, head {h}"
        )
    if int(ends[-1]) != nnz:
        raise ValueError(f"offsets must end at len(indices) = {nnz}, got {int(ends[-1])}")


def _place(offsets: Int64[Tensor, "batch heads rows_plus_1"], position: int) -> str:
    starts = offsets[..., :-1].reshape(-1)
    row = int((starts <= position).sum()) - 1
    bh, i = divmod(row, offsets.shape[2] - 1)
    b, h = divmod(bh, offsets.shape[1])
    return f"batch {b}, head {h}, row {i}, position {position - int(starts[row])}"


def four_dims(array: Bool[Tensor, "*batch_heads rows columns"], name: str) -> Tensor:
    """``(batch, heads, rows, columns)``; two dimensions stand for one batch entry and head."""
    if array.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {array.dtype}")
    if array.dim() == 2:
        return array[None, None]
    if array.dim() != 4:
        raise ValueError(f"{name} must have 2 or 4 dimensions, got shape {tuple(array.shape)}")
    return array


def offsets_from_counts(
    counts: Int64[Tensor, "batch heads rows"],
) -> Int64[Tensor, "batch heads rows_plus_1"]:
    """Absolute offsets of rows with these lengths, laid one after another."""
    ends = counts.reshape(-1).cumsum(0).view(counts.shape)
    return torch.cat([ends[..., :1] - counts[..., :1], ends], dim=-1)


def flatten(
    indices: Int[Tensor, "*batch_heads rows k"],
    counts: Int[Tensor, "*batch_heads rows"] | None,
    *,
    validate: bool,
) -> tuple[Int[Tensor, " nnz"], Int64[Tensor, "batch heads rows_plus_1"]]:
    """Padded rows to one flat list and its offsets."""
    if indices.dim() == 2:
        indices = indices[None, None]
        counts = None if counts is None else counts.reshape(1, 1, -1)
    if indices.dim() != 4:
        raise ValueError(f"indices must have 2 or 4 dimensions, got shape {tuple(indices.shape)}")
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    width = indices.shape[-1]
    if counts is None:
        used = indices != -1
        counts = used.sum(-1)
        holes = (used != (torch.arange(width, device=indices.device) < counts[..., None])) & ~used
        if validate and bool(holes.any()):
            b, h, i, k = holes.nonzero()[0].tolist()
            raise ValueError(
                f"indices may hold -1 only at the end of a row, got -1 before a key block "
                f"at batch {b}, head {h}, row {i}, position {k}"
            )
    else:
        if counts.shape != indices.shape[:-1]:
            raise ValueError(
                f"counts must have shape {tuple(indices.shape[:-1])}, got {tuple(counts.shape)}"
            )
        counts = counts.to(torch.int64)
        bad = (counts < 0) | (counts > width)
        if validate and bool(bad.any()):
            b, h, i = bad.nonzero()[0].tolist()
            raise ValueError(
                f"counts must be in [0, {width}], got {int(counts[b, h, i])} "
                f"at batch {b}, head {h}, row {i}"
            )
    offsets = offsets_from_counts(counts)
    if int(offsets[-1, -1, -1]) == indices.numel():
        return indices.reshape(-1), offsets
    used = torch.arange(width, device=indices.device) < counts[..., None]
    return indices[used], offsets


def choose(
    indices: Int[Tensor, " nnz"],
    offsets: Int64[Tensor, "batch heads rows_plus_1"],
    batches: list[int],
    heads: list[int],
) -> tuple[Tensor, Int64[Tensor, "new_batch new_heads rows_plus_1"]]:
    """Index lists of these batch entries and heads; a view where they adjoin."""
    picked = offsets[batches][:, heads].flatten(0, 1)
    starts, sizes = picked[:, 0], picked[:, -1] - picked[:, 0]
    ends = sizes.cumsum(0)
    total = int(ends[-1])
    shifted = picked - starts[:, None] + (ends - sizes)[:, None]
    if bool((picked[1:, 0] == picked[:-1, -1]).all()):
        first = int(starts[0])
        flat = indices[first : first + total]
    else:
        shift = (starts - ends + sizes).repeat_interleave(sizes, output_size=total)
        flat = indices[torch.arange(total, device=indices.device) + shift]
    return flat, shifted.view(len(batches), len(heads), -1)


def as_list(key: int | slice, size: int, name: str) -> list[int]:
    """The places that an integer or a slice means."""
    if isinstance(key, slice):
        picked = list(range(size))[key]
        if not picked:
            raise IndexError(f"{name} slice {key} of a mask with {size} keeps nothing")
        return picked
    if not -size <= key < size:
        raise IndexError(f"{name} must be in [{-size}, {size}), got {key}")
    return [key % size]


def whole_blocks(
    keep: Bool[Tensor, "batch heads q_len kv_len"], block_size: tuple[int, int]
) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
    """One boolean per block; refuses blocks that are kept in part."""
    bq, bk = block_size
    if block_size == (1, 1):
        return keep
    pad = (0, -keep.shape[-1] % bk, 0, -keep.shape[-2] % bq)

    def tiles(fill: bool) -> Tensor:
        # The padding takes the value that does not decide, so that cut-off blocks count whole.
        padded = torch.nn.functional.pad(keep, pad, value=fill)
        return padded.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bq))

    some = tiles(False).any(-1).any(-2)
    partly = some & ~tiles(True).all(-1).all(-2)
    if bool(partly.any()):
        b, h, i, j = partly.nonzero()[0].tolist()
        raise ValueError(
            f"keep must be constant within each block of {bq}x{bk}, but the block at batch {b}, "
            f"head {h}, query {i * bq}, key {j * bk} is kept in part"
        )
    return some


def transposed_rows(
    indices: Int32[Tensor, " nnz"],
    rows: Int64[Tensor, " nnz"],
    grid: tuple[int, int, int, int],
) -> tuple[
    Int32[Tensor, " nnz"], Int64[Tensor, "batch heads kv_blocks_plus_1"], Int64[Tensor, " nnz"]
]:
    """Key-major ``(indices, offsets)`` and the place of each of their entries in ``indices``.

    ``rows`` are the flat rows of the entries, ``grid`` is (batch, heads, q_blocks, kv_blocks).
    """
    batch, heads, q_blocks, kv_blocks = grid
    column = rows // q_blocks * kv_blocks + indices
    if batch * heads * kv_blocks < 2**31:
        column = column.to(torch.int32)  # sorts in half the time
    # Entries are in row order, so a stable sort by column leaves the rows ascending.
    order = column.argsort(stable=True)
    counts = column.bincount(minlength=batch * heads * kv_blocks)
    offsets = offsets_from_counts(counts.view(batch, heads, -1))
    return (rows % q_blocks)[order].to(torch.int32), offsets, order
