"""A full sorter, which the top-k engine is compared with: odd-even merge networks, merge passes.

Batcher's odd-even merge sort of n = 2**p values takes p (p + 1) / 2 stages and
(p**2 - p + 4) 2**(p - 2) - 1 comparators. A merge sorter that is `width` values wide sorts runs of
`width` with such a network on the way in, then merges pairs of runs, `width` values in a cycle:
for 1024 values 6 passes of 64 cycles. The paper (SpAtten, HPCA 2021, §IV-B) gives no design of its
sorter: these cycles are ours. Quick-select takes 256 on average for the median of 1024 distinct
values, so that the sorter is 1.5 times slower; the paper prints 1.4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseloom.hardware.config import MachineError


class Sorted(NamedTuple):
    """Ids in descending order of their values, equal ones in input order; and the cycles taken."""

    ids: NDArray[np.int64]
    cycles: int


def network_stages(n: int) -> int:
    """Stages of Batcher's odd-even merge sort of n values, a power of two."""
    p = _log2(n, "n")
    return p * (p + 1) // 2


def network_comparators(n: int) -> int:
    """Comparators of Batcher's odd-even merge sort of n values, a power of two."""
    p = _log2(n, "n")
    return (p * p - p + 4) * n // 4 - 1 if p else 0


def network(n: int) -> list[list[tuple[int, int]]]:
    """The network itself: for each stage the pairs (i, j), i < j, that are put in order."""
    _log2(n, "n")
    found: list[list[tuple[int, int]]] = []
    size = 1
    while size < n:
        distance = size
        while distance:
            stage = [
                (i + low, i + low + distance)
                for low in range(distance % size, n - distance, 2 * distance)
                for i in range(min(distance, n - low - distance))
                if (i + low) // (2 * size) == (i + low + distance) // (2 * size)
            ]
            found.append(stage)
            distance //= 2
        size *= 2
    return found


def sort_cycles(n: int, width: int = 16) -> int:
    """Cycles to sort n values: a pass over them for every doubling of the runs of `width`."""
    _log2(width, "width")
    groups = -(-n // width)
    return groups * max((groups - 1).bit_length(), 1) if n > 0 else 0


def merge_sort(values: NDArray[Any], width: int = 16) -> Sorted:
    """What the merge sorter makes of one row.

    Args:
        values: (n) integers or floats without NaN.
        width: values in a cycle, a power of two.
    """
    n = len(values)
    cycles = sort_cycles(n, width)
    stages = network(width)
    ids = np.arange(n)

    def before(i: int, j: int) -> bool:
        return bool(values[i] > values[j]) or (bool(values[i] == values[j]) and i < j)

    runs: list[list[int]] = []
    for low in range(0, n, width):
        # Places past the end of the row hold n, which comes after everything.
        run = [int(i) for i in ids[low : low + width]]
        run += [n] * (width - len(run))
        for stage in stages:
            for i, j in stage:
                if run[j] < n and (run[i] == n or before(run[j], run[i])):
                    run[i], run[j] = run[j], run[i]
        runs.append([i for i in run if i < n])
    while len(runs) > 1:
        merged: list[list[int]] = []
        for first, second in zip(runs[::2], [*runs[1::2], []], strict=False):
            run, i, j = list[int](), 0, 0
            while i < len(first) or j < len(second):
                if j == len(second) or (i < len(first) and before(first[i], second[j])):
                    run.append(first[i])
                    i += 1
                else:
                    run.append(second[j])
                    j += 1
            merged.append(run)
        runs = merged
    return Sorted(np.array(runs[0] if runs else [], np.int64), cycles)


def _log2(n: int, name: str) -> int:
    if n < 1 or n & (n - 1):
        raise MachineError(f"{name} must be a power of two, got {n}")
    return n.bit_length() - 1
