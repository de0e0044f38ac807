"""SpAtten (HPCA 2021): the algorithm's figures and averages, one function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparseloom.experiments.reproduce import (
    Study,
    spatten_curves,
    spatten_probabilities,
    spatten_reductions,
)
from sparseloom.experiments.reproduce.rows import Row

if TYPE_CHECKING:
    from sparseloom.report.html import Section

TABLES: dict[str, Callable[..., list[Row]]] = {
    "fig7": spatten_probabilities.fig7,
    "bits": spatten_reductions.bits,
    "reductions": spatten_reductions.reductions,
    "by-benchmark": spatten_reductions.by_benchmark,
    "fig21": spatten_curves.fig21,
}
STUDIES: dict[str, tuple[Study, ...]] = {
    "bits": (spatten_reductions.GENERATION,),
    "reductions": (spatten_reductions.GENERATION, spatten_reductions.ENCODER),
    "by-benchmark": (spatten_reductions.LENGTHS,),
    "fig21": spatten_curves.STUDIES,
}
PICTURES: dict[str, Callable[[list[Row]], list[Section]]] = {
    "fig7": spatten_probabilities.fig7_picture,
    "reductions": spatten_reductions.bits_picture,
    "fig21": spatten_curves.fig21_picture,
}
