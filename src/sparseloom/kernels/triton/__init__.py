"""The Triton backend: attention over the kept pairs on NVIDIA GPUs.

Its kernels run on a CUDA device or, with TRITON_INTERPRET=1 in the environment before Triton is
imported, on CPU tensors in Triton's interpreter, for tests. ``compile_report`` compiles them for a
card that is not there.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch


@functools.cache
def unavailable() -> str | None:
    """Why the backend cannot run on this machine (None: it can). Looked up once."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'sparseloom[gpu]' (Linux)"
    from triton import knobs

    if knobs.runtime.interpret or torch.cuda.is_available():
        return None
    return "no CUDA device (and TRITON_INTERPRET=1 is not set, which interprets the kernels)"
