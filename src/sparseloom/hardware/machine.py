"""What every machine has in common: a checked description, and `simulate`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, get_args

from pydantic import Field

from sparseloom.hardware.config import Section, digest
from sparseloom.hardware.energy import EnergyTable
from sparseloom.hardware.report import Fidelity, Report
from sparseloom.trace import Selection, Trace


class MachineConfig(Section):
    """The head of every machine file."""

    schema_: Literal["sparseloom/machine/1"] = Field(alias="schema")
    name: str
    kind: str
    title: str
    source: str
    technology_nm: int = Field(ge=1)
    clock_ghz: float = Field(gt=0)
    energy_table: str


class Machine(ABC):
    """An accelerator that costs the selections of a trace.

    Args:
        config: the checked machine file.
        table: the energy and area table that it names.
    """

    fidelities: ClassVar[tuple[Fidelity, ...]]
    Config: ClassVar[type[MachineConfig]]

    def __init__(self, config: MachineConfig, table: EnergyTable) -> None:
        self.config = config
        self.table = table

    @property
    def name(self) -> str:
        """The machine's name, as in `dota_asplos_2022`."""
        return self.config.name

    @property
    def config_hash(self) -> str:
        """Changes whenever a setting of the machine or its energy table does."""
        return digest(self.config, self.table)

    def simulate(
        self, trace: Trace, selection: str | None = None, *, fidelity: str = "analytic"
    ) -> Report:
        """Cost one selection of a trace.

        Args:
            trace: the workload and its selections.
            selection: a name; None takes the only one there is; "dense" keeps everything.
            fidelity: how closely time is followed: "analytic", "cycle" or "rtl".

        Raises:
            ValueError: an unknown selection or fidelity, or one that must be named.
            NotImplementedError: the machine has no such fidelity.
        """
        if fidelity not in get_args(Fidelity):
            known = ", ".join(get_args(Fidelity))
            raise ValueError(f"fidelity must be one of {known}, got {fidelity!r}")
        if fidelity not in self.fidelities:
            raise NotImplementedError(
                f"{self.name} has fidelity {', '.join(self.fidelities)}, got {fidelity!r}"
            )
        return self._simulate(trace, trace.selection(selection), fidelity)

    @abstractmethod
    def _simulate(self, trace: Trace, selection: Selection, fidelity: Fidelity) -> Report: ...

    @abstractmethod
    def area(self) -> dict[str, float]:
        """Area by module in mm²."""

    @abstractmethod
    def power(self) -> dict[str, float]:
        """Power by module in W, everything busy."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.config_hash})"
