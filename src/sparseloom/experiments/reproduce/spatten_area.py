"""SpAtten (HPCA 2021): area and power of the full machine and of SpAtten-1/8, from our tables.

How the authors' SRAM is cut, and what SpAtten-1/8 keeps of it, is unpublished: every row that
needs it is a scenario, and each is shown.
"""

from __future__ import annotations

from dataclasses import replace

from sparseloom.experiments.reproduce.rows import Row, row
from sparseloom.hardware.energy_model import LOGIC_TABLES, EnergyModel
from sparseloom.hardware.spatten.area import (
    EIGHTH,
    EIGHTH_SRAM,
    FULL,
    LINE,
    MACROS,
    MODULES,
    PUBLISHED_EIGHTH_MM2,
    PUBLISHED_MM2,
    blocks,
    calibrated,
)
from sparseloom.hardware.spatten.power import (
    PUBLISHED_EIGHTH_W,
    PUBLISHED_W,
    Activity,
    calibrated_power,
    gpt2_activity,
    per_line,
    watts,
)

PAPER = "spatten_hpca_2021"
TOLERANCE = 0.25
SRAM_CUTS: dict[str, EnergyModel] = {
    "a line of SRAM is one CACTI bank (4.2 ns a cycle: could not run at 1 GHz)": LINE,
    "a line of SRAM is banks of 512 bits side by side": MACROS,
}
SHORT_CUTS = ("one bank per SRAM", "banks of 512 bits")
_FULL, _EIGHTH = "figure 13a", "table III, SpAtten-1/8"
_LANES = "SpAtten-1/8 has one softmax lane and the full top-k engines"
_ACTIVITY = "activity per cycle: published GPT-2 averages, values kept 0.25 (assumed)"
_SHARE = "SpAtten-1/8 does an eighth of the full machine's work per cycle"


def area_rows() -> list[Row]:
    """Area in mm² at 40 nm: tables alone, calibrated, and SpAtten-1/8 by scenario."""
    found: list[Row] = []
    for (cut, model), short in zip(SRAM_CUTS.items(), SHORT_CUTS, strict=True):
        raw = model.area(blocks(FULL))
        every = [replace(model, logic=table).area(blocks(FULL)) for table in LOGIC_TABLES]
        for module in MODULES:
            low, high = (pick(x[module] for x in every) for pick in (min, max))
            found.append(
                row(
                    PAPER,
                    _FULL,
                    f"area of {module} (mm²), tables alone, {short}",
                    PUBLISHED_MM2[module],
                    raw[module],
                    basis="scenario",
                    assumptions=[cut],
                    note=f"{low:.2f} to {high:.2f} over {' and '.join(LOGIC_TABLES)}",
                )
            )
        found.append(
            row(
                PAPER,
                _FULL,
                f"area (mm²), tables alone, {short}",
                sum(PUBLISHED_MM2.values()),
                sum(raw.values()),
                basis="scenario",
                assumptions=[cut],
            )
        )
        one = calibrated(model)
        found.append(
            row(
                PAPER,
                _FULL,
                f"area (mm²), one factor per module, {short}",
                sum(PUBLISHED_MM2.values()),
                sum(one.area(FULL).values()),
                basis="calibrated",
                assumptions=[cut],
                note=", ".join(f"{m} × {f:.2f}" for m, f in one.factors.items()),
            )
        )
        for name, kib in EIGHTH_SRAM.items():
            eighth = one.area(replace(EIGHTH, sram_kib=kib))
            found.append(
                row(
                    PAPER,
                    _EIGHTH,
                    f"area (mm²), factors of the full machine, {short}, {kib:g} KiB each",
                    PUBLISHED_EIGHTH_MM2,
                    sum(eighth.values()),
                    basis="scenario",
                    assumptions=[cut, f"SRAM {name}", _LANES],
                    tolerance=TOLERANCE,
                    note="an eighth of the full machine's two arrays alone is 1.79 mm²",
                )
            )
    return found


def power_rows(
    activity: Activity | None = None,
    *,
    activity_name: str = _ACTIVITY,
    label: str = "published activity",
) -> list[Row]:
    """Power in W at 1 GHz: tables alone, calibrated, and SpAtten-1/8 by scenario.

    Args:
        activity: per cycle of the full machine; None = from published averages on GPT-2.
        activity_name, label: where it comes from, for the rows' assumptions and their names.
    """
    activity = gpt2_activity() if activity is None else activity
    activates = activity.activates > 0
    memory = "oconnor_hbm2" if activates else "oconnor_hbm2_flat"
    found: list[Row] = []
    for (cut, base), cut_name in zip(SRAM_CUTS.items(), SHORT_CUTS, strict=True):
        short = f"{cut_name}, {label}"
        model = replace(base, memory=memory)
        given = [activity_name, cut, f"{model.cell} cells", memory]
        raw = watts(model, FULL, activity)
        every = [watts(replace(model, logic=x), FULL, activity) for x in LOGIC_TABLES]
        for module, published in PUBLISHED_W.items():
            low, high = (pick(x[module] for x in every) for pick in (min, max))
            where = "table II" if module == "dram" else "figure 13b"
            found.append(
                row(
                    PAPER,
                    where,
                    f"power of {module} (W), tables alone, {short}",
                    published,
                    raw[module],
                    basis="scenario",
                    assumptions=given,
                    note=f"{low:.2f} to {high:.2f} over {' and '.join(LOGIC_TABLES)}",
                )
            )
        one = calibrated_power(activity, model)
        found.append(
            row(
                PAPER,
                "table II",
                f"power (W), one factor per module, {short}",
                sum(PUBLISHED_W.values()),
                sum(one.watts(FULL, activity).values()),
                basis="calibrated",
                assumptions=given,
                note=", ".join(f"{m} × {f:.2f}" for m, f in one.factors.items()),
            )
        )
        for name, kib in EIGHTH_SRAM.items():
            eighth = replace(EIGHTH, sram_kib=kib)
            drawn = one.watts(eighth, per_line(activity * (1 / 8), eighth))
            found.append(
                row(
                    PAPER,
                    _EIGHTH,
                    f"power (W), factors of the full machine, {short}, {kib:g} KiB each",
                    PUBLISHED_EIGHTH_W,
                    sum(drawn.values()),
                    basis="scenario",
                    tolerance=TOLERANCE,
                    assumptions=[*given, f"SRAM {name}", _LANES, _SHARE],
                    note=f"published as 382 GOP/J at 360 GOP/s; {drawn['dram']:.2f} W is DRAM",
                )
            )
    return found
