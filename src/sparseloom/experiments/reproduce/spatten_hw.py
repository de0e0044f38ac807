"""SpAtten (HPCA 2021): the hardware's tables and figures, one function each."""

from __future__ import annotations

from collections.abc import Callable

from sparseloom.experiments.reproduce.rows import Row
from sparseloom.experiments.reproduce.spatten_design import fig18, fig19, fig20, traces
from sparseloom.experiments.reproduce.spatten_power import fig13, table2, table3
from sparseloom.experiments.reproduce.spatten_rivals import a3_ranges, devices
from sparseloom.experiments.reproduce.spatten_speed import fig14, fig15, headline, table4

TABLES: dict[str, Callable[[], list[Row]]] = {
    "headline": headline,
    "table2": table2,
    "fig13": fig13,
    "table3": table3,
    "a3-ranges": a3_ranges,
    "table4": table4,
    "devices": devices,
    "fig14": fig14,
    "fig15": fig15,
    "fig18": fig18,
    "traces": traces,
    "fig19": fig19,
    "fig20": fig20,
}
