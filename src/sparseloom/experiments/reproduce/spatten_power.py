"""SpAtten (HPCA 2021): power and area (table II, figure 13), and SpAtten-1/8 (table III)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from functools import partial
from statistics import fmean

from sparseloom.experiments.reproduce.rows import Row, row
from sparseloom.experiments.reproduce.spatten_area import (
    SHORT_CUTS,
    SRAM_CUTS,
    area_rows,
    power_rows,
)
from sparseloom.experiments.reproduce.spatten_rivals import table3 as rivals
from sparseloom.experiments.reproduce.spatten_runs import (
    BERT,
    EIGHTH,
    GPT2,
    PAPER,
    Case,
    activity,
    operations,
    prepare,
    report,
    tera_operations,
)
from sparseloom.experiments.reproduce.spatten_speed import GPT2_RATIOS, assumed
from sparseloom.hardware.actions import Action, Block
from sparseloom.hardware.energy_model import EnergyModel
from sparseloom.hardware.spatten.area import FULL, blocks
from sparseloom.hardware.spatten.power import Activity, actions

_add = partial(row, PAPER)
_TABLES = {
    "figure 13a": "fig13",
    "figure 13b": "fig13",
    "table II": "table2",
    "table III, SpAtten-1/8": "table3",
}
_SIMULATED = "activity per cycle: simulated, mean over the GPT-2 benchmarks"
_PUBLISHED_PARTS = {"logic": 1.36, "SRAM": 1.24, "DRAM": 5.71}
_WORST = "lop cells; the published power names neither cells nor the cut of the SRAM"


def gpt2_mean() -> Activity:
    """Activity per cycle of the full machine, mean over GPT-2's benchmarks."""
    prepare(Case(name) for name in GPT2)
    every = [activity(report(Case(name))) for name in GPT2]
    return Activity(*(fmean(getattr(one, f.name) for one in every) for f in fields(Activity)))


def table2() -> list[Row]:
    """Table II: power of logic, SRAM and DRAM of the full machine."""
    done = gpt2_mean()
    rows: list[Row] = []
    for (cut, base), short in zip(SRAM_CUTS.items(), SHORT_CUTS, strict=True):
        model = replace(base, memory="oconnor_hbm2")
        for part, watts in parts(model, done).items():
            rows.append(
                _add(
                    "table2", f"power of {part} (W), tables alone, {short}, simulated activity",
                    _PUBLISHED_PARTS[part], watts,
                    basis="scenario", assumptions=(_SIMULATED, GPT2_RATIOS, cut, _WORST),
                )
            )  # fmt: skip
    return [*rows, *_of("table2", _power(done))]


def fig13() -> list[Row]:
    """Figure 13: area and on-chip power of the full machine by module."""
    return _of("fig13", [*area_rows(), *_power(gpt2_mean())])


def table3() -> list[Row]:
    """Table III: SpAtten-1/8, A3 and MnnFast in both units, SpAtten-1/8 simulated as well."""
    return [*rivals(), *_of("table3", [*area_rows(), *_power(gpt2_mean())]), *_eighth()]


def _power(done: Activity) -> list[Row]:
    given = f"{_SIMULATED}; {GPT2_RATIOS}"
    return [*power_rows(), *power_rows(done, activity_name=given, label="simulated activity")]


def _of(table: str, rows: Iterable[Row]) -> list[Row]:
    return [{**one, "table": table} for one in rows if _TABLES[one["table"]] == table]


def parts(model: EnergyModel, per_cycle: Activity) -> dict[str, float]:
    """Power of the full machine in W at 1 GHz by kind: logic, SRAM (FIFOs too), DRAM."""
    found = dict.fromkeys(_PUBLISHED_PARTS, 0.0)
    for one in actions(FULL, per_cycle):
        found[_part(one)] += sum(model.dynamic([one]).values()) * 1e9
    for block in blocks(FULL):
        found[_part(block)] += sum(model.leakage([block]).values())
    return found


def _part(one: Action | Block) -> str:
    if one.op.startswith("dram"):
        return "DRAM"
    return "SRAM" if one.op.startswith(("sram", "fifo")) else "logic"


def _eighth() -> list[Row]:
    """SpAtten-1/8 on BERT-Base's benchmarks: BERT-Large has more of the same heads."""
    names = [name for name in BERT if name.startswith("bert-base")]
    cases = [Case(name, machine=EIGHTH) for name in names]
    prepare(cases)
    reports = [report(case) for case in cases]
    dense = [operations(Case(name, "dense")) for name in names]
    giga = [work / one.seconds / 1e9 for work, one in zip(dense, reports, strict=True)]
    per_joule = [work / one.total_energy / 1e9 for work, one in zip(dense, reports, strict=True)]
    given = (
        *assumed("bert"),
        "mean over the 11 benchmarks of BERT-Base, dense operations over time",
    )
    add = partial(_add, "table3")
    return [
        add("SpAtten-1/8 simulated, GOP/s (two operations per MAC)", 360.0, fmean(giga),
            basis="scenario", assumptions=given,
            note=f"{min(giga):.0f} to {max(giga):.0f} over the benchmarks"),
        add("SpAtten-1/8 simulated, GOP/s (one operation per MAC)", "360, MACs counted twice",
            fmean(giga) / 2, basis="scenario", assumptions=given),
        add("SpAtten-1/8 simulated, GOP/s executed (two operations per MAC)", "not published",
            1e3 * fmean(map(tera_operations, cases)), basis="scenario", assumptions=given),
        add("SpAtten-1/8 simulated, GOP/J (two operations per MAC), tables alone", 382.0,
            fmean(per_joule), basis="scenario",
            assumptions=(*given, reports[0].energy_table)),
    ]  # fmt: skip
