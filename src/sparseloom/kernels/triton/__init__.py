"""Kernels for NVIDIA GPUs in Triton, and whether they can run here.

They run on a CUDA device or, with TRITON_INTERPRET=1 in the environment before Triton is imported,
on CPU tensors in Triton's interpreter, for tests. ``compile_report`` compiles them for a card that
is not there.
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec

import torch

OLDEST = (8, 0)
"""The compute capability that the kernels need: bf16 tensor cores, asynchronous copies."""


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def unavailable() -> str | None:
    """Why the backend cannot run on this machine (None: it can). Looked up once."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'sparseloom[gpu]' (Linux)"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (and TRITON_INTERPRET=1 is not set, which interprets the kernels)"
    if torch.version.hip is not None:
        return "it was made for NVIDIA GPUs, and this PyTorch is for AMD's"
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        return f"it needs a GPU of compute capability 8.0 or more, got {found[0]}.{found[1]}"
    return None
