"""The machine file of ELSA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparseloom.hardware.attention_core import FlatMemory
from sparseloom.hardware.config import Section
from sparseloom.hardware.machine import MachineConfig


class Search(Section):
    """How candidates are found; the machine file says what each choice means."""

    mode: Literal["base", "approximate"]
    evidence: Literal["tensors", "selection"]
    retention: float = Field(gt=0, le=1)
    form: Literal["kronecker", "orthogonal"]
    seed: int = Field(ge=0)


class Hashing(Section):
    """The hash computation module."""

    multipliers: int = Field(ge=1)


class CandidateSelection(Section):
    """Banks, the candidate selectors of each, and what waits between them."""

    banks: int = Field(ge=1)
    selectors: int = Field(ge=1)
    queue: int = Field(ge=1)
    run_ahead: int = Field(ge=0)
    query_buffer: int = Field(ge=1)


class AttentionModule(Section):
    """An attention module: 2 · dim multipliers."""

    dim: int = Field(ge=1)
    output_buffer: int = Field(ge=1)
    depth_cycles: int = Field(ge=0)


class Division(Section):
    """The output division module."""

    multipliers: int = Field(ge=1)


class Numbers(Section):
    """Widths of operands; `integer_bits` counts the sign."""

    integer_bits: int = Field(ge=1, le=16)
    fraction_bits: int = Field(ge=0, le=12)
    hash_fraction_bits: int = Field(ge=1, le=12)
    norm_bits: int = Field(ge=1, le=16)
    norm_fraction_bits: int = Field(ge=0, le=12)
    cosine_fraction_bits: int = Field(ge=1, le=16)
    exponent_bits: int = Field(ge=4, le=10)
    mantissa_bits: int = Field(ge=1, le=16)
    table_bits: int = Field(ge=1, le=16)

    @property
    def bits(self) -> int:
        """Bits of an operand."""
        return self.integer_bits + self.fraction_bits


class Memories(Section):
    """Rows of the memories, and whether filling them takes time."""

    keys: int = Field(ge=1)
    time: Literal["hidden", "charged"]
    copies: int = Field(ge=1, le=2)


class EnergyOf(Section):
    """The published power of each module while it is busy, or counted actions."""

    source: Literal["published_modules", "actions"]
    logic: str
    memory: str
    sram_cell: Literal["lstp", "lop", "hp"]


class ElsaConfig(MachineConfig):
    """A machine file of kind `elsa`."""

    kind: Literal["elsa"]  # pyright: ignore[reportIncompatibleVariableOverride]
    units: int = Field(ge=1)
    search: Search
    hashing: Hashing
    selection: CandidateSelection
    attention: AttentionModule
    division: Division
    numbers: Numbers
    memory: Memories
    dram: FlatMemory
    energy: EnergyOf

    @property
    def multipliers(self) -> int:
        """Of a unit's attention modules and output division (published: 528)."""
        return 2 * self.attention.dim * self.selection.banks + self.division.multipliers
