"""The sorter sorts, and its size and cycles are those of the literature."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.units.merge_sort import (
    merge_sort,
    network,
    network_comparators,
    network_stages,
    sort_cycles,
)


def test_sizes_at_1024() -> None:
    assert network_comparators(1024) == 24063
    assert network_stages(1024) == 55
    assert sort_cycles(1024) == 6 * 64 == 384


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 64, 1024])
def test_the_network_has_the_closed_form_size(n: int) -> None:
    stages = network(n)
    assert len(stages) == network_stages(n)
    assert sum(len(stage) for stage in stages) == network_comparators(n)
    for stage in stages:  # the comparators of a stage work at the same time
        wires = [wire for pair in stage for wire in pair]
        assert len(wires) == len(set(wires))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_network_sorts_every_row_of_bits(n: int) -> None:
    """By the 0-1 principle it then sorts everything."""
    for code in range(2**n):
        row = [code >> i & 1 for i in range(n)]
        for stage in network(n):
            for i, j in stage:
                row[i], row[j] = max(row[i], row[j]), min(row[i], row[j])
        assert row == sorted(row, reverse=True)


@settings(deadline=None)
@given(st.lists(st.integers(-5, 5), max_size=100), st.sampled_from([1, 2, 8, 16]))
def test_sorts_stably(values: list[int], width: int) -> None:
    row = np.array(values, np.int64)
    found = merge_sort(row, width)
    assert found.ids.tolist() == np.argsort(-row, kind="stable").tolist()
    assert found.cycles == sort_cycles(len(values), width)


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (1, 1), (16, 1), (17, 2), (33, 6), (512, 160)])
def test_cycles(n: int, expected: int) -> None:
    assert sort_cycles(n) == expected


def test_a_width_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(MachineError, match="width must be a power of two, got 12"):
        sort_cycles(10, 12)
