"""DOTA's machine file. Lanes, array and precisions are published, the rest are defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sparseloom.hardware.config import Section
from sparseloom.hardware.machine import MachineConfig
from sparseloom.hardware.units.rmmu import RmmuConfig
from sparseloom.hardware.units.token_scheduler import MAX_QUERIES


class Rmmu(RmmuConfig):
    """The reconfigurable multi-precision matrix unit of a Lane."""

    policy: Literal["split", "sequential"] = "sequential"
    """Detection on rows of its own, or on all rows between the products."""
    detecting_rows: int = Field(default=0, ge=0)
    """With `split`: how many; 0 balances them with the rows that compute, call by call."""


class Detector(Section):
    """Comparators behind the array."""

    parallel_queries: int = Field(ge=1, le=MAX_QUERIES)
    """Queries that are selected for, and run, side by side."""
    scores_per_cycle: int = Field(ge=1)
    latency_cycles: int = Field(ge=0)
    groups_ahead: int = Field(ge=1)
    """Groups of queries that are detected and sorted before their products start."""


class Scheduler(Section):
    """Buffers by sets of queries, and the queue between them and the array."""

    dataflow: Literal["out_of_order", "in_order", "row_by_row"]
    split: bool
    pushes_per_cycle: int = Field(ge=1)
    steps_per_cycle: int = Field(ge=1)
    queue_entries: int = Field(ge=1)


class Mfu(Section):
    """The multi-function unit of a Lane."""

    exponentials_per_cycle: int = Field(ge=1)
    divisions_per_cycle: int = Field(ge=1)
    elements_per_cycle: int = Field(ge=1)
    latency_cycles: int = Field(ge=0)
    groups_in_flight: int = Field(ge=1)
    """Groups of queries whose scores or probabilities are kept at a time."""

    @property
    def scores_per_cycle(self) -> int:
        """Scores that softmax takes per cycle."""
        return min(self.exponentials_per_cycle, self.divisions_per_cycle)


class Accumulator(Section):
    """The adders that join the Lanes' partial sums."""

    additions_per_cycle: int = Field(ge=1)


class Sram(Section):
    """The buffer of a Lane."""

    kib_per_lane: int = Field(ge=1)
    banks: int = Field(ge=1)
    port_bytes: int = Field(ge=1)
    conflicts: Literal["modelled", "ideal"]
    operand_bytes: int = Field(ge=1)
    """Beside the array: vectors that were read and wait for their step."""
    code_bytes_per_cycle: int = Field(ge=1)
    """Of the banks that hold the predictor's keys."""

    @property
    def bytes_per_cycle(self) -> int:
        """Of all banks together."""
        return self.banks * self.port_bytes


class Dram(Section):
    """A flat bandwidth, which all accelerators share."""

    preset: str
    gbytes_per_second: float = Field(gt=0)
    latency_cycles: int = Field(ge=0)
    buffers: int = Field(ge=1)
    """Blocks of operands that a Lane holds at a time: with 2 the next arrives during this one."""


class ClosedForm(Section):
    """What the formulas charge; the machine file says what each choice means."""

    pairs: Literal["allowed", "square"]
    lane_balance: Literal["measured", "ideal"]
    detection: Literal["ideal", "whole_words"]
    memory: Literal["bandwidth", "ideal"]


class DotaConfig(MachineConfig):
    """A machine file of kind `dota`."""

    kind: Literal["dota"]  # pyright: ignore[reportIncompatibleVariableOverride]
    accelerators: int = Field(ge=1)
    lanes: int = Field(ge=1)
    rmmu: Rmmu
    detector: Detector
    scheduler: Scheduler
    mfu: Mfu
    accumulator: Accumulator
    sram: Sram
    dram: Dram
    closed_form: ClosedForm

    @model_validator(mode="after")
    def _rows_for_all(self) -> DotaConfig:
        queries = self.detector.parallel_queries
        if self.rmmu.rows < queries + self.rmmu.detecting_rows:
            raise ValueError(
                f"rmmu.rows must hold a row for each of {queries} parallel queries beside "
                f"{self.rmmu.detecting_rows} that detect, got {self.rmmu.rows}"
            )
        return self

    @property
    def bytes_per_cycle(self) -> float:
        """Of the DRAM."""
        return self.dram.gbytes_per_second / self.clock_ghz
