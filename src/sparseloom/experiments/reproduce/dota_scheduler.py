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
            if not counts["kept"]:
                continue
            what = f"{_case(one)}: {counts['dataflow']}, T = {counts['parallel']}"
            said = (_masks(one), *((_SCHEDULER,) if "out" in counts["dataflow"] else ()))
            slots = counts["parallel"] * counts["steps"]
            quantities = {
                "loads over row by row": counts["loads"] / counts["kept"],
                "slots with work": 1 - counts["idle"] / slots,
            }
            if counts["dataflow"] == "out of order":
                quantities["least possible loads over row by row"] = (
                    counts["union"] / counts["kept"]
                )
            rows += [
                row(
                    PAPER, "scheduler", f"{what}: {name}", "a curve without numbers", ours,
                    basis="predicted", assumptions=said,
                )
                for name, ours in quantities.items()
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
