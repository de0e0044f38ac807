"""DOTA (ASPLOS 2022) on masks of adapted models: its scheduler's loads, and what its rates do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparseloom.experiments.reproduce import Study
from sparseloom.experiments.reproduce.dota_speed import MASKS, PAPER
from sparseloom.experiments.reproduce.rows import Row, row

_SCHEDULER = "the order of the scan and the rule for splitting are reconstructions"
_RATES = "rates of detector, scheduler and SRAM, and the DRAM, are unpublished: our defaults"


def scheduler(stored: Sequence[Row]) -> list[Row]:
    """Key loads against row by row, for 1 to 8 queries side by side, on recorded masks."""
    rows: list[Row] = []
    for one in stored:
        for counts in one["loads"]:
            ordered = counts["dataflow"] == "in_order"
            name = "in order" if ordered else "out of order"
            name += "" if ordered or counts["split"] else ", no split"
            found = {"loads over row by row": counts["load_ratio"]}
            if not ordered:
                found["slots with work"] = counts["utilisation"]
            if not ordered and counts["split"]:
                found["least possible loads over row by row"] = counts["union_ratio"]
                found["the same were keys random"] = counts["random_ratio"]
            rows += [
                row(
                    PAPER, "scheduler",
                    f"{_case(one)}: {name}, T = {counts['parallel_queries']}: {what}",
                    "a curve without numbers", ours, basis="predicted",
                    assumptions=(_masks(one), *(() if ordered else (_SCHEDULER,))),
                )
                for what, ours in found.items()
            ]  # fmt: skip
    return rows


def sensitivity(stored: Sequence[Row]) -> list[Row]:
    """Attention's cycles with other rates, T, SRAM, DRAM and precisions, over the defaults."""
    rows: list[Row] = []
    for one in stored:
        cycles = {entry["variant"]: entry["cycles"] for entry in one["sensitivity"]}
        base = cycles.pop("as it is")
        fidelity = one["numbers"]["fidelity"]
        rows += [
            row(
                PAPER, "sensitivity", f"{_case(one)}: {variant}", "not published", found / base,
                basis="scenario", assumptions=(_masks(one), _RATES, f"at fidelity {fidelity}"),
            )
            for variant, found in cycles.items()
        ]  # fmt: skip
    return rows


def _case(one: Row) -> str:
    return f"{one['workload']}, {1 - one['sparsity']:.2g} kept"


def _masks(one: Row) -> str:
    return f"masks recorded from one input of {one['tokens']} tokens of {one['task_name']}"


TABLES: dict[str, Callable[..., list[Row]]] = {
    "scheduler": scheduler,
    "sensitivity": sensitivity,
}
STUDIES: dict[str, tuple[Study, ...]] = dict.fromkeys(TABLES, (MASKS,))
