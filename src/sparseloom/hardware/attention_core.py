"""What machines share that compute attention alone, one head after another, and choose themselves.

They see the workload and, where a trace holds them, queries, keys and values; which keys a
selection keeps is not theirs to follow unless a setting says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64
from pydantic import Field

from sparseloom.hardware.actions import Action, Block
from sparseloom.hardware.config import Section
from sparseloom.hardware.energy_model import EnergyModel
from sparseloom.hardware.machine import Machine
from sparseloom.hardware.report import Fidelity, Report, Stage
from sparseloom.trace import Operator, Selection, Trace, TraceError, Workload


class FlatMemory(Section):
    """A flat bandwidth under a name."""

    preset: str
    gbytes_per_second: float = Field(gt=0)

    def bytes_per_cycle(self, clock_ghz: float) -> float:
        """Bytes moved per cycle of the machine."""
        return self.gbytes_per_second / clock_ghz


class EnergySource(Section):
    """Actions times an energy model of this node, or the published power times time."""

    source: Literal["actions", "published_power"]
    logic: str
    memory: str
    sram_cell: Literal["lstp", "lop", "hp"]


class Priced(NamedTuple):
    """Energy that a machine has worked out by itself: joules by component, the tables behind them,
    and what they rest on, as a sentence."""

    joules: Mapping[str, float]
    table: str
    assumption: str


class Sampled(NamedTuple):
    """Values of a call: query (batch, heads, q_len, head_dim), key and value (batch, kv_heads,
    kv_len, ·)."""

    query: Float[np.ndarray, "batch heads q_len head_dim"]
    key: Float[np.ndarray, "batch kv_heads kv_len head_dim"]
    value: Float[np.ndarray, "batch kv_heads kv_len value_dim"]

    def head(self, sequence: int, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, key and value of one query head; runs of query heads share keys and values."""
        shared = head * self.key.shape[1] // self.query.shape[1]
        return (
            self.query[sequence, head],
            self.key[sequence, shared],
            self.value[sequence, shared],
        )


