"""A Lane against one that is stepped every cycle, written anew in plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.hardware.dota import lane as ln
from sparseloom.hardware.dota import state as s
from sparseloom.hardware.dota.state import Sizes
from sparseloom.hardware.engine.log import make_log
from sparseloom.hardware.units.token_scheduler import schedule

BASE = Sizes(
    cycle=128, width=64, value_width=64, key_beats=8, value_beats=8, banks=64, conflicts=1,
    queue=16, operands=16, steps_per_cycle=4, pushes_per_cycle=8, split=0, ahead=2, in_flight=3,
    detector_latency=2, mfu_latency=20, dram_latency=100, bytes_per_cycle=64.0, capacity=1 << 20,
)  # fmt: skip


@dataclass
class Job:
    """A product that the array works on: its steps, and what each has left."""

    kind: str
    group: int
    began: int
    steps: list[list[int]]
    budget: int = 0
    left: int = 0
    next: int = 0
    there: dict[int, int] = field(default_factory=dict)


class Stepped:
    """Every unit in every cycle: lists, counters, no event is looked ahead to."""

    def __init__(self, z: Sizes, table: np.ndarray, steps: list[list[list[int]]]) -> None:
        self.z, self.table, self.steps = z, table, steps
        n = len(table)
        self.issued: list[list[int]] = [[] for _ in range(n)]  # cycle of each step
        self.put = self.gone = 0  # steps that entered the queue, and that left it
        self.last_taken: list[int] = []  # cycles of the latest that left
        self.read: list[int] = []  # cycles in which operands left for the array
        self.sorted_at: list[int | None] = [None] * n
        self.sorting = 0  # group whose keys are pushed next
        self.pushed = 0
        self.detect_end: list[int] = []
        self.detect_begin: list[int] = []
        self.ready = [1 << 40] * n
        self.mfu = 0
        self.banks: dict[int, int] = {}
        self.scored = self.done = 0
        self.scores_end: list[int] = []
        self.ends: list[int] = []

    def run(self) -> int:
        n, now = len(self.table), 0
        job: Job | None = None
        detecting = 0  # cycles left
        while True:
            # The array is free: decide, perhaps several times where groups are empty.
            while job is None and detecting == 0:
                if self.done == n:
                    return max(now, self.mfu)
                g = len(self.detect_end)
                if g < n and g - self.scored < self.z.ahead:
                    detecting = int(max(self.table[g, ln.G_DETECT], self.table[g, ln.G_COMPARE]))
                    detecting = detecting if self.table[g, ln.G_DETECT] else 0
                    self.detect_begin.append(now)
                    self.detect_end.append(now + detecting)
                    continue
                self._sort(now, peek=True)
                if self.done < self.scored and self.ready[self.done] <= now:
                    job = Job("values", self.done, now, self.steps[self.done])
                elif self._startable(now):
                    job = Job("scores", self.scored, now, self.steps[self.scored])
                else:
                    break
                if not job.steps:
                    self._finish(job, now)
                    job = None
            self._sort(now)
            self._issue(now)
            if detecting:
                detecting -= 1
            elif job is not None and self._advance(job, now):
                self._finish(job, now + 1)
                job = None
            now += 1

    def _startable(self, now: int) -> bool:
        g = self.scored
        if g >= len(self.detect_end) or g - self.done >= self.z.in_flight:
            return False
        at = self.sorted_at[g]
        if not self.steps[g]:
            return at is not None and at <= now
        wanted = min(len(self.steps[g]), self.z.queue)
        return len(self.issued[g]) >= wanted

    def _sort(self, now: int, peek: bool = False) -> None:
        """Push keys of one group; it is sorted from the cycle after its last push."""
        while self.sorting < len(self.detect_end):
            g = self.sorting
            if now < self.detect_begin[g]:
                return
            before = g - self.z.ahead
            if before >= 0 and (
                len(self.issued[before]) < len(self.steps[before])
                or (self.issued[before] and self.issued[before][-1] >= now)
            ):
                return
            pushes = int(self.table[g, ln.G_PUSHES])
            if self.pushed >= pushes:
                late = 0
                if self.table[g, ln.G_DETECT]:
                    late = self.detect_end[g] + self.z.detector_latency
                if now < late:
                    return
                self.sorted_at[g] = now
                self.sorting, self.pushed = g + 1, 0
                continue
            if not peek:
                self.pushed += self.z.pushes_per_cycle
            return

    def _issue(self, now: int) -> None:
        scans = 0
        for g in range(len(self.table)):
            while len(self.issued[g]) < len(self.steps[g]):
                at = self.sorted_at[g]
                if at is None or at > now or scans == self.z.steps_per_cycle:
                    return
                gone = self.gone - sum(t == now for t in self.last_taken)
                if self.put - gone >= self.z.queue:
                    return
                self.issued[g].append(now)
                self.put += 1
                scans += 1

    def _read(self, job: Job, step: int, ask: int) -> int:
        """When the operands of a step are there, its banks taken in order."""
        z = self.z
        beats = z.key_beats if job.kind == "scores" else z.value_beats
        there = ask + 1
        for key in job.steps[step]:
            for beat in range(beats):
                bank = (key * beats + beat) % z.banks
                served = max(self.banks.get(bank, 0), ask)
                self.banks[bank] = served + 1
                there = max(there, served + 1)
        return there

    def _advance(self, job: Job, now: int) -> bool:
        """One cycle of a product; True when it is over."""
        z = self.z
        width = z.width if job.kind == "scores" else z.value_width
        budget = z.cycle
        while budget:
            if job.left == 0:
                if job.next == len(job.steps):
                    return True
                if job.next not in job.there:
                    ask = job.began - 2
                    if job.kind == "scores":
                        if len(self.issued[job.group]) <= job.next:
                            return False
                        ask = max(ask, self.issued[job.group][job.next])
                    if len(self.read) >= z.operands:
                        ask = max(ask, self.read[-z.operands] + 1)
                    job.there[job.next] = self._read(job, job.next, ask)
                if job.there[job.next] > now:
                    return False
                self.read.append(now)
                if job.kind == "scores":
                    self.last_taken = [t for t in self.last_taken if t == now] + [now]
                    self.gone += 1
                job.next += 1
                job.left = width
            used = min(budget, job.left)
            job.left -= used
            budget -= used
        return job.left == 0 and job.next == len(job.steps)

    def _finish(self, job: Job, now: int) -> None:
        g = job.group
        if job.kind == "values":
            self.done += 1
            self.ends.append(now)
            return
        self.scores_end.append(now)
        beats = int(self.table[g, ln.G_SOFTMAX])
        self.mfu = max(now, self.mfu) + beats
        self.ready[g] = self.mfu
        if beats:
            self.ready[g] += 2 * int(self.table[g, ln.G_LAST_ROW]) + self.z.mfu_latency
        self.scored += 1


def work(
    rng: np.random.Generator, rows: int, keys: int, share: float, detect: int
) -> tuple[np.ndarray, Any, list[list[list[int]]]]:
    """A head with random rows: table of groups, its schedule, and keys per group and step."""
    keep = rng.random((rows, keys)) < share
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int64)
    found = schedule(offsets, np.nonzero(keep)[1].astype(np.int32), record=True)
    assert found.issued is not None
    n = len(found.steps)
    steps: list[list[list[int]]] = [[[] for _ in range(int(count))] for count in found.steps]
    for group, step, key, _ in zip(*found.issued, strict=True):
        steps[group][step].append(int(key))
    table = np.zeros((n, len(ln.GROUP)), np.int64)
    ends = np.cumsum(found.loads)
    table[:, ln.G_KEY_FROM] = table[:, ln.G_VALUE_FROM] = ends - found.loads
    table[:, ln.G_KEY_TO] = table[:, ln.G_VALUE_TO] = ends
    table[:, ln.G_KEY_STEPS] = table[:, ln.G_VALUE_STEPS] = found.steps
    table[:, ln.G_PUSHES] = found.union
    table[:, ln.G_SOFTMAX] = found.kept // 5
    table[:, ln.G_LAST_ROW] = found.steps // 16
    if detect:
        table[:, ln.G_DETECT] = rng.integers(1, detect + 1, n)
        table[:, ln.G_COMPARE] = rng.integers(1, detect + 1, n)
    return table, found.issued, steps


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.0, 0.05, 0.2, 0.6, 1.0]),
    detect=st.sampled_from([0, 3, 30]),
    width=st.sampled_from([8, 48, 64, 200]),
    queue=st.sampled_from([1, 4, 16, 64]),
    operands=st.sampled_from([1, 3, 16]),
    issue=st.integers(1, 5),
    pushes=st.sampled_from([1, 8]),
    banks=st.sampled_from([8, 12, 64]),
    beats=st.sampled_from([1, 4, 5]),
    ahead=st.integers(1, 3),
    in_flight=st.integers(1, 3),
)
def test_every_group_ends_in_the_same_cycle(
    seed: int,
    share: float,
    detect: int,
    width: int,
    queue: int,
    operands: int,
    issue: int,
    pushes: int,
    banks: int,
    beats: int,
    ahead: int,
    in_flight: int,
) -> None:
    rng = np.random.default_rng(seed)
    table, issued, steps = work(rng, int(rng.integers(1, 18)), 24, share, detect)
    z = BASE._replace(
        width=width, value_width=width, queue=queue, operands=operands, steps_per_cycle=issue,
        pushes_per_cycle=pushes,
        banks=banks, key_beats=beats, value_beats=beats, ahead=ahead, in_flight=in_flight,
    )  # fmt: skip
    state = s.lane_state(z, len(table), 0, 0.0)
    log = make_log(s.PER_LANE, len(s.CAUSES))
    end = ln.run_lane(
        z, state, log, 0, 0, table, issued.step, issued.key, issued.step, issued.key, 0
    )
    slow = Stepped(z, table, steps)
    assert end == slow.run()
    assert state.times[:, s.T_SCORED].tolist() == slow.scores_end
    assert state.times[:, s.T_DONE].tolist() == slow.ends
