"""Dynamic Sparse Attention (Liu et al., IEEE Transactions on Computers 2022), table by table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sparseloom.experiments.reproduce import (
    Study,
    dynamic_kernels,
    dynamic_latency,
    dynamic_lra,
    dynamic_pictures,
    dynamic_quality,
    dynamic_rank,
    dynamic_thresholds,
)
from sparseloom.experiments.reproduce.dynamic_energy import fig8
from sparseloom.experiments.reproduce.dynamic_macs import fig7
from sparseloom.experiments.reproduce.rows import Row

if TYPE_CHECKING:
    from sparseloom.report.html import Section

TABLES: dict[str, Callable[..., list[Row]]] = {
    "fig1": dynamic_pictures.fig1,
    "table1": dynamic_thresholds.table1,
    "table2": dynamic_quality.table2,
    "fig3": dynamic_quality.fig3,
    "lra": dynamic_lra.lra,
    "fig4": dynamic_pictures.fig4,
    "fig5": dynamic_pictures.fig5,
    "fig6": dynamic_quality.fig6,
    "rank": dynamic_rank.rank,
    "fine-tuning": dynamic_lra.finetuning,
    "fig7": fig7,
    "fig8": fig8,
    "table3": dynamic_kernels.table3,
    "fig11": dynamic_kernels.fig11,
    "break-even": dynamic_kernels.break_even,
    "table4": dynamic_latency.table4,
    "accuracy-change": dynamic_quality.accuracy_change,
    "fig12": dynamic_latency.fig12,
    "fig13": dynamic_latency.fig13,
}
QUALITY = (*dynamic_quality.LRA, dynamic_quality.SENTIMENT)
KERNELS = (dynamic_kernels.STUDY, dynamic_kernels.STUDY_ON_CARD)
LATENCY = (dynamic_latency.STUDY, dynamic_latency.STUDY_ON_CARD)
STUDIES: dict[str, tuple[Study, ...]] = {
    "table1": (dynamic_thresholds.STUDY,),
    "table2": QUALITY,
    "fig3": QUALITY,
    "lra": dynamic_lra.STUDIES,
    "fig6": QUALITY,
    "rank": (dynamic_rank.STUDY,),
    "fine-tuning": dynamic_quality.LRA,
    "table3": KERNELS,
    "fig11": KERNELS,
    "break-even": KERNELS,
    "table4": LATENCY,
    "accuracy-change": QUALITY,
    "fig12": LATENCY,
    "fig13": LATENCY,
}


def _heads(table: str, study: list[Row]) -> list[Section]:
    del study
    return dynamic_pictures.picture(table)


PICTURES: dict[str, Callable[[list[Row]], list[Section]]] = {
    **{name: partial(_heads, name) for name in ("fig1", "fig4", "fig5")},
    "fig3": dynamic_quality.sparsity_picture,
    "fig6": dynamic_quality.prediction_picture,
    "fig11": dynamic_kernels.gain_picture,
    "fig12": dynamic_latency.latency_picture,
    "fig13": dynamic_latency.memory_picture,
}