@dataclass
class Tally:
    """What a simulation adds up."""

    stages: list[Stage] = field(default_factory=list)
    counts: dict[tuple[str, str, int, float], float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    dram_bytes: float = 0.0
    useful_bytes: float = 0.0
    operations: float = 0.0
    notes: list[str] = field(default_factory=list)

    def act(self, component: str, op: str, count: float, bits: int, kib: float = 0.0) -> None:
        """Count an action."""
        key = (component, op, bits, kib)
        self.counts[key] = self.counts.get(key, 0.0) + float(count)

    def note(self, text: str) -> None:
        """An assumption, once."""
        if text not in self.notes:
            self.notes.append(text)

    def actions(self) -> list[Action]:
        """The events behind the energy."""
        return [
            Action(component, op, count, bits, kib)
            for (component, op, bits, kib), count in self.counts.items()
        ]


def visible(
    workload: Workload, operator: Operator, sequence: int
) -> Bool[np.ndarray, "q_len kv_len"]:
    """The pairs that causality (bottom-right aligned) and padding allow, of one sequence."""
    padding = workload.padding_of(operator)
    keys = np.ones(operator.kv_len, np.bool_)
    if padding is not None:
        keys = padding[min(sequence, len(padding) - 1)]
    pairs = np.broadcast_to(keys, (operator.q_len, operator.kv_len))
    if not operator.is_causal:
        return pairs
    last = np.arange(operator.q_len)[:, None] + operator.kv_len - operator.q_len
    return pairs & (np.arange(operator.kv_len) <= last)


def visible_counts(
    workload: Workload, operator: Operator, sequence: int
) -> Int64[np.ndarray, "q_len"]:
    """How many keys each query of a sequence may see."""
    padding = workload.padding_of(operator)
    keys = np.ones(operator.kv_len, np.bool_)
    if padding is not None:
        keys = padding[min(sequence, len(padding) - 1)]
    before = np.concatenate([[0], np.cumsum(keys, dtype=np.int64)])
    ends = np.full(operator.q_len, operator.kv_len)
    if operator.is_causal:
        ends = np.clip(np.arange(operator.q_len) + operator.kv_len - operator.q_len + 1, 0, None)
    return before[ends]


def sampled(trace: Trace, call: int, operator: Operator) -> Sampled | None:
    """The values of a call, or None where the trace does not hold all three.

    Raises:
        TraceError: values of another shape than the operator.
    """
    names = [f"calls.{call}.{part}" for part in ("query", "key", "value")]
    if any(name not in trace.tensors for name in names):
        return None
    op = operator
    shapes = (
        (op.batch, op.heads, op.q_len, op.head_dim),
        (op.batch, op.kv_heads, op.kv_len, op.head_dim),
        (op.batch, op.kv_heads, op.kv_len, op.value_dim),
    )
    for name, shape in zip(names, shapes, strict=True):
        if trace.tensors[name].shape != shape:
            raise TraceError(f"{name} must be {shape}, got {trace.tensors[name].shape}")
    return Sampled(*(trace.tensors[name] for name in names))


def core_report(
    machine: Machine,
    trace: Trace,
    selection: Selection,
    fidelity: Fidelity,
    tally: Tally,
    *,
    memory: FlatMemory,
    energy: EnergySource | Priced,
    blocks: Sequence[Block] = (),
    assumptions: Sequence[str],
) -> Report:
    """The report of a machine that runs attention alone; `blocks` are for counted actions."""
    clock = machine.config.clock_ghz
    # One sequence at a time: a stable sort keeps the calls of each in order.
    stages = sorted(tally.stages, key=lambda stage: stage.sequence)
    cycles = sum(stage.cycles for stage in stages)
    moved = tally.dram_bytes / memory.bytes_per_cycle(clock)
    busy = {**tally.busy, "dram": moved}
    found = [*assumptions, *tally.notes]
    if any(not op.is_attention and op.kind == "gemm" for op in trace.workload.operators):
        found.append("attention alone: projections and feed-forward run elsewhere")
    if any(op.kv_heads != op.heads for op in trace.workload.attention()):
        found.append("query heads that share keys and values load them separately")
    table = machine.table.name
    if isinstance(energy, Priced):
        joules, table = dict(energy.joules), energy.table
        found.append(energy.assumption)
    elif energy.source == "actions":
        model = EnergyModel(
            logic=energy.logic,
            memory=energy.memory,
            cell=energy.sram_cell,
            node_nm=machine.config.technology_nm,
        )
        joules, table = model.joules(tally.actions(), cycles, clock, blocks), model.name
        found.append("energy is counted actions and leakage; control and clock are not counted")
    else:
        joules = {name: watts * cycles / (clock * 1e9) for name, watts in machine.power().items()}
        found.append("energy is the power of the published comparison, DRAM included, times time")
    return Report(
        machine=machine.name,
        trace=trace.workload.name,
        selection=selection.name,
        scope="attention",
        fidelity=fidelity,
        clock_ghz=clock,
        stages=tuple(stages),
        energy=joules,
        energy_table=table,
        area=machine.area(),
        actions={f"{a.component} {a.op} {a.bits}b": a.count for a in tally.actions()},
        utilisation={
            name: min(1.0, used / cycles) if cycles else 0.0 for name, used in busy.items()
        },
        dram_preset=memory.preset,
        dram_bytes=round(tally.dram_bytes),
        useful_bytes=round(tally.useful_bytes),
        config_hash=machine.config_hash,
        assumptions=tuple(found),
        value=number(selection.quality, "value"),
        dense_value=number(selection.quality, "dense_value"),
        operations=tally.operations,
    )


def number(quality: Mapping[str, object], name: str) -> float | int | None:
    """A measured quality, where it is a number."""
    value = quality.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
