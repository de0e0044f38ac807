"""``SparseMask`` in other formats: CSR, numpy, FlexAttention, a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor

from sparseloom._mask_pairs import KeyPadding

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from torch.nn.attention.flex_attention import BlockMask

    import sparseloom.mask


class MaskFormats:
    """The part of ``SparseMask`` that speaks other formats."""

    indices: Int32[Tensor, " nnz"]
    offsets: Int64[Tensor, "batch heads q_blocks_plus_1"]
    block_size: tuple[int, int]
    q_len: int
    kv_len: int

    @classmethod
    def _from_rows(
        cls,
        flat: Tensor,
        offsets: Tensor,
        block_size: tuple[int, int],
        q_len: int,
        kv_len: int,
        *,
        validate: bool = True,
    ) -> sparseloom.mask.SparseMask:
        raise NotImplementedError

    @classmethod
    def from_csr(
        cls,
        crow: Int[Tensor, "*batch_heads q_blocks_plus_1"],
        col: Int[Tensor, " nnz"],
        *,
        block_size: tuple[int, int] = (1, 1),
        q_len: int,
        kv_len: int,
    ) -> sparseloom.mask.SparseMask:
        """A mask from compressed sparse rows, ``crow`` starting at 0 in each (batch, head).

        ``crow`` is ``(batch, heads, q_blocks + 1)``, or ``(q_blocks + 1,)`` for a single one;
        ``col`` holds the columns of all (batch, head) pairs one after another.
        """
        return cls._from_rows(col, _offsets_from_crow(crow), block_size, q_len, kv_len)

    def to_csr(
        self,
    ) -> tuple[Int64[Tensor, "batch heads q_blocks_plus_1"], Int32[Tensor, " nnz"]]:
        """``(crow, col)`` as in ``from_csr``: blocks as matrix entries.

        ``col[offsets[b, h, 0] : offsets[b, h, -1]]`` belongs to ``crow[b, h]``.
        """
        return self.offsets - self.offsets[..., :1], self.indices

    def numpy(self) -> dict[str, Any]:
        """Plain arrays and integers: ``indices, offsets, block_size, q_len, kv_len``.

        On the CPU the arrays share memory with the mask.
        """
        return {
            "indices": self.indices.cpu().numpy(),
            "offsets": self.offsets.cpu().numpy(),
            "block_size": self.block_size,
            "q_len": self.q_len,
            "kv_len": self.kv_len,
        }

    @classmethod
    def from_numpy(cls, arrays: Mapping[str, Any]) -> sparseloom.mask.SparseMask:
        """The mask that ``numpy`` wrote; the arrays are checked like any other."""
        indices, offsets = _tensors_from_numpy(arrays)
        bq, bk = arrays["block_size"]
        lengths = int(arrays["q_len"]), int(arrays["kv_len"])
        return cls._from_rows(indices, offsets, (int(bq), int(bk)), *lengths)

    def to_block_mask(
        self,
        *,
        is_causal: bool = False,
        key_padding: KeyPadding | None = None,
        for_eager: bool = False,
    ) -> BlockMask:
        """The mask for ``torch.nn.attention.flex_attention``.

        Blocks in which every pair is allowed become full blocks, which skip ``mask_mod``; the
        others are partial and ``mask_mod`` applies causality and padding; blocks with nothing
        allowed are left out. ``heads`` must be 1 or the number of query heads: ``expand`` first.

        Args:
            is_causal: query ``i`` sees key ``j`` if ``j <= i + kv_len - q_len``.
            key_padding: True = attend; its batch may exceed that of a shared mask.
            for_eager: let ``mask_mod`` test the kept blocks too. Without ``torch.compile``
                FlexAttention looks at ``mask_mod`` alone; compiled it needs no such test, which
                would only slow it down.
        """
        # flex_attention loads much of the compiler: only who asks for it waits for that.
        from sparseloom._mask_flex import to_block_mask

        return to_block_mask(
            cast("sparseloom.mask.SparseMask", self),
            is_causal=is_causal,
            key_padding=key_padding,
            for_eager=for_eager,
        )

    def plot(
        self,
        batch: int = 0,
        head: int = 0,
        *,
        is_causal: bool = False,
        max_cells: int = 1024,
        figure: Figure | None = None,
        row: int | None = None,
        col: int | None = None,
    ) -> Figure:
        """A picture of one head: queries from top to bottom, keys from left to right.

        Args:
            batch: which batch entry.
            head: which head of the mask.
            is_causal: draw the causal edge, grey out what it forbids, count density under it.
            max_cells: cells a side; larger masks show the share kept in each cell.
            figure: draw into this figure of ``plotly.subplots``, without a title, …
            row: … in this row …
            col: … and this column (from 1).

        Raises:
            ImportError: plotly is not installed.
        """
        from sparseloom._mask_plot import plot_mask

        return plot_mask(
            cast("sparseloom.mask.SparseMask", self)[batch, head],
            f"batch {batch}, head {head}",
            is_causal=is_causal,
            max_cells=max_cells,
            place=None if figure is None else (figure, row, col),
        )


def _offsets_from_crow(
    crow: Int[Tensor, "*batch_heads rows_plus_1"],
) -> Int64[Tensor, "batch heads rows_plus_1"]:
    """Row pointers that start at 0 in each (batch, head), as absolute offsets."""
    if crow.dim() == 1:
        crow = crow[None, None]
    if crow.dim() != 3:
        raise ValueError(f"crow must have 1 or 3 dimensions, got shape {tuple(crow.shape)}")
    wrong = crow[..., 0] != 0
    if bool(wrong.any()):
        b, h = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"crow must start at 0 in each (batch, head), got {int(crow[b, h, 0])} "
            f"at batch {b}, head {h}"
        )
    crow = crow.to(torch.int64)
    sizes = crow[..., -1].reshape(-1)
    return crow + (sizes.cumsum(0) - sizes).view(*crow.shape[:2], 1)


def _tensors_from_numpy(arrays: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``(indices, offsets)``, copied only where the array is read-only or of another type."""
    wanted = ("indices", "offsets", "block_size", "q_len", "kv_len")
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise ValueError(f"arrays must hold {', '.join(wanted)}; missing: {', '.join(missing)}")
    found = {name: np.asarray(arrays[name]) for name in ("indices", "offsets")}
    for name, array in found.items():
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got {array.dtype}")
    # 64 bits until the values have been checked: a cast to int32 would wrap them around.
    indices = found["indices"]
    narrow = np.int32 if indices.dtype == np.int32 else np.int64
    return (
        torch.from_numpy(np.require(indices, narrow, ["C", "W"])),
        torch.from_numpy(np.require(found["offsets"], np.int64, ["C", "W"])),
    )
