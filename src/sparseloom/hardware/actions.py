"""What a simulator counts and what a machine is made of; energy and area are applied afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["int", "fp"]

ARITHMETIC = ("multiply", "add", "compare", "shift", "exp", "divide", "register")
MEMORY_EVENTS = ("sram_read", "sram_write", "fifo")
DRAM_EVENTS = ("dram_activate", "dram_read", "dram_write")
EVENTS = (*ARITHMETIC, *MEMORY_EVENTS, "crossbar", *DRAM_EVENTS)
BLOCKS = (*ARITHMETIC, "sram", "fifo", "crossbar")


def _check(what: str, op: str, known: tuple[str, ...], *values: tuple[str, float]) -> None:
    if op not in known:
        raise ValueError(f"op of {what} must be one of {', '.join(known)}, got {op!r}")
    for name, value in values:
        if not value >= 0:
            raise ValueError(f"{name} of {what} must be at least 0, got {value}")


@dataclass(frozen=True)
class Action:
    """An event and how often it happened.

    Args:
        component: module of the machine, as in its area breakdown ("qk", "softmax", "dram").
        op: one of `EVENTS`. "register" is one write of a register of `bits`; "fifo" one word that
            goes in and comes out again; "crossbar" one word from an input to an output.
        count: how many times.
        bits: operand width; for sram, fifo, crossbar and dram the bits moved per event.
        kib: capacity of the memory macro (sram, fifo) in KiB.
        kind: of arithmetic.

    Raises:
        ValueError: an op that is not in `EVENTS`, or a number below 0.
    """

    component: str
    op: str
    count: float
    bits: int = 0
    kib: float = 0.0
    kind: Kind = "int"

    def __post_init__(self) -> None:
        _check(
            "an action", self.op, EVENTS,
            ("count", self.count), ("bits", self.bits), ("kib", self.kib),
        )  # fmt: skip


@dataclass(frozen=True)
class Block:
    """Hardware of one sort in a component: what has area and leaks.

    Args:
        component: as in `Action`.
        op: one of `BLOCKS`. "sram" and "fifo" are macros of `kib` KiB with words of `bits`; of a
            "crossbar" the units are its crosspoints (inputs × outputs).
        units: how many.
        bits: operand or word width.
        kib: capacity of one macro in KiB.
        kind: of arithmetic.

    Raises:
        ValueError: an op that is not in `BLOCKS`, or a number below 0.
    """

    component: str
    op: str
    units: float
    bits: int = 0
    kib: float = 0.0
    kind: Kind = "int"

    def __post_init__(self) -> None:
        _check(
            "a block", self.op, BLOCKS,
            ("units", self.units), ("bits", self.bits), ("kib", self.kib),
        )  # fmt: skip
