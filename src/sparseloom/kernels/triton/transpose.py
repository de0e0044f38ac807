"""What the kernels derive from a mask: rows by length, and the key-major form. Made once.

The operators get a mask as its tensors, so what is derived is kept as long as these live, and is
made anew where one was written to in between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int32, Int64
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparseloom.mask import SparseMask


class KeyMajor(NamedTuple):
    """Which query blocks keep each key block, and where their entries are in the mask."""

    indices: Int32[Tensor, " nnz"]
    offsets: Int64[Tensor, "mask_batch mask_heads kv_blocks_plus_1"]
    order: Int64[Tensor, " nnz"]


_ORDERS = WeakTensorKeyDictionary()
_KEY_MAJOR = WeakTensorKeyDictionary()


def longest_first(
    offsets: Int64[Tensor, "mask_batch mask_heads blocks_plus_1"],
) -> Int32[Tensor, "mask_batch mask_heads blocks"]:
    """The blocks of each row of the mask, those with the most kept blocks first.

    Long rows are the load problem of ragged masks (a global token, the last rows of a causal
    one): begun first, they end before the others have all begun.
    """
    found = _ORDERS.get(offsets)
    if found is None or found[0] != _version(offsets):
        order = offsets.diff(dim=-1).argsort(dim=-1, descending=True, stable=True)
        found = _version(offsets), order.to(torch.int32)
        _ORDERS[offsets] = found
    return found[1]


def key_major(
    indices: Int32[Tensor, " nnz"],
    offsets: Int64[Tensor, "mask_batch mask_heads q_blocks_plus_1"],
    block_size: tuple[int, int],
    q_len: int,
    kv_len: int,
) -> KeyMajor:
    """The key-major form of a mask."""
    state = (_version(indices), _version(offsets), block_size, q_len, kv_len)
    found = _KEY_MAJOR.get(offsets)
    if found is None or found[0] is not indices or found[1] != state:
        mask = SparseMask(
            indices, offsets, block_size=block_size, q_len=q_len, kv_len=kv_len, validate=False
        )
        turned = mask.transpose()
        form = KeyMajor(turned.indices, turned.offsets, mask.transpose_order())
        found = indices, state, form
        _KEY_MAJOR[offsets] = found
    return found[2]


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
