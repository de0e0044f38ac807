"""The zero eliminator: packs what is kept of a group to the front, in order.

A prefix sum counts the gaps before each item; then log2(n) stages shift left by 1, 2, 4, …, each
item where its count has that bit (SpAtten, HPCA 2021, §IV-B and Fig. 10). Two items never meet:
when stage i begins, a kept item has moved by its count modulo 2**i, which grows by at most the
gaps between neighbours.
"""

from __future__ import annotations

import numpy as np

from sparseloom.hardware.engine.compiled import inlined


@inlined
def count_gaps(keep: np.ndarray, gaps: np.ndarray, n: int) -> int:
    """`gaps[i]` = how many of the first i of `n` are not kept; returns how many are kept."""
    found = 0
    for i in range(n):
        gaps[i] = found
        if not keep[i]:
            found += 1
    return n - found


@inlined
def eliminate(items: np.ndarray, keep: np.ndarray, gaps: np.ndarray, n: int) -> int:
    """Pack the kept ones of the first `n` items to the front, in place, and return how many.

    Args:
        items: (>= n) any type; behind the kept ones it is 0 afterwards.
        keep: (>= n) whether to keep each item; used as scratch.
        gaps: (>= n) int64 scratch: the register of the prefix sum.
        n: width of the eliminator.
    """
    kept = count_gaps(keep, gaps, n)
    for i in range(n):
        if not keep[i]:
            items[i] = 0
    shift = 1
    while shift < n:  # one stage of multiplexers, from left to right so that it works in place
        for i in range(shift, n):
            if keep[i] and gaps[i] & shift:
                items[i - shift] = items[i]
                gaps[i - shift] = gaps[i]
                keep[i - shift] = True
                items[i] = 0
                keep[i] = False
        shift *= 2
    return kept


def stages(n: int) -> int:
    """Stages of shifters of an eliminator that is `n` items wide."""
    return max(n - 1, 0).bit_length()
