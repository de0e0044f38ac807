"""How tensors of a cache cross to the library: addresses, element types, strides in bytes."""

from __future__ import annotations

import torch
from torch import Tensor

# The numbers of `Element` in csrc/decode/decode.hpp, and bytes.
_ELEMENTS = {
    torch.float32: (0, 4), torch.bfloat16: (1, 2), torch.float16: (2, 2), torch.int8: (3, 1),
    torch.int16: (4, 2), torch.uint8: (5, 1),
}  # fmt: skip
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NO_TENSOR = (0, 0, 0, 0, 0)


def cached(tensor: Tensor) -> tuple[int, int, int, int, int]:
    """Address, element type, and the strides of batch, head and row in bytes."""
    element, size = _ELEMENTS[tensor.dtype]
    batch, head, row, _ = tensor.stride()
    return tensor.data_ptr(), element, batch * size, head * size, row * size


def factors(scale: Tensor | None) -> tuple[int, int, int, int, int]:
    """Address and element strides, 0 where one factor is shared."""
    if scale is None:
        return NO_TENSOR
    shape, strides = scale.shape, scale.stride()
    return (
        scale.data_ptr(),
        strides[0] if shape[0] > 1 else 0,
        strides[1] if shape[1] > 1 else 0,
        strides[2] if shape[2] > 1 else 0,
        strides[3] if shape[3] > 1 else 0,
    )
