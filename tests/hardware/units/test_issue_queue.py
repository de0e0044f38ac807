"""The queue between scheduler and array: what its rates allow, to the cycle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.hardware.config import MachineError, checked
from sparseloom.hardware.units.issue_queue import IssueQueue, IssueTiming, issue_timing
from sparseloom.hardware.units.token_scheduler import schedule


def run(steps: list[int], pushes: list[int] | None = None, **rates: int) -> IssueTiming:
    """Groups of these steps behind a queue; keys cost nothing unless pushes are given."""
    queue = checked(IssueQueue, rates, "here")
    keys = [0] * len(steps) if pushes is None else pushes
    return issue_timing(np.array(steps, np.int64), np.array(keys, np.int64), queue)


def test_only_the_first_scan_is_waited_for() -> None:
    """Scanned in cycle 0, taken from cycle 1 on at two steps a cycle, and the same for values."""
    found = run([10, 10, 0, 7])
    assert found.start.tolist() == [1, 11, 21, 21]
    assert found.end.tolist() == [11, 21, 21, 29]
    assert found.stalls.tolist() == [1, 0, 0, 0]


def test_one_step_a_cycle_halves_the_first_product() -> None:
    """Nothing is scanned ahead of the first group: 100 steps take 100 cycles instead of 50.

    For the second one 16 steps wait in the queue. The first leaves in cycle 0, so step 16 + j is
    scanned in cycle 1 + j and taken in the next: the last one, j = 83, in cycle 85.
    """
    found = run([100, 100], steps_per_cycle=1)
    assert found.end[0] == 1 + 100 + 50
    second = found.end[1] - found.end[0]
    assert second == 86 + 50
    assert found.stalls.tolist() == [51, second - 100]
    deep = run([100, 100], steps_per_cycle=1, entries=64)
    assert deep.end[1] - deep.end[0] == 100, "50 steps ahead are enough"


def test_keys_are_sorted_before_the_first_scan() -> None:
    """160 keys at 16 a cycle: 10 cycles; those of the second group while the first one runs."""
    found = run([10, 10], [160, 160])
    assert found.start.tolist() == [11, 21]
    slow = run([10, 10, 10], [160, 160, 160], pushes_per_cycle=1)
    assert slow.start.tolist() == [161, 321, 481]


def test_two_sets_of_buffers() -> None:
    """The keys of the third group wait until the first one has left its buffers."""
    found = run([40, 40, 40], [1, 1, 32], steps_per_cycle=1, pushes_per_cycle=1, entries=1)
    # One entry: a step leaves in the cycle after its scan, and the next is scanned after that.
    scans_of_first = 1 + 2 * 40 - 1
    assert found.start[0] == 2
    assert found.end[0] == 2 + 2 * 40 - 1 + 20
    ready = scans_of_first + 32
    assert ready < found.start[2], "sorted long before it is needed"


def test_wide_heads_take_several_cycles_for_a_step() -> None:
    found = run([5, 5], drained_per_cycle=1, cycles_per_step=4)
    assert found.end.tolist() == [41, 81]
    assert found.stalls.tolist() == [1, 0]
    uneven = run([7, 6], drained_per_cycle=3, cycles_per_step=2)
    assert uneven.end.tolist() == [13, 21], "three steps in two cycles"
    assert uneven.stalls.tolist() == [1, 0]


groups = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(
    groups,
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 16),
)
def test_time_is_conserved_and_faster_is_never_slower(
    work: list[tuple[int, int]], entries: int, scans: int, drains: int, each: int, pushed: int
) -> None:
    steps, pushes = [s for s, _ in work], [p for _, p in work]
    rates = {
        "entries": entries,
        "steps_per_cycle": scans,
        "drained_per_cycle": drains,
        "cycles_per_step": each,
        "pushes_per_cycle": pushed,
    }
    found = run(steps, pushes, **rates)
    busy = sum(2 * each * -(-s // drains) for s in steps)
    assert found.stalls.min() >= 0
    assert found.end[-1] == busy + found.stalls.sum()
    assert found.end[-1] >= -(-sum(steps) // scans)
    for name in ("entries", "steps_per_cycle", "pushes_per_cycle"):
        better = run(steps, pushes, **{**rates, name: rates[name] + 1})
        assert better.end[-1] <= found.end[-1]


def test_through_the_scheduler() -> None:
    """At the default rates a random mask at 5 % keeps the array busy; one push a cycle does not."""
    keep = np.random.default_rng(0).random((400, 400)) < 0.05
    offsets = np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int64)
    keys = np.nonzero(keep)[1].astype(np.int32)
    fast = schedule(offsets, keys, queue=IssueQueue()).timing
    slow = schedule(offsets, keys, queue=IssueQueue(pushes_per_cycle=1)).timing
    assert fast is not None
    assert slow is not None
    assert fast.stalls[1:].sum() == 0
    assert slow.end[-1] > 2 * fast.end[-1]


def test_what_is_refused() -> None:
    with pytest.raises(MachineError, match="pushes must have one entry per group, got 1 for 2"):
        run([1, 2], [1])
    with pytest.raises(MachineError, match="steps and pushes must be at least 0"):
        run([-1])
    with pytest.raises(MachineError, match="entries"):
        run([1], entries=0)
