"""Dai et al. (DAC 2023), of which the abstract is public: its numbers beside our design's."""

from __future__ import annotations

from collections.abc import Callable

from sparseloom.experiments.reproduce import Study, static_learned, static_machine, static_systems
from sparseloom.experiments.reproduce.rows import Row

TABLES: dict[str, Callable[..., list[Row]]] = {
    "headline": static_machine.headline,
    "area": static_machine.area,
    "templates": static_machine.templates,
    "density": static_machine.density,
    "length": static_machine.length,
    "scope": static_machine.scope,
    "accuracy": static_learned.accuracy,
    "seeds": static_learned.seeds,
    "ablations": static_learned.ablations,
    "learned": static_learned.learned,
    "systems": static_systems.systems,
}
STUDIES: dict[str, tuple[Study, ...]] = {
    "headline": (*static_learned.QUALITY, *static_learned.COST),
    "accuracy": static_learned.QUALITY,
    "seeds": static_learned.QUALITY,
    "ablations": static_learned.QUALITY,
    "learned": static_learned.COST,
    "systems": (*static_learned.QUALITY, *static_learned.COST, *static_systems.OTHERS),
}
