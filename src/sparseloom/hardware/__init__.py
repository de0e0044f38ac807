"""Accelerators as data: load a machine, simulate a trace on it, read cycles, energy and area.

Nothing here needs torch: masks come from `sparseloom.trace` as plain arrays.
"""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from pathlib import Path

from sparseloom.hardware.config import (
    MachineError,
    checked,
    parse_overrides,
    read_machine,
    shipped,
)
from sparseloom.hardware.energy import EnergyTable, load_table
from sparseloom.hardware.machine import Machine, MachineConfig, Options, Roof
from sparseloom.hardware.report import Report, Stage

__all__ = [
    "EnergyTable",
    "Machine",
    "MachineConfig",
    "MachineError",
    "Options",
    "Report",
    "Roof",
    "Stage",
    "list_machines",
    "load",
    "load_table",
    "parse_overrides",
    "register",
]

# Kinds of machine: where the class lives that simulates them.
_KINDS = {
    "dota": ("sparseloom.hardware.dota", "Dota"),
    "a3": ("sparseloom.hardware.a3", "A3"),
    "elsa": ("sparseloom.hardware.elsa", "Elsa"),
    "mnnfast": ("sparseloom.hardware.mnnfast", "MnnFast"),
    "spatten": ("sparseloom.hardware.spatten", "SpAtten"),
    "static_dense": ("sparseloom.hardware.static_dense", "StaticDense"),
    "device": ("sparseloom.hardware.devices", "Device"),
}
_registered: dict[str, type[Machine]] = {}


def load(name_or_path: str | PathLike[str], /, **overrides: object) -> Machine:
    """A machine by its name (see `list_machines`) or by the path of a machine file.

    Args:
        name_or_path: `"dota_asplos_2022"`, or a path that ends in `.yaml`.
        overrides: settings to change, sections separated by dots:
            `load("dota_asplos_2022", **{"rmmu.rows": 64}, clock_ghz=0.5)`.

    Raises:
        MachineError: no such machine, or a file or setting that does not fit its schema.
    """
    tree = read_machine(name_or_path, overrides)
    where = Path(name_or_path).name
    kind = tree.get("kind")
    machine = _class_of(kind) if isinstance(kind, str) else None
    if machine is None:
        known = ", ".join([*_KINDS, *_registered])
        raise MachineError(f"{where}: kind must be one of {known}, got {kind!r}")
    config = checked(machine.Config, tree, where)
    beside = Path(name_or_path).parent / config.energy_table
    return machine(config, load_table(beside if beside.is_file() else config.energy_table))


def register(kind: str, machine: type[Machine]) -> None:
    """Let machine files of this kind be simulated by your own class.

    It holds for this process; registering the same kind again replaces the class.

    Raises:
        MachineError: a kind that comes with the package.
        TypeError: `machine` is no subclass of `Machine` with `fidelities` and `Config`.
    """
    if kind in _KINDS:
        raise MachineError(
            f"kind must not be one of the package's ({', '.join(_KINDS)}), got {kind!r}"
        )
    whole = isinstance(machine, type) and issubclass(machine, Machine)
    if not whole or not all(hasattr(machine, name) for name in ("fidelities", "Config")):
        raise TypeError(
            "machine must be a subclass of Machine that sets fidelities and Config, "
            f"got {machine!r}"
        )
    _registered[kind] = machine


def _class_of(kind: str) -> type[Machine] | None:
    if kind in _registered:
        return _registered[kind]
    if kind not in _KINDS:
        return None
    module, name = _KINDS[kind]
    return getattr(import_module(module), name)


def list_machines() -> list[str]:
    """Names of the machines that come with the package."""
    return shipped("machines")
