"""Memory files: geometry, timing, refresh, mapping and controller of a DRAM."""

from __future__ import annotations

from os import PathLike
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sparseloom.hardware.config import MachineError, Section, checked, read_machine, shipped
from sparseloom.hardware.units.address_mapping import MAPPINGS, Mapping


class Timing(Section):
    """Clocks between commands; the names are those of JEDEC without the t.

    burst: clocks of the data bus for one atom. activate_command: clocks of the command bus that
    an ACT takes; what follows an ACT counts from the last of them.
    read_to_write_gap: clocks of the data bus between the last read and the first write.
    """

    burst: int = Field(ge=1)
    read_latency: int = Field(ge=1)
    write_latency: int = Field(ge=1)
    rcd_read: int = Field(ge=1)
    rcd_write: int = Field(ge=1)
    rp: int = Field(ge=1)
    ras: int = Field(ge=1)
    rc: int = Field(ge=1)
    wr: int = Field(ge=0)
    rtp: int = Field(ge=1)
    ccd_s: int = Field(ge=1)
    ccd_l: int = Field(ge=1)
    rrd_s: int = Field(ge=1)
    rrd_l: int = Field(ge=1)
    faw: int = Field(ge=1)
    wtr_s: int = Field(ge=0)
    wtr_l: int = Field(ge=0)
    read_to_write_gap: int = Field(ge=0)
    activate_command: int = Field(ge=1, le=4)


class Refresh(Section):
    """Every pseudo-channel refreshes all its banks each `interval`; 0: never."""

    interval: int = Field(ge=0)
    all_banks: int = Field(ge=1)

    @model_validator(mode="after")
    def _possible(self) -> Refresh:
        if self.interval and self.interval <= self.all_banks:
            raise ValueError(f"interval must be 0 or above all_banks = {self.all_banks}")
        return self


class Controller(Section):
    """One controller for each channel.

    read_entries, write_entries: requests that wait in its queues. outstanding_reads: reads that
    were accepted and whose data was not taken yet. response_clocks: added to every read.
    Writes are served when they fill `write_high_fraction` of their queue or no read waits, until
    they fill less than `write_low_fraction` of it and a read waits.
    """

    read_entries: int = Field(ge=1, le=4096)
    write_entries: int = Field(ge=1, le=4096)
    write_high_fraction: float = Field(gt=0, le=1)
    write_low_fraction: float = Field(ge=0, lt=1)
    outstanding_reads: int = Field(ge=1, le=1 << 20)
    response_clocks: int = Field(ge=0)


class MemoryConfig(Section):
    """A memory file. Sizes are those of one pseudo-channel; one rank."""

    schema_: Literal["sparseloom/memory/1"] = Field(alias="schema")
    name: str
    source: str
    clock_ghz: float = Field(gt=0)
    channels: int = Field(ge=1, le=1024)
    pseudo_channels: int = Field(ge=1, le=4)
    bank_groups: int = Field(ge=1, le=16)
    banks_per_group: int = Field(ge=1, le=16)
    rows: int = Field(ge=1, le=1 << 24)
    row_bytes: int = Field(ge=1)
    atom_bytes: int = Field(ge=1)
    command_bus: Literal["split", "shared"]
    mapping: Mapping
    timing_clocks: Timing
    refresh_clocks: Refresh
    controller: Controller

    @field_validator("mapping", mode="before")
    @classmethod
    def _named(cls, mapping: object) -> object:
        if isinstance(mapping, str):
            if mapping not in MAPPINGS:
                raise ValueError(f"must be one of {', '.join(MAPPINGS)} or an order of fields")
            return MAPPINGS[mapping]
        return mapping

    @field_validator(
        "channels",
        "pseudo_channels",
        "bank_groups",
        "banks_per_group",
        "rows",
        "row_bytes",
        "atom_bytes",
    )
    @classmethod
    def _power_of_two(cls, number: int) -> int:
        if number & (number - 1):
            raise ValueError("must be a power of two")
        return number

    @model_validator(mode="after")
    def _fits(self) -> MemoryConfig:
        if self.row_bytes < self.atom_bytes:
            raise ValueError(f"row_bytes must be at least atom_bytes = {self.atom_bytes}")
        bits = self.field_bits
        for field in bits:
            used = sum(
                int(item.partition(":")[2])
                for item in self.mapping.order
                if item.startswith(f"{field}:")
            )
            if used > bits[field]:
                raise ValueError(f"mapping takes {used} bits of {field}, which has {bits[field]}")
        if sum(bits.values()) > 33:
            raise ValueError("channels × banks × rows × atoms of a row must be at most 2^33")
        return self

    @property
    def field_bits(self) -> dict[str, int]:
        """Width in bits of each field of an address."""
        sizes = {
            "channel": self.channels,
            "pseudo_channel": self.pseudo_channels,
            "bank_group": self.bank_groups,
            "bank": self.banks_per_group,
            "row": self.rows,
            "column": self.row_bytes // self.atom_bytes,
        }
        return {field: size.bit_length() - 1 for field, size in sizes.items()}

    @property
    def banks(self) -> int:
        """Banks of one pseudo-channel."""
        return self.bank_groups * self.banks_per_group

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the whole memory."""
        return self.channels * self.pseudo_channels * self.banks * self.rows * self.row_bytes

    @property
    def peak_bytes_per_clock(self) -> float:
        """Bytes that all data buses move in one clock of the memory."""
        return self.channels * self.pseudo_channels * self.atom_bytes / self.timing_clocks.burst

    @property
    def unloaded_read_clocks(self) -> int:
        """From the clock in which a read meets an idle, closed bank to the one it is ready in."""
        t = self.timing_clocks
        opened = t.activate_command - 1 + t.rcd_read
        return opened + t.read_latency + t.burst + self.controller.response_clocks


def load_memory(name_or_path: str | PathLike[str], **overrides: object) -> MemoryConfig:
    """A memory by name (`hbm2_2000`) or path; overrides have dotted keys, as machines' have.

    Raises:
        MachineError: one line that names the file or the key and says what is allowed.
    """
    tree = read_machine(name_or_path, overrides, folder="memories", kind="memory")
    return checked(MemoryConfig, tree, str(name_or_path))


def list_memories() -> list[str]:
    """Names of the shipped memories."""
    return shipped("memories")


__all__ = [
    "Controller",
    "MachineError",
    "MemoryConfig",
    "Refresh",
    "Timing",
    "list_memories",
    "load_memory",
]
