"""FIFOs keep order and bounds; the log conserves cycles; changed sources are compiled anew."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numba
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.hardware.engine import compiled as module
from sparseloom.hardware.engine import fifo, log


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.booleans(), max_size=200), st.integers(1, 5))
def test_a_fifo_is_a_deque_with_a_bound(pushes: list[bool], depth: int) -> None:
    fifos, model, item = fifo.make_fifos(2, depth), deque[int](), 0
    for is_push in pushes:
        assert fifo.full(fifos, 1) == (len(model) == depth)
        if is_push and len(model) < depth:
            fifo.push(fifos, 1, item)
            model.append(item)
            item += 1
        elif not is_push and model:
            assert fifo.peek(fifos, 1) == model[0]
            assert fifo.pop(fifos, 1) == model.popleft()
        assert fifo.used(fifos, 1) == len(model)
    assert fifo.used(fifos, 0) == 0


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=60))
def test_the_log_conserves_cycles(cycles: list[tuple[int, int]]) -> None:
    found = log.make_log(1, 4, window=(0, 1000))
    for now, (code, tag) in enumerate(cycles):
        log.note(found, 0, code, tag, now)
    log.close(found, 0, len(cycles))
    assert found.totals.sum() == len(cycles)
    for code in range(4):
        assert found.totals[0, code] == sum(1 for c, _ in cycles if c == code)
    kept = found.intervals[: found.limits[0]]
    assert (kept[1:, 2] == kept[:-1, 3]).all()
    assert kept[0, 2] == 0
    assert kept[-1, 3] == len(cycles)


def test_the_log_keeps_the_window_and_counts_what_does_not_fit() -> None:
    found = log.make_log(1, 2, window=(10, 20), capacity=2)
    for now in range(40):
        log.note(found, 0, now % 2, -1, now)
    log.close(found, 0, 40)
    assert found.totals.tolist() == [[20, 20]]
    assert found.limits.tolist() == [2, 8, 10, 20]
    assert (found.intervals[:, 3] > 10).all()


def test_the_files_of_compiled_code_are_named_after_every_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def names(stamp: int) -> Any:
        def double(x: int) -> int:
            return 2 * x

        monkeypatch.setattr(module, "_stamp", lambda: stamp)
        return module.compiled(double)

    first, second = names(1), names(2)
    assert first(4) == second(4) == 8
    folder = Path(first.stats.cache_path)
    for stamp in (1, 2):
        found = list(folder.glob(f"*double.{stamp:08x}*.nbi"))
        assert len(found) == 1
        for file in folder.glob(f"*double.{stamp:08x}*"):
            file.unlink()


def test_inlined_functions_are_compiled_once_for_all_constants() -> None:
    def add(x: int, y: int) -> int:
        return x + y

    inner = module.inlined(add)

    def three(x: int) -> int:
        return inner(inner(inner(x, 1), 2), 3)

    outer: Any = numba.njit(three)
    assert outer(4) == 10
    assert inner(4, 5) == 9
