"""SRAM macros from a grid of CACTI results, interpolated on logarithms; never beyond the grid.

The grid is `tables/cacti_sram.csv`, made by `benchmarks/cacti_grid.py`: one bank, one read/write
port, 300 K. The cell decides leakage by four decades ("lstp" least, "hp" most) and speed, so it is
always named: check `access_ns` and `cycle_ns` against the clock.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from importlib import resources
from typing import Final

import numpy as np

from sparseloom.hardware.config import MachineError

QUANTITIES = ("read_pj", "write_pj", "leakage_mw", "area_mm2", "access_ns", "cycle_ns")


class SramTable:
    """A grid of SRAM macros over node, cell, capacity and width of the port.

    Attributes:
        name: of the file.
        nodes_nm, cells, kib, port_bits: the axes, ascending.
    """

    def __init__(self, name: str, rows: list[dict[str, str]]) -> None:
        self.name: Final = name
        self.nodes_nm: Final = sorted({float(row["node_nm"]) for row in rows})
        self.cells: Final = sorted({row["cell"] for row in rows})
        self.kib: Final = sorted({float(row["kib"]) for row in rows})
        self.port_bits: Final = sorted({float(row["port_bits"]) for row in rows})
        shape = (len(self.cells), len(self.nodes_nm), len(self.kib), len(self.port_bits))
        self._logs: Final = {name: np.full(shape, np.nan) for name in QUANTITIES}
        for row in rows:
            at = (
                self.cells.index(row["cell"]),
                self.nodes_nm.index(float(row["node_nm"])),
                self.kib.index(float(row["kib"])),
                self.port_bits.index(float(row["port_bits"])),
            )
            for name, logs in self._logs.items():
                logs[at] = np.log(float(row[name]))

    def value(
        self, quantity: str, kib: np.ndarray, bits: np.ndarray, *, node_nm: float, cell: str
    ) -> np.ndarray:
        """One of `QUANTITIES` for macros of `kib` KiB with ports of `bits`, both (macros,).

        Raises:
            MachineError: outside the grid, beside a point that is not in it, or an unknown cell.
        """
        if cell not in self.cells:
            raise MachineError(f"cell must be one of {', '.join(self.cells)}, got {cell!r}")
        logs = self._logs[quantity][self.cells.index(cell)]
        total = np.zeros(kib.shape)
        nodes = _corners("node", np.full(kib.shape, float(node_nm)), self.nodes_nm, "nm", self.name)
        capacities = _corners("capacity", kib, self.kib, "KiB", self.name)
        ports = _corners("port width", bits, self.port_bits, "bits", self.name)
        for n, of_node in nodes:
            for k, of_capacity in capacities:
                for p, of_port in ports:
                    share = of_node * of_capacity * of_port
                    # A point that is not there (NaN) matters only where it has a share.
                    total = total + np.where(share > 0, share * logs[n, k, p], 0.0)
        if np.isnan(total).any():
            at = int(np.isnan(total).argmax())
            raise MachineError(
                f"{self.name}: no SRAM of {kib[at]:g} KiB with {bits[at]:g}-bit ports"
                f" at {node_nm:g} nm ({cell}): a neighbouring point is not in the grid"
            )
        return np.exp(total)


def _corners(
    what: str, value: np.ndarray, axis: list[float], unit: str, table: str
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Lower and upper neighbour of each value with their shares, on logarithms."""
    outside = (value < axis[0]) | (value > axis[-1]) | np.isnan(value)
    if outside.any():
        raise MachineError(
            f"{table}: {what} must be {axis[0]:g} to {axis[-1]:g} {unit}, got {value[outside][0]:g}"
        )
    at = np.interp(np.log(value), np.log(axis), np.arange(len(axis)))
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, len(axis) - 1)
    return (low, 1.0 - (at - low)), (high, at - low)


@lru_cache
def load_sram(name: str = "cacti_sram") -> SramTable:
    """A shipped grid by name.

    Raises:
        MachineError: there is none.
    """
    home = resources.files("sparseloom.hardware") / "tables"
    known = sorted(f.name.removesuffix(".csv") for f in home.iterdir() if f.name.endswith(".csv"))
    if name not in known:
        raise MachineError(f"unknown SRAM table {name!r} (there is: {', '.join(known)})")
    lines = (home / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    return SramTable(name, list(csv.DictReader(x for x in lines if not x.startswith("#"))))
