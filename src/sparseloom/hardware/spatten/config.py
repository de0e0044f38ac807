"""The machine file of SpAtten: sizes, latencies and policies, each under the unit it belongs to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sparseloom.hardware.config import MachineError, Section
from sparseloom.hardware.machine import MachineConfig


class Multipliers(Section):
    """One array (Q·K or P·V) whose adder trees cut it into `multipliers / head_dim` products."""

    multipliers: int = Field(ge=1)
    bits: int = Field(ge=1, le=32)


class Buffer(Section):
    """The key or the value SRAM, both halves of its double buffer, lines as wide as an array."""

    lines: int = Field(ge=2)
    banks: int = Field(ge=1)
    lines_written_per_cycle: int = Field(ge=1)


class Fetcher(Section):
    """Addresses to atoms to lines: ports, crossbars and their FIFOs, and where cycles pass.

    reorders: whether a port gives atoms back in the order in which it asked; the public RTL passes
    on what comes first, right in time but not in value. init_cycles: before the first load is
    accepted. request_latency: from the allocation of lines to the first read. align_latency: from
    the ports' atoms to the SRAM. read_latency: from there to the multipliers.
    """

    ports: int = Field(ge=1)
    address_fifo_depth: int = Field(ge=1)
    data_fifo_depth: int = Field(ge=1, le=256)
    reorders: bool
    loads_in_flight: int = Field(ge=1, le=32)
    init_cycles: int = Field(ge=0)
    request_latency: int = Field(ge=1)
    align_latency: int = Field(ge=0)
    read_latency: int = Field(ge=1)

    @model_validator(mode="after")
    def _a_power_of_two(self) -> Fetcher:
        if self.data_fifo_depth & (self.data_fifo_depth - 1):
            raise ValueError(f"data_fifo_depth must be a power of two, got {self.data_fifo_depth}")
        return self


class Softmax(Section):
    """Lanes and latencies of the softmax and of the decision behind it."""

    lanes: int = Field(ge=1)
    row_fifo_depth: int = Field(ge=1)
    dequantise_latency: int = Field(ge=0)
    exponential_latency: int = Field(ge=0)
    accumulate_latency: int = Field(ge=0)
    divide_latency: int = Field(ge=0)
    quantise_latency: int = Field(ge=0)
    decision_latency: int = Field(ge=0)
    pass_through: bool

    @property
    def sum_latency(self) -> int:
        """Cycles from the last score of a row to its sum."""
        return self.dequantise_latency + self.exponential_latency + self.accumulate_latency

    @property
    def probability_latency(self) -> int:
        """Cycles from the sum's use to a quantised probability."""
        return self.divide_latency + self.quantise_latency


class TopK(Section):
    """Both selection engines.

    token_selection: when tokens are ranked, the next load waiting for it: `layer`, at the end of
    a call after which fewer are kept; `head`, after every head of such a call; `row`, before every
    load, all tokens of the context.
    """

    engine: Literal["quick_select", "merge_sort"]
    lanes: int = Field(ge=1, le=512)
    emit_per_cycle: int = Field(ge=1)
    replay_latency: int = Field(ge=0)
    token_selection: Literal["layer", "head", "row"]


class Progressive(Section):
    """What rows behind a re-run do until its low bits are there."""

    order: Literal["hold", "overtake"]


class Layout(Section):
    """How vectors lie in DRAM."""

    pack_6bit_keys: int = Field(ge=1, le=2)
    unknown_keys: Literal["uniform", "clustered"]
    region_align_bytes: int = Field(ge=1)


class FullyConnected(Section):
    """Whether the fully connected layers run on the same arrays, and their weights' width."""

    enabled: bool
    weight_bits: int = Field(ge=1, le=32)


class Dram(Section):
    """The memory preset; `channels` of it belong to this machine.

    `analytic_efficiency` is the share of the peak that closed forms get.
    """

    preset: str
    channels: int = Field(ge=1, le=64)
    analytic_efficiency: float = Field(gt=0, le=1)


class Energy(Section):
    """The tables that counts of actions are multiplied with; see `hardware.energy_model`.

    `sram_kib` is the capacity per SRAM that energy and area are read for; null: what the lines
    hold.
    """

    logic: str
    memory: str
    sram: str
    sram_cell: Literal["lstp", "lop", "hp"]
    sram_kib: float | None = Field(default=None, gt=0)


class SpAttenConfig(MachineConfig):
    """A machine file of kind `spatten`."""

    kind: Literal["spatten"]  # pyright: ignore[reportIncompatibleVariableOverride]
    scores: Multipliers
    values: Multipliers
    key_sram: Buffer
    value_sram: Buffer
    fetcher: Fetcher
    softmax: Softmax
    topk: TopK
    progressive: Progressive
    layout: Layout
    fully_connected: FullyConnected
    dram: Dram
    energy: Energy

    @model_validator(mode="after")
    def _lanes_fit(self) -> SpAttenConfig:
        if self.scores.multipliers != self.values.multipliers:
            raise ValueError(
                f"values.multipliers must equal scores.multipliers ({self.scores.multipliers}), "
                f"got {self.values.multipliers}: one line of either SRAM feeds its array"
            )
        return self

    @property
    def ranks_every_row(self) -> bool:
        """Whether tokens are ranked anew before every fetch."""
        return self.topk.token_selection == "row"  # noqa: S105 - tokens of text

    @property
    def ranks_every_head(self) -> bool:
        """Whether tokens are ranked after every head of a call that ends with fewer."""
        return self.topk.token_selection == "head"  # noqa: S105 - tokens of text

    def keys_per_cycle(self, head_dim: int) -> int:
        """Keys in a line, which is what the array takes in a cycle.

        Raises MachineError where the array is narrower than a head.
        """
        if head_dim > self.scores.multipliers or self.scores.multipliers % head_dim:
            raise MachineError(
                f"{self.name}: scores.multipliers ({self.scores.multipliers}) must be a multiple "
                f"of head_dim, got head_dim {head_dim}"
            )
        return self.scores.multipliers // head_dim

    def sram_kib(self, buffer: Buffer) -> float:
        """Capacity of a buffer: lines × multipliers × bits."""
        return buffer.lines * self.scores.multipliers * self.scores.bits / 8 / 1024
