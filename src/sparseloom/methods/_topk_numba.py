"""The best k keys of each row on a CPU, compiled by numba: one radix selection per row.

The bits of an fp32 number, mapped so that they grow with it, are ranked 12, 10 and 10 bits at a
time; a last pass writes the keys above the k-th value in order, and as many equal to it as are
still missing, so that ties go to the lowest key and nothing has to be sorted.  The time does not
depend on k.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INLINE = 1 << 17  # scores below which threads cost more than they save
_LOWEST = 0x00800000  # the mapped bits of the smallest finite number
_HIGHEST = 0xFF7FFFFF  # and of the largest
_FORCED = 0xFFFFFFFF


def select_rows(
    scores: Tensor,
    visible: Tensor,
    budget: Tensor,
    diagonal: Tensor,
    attended: Tensor | None,
    starts: Tensor,
    out: Tensor,
) -> None:
    """See `_topk.select_rows`; everything is on the CPU."""
    batch, heads, rows, columns = scores.shape
    padding = np.zeros((0, 0), np.bool_) if attended is None else attended.contiguous().numpy()
    arrays = [
        scores.contiguous().numpy().view(np.uint32).reshape(batch * heads * rows, columns),
        visible.contiguous().numpy(),
        budget.contiguous().numpy(),
        diagonal.contiguous().numpy(),
        padding,
        starts.contiguous().numpy().reshape(-1),
        out.numpy(),
    ]
    total = batch * heads * rows
    workers = 1 if total * columns < _INLINE else min(torch.get_num_threads(), total)
    work = _compiled()
    if workers == 1:
        work(*arrays, heads, 0, total)
        return
    edges = [total * part // workers for part in range(workers + 1)]
    jobs = [
        _threads(workers).submit(work, *arrays, heads, low, high) for low, high in pairwise(edges)
    ]
    for job in jobs:
        job.result()


@lru_cache(maxsize=1)
def _threads(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="sparseloom-select")


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., None]:
    from numba import njit

    plain = inspect.unwrap(_select)  # the tests wrap every function in run-time type checks
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(plain)
    except RuntimeError:  # no folder that a compiled function could be kept in
        return njit(**options)(plain)


def _select(
    scores: Any,
    visible: Any,
    budget: Any,
    diagonal: Any,
    attended: Any,
    starts: Any,
    out: Any,
    heads: int,
    low: int,
    high: int,
) -> None:
    """Rows low … high - 1 of the flattened (batch, heads, rows)."""
    rows = visible.shape[1]
    ranks = np.empty(scores.shape[1], np.uint32)
    close = np.empty(scores.shape[1] + 1, np.uint32)
    counts = np.zeros(4096, np.int32)
    for flat in range(low, high):
        r = flat % rows
        b = flat // (rows * heads)
        vb = b if visible.shape[0] > 1 else 0
        n = visible[vb, r]
        k = budget[vb, r]
        place = starts[flat]
        if k <= 0:
            continue
        if k >= n:
            for j in range(n):
                out[place + j] = j
            continue
        row = scores[flat]
        for j in range(n):
            bits = row[j]
            bits = np.uint32(0) if bits == np.uint32(0x80000000) else bits  # -0 is 0
            negative = bits >> np.uint32(31) != 0
            rank = bits ^ (np.uint32(0xFFFFFFFF) if negative else np.uint32(0x80000000))
            rank = max(rank, np.uint32(_LOWEST))
            rank = min(rank, np.uint32(_HIGHEST))
            nan = bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
            ranks[j] = np.uint32(_LOWEST) if nan else rank
        if attended.shape[0] > 0:
            pb = b if attended.shape[0] > 1 else 0
            for j in range(n):
                if not attended[pb, j]:
                    ranks[j] = 0
        for j in range(diagonal[r, 0], min(n, diagonal[r, 1])):
            if ranks[j] != 0:
                ranks[j] = np.uint32(_FORCED)

        counts[:] = 0
        for j in range(n):
            counts[ranks[j] >> np.uint32(20)] += 1
        left = k
        digit = 4095
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        m = 0
        for j in range(n):
            close[m] = ranks[j]
            m += ranks[j] >> np.uint32(20) == np.uint32(digit)
        kth = np.uint32(digit) << np.uint32(20)
        for step in range(2):
            shift = np.uint32(10 - 10 * step)
            counts[:1024] = 0
            for i in range(m):
                counts[(close[i] >> shift) & np.uint32(1023)] += 1
            digit = 1023
            while counts[digit] < left:
                left -= counts[digit]
                digit -= 1
            kept = 0
            for i in range(m):
                rank = close[i]
                close[kept] = rank
                kept += (rank >> shift) & np.uint32(1023) == np.uint32(digit)
            m = kept
            kth |= np.uint32(digit) << shift

        end = place + k
        for j in range(n):
            tie = ranks[j] == kth and left > 0
            out[place] = j
            place += ranks[j] > kth or tie
            left -= tie
            if place == end:
                break
