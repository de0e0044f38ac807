"""What every machine has in common: a checked description, and `simulate`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

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


@dataclass(frozen=True)
class Options:
    """How to simulate: the arguments of `Machine.simulate` beside the trace.

    Args:
        fidelity: how closely time is followed.
        seed: of whatever is drawn; machines that draw nothing have no use for it.
        window: first cycle and one past the last, of which to keep what every unit did.
    """

    fidelity: Fidelity = "analytic"
    seed: int = 0
    window: tuple[int, int] | None = None


class Roof(NamedTuple):
    """The two limits of a roofline.

    operations: per second, a multiply-accumulate counting as two; of the arrays that do the bulk
    of the work. bytes: per second, to and from the memory outside.
    """

    operations: float
    bytes: float


class Machine(ABC):
    """An accelerator that costs the selections of a trace.

    Args:
        config: the checked machine file.
        table: the energy and area table that it names.
    """

    fidelities: ClassVar[tuple[Fidelity, ...]]
    logged: ClassVar[tuple[Fidelity, ...]] = ()
    """Fidelities at which an event log says what every unit did."""
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
        self,
        trace: Trace,
        selection: str | None = None,
        *,
        fidelity: str = "analytic",
        seed: int = 0,
        window: tuple[int, int] | None = None,
    ) -> Report:
        """Cost one selection of a trace.

        Args:
            trace: the workload and its selections.
            selection: a name; None takes the only one there is; "dense" keeps everything.
            fidelity: how closely time is followed: "analytic", "cycle" or "rtl".
            seed: of whatever the machine draws; the report says None where it draws nothing.
            window: first cycle and one past the last, of which `Report.events` keeps what every
                unit did; None keeps nothing.

        Raises:
            ValueError: an unknown selection or fidelity, one that must be named, a seed below 0,
                or a window that does not go forward from 0 or later.
            NotImplementedError: the machine has no such fidelity, or a window was asked for and
                the machine logs no events at it.
        """
        if fidelity not in get_args(Fidelity):
            known = ", ".join(get_args(Fidelity))
            raise ValueError(f"fidelity must be one of {known}, got {fidelity!r}")
        if fidelity not in self.fidelities:
            raise NotImplementedError(
                f"{self.name} has fidelity {', '.join(self.fidelities)}, got {fidelity!r}"
            )
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if window is not None:
            if not 0 <= window[0] < window[1]:
                raise ValueError(
                    f"window must go forward from cycle 0 or later, got {window[0]}:{window[1]}"
                )
            if fidelity not in self.logged:
                others = f" (it does at {', '.join(self.logged)})" if self.logged else ""
                raise NotImplementedError(
                    f"{self.name} logs no events at fidelity {fidelity!r}{others}, got window "
                    f"{window[0]}:{window[1]}"
                )
        options = Options(fidelity, seed, window)
        return self._simulate(trace, trace.selection(selection), options)

    @abstractmethod
    def _simulate(self, trace: Trace, selection: Selection, options: Options) -> Report: ...

    @abstractmethod
    def area(self) -> dict[str, float]:
        """Area by module in mm²."""

    @abstractmethod
    def power(self) -> dict[str, float]:
        """Power by module in W, everything busy."""

    def roof(self) -> Roof | None:
        """What the machine could do at most; None where that is not known."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.config_hash})"
