"""Tables of arithmetic: what an operation costs at one node, and how that grows with its width."""

from __future__ import annotations

from functools import cached_property
from os import PathLike
from typing import Literal, TypeAlias

import numpy as np
from pydantic import Field, model_validator

from sparseloom.hardware.config import Section, checked, find, read_yaml

Quantity: TypeAlias = Literal["energy_pj", "area_um2", "leakage_uw"]
Width: TypeAlias = Literal["linear", "quadratic", "exact"]
_POWER = {"linear": 1.0, "quadratic": 2.0}


class Point(Section):
    """One width of an operation; what the source does not give is left out."""

    bits: int = Field(ge=1)
    energy_pj: float | None = Field(default=None, gt=0)
    area_um2: float | None = Field(default=None, gt=0)
    leakage_uw: float | None = Field(default=None, ge=0)


class Primitive(Section):
    """An operation at one or more widths.

    Between two widths values are interpolated on logarithms; beyond them they grow with `width`:
    "linear" (adders), "quadratic" (multipliers), or "exact" (no other width than those listed).
    """

    width: Width
    points: tuple[Point, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _ascending(self) -> Primitive:
        widths = [point.bits for point in self.points]
        if widths != sorted(set(widths)):
            raise ValueError(f"widths must ascend, got {widths}")
        return self

    def value(self, quantity: Quantity, bits: np.ndarray) -> np.ndarray | None:
        """The quantity at each width of `bits`; None where it is not known for all of them."""
        known = [(p.bits, y) for p in self.points if (y := getattr(p, quantity)) is not None]
        if not known:
            return None
        x, y = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
        if self.width == "exact":
            at = np.searchsorted(x, bits).clip(max=len(x) - 1)
            return y[at] if np.array_equal(x[at], bits) else None
        nearest = np.clip(bits, x[0], x[-1])
        middle = np.exp(np.interp(np.log(nearest), np.log(x), np.log(y)))
        return middle * (bits / nearest) ** _POWER[self.width]


class PrimitiveTable(Section):
    """What operations take at one node and voltage, with the source of the numbers.

    `fallback` names the table that has what this one lacks.
    """

    schema_: Literal["sparseloom/primitive_table/1"] = Field(alias="schema")
    name: str
    source: str
    technology_nm: int = Field(ge=7, le=130)
    volts: float = Field(gt=0)
    fallback: str | None = None
    ops: dict[str, dict[Literal["int", "fp"], Primitive]]

    def value(
        self, quantity: Quantity, op: str, kind: Literal["int", "fp"], bits: np.ndarray
    ) -> np.ndarray | None:
        """The quantity from this table alone at its node; None where it has no such row."""
        row = self.ops.get(op, {}).get(kind)
        return None if row is None else row.value(quantity, bits)

    @cached_property
    def other(self) -> PrimitiveTable | None:
        """The table that this one falls back on."""
        return None if self.fallback is None else load_primitives(self.fallback)


def load_primitives(name_or_path: str | PathLike[str]) -> PrimitiveTable:
    """A table of primitives by its shipped name or by path.

    Raises:
        MachineError: there is none, or it does not fit the schema.
    """
    file = find("tables", name_or_path, "primitive table")
    return checked(PrimitiveTable, read_yaml(file), str(file))
