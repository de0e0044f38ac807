"""Dynamic Sparse Attention (Liu et al., IEEE Transactions on Computers 2022), table by table."""

from __future__ import annotations

from collections.abc import Callable

from sparseloom.experiments.reproduce import Study, dynamic_thresholds
from sparseloom.experiments.reproduce.dynamic_energy import fig8
from sparseloom.experiments.reproduce.dynamic_macs import fig7
from sparseloom.experiments.reproduce.rows import Row

TABLES: dict[str, Callable[..., list[Row]]] = {
    "table1": dynamic_thresholds.table1,
    "fig7": fig7,
    "fig8": fig8,
}
STUDIES: dict[str, tuple[Study, ...]] = {"table1": (dynamic_thresholds.STUDY,)}
