"""Dynamic Sparse Attention, figure 8: relative energy with the prediction path charged.

E_rel = (Linear + Other + r·Attention + f·Prediction) / (Linear + Other + Attention), in MACs; f
converts a low-precision MAC into one of FP32.  The authors take f from NeuroMeter at 45 nm and
print the overhead of the prediction, 1.17–1.33 % of the dense energy, but neither f nor the bars.
"""

from __future__ import annotations

from collections.abc import Mapping

from sparseloom.experiments.reproduce.dynamic_macs import (
    IMAGE,
    PAPER,
    RETRIEVAL_4K,
    TEXT_4K,
    Shape,
    counted,
    kept_macs,
)
from sparseloom.experiments.reproduce.rows import Row, row
from sparseloom.hardware.energy_model import EnergyModel
from sparseloom.results import Basis

SPARSITY = 0.95
TABLE = "horowitz_45nm"
CALIBRATED = (0.115, 0.119)
"""f at which the lowest and the highest overhead of the three tasks are those that are printed."""
_SETTING = "DSA-95 %, σ = 0.25, INT4; prediction of heads · round(σ · head_dim) columns"
_CHOSEN = "f was chosen so that the overhead is the printed one; 4 bits of 32 would be 0.125"
_TASKS = (TEXT_4K, RETRIEVAL_4K, IMAGE)


def mac_joules(bits: int, *, floating: bool = False) -> float:
    """Energy of one multiply-accumulate at 45 nm and 0.9 V in J."""
    model = EnergyModel(logic=TABLE, node_nm=45)
    kind = "fp" if floating else "int"
    ops = (model.event_joules(op, bits, kind=kind) for op in ("multiply", "add"))
    return sum(float(joules) for joules in ops)


def factor(bits: int) -> float:
    """f from the energy table: an integer MAC of this width over one of FP32."""
    return mac_joules(bits) / mac_joules(32, floating=True)


def overhead(shape: Shape, f: float) -> float:
    """Energy of the prediction over that of the dense layer."""
    macs = counted(shape)
    return f * macs.prediction / macs.dense


def relative_energy(shape: Shape, f: float, sparsity: float = SPARSITY) -> float:
    """E_rel of a layer."""
    macs = counted(shape)
    stays = macs.linear + macs.other + kept_macs(shape, sparsity) + f * macs.prediction
    return stays / macs.dense


def fig8() -> list[Row]:
    """Figure 8: energy relative to dense attention, prediction included."""
    low, high = CALIBRATED
    ends = {
        f"prediction over dense, lowest of three tasks, f = {low}, %": (
            1.17,
            min(overhead(shape, low) for shape in _TASKS),
        ),
        f"prediction over dense, highest of three tasks, f = {high}, %": (
            1.33,
            max(overhead(shape, high) for shape in _TASKS),
        ),
    }
    rows = [
        row(
            PAPER,
            "fig8",
            name,
            published,
            100 * share,
            basis="calibrated",
            tolerance=0.005,
            assumptions=(_SETTING,),
            note=_CHOSEN,
        )
        for name, (published, share) in ends.items()
    ]
    tables = {f"INT{bits} of {TABLE}": factor(bits) for bits in (4, 8)}
    rows.append(
        row(
            PAPER,
            "fig8",
            f"f, INT4 of {TABLE}",
            low,
            factor(4),
            basis="scenario",
            assumptions=(f"f is not printed: {low} is what reproduces the printed overhead",),
            note="the table's INT8 multiplier is scaled to 4 bits by the square of the width",
        )
    )
    for shape in _TASKS:
        rows += _curve(shape, {"f = 0.115": 0.115, "f = 0.12": 0.12}, "calibrated")
        rows += _curve(shape, tables, "scenario")
    return rows


def _curve(shape: Shape, factors: Mapping[str, float], basis: Basis) -> list[Row]:
    """Overhead and relative energy of one task under each f."""
    rows: list[Row] = []
    for name, f in factors.items():
        found = {
            f"prediction over dense, {name}, %": (
                "1.17–1.33 over the tasks",
                100 * overhead(shape, f),
            ),
            f"energy at 95% over dense, {name}": (
                "a bar without a number",
                relative_energy(shape, f),
            ),
        }
        rows += [
            row(
                PAPER,
                "fig8",
                f"{shape.label}: {quantity}",
                published,
                ours,
                basis=basis,
                assumptions=(_SETTING,),
            )
            for quantity, (published, ours) in found.items()
        ]
    return rows
