"""The zero eliminator packs in order: the published example, and a list comprehension."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.hardware.units.zero_eliminator import count_gaps, eliminate, stages


def test_example_of_the_paper() -> None:
    """SpAtten Fig. 10: [a 0 b 0 c d 0 e] has gaps [0 0 1 1 2 2 2 3] and becomes [a b c d e]."""
    items = np.array([10, 0, 11, 0, 12, 13, 0, 14])
    keep, gaps = items != 0, np.zeros(8, np.int64)
    assert count_gaps(keep, gaps, 8) == 5
    assert gaps.tolist() == [0, 0, 1, 1, 2, 2, 2, 3]
    assert eliminate(items, keep, gaps, 8) == 5
    assert items.tolist() == [10, 11, 12, 13, 14, 0, 0, 0]


@pytest.mark.parametrize(("n", "expected"), [(1, 0), (2, 1), (8, 3), (16, 4), (24, 5), (32, 5)])
def test_stages(n: int, expected: int) -> None:
    assert stages(n) == expected


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.booleans(), max_size=40))
def test_what_is_kept_is_packed_in_order(keep: list[bool]) -> None:
    n = len(keep)
    items = np.arange(1, n + 1)
    expected = [i + 1 for i in range(n) if keep[i]]
    found = eliminate(items, np.array(keep, np.bool_), np.zeros(n, np.int64), n)
    assert found == len(expected)
    assert items.tolist() == expected + [0] * (n - found)
