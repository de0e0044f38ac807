"""Peak memory of one call on the card, as PyTorch's allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Peak(NamedTuple):
    """Bytes that a call takes at its peak above what was there before it, and of its result."""

    total: int
    result: int

    @property
    def extra(self) -> int:
        """Without the result."""
        return max(0, self.total - self.result)


def call_with_peak(run: Callable[[], object], cuda: Any = torch.cuda) -> Peak:
    """The peak of one call; `cuda` is `torch.cuda`, or what stands for it in a test."""
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    result = run()
    cuda.synchronize()
    peak, kept = cuda.max_memory_allocated() - before, cuda.memory_allocated() - before
    del result
    return Peak(max(0, peak), max(0, kept))
