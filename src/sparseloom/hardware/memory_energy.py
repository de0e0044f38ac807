"""Energy of off-chip memories: activations × row energy + bits × energy of moving them."""

from __future__ import annotations

from os import PathLike
from typing import Literal

from pydantic import Field

from sparseloom.hardware.config import Section, checked, find, read_yaml


class MemoryEnergy(Section):
    """One memory, with the source of its numbers.

    `activate_pj` is 0 where the source gives a total per bit with activations in it.
    """

    schema_: Literal["sparseloom/memory_energy/1"] = Field(alias="schema")
    name: str
    source: str
    activate_pj: float = Field(ge=0)
    pj_per_bit: dict[str, float] = Field(min_length=1)
    published_pj_per_bit: float | None = Field(default=None, gt=0)

    @property
    def move_pj_per_bit(self) -> float:
        """Everything but activations."""
        return sum(self.pj_per_bit.values())

    def equivalent_pj_per_bit(self, bits_per_activation: float) -> float:
        """With the activations, where each serves that many bits."""
        return self.move_pj_per_bit + self.activate_pj / bits_per_activation


def load_memory_energy(name_or_path: str | PathLike[str]) -> MemoryEnergy:
    """A memory's energy by its shipped name or by path.

    Raises:
        MachineError: there is none, or it does not fit the schema.
    """
    file = find("tables", name_or_path, "memory energy table")
    return checked(MemoryEnergy, read_yaml(file), str(file))
