"""Kernels: attention over the pairs that a ``SparseMask`` keeps.

``attention`` checks its arguments, chooses a backend and runs it as a torch operator. The
``reference`` backend defines the result; ``cpu`` is in C++, ``triton`` runs on GPUs, ``flex`` and
``dense`` are PyTorch's own kernels.
``sddmm``, ``sparse_softmax`` and ``spmm`` are the same computation in three steps, and
``decode_attention`` is one step of decoding against a cache.
"""

from __future__ import annotations

from sparseloom.kernels.api import (
    AttentionOutput,
    attention,
    available_backends,
    choose_backend,
)
from sparseloom.kernels.decode import DecodeOutput, DecodeStats, decode_attention
from sparseloom.kernels.planes import PlaneCache
from sparseloom.kernels.unfused import sddmm, sparse_softmax, spmm

__all__ = [
    "AttentionOutput",
    "DecodeOutput",
    "DecodeStats",
    "PlaneCache",
    "attention",
    "available_backends",
    "choose_backend",
    "decode_attention",
    "sddmm",
    "sparse_softmax",
    "spmm",
]
