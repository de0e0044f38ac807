"""Energy, leakage and area of a simulated machine: counts of actions times named tables.

Three tables meet here, each named in the result: arithmetic (`PrimitiveTable`, scaled to the node),
SRAM (`SramTable`, read at the node) and off-chip memory (`MemoryEnergy`, not scaled).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from sparseloom.hardware.actions import ARITHMETIC, Action, Block, Kind
from sparseloom.hardware.config import MachineError
from sparseloom.hardware.memory_energy import MemoryEnergy, load_memory_energy
from sparseloom.hardware.primitives import PrimitiveTable, Quantity, load_primitives
from sparseloom.hardware.scaling import area_scale, energy_scale
from sparseloom.hardware.sram_table import SramTable, load_sram

Numbers: TypeAlias = float | np.ndarray
_Event: TypeAlias = tuple[str, int, float, Kind]

# Floating point that no table lists, as multiplications and additions (our defaults): the
# exponential as a Taylor polynomial of order 5 on fused multiply-adds (SpAtten, section IV-F), the
# quotient as two Newton-Raphson steps and a multiplication.
COMPOSED: dict[str, dict[str, int]] = {
    "exp": {"multiply": 5, "add": 5},
    "divide": {"multiply": 5, "add": 2},
}
# A crossbar is multiplexers (our default; its wires are not counted): a word passes as many of
# them as in a 32-bit shifter, 5 per bit, and each crosspoint has one per bit.
SHIFTER_BITS, SHIFTER_STAGES = 32, 5
# A FIFO of no more words than this is registers (our default; CACTI refuses such wide banks).
SHALLOW_ROWS = 32
# Tables whose rows for the same operation disagree, for `EnergyModel.bands`.
LOGIC_TABLES = ("aladdin_40nm", "horowitz_45nm")


@dataclass(frozen=True)
class EnergyModel:
    """Energy and area by component from named tables.

    Args:
        logic: table of arithmetic.
        memory: table of the off-chip memory.
        sram: grid of SRAM macros.
        cell: of every SRAM: "lstp", "lop" or "hp".
        node_nm: of the machine. Logic is scaled to it, the SRAM grid is read at it.
        voltage: of the logic; None = that of the table. The grid's cells have their own.
        widest_port_bits: memories wider than this are equal macros side by side. CACTI's very wide
            banks are large, slow and hungry: 192 KiB behind one port of 6144 bits takes 12 times
            the area of 12 macros of 512 bits.

    An access narrower than the narrowest port of the grid costs that whole port. FIFOs smaller
    than the smallest macro, of narrower words, or of 32 words and fewer, are registers. Leakage of
    logic scales as its area does.

    Raises:
        MachineError: of every method: something that no table has, in one sentence.
    """

    logic: str = "aladdin_40nm"
    memory: str = "oconnor_hbm2"
    sram: str = "cacti_sram"
    cell: Literal["lstp", "lop", "hp"] = "lop"
    node_nm: float = 40
    voltage: float | None = None
    widest_port_bits: int = 512
    _known: dict[_Event, float] = field(
        default_factory=dict[_Event, float], init=False, repr=False, compare=False
    )

    @property
    def name(self) -> str:
        """The tables and what they were read at, for a report."""
        volts = "" if self.voltage is None else f", {self.voltage:g} V"
        at = f"{self.node_nm:g} nm{volts}"
        return f"{self.logic} + {self.sram} ({self.cell}) + {self.memory} at {at}"

    @cached_property
    def logic_table(self) -> PrimitiveTable:
        """The table of arithmetic."""
        return load_primitives(self.logic)

    @cached_property
    def memory_table(self) -> MemoryEnergy:
        """The table of the off-chip memory."""
        return load_memory_energy(self.memory)

    @cached_property
    def sram_table(self) -> SramTable:
        """The grid of SRAM macros."""
        return load_sram(self.sram)

    def event_joules(
        self, op: str, bits: Numbers = 0, kib: Numbers = 0.0, kind: Kind = "int"
    ) -> np.ndarray:
        """Energy of one event in J, for any number of widths and capacities at once.

        Args:
            op, bits, kib, kind: as in `Action`; bits and kib broadcast against each other.
        """
        wide, big = _arrays(op, bits, kib)
        picojoules = self._event(op, wide.ravel(), big.ravel(), kind)
        return (picojoules * 1e-12).reshape(wide.shape)

    def coefficients(self, actions: Sequence[Action]) -> np.ndarray:
        """Energy of one event of each action in J, shape (actions,); counts are not read.

        Counts of many design points, shape (points, actions), give all their energies as
        `counts @ coefficients`.
        """
        return np.array([self._coefficient(action) for action in actions], dtype=np.float64)

    def dynamic(self, actions: Sequence[Action]) -> dict[str, float]:
        """Energy of the actions by component in J."""
        found: dict[str, float] = {}
        for action in actions:
            energy = action.count * self._coefficient(action)
            found[action.component] = found.get(action.component, 0.0) + energy
        return found

    def joules(
        self, actions: Sequence[Action], cycles: float, clock_ghz: float, blocks: Sequence[Block]
    ) -> dict[str, float]:
        """Energy by component in J, and under "leakage" what the blocks leak meanwhile.

        Args:
            actions: what happened.
            cycles, clock_ghz: how long it took.
            blocks: what the machine is made of.
        """
        found = self.dynamic(actions)
        if "leakage" in found:
            raise MachineError("component must not be 'leakage': the result lists leakage there")
        seconds = cycles / (clock_ghz * 1e9)
        found["leakage"] = sum(self.leakage(blocks).values()) * seconds
        return found

    def sram_cycle_ns(self, kib: float, bits: int) -> float:
        """Shortest time between two accesses of a bank of `kib` KiB and `bits` per line, in ns."""
        macros = -(-bits // self.widest_port_bits)
        wide = np.array([max(bits / macros, self.sram_table.port_bits[0])])
        each = np.array([kib / macros])
        found = self.sram_table.value("cycle_ns", each, wide, node_nm=self.node_nm, cell=self.cell)
        return float(found[0])

    def area(self, blocks: Sequence[Block]) -> dict[str, float]:
        """Area by component in mm²."""
        return self._sum(blocks, "area_um2", "area_mm2", 1e-6)

    def leakage(self, blocks: Sequence[Block]) -> dict[str, float]:
        """Leakage by component in W."""
        found = self._sum(blocks, "leakage_uw", "leakage_mw", 1e-3)
        return {component: milliwatts * 1e-3 for component, milliwatts in found.items()}

    def bands(
        self, actions: Sequence[Action], tables: Sequence[str] = LOGIC_TABLES
    ) -> dict[str, tuple[float, float]]:
        """Lowest and highest energy by component in J over tables of arithmetic.

        Each table is applied as a whole, at this model's node, voltage, cell and memory.
        """
        every = [replace(self, logic=table).dynamic(actions) for table in tables]
        return {
            component: (min(x[component] for x in every), max(x[component] for x in every))
            for component in every[0]
        }

    def _event(self, op: str, bits: np.ndarray, kib: np.ndarray, kind: Kind) -> np.ndarray:
        """Energy of one event in pJ, all of shape (events,)."""
        if op == "dram_activate":
            return np.full(bits.shape, self.memory_table.activate_pj)
        if op in ("dram_read", "dram_write"):
            return bits * self.memory_table.move_pj_per_bit
        if op == "sram_read":
            return self._sram("read_pj", bits, kib)
        if op == "sram_write":
            return self._sram("write_pj", bits, kib)
        if op == "crossbar":
            return self._logic("energy_pj", "shift", "int", bits)
        if op != "fifo":
            return self._logic("energy_pj", op, kind, bits)
        found = self._logic("energy_pj", "register", "int", bits)
        macro = ~self._of_registers(bits, kib)
        if macro.any():
            both = [self._sram(way, bits[macro], kib[macro]) for way in ("read_pj", "write_pj")]
            found[macro] = sum(both)
        return found

    def _coefficient(self, action: Action) -> float:
        event = (action.op, action.bits, action.kib, action.kind)
        found = self._known.get(event)
        if found is None:
            found = self._known[event] = float(self.event_joules(*event))
        return found

    def _sum(
        self, blocks: Sequence[Block], of_logic: Quantity, of_sram: str, unit: float
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        for block in blocks:
            wide, big = (x.ravel() for x in _arrays(block.op, block.bits, block.kib))
            if block.op == "sram" or (block.op == "fifo" and not self._of_registers(wide, big)[0]):
                one = self._sram(of_sram, wide, big)
            elif block.op == "fifo":
                one = self._logic(of_logic, "register", "int", big * 8192) * unit
            elif block.op == "crossbar":
                shifter = self._logic(of_logic, "shift", "int", np.full(1, float(SHIFTER_BITS)))
                one = shifter / (SHIFTER_BITS * SHIFTER_STAGES) * wide * unit
            else:
                one = self._logic(of_logic, block.op, block.kind, wide) * unit
            found[block.component] = found.get(block.component, 0.0) + block.units * float(one[0])
        return found

    def _of_registers(self, bits: np.ndarray, kib: np.ndarray) -> np.ndarray:
        """Which FIFOs are made of registers."""
        grid = self.sram_table
        macros = np.ceil(bits / self.widest_port_bits)
        shallow = kib * 8192 <= SHALLOW_ROWS * bits
        return (bits < grid.port_bits[0]) | (kib / macros < grid.kib[0]) | shallow

    def _sram(self, quantity: str, bits: np.ndarray, kib: np.ndarray) -> np.ndarray:
        """A quantity of a memory of any width: the sum over its macros."""
        grid = self.sram_table
        macros = np.ceil(bits / self.widest_port_bits)
        port = np.maximum(bits / macros, grid.port_bits[0])
        one = grid.value(quantity, kib / macros, port, node_nm=self.node_nm, cell=self.cell)
        return one * macros

    def _logic(self, quantity: Quantity, op: str, kind: Kind, bits: np.ndarray) -> np.ndarray:
        """A quantity of an operation at this node, from the table or the one it falls back on."""
        table = self.logic_table
        for source in (table, table.other):
            value = None if source is None else source.value(quantity, op, kind, bits)
            if source is not None and value is not None:
                return value * self._scale(quantity, source)
        if kind == "fp" and op in COMPOSED:
            parts = COMPOSED[op].items()
            return np.add.reduce([n * self._logic(quantity, part, kind, bits) for part, n in parts])
        if op not in ARITHMETIC:
            raise MachineError(f"op must be one of {', '.join(ARITHMETIC)}, got {op!r}")
        tables = table.name if table.fallback is None else f"{table.name} and {table.fallback}"
        widths = np.unique(bits).astype(int).tolist()
        raise MachineError(f"no {quantity} of {op!r} ({kind}) at {widths} bits in {tables}")

    def _scale(self, quantity: Quantity, source: PrimitiveTable) -> float:
        if quantity == "energy_pj":
            return energy_scale(
                source.technology_nm, self.node_nm, from_volts=source.volts, to_volts=self.voltage
            )
        return area_scale(source.technology_nm, self.node_nm)


def _arrays(op: str, bits: Numbers, kib: Numbers) -> tuple[np.ndarray, np.ndarray]:
    wide, big = np.broadcast_arrays(np.asarray(bits, np.float64), np.asarray(kib, np.float64))
    if op != "dram_activate" and not (wide >= 1).all():
        raise MachineError(f"bits of {op!r} must be at least 1, got {wide.min():g}")
    if op.startswith(("sram", "fifo")) and not (big > 0).all():
        raise MachineError(f"kib of {op!r} must be above 0, got {big.min():g}")
    return wide, big
