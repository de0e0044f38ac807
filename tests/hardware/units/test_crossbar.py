"""The crossbar loses nothing, doubles nothing, and never puts two items into one output at once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseloom.hardware.engine.fifo import make_fifos, pop, push
from sparseloom.hardware.units.crossbar import arbitrate, field_wants, rooms, transfer


def _cycle(
    inputs: NDArray[np.int64], outputs: NDArray[np.int64], low_bit: int
) -> tuple[NDArray[np.int64], list[bool]]:
    wants = np.zeros(len(inputs), np.int64)
    ready = np.zeros(len(outputs), np.bool_)
    grants = np.zeros(len(inputs), np.bool_)
    field_wants(inputs, low_bit, len(ready), wants)
    rooms(outputs, ready)
    assert arbitrate(wants, ready, grants) == grants.sum()
    transfer(inputs, outputs, wants, grants)
    return wants, grants.tolist()


def test_the_lowest_index_wins() -> None:
    inputs, outputs = make_fifos(3, 4), make_fifos(2, 4)
    for i, item in enumerate([3, 5, 4]):  # wants 1, 1, 0
        push(inputs, i, item)
    wants, grants = _cycle(inputs, outputs, 0)
    assert wants.tolist() == [1, 1, 0]
    assert grants == [True, False, True]
    wants, grants = _cycle(inputs, outputs, 0)
    assert wants.tolist() == [-1, 1, -1]
    assert grants == [False, True, False]
    assert [pop(outputs, 1), pop(outputs, 1), pop(outputs, 0)] == [3, 5, 4]


def test_a_full_output_takes_nothing() -> None:
    inputs, outputs = make_fifos(1, 2), make_fifos(1, 1)
    push(inputs, 0, 7)
    push(outputs, 0, 1)
    assert _cycle(inputs, outputs, 0)[1] == [False]
    assert pop(outputs, 0) == 1
    assert _cycle(inputs, outputs, 0)[1] == [True]


@settings(deadline=None, max_examples=50)  # the first example compiles
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), max_size=120),
    st.integers(0, 2**32),
)
def test_everything_arrives_once_and_in_order(items: list[tuple[int, int]], seed: int) -> None:
    """8 inputs to 5 outputs of depth 2 that drain at random; item = number * 8 + field."""
    random = np.random.default_rng(seed)
    inputs, outputs = make_fifos(8, 120), make_fifos(5, 2)
    origin = {number * 8 + field: i for number, (i, field) in enumerate(items)}
    for item, i in origin.items():
        push(inputs, i, item)
    arrived = list[tuple[int, int]]()  # output, item
    cycles = 0
    while len(arrived) < len(items):
        used = outputs[:, 1].copy()
        _cycle(inputs, outputs, 0)
        moved = outputs[:, 1] - used
        assert moved.min() >= 0
        assert moved.max() <= 1  # no conflict
        for o in np.flatnonzero(outputs[:, 1]):
            if random.random() < 0.7:
                arrived.append((int(o), int(pop(outputs, int(o)))))
        cycles += 1
        assert cycles < 2000
    assert sorted(item for _, item in arrived) == sorted(origin)  # no loss, no duplication
    assert all(o == item % 5 for o, item in arrived)
    for i in range(8):
        for o in range(5):
            path = [item for at, item in arrived if at == o and origin[item] == i]
            assert path == sorted(path)
