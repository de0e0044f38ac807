"""SRAM buffers: what they hold, what their ports allow in a cycle, and whether they meet the clock.

A buffer is `banks` macros, each with its own ports. The published key buffer (SpAtten, HPCA 2021,
§IV-E; RTL) is 256 lines of 512 × 12 bits in 2 banks: one is written while the other is read.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from sparseloom.hardware.config import MachineError, Section


class SramConfig(Section):
    """One buffer; lines are interleaved over its banks."""

    lines: int = Field(ge=1)
    line_bits: int = Field(ge=1)
    banks: int = Field(default=2, ge=1)
    read_ports: int = Field(default=1, ge=0)
    """Lines that one bank reads in a cycle."""
    write_ports: int = Field(default=1, ge=0)
    """Lines that one bank writes in a cycle."""
    shared_ports: bool = False
    """Whether a port reads or writes, so that a bank serves `read_ports` accesses in all."""

    @model_validator(mode="after")
    def _fits(self) -> SramConfig:
        if self.lines % self.banks:
            raise ValueError(f"lines ({self.lines}) must be a multiple of banks ({self.banks})")
        if self.shared_ports and self.write_ports != self.read_ports:
            raise ValueError("with shared_ports, read_ports and write_ports must be equal")
        return self

    @property
    def kib(self) -> float:
        """Capacity of the buffer in KiB."""
        return self.lines * self.line_bits / 8 / 1024

    @property
    def macro_kib(self) -> float:
        """Capacity of one macro (a bank), which its energy and cycle time depend on."""
        return self.kib / self.banks


def bank_of(line: int, banks: int) -> int:
    """Which bank holds a line."""
    return line % banks


def lines_for(config: SramConfig, vectors: int, vector_bits: int) -> int:
    """Lines that hold `vectors` of `vector_bits` each; a vector does not cross lines.

    Raises:
        MachineError: a vector is wider than a line, or the buffer has too few lines.
    """
    per_line = config.line_bits // vector_bits
    if per_line < 1:
        raise MachineError(
            f"vector_bits must be at most the line's {config.line_bits} bits, got {vector_bits}"
        )
    needed = -(-vectors // per_line)
    if needed > config.lines:
        raise MachineError(
            f"{vectors} vectors of {vector_bits} bits need {needed} lines; "
            f"the buffer has {config.lines}"
        )
    return needed


def access_cycles(config: SramConfig, reads: list[int], writes: list[int]) -> int:
    """Cycles to read and write the given lines when nothing but the ports of the banks limits."""
    busy = 0
    for bank in range(config.banks):
        read = sum(bank_of(line, config.banks) == bank for line in reads)
        write = sum(bank_of(line, config.banks) == bank for line in writes)
        if config.shared_ports:
            read, write = read + write, 0
        busy = max(
            busy,
            _cycles(read, config.read_ports, "read"),
            _cycles(write, config.write_ports, "write"),
        )
    return busy


def check_clock(name: str, cycle_ns: float, clock_ghz: float) -> None:
    """Refuse a macro that is slower than the clock: its cycle time comes from a memory table.

    Raises:
        MachineError: the macro cannot be accessed in every cycle.
    """
    if cycle_ns * clock_ghz > 1.0:
        raise MachineError(
            f"sram {name!r} cycles in {cycle_ns:g} ns, too slow for {clock_ghz:g} GHz "
            f"({1 / clock_ghz:g} ns): use more banks, a faster cell type or a slower clock"
        )


def _cycles(accesses: int, ports: int, kind: str) -> int:
    if accesses and not ports:
        raise MachineError(f"the buffer has no {kind} port")
    return -(-accesses // ports) if accesses else 0
