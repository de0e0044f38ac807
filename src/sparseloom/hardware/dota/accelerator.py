"""One accelerator on one sequence after another: products, attention, norms, with one log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from sparseloom.hardware.dota import state as st
from sparseloom.hardware.dota.closed_form import Cost, elements_cost, gemm_cost, resident
from sparseloom.hardware.dota.config import DotaConfig
from sparseloom.hardware.dota.groups import Lowering
from sparseloom.hardware.dota.lane import run_lane
from sparseloom.hardware.dota.products import Feed, plan, run_elements, run_product
from sparseloom.hardware.dota.tell import tell
from sparseloom.hardware.engine.log import Log, close, make_log
from sparseloom.hardware.report import Stage
from sparseloom.trace import AttentionCall, Operator, Selection, Workload


@dataclass
class Tally:
    """What ran so far: stages in order, and the actions behind the energy."""

    stages: list[Stage] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    dram_bytes: int = 0
    useful_bytes: float = 0.0
    kept: int = 0
    loads: int = 0
    idle_slots: int = 0


class Accelerator:
    """Lanes, Accumulator and this accelerator's share of the DRAM.

    Args:
        config: the machine.
        workload, selection: what runs.
        lowering: of the selection's masks; may be shared by accelerators.
        sharing: accelerators that have equal slots of the DRAM's time.
        window: cycles of which the log keeps intervals.
    """

    def __init__(
        self,
        config: DotaConfig,
        workload: Workload,
        selection: Selection,
        lowering: Lowering,
        *,
        sharing: int = 1,
        window: tuple[int, int] = (0, 0),
    ) -> None:
        self.config, self.workload, self.selection = config, workload, selection
        self.lowering = lowering
        self.rate = config.bytes_per_cycle / sharing
        self._steps = list(_steps(workload, selection))
        self._fed = {
            (operator.layer, operator.step): (operator, call)
            for operator, call in reversed(self._steps)
            if operator.kind == "attention"
        }
        self.log: Log = make_log(config.lanes * st.PER_LANE + 1, len(st.CAUSES), window=window)
        self.tally = Tally()
        self.now = 0
        self._mfu = 0  # when the multi-function units have done all norms
        self._feed = Feed(np.zeros(config.dram.buffers, np.int64), np.zeros(1))
        self._groups = 0

    def run(self, sequence: int) -> None:
        """All operators of one sequence."""
        before: Operator | None = None
        mine = [step for step in self._steps if sequence < step[0].batch]
        for i, (operator, call) in enumerate(mine):
            start = self.now
            facts: dict[str, float | int | str] = {}
            if call is not None:
                facts = self._attention(operator, call, sequence)
                component = "attention"
            elif operator.kind == "gemm":
                facts = self._gemm(operator, before)
                component = "linear" if operator.role == "qkv" else "other"
            else:
                self._elements(operator)
                component = "other"
            before = operator
            if i == len(mine) - 1:
                self._drain()
            if self.now > start:
                self.tally.stages.append(
                    Stage(
                        component=component,
                        cycles=self.now - start,
                        layer=operator.layer,
                        step=operator.step,
                        sequence=sequence,
                        facts=facts,
                    )
                )

    def close(self, end: int) -> None:
        """End the log at cycle `end`."""
        for unit in range(self.log.totals.shape[0]):
            close(self.log, unit, self.now)
            self.log.running[unit, 0] = st.IDLE
            close(self.log, unit, end)

    def busy(self) -> dict[str, float]:
        """Cycles in which units worked, by the names of the energy table; after `close`."""
        totals = self.log.totals[:, st.BUSY]
        lanes = totals[: self.config.lanes * st.PER_LANE].reshape(-1, st.PER_LANE)
        # Detector and Scheduler are one module: what works longer keeps it awake.
        detector = np.maximum(lanes[:, st.DETECTOR], lanes[:, st.SCHEDULER])
        return {
            "mfu_cycle": float(lanes[:, st.MFU].sum()),
            "detector_cycle": float(detector.sum()),
            "accumulator_cycle": float(totals[-1]),
        }

    def _gemm(self, operator: Operator, before: Operator | None) -> dict[str, float | int | str]:
        c, shape = self.config, self.workload.model
        held = 0
        attention, call = self._fed.get((operator.layer, operator.step), (None, None))
        if attention is not None and operator.role == "qkv" and resident(c, attention):
            both = attention.head_dim + attention.value_dim
            held = attention.kv_len * both * c.rmmu.base_bits // 8
        shared = same_input(before, operator)
        local = operator.role == "attention_output"
        found = plan(c, operator, heads=shape.heads, held_bytes=held, input_is_here=shared or local)
        cost = gemm_cost(c, operator, shared)
        self.tally.costs.append(replace(cost, dram_bytes=float(found.dram_bytes)))
        self.tally.useful_bytes += cost.dram_bytes
        self.tally.dram_bytes += found.dram_bytes
        mfu = self._mfu
        if operator.role == "qkv" and not shared and call is not None and call.predictor:
            # The predictor's input is quantised behind the products that read it.
            elements = operator.rows * operator.inner
            mfu = self._on_mfu(elements, tiles=found.row_tiles, waits=False)
        self.now = int(
            run_product(
                self._feed,
                self.log,
                self.now,
                mfu,
                found.blocks,
                found.share,
                c.rmmu.overhead_cycles,
                self.rate,
                c.dram.latency_cycles,
            )
        )
        return dict(cost.facts)

    def _elements(self, operator: Operator) -> None:
        self.tally.costs.append(elements_cost(self.config, operator))
        tiles = -(-operator.rows // self.config.rmmu.rows)
        self._on_mfu(operator.rows * operator.columns, tiles=tiles, waits=True)

    def _on_mfu(self, elements: int, *, tiles: int, waits: bool) -> int:
        """Elements through all multi-function units; the arrays wait for the first tile of rows."""
        per_cycle = self.config.mfu.elements_per_cycle * self.config.lanes
        cycles = -(-elements // per_cycle)
        first = -(-cycles // tiles) if waits else 0
        begin = max(self.now, self._mfu)
        self._mfu = int(
            run_elements(self.log, self.config.lanes, self.now, self._mfu, cycles, first)
        )
        if waits:
            self.now = begin + first
        return self._mfu

    def _attention(
        self, operator: Operator, call: AttentionCall, sequence: int
    ) -> dict[str, float | int | str]:
        c = self.config
        self._wait_for_mfu()
        work = self.lowering.work(operator, call, self.workload.padding_of(operator), sequence)
        sizes = st.lane_sizes(
            c,
            head_dim=operator.head_dim,
            value_dim=operator.value_dim,
            parallel=work.parallel,
            detecting_rows=work.detecting_rows,
            bytes_per_cycle=self.rate / c.lanes,
        )
        ends: list[int] = []
        port = self._feed.port[0]
        for lane, mine in enumerate(work.lanes):
            state = st.lane_state(sizes, len(mine.groups), self.now, port)
            end = run_lane(
                sizes, state, self.log, lane, self.now, mine.groups,
                mine.key_steps, mine.keys, mine.value_steps, mine.values, self._groups,
            )  # fmt: skip
            ends.append(int(end))
            self._groups += len(mine.groups)
            self._feed.port[0] = max(self._feed.port[0], state.port[0])
        last = max(ends)
        for lane, end in enumerate(ends):
            if end < last:
                tell(self.log, lane * st.PER_LANE + st.ARRAY, st.ON_LANES, -1, end)
            tell(self.log, lane * st.PER_LANE + st.ARRAY, st.IDLE, -1, last)
        self.now = self._mfu = last
        moved = sum(cost.dram_bytes for cost in work.costs)
        self.tally.costs += work.costs
        self.tally.dram_bytes += work.dram_bytes
        self.tally.useful_bytes += moved
        self.tally.kept += work.kept
        self.tally.loads += work.loads
        self.tally.idle_slots += work.idle_slots
        return {**work.costs[-1].facts, "key_loads": work.loads, "idle_slots": work.idle_slots}

    def _wait_for_mfu(self) -> None:
        """Until all norms are done."""
        for lane in range(self.config.lanes):
            if self._mfu > self.now:
                tell(self.log, lane * st.PER_LANE + st.ARRAY, st.ON_MFU, -1, self.now)
        self.now = max(self.now, self._mfu)

    def _drain(self) -> None:
        """Until everything has been written."""
        self._wait_for_mfu()
        end = int(np.ceil(self._feed.port[0]))
        for lane in range(self.config.lanes):
            unit = lane * st.PER_LANE + st.ARRAY
            if end > self.now:
                tell(self.log, unit, st.ON_DRAM, -1, self.now)
            tell(self.log, unit, st.IDLE, -1, max(self.now, end))
        self.now = max(self.now, end)
        self._mfu = self.now
        # The next sequence brings its own inputs; its first weights arrive with them.
        self._feed.slots[:] = self.now


def _steps(
    workload: Workload, selection: Selection
) -> Iterator[tuple[Operator, AttentionCall | None]]:
    calls = iter(selection.calls)
    for operator in workload.operators:
        yield operator, next(calls) if operator.is_attention else None


def same_input(before: Operator | None, operator: Operator) -> bool:
    """Whether both are projections of one layer's input to queries, keys or values."""
    if before is None or (before.role, operator.role) != ("qkv", "qkv"):
        return False
    names = ("kind", "layer", "step", "batch", "rows", "inner")
    return all(getattr(before, name) == getattr(operator, name) for name in names)
