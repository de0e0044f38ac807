"""How tensors cross to the library: as addresses, strides in elements, and a number per type."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The element types that the kernels read."""


def rows(tensor: Tensor) -> Tensor:
    """The tensor with neighbouring dims adjacent."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def view(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address, and the strides of batch, head and row."""
    batch, head, row, _ = tensor.stride()
    return tensor.data_ptr(), batch, head, row


def address(tensor: Tensor | None) -> int:
    """Where the numbers lie; 0 for no tensor. Whoever asks keeps the tensor alive."""
    return 0 if tensor is None else tensor.data_ptr()
