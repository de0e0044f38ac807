"""Energy and area: counts of actions times a named table, applied after the simulation."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Literal

from pydantic import Field

from sparseloom.hardware.config import Section, checked, find, read_yaml


class Module(Section):
    """Power and area of one instance that holds `units` of whatever it is made of."""

    units: int = Field(ge=1)
    power_mw: float = Field(ge=0)
    area_mm2: float = Field(ge=0)


class EnergyTable(Section):
    """What modules take and what events cost, with the source of the numbers."""

    schema_: Literal["sparseloom/energy_table/1"] = Field(alias="schema")
    name: str
    source: str
    technology_nm: int = Field(ge=1)
    clock_ghz: float = Field(gt=0)
    modules: dict[str, Module]
    events_pj: dict[str, float]
    idle_fraction: float = Field(ge=0, le=1)

    def joules(
        self, busy: Mapping[str, float], idle: Mapping[str, float], *, width: Mapping[str, float]
    ) -> dict[str, float]:
        """Dynamic energy by component.

        Args:
            busy: counts of events, by the table's names; a component is the first word.
            idle: the same events on a clock-gated unit.
            width: how many times wider than in the table an event's unit is; default 1.
        """
        found: dict[str, float] = {}
        for counts, share in ((busy, 1.0), (idle, self.idle_fraction)):
            for event, count in counts.items():
                component = event.partition("_")[0]
                picojoules = count * self.events_pj[event] * share * width.get(event, 1.0)
                found[component] = found.get(component, 0.0) + picojoules * 1e-12
        return found

    def area(self, units: Mapping[str, int]) -> dict[str, float]:
        """Area by module in mm², for the total number of units configured."""
        return {
            name: self.modules[name].area_mm2 * count / self.modules[name].units
            for name, count in units.items()
        }

    def power(self, units: Mapping[str, int]) -> dict[str, float]:
        """Power by module in W with everything busy; of SRAM it is the leakage."""
        return {
            name: self.modules[name].power_mw * 1e-3 * count / self.modules[name].units
            for name, count in units.items()
        }


def load_table(name_or_path: str | PathLike[str]) -> EnergyTable:
    """A table by its shipped name or by path.

    Raises:
        MachineError: there is none, or it does not fit the schema.
    """
    file = find("tables", name_or_path, "energy table")
    return checked(EnergyTable, read_yaml(file), str(file))
