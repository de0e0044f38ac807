"""Kernels: attention over the pairs that a ``SparseMask`` keeps."""

from __future__ import annotations

from sparseloom.kernels.api import (
    AttentionOutput,
    attention,
    available_backends,
    choose_backend,
)

__all__ = [
    "AttentionOutput",
    "attention",
    "available_backends",
    "choose_backend",
]
