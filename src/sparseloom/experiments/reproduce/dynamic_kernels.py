"""Dynamic Sparse Attention, table 3 and figure 11: gains of the three unfused steps, break-even."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparseloom.experiments.reproduce import Request, Study
from sparseloom.experiments.reproduce.rows import Row, row

if TYPE_CHECKING:
    from sparseloom.report.html import Section

PAPER = "dsa_tc_2022"
BLOCK_NAMES = {(4, 1): "1×4", (8, 1): "1×8", (1, 1): "fine-grained"}
"""Our (queries, keys) → the paper's name: V consecutive queries share each key."""
# Gain over the dense step at 90 % on a V100: FP16 for vectors, FP32 for fine-grained.
TABLE_3 = {
    "spmm": {(4, 1): 1.57, (8, 1): 1.94, (1, 1): 1.85},
    "sddmm": {(4, 1): 0.94, (8, 1): 1.15, (1, 1): 1.09},
}
_FP = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
_NAMES = {"spmm": "SpMM", "sddmm": "SDDMM", "softmax": "softmax"}
_PRECISION = "published in FP16 for vectors, FP32 for fine-grained"
_BREAK_EVEN = (
    "published for Sputnik in FP32 on a V100; the text gives 71 % to SDDMM and 90 % to SpMM, an "
    "earlier abstract of its authors the other way round, and table 3 agrees with that"
)


def table3(study: Sequence[Row]) -> list[Row]:
    """Table 3: SpMM and SDDMM at 90 % sparsity over the dense product, on this machine."""
    return [one for part in by_machine(study, "table3") for one in _table3(part)]


def _table3(timed: Sequence[Row]) -> list[Row]:
    where, on = _where(timed), on_card(timed[0])
    rows: list[Row] = []
    for op, gains in TABLE_3.items():
        for block, published in gains.items():
            for dtype in _dtypes(timed, op):
                one = _of(timed, op, block, 0.9)
                dense = _dense(timed, op, dtype)
                rows.append(
                    row(
                        PAPER,
                        "table3",
                        f"{_NAMES[op]}, {BLOCK_NAMES[block]}, over a dense product in {dtype}{on}",
                        published,
                        dense["ms"] / one["ms"],
                        basis="scenario",
                        assumptions=(where, f"ours in {_FP[one['dtype']]}; {_PRECISION}"),
                        note=_spread(op, one, dense),
                    )
                )
    return rows


def fig11(study: Sequence[Row]) -> list[Row]:
    """Figure 11: softmax over the range of sparsity against a dense softmax, on this machine."""
    return [one for part in by_machine(study, "fig11") for one in _fig11(part)]


def _fig11(timed: Sequence[Row]) -> list[Row]:
    where, on = _where(timed), on_card(timed[0])
    rows: list[Row] = []
    for block in BLOCK_NAMES:
        for sparsity in _sparsities(timed):
            one = _of(timed, "softmax", block, sparsity)
            rows.append(
                row(
                    PAPER,
                    "fig11",
                    f"softmax, {BLOCK_NAMES[block]}, {sparsity:.1%} sparse{on}",
                    "3.0–709.9 over the range",
                    one["speedup"],
                    basis="scenario",
                    assumptions=(where,),
                    note=_spread("softmax", one, _dense(timed, "softmax", "float32")),
                )
            )
    gains = [one["speedup"] for one in timed if one["op"] == "softmax" and one["block_size"]]
    for name, published, ours in (
        ("least", 3.0, min(gains, default=0.0)),
        ("largest", 709.9, max(gains, default=0.0)),
    ):
        rows.append(
            row(
                PAPER,
                "fig11",
                f"softmax, {name} gain of the range{on}",
                published,
                ours,
                basis="scenario",
                assumptions=(where, "the ends of the published range of sparsity are not printed"),
            )
        )
    return rows


def break_even(study: Sequence[Row]) -> list[Row]:
    """Section 5: from which sparsity on SDDMM and SpMM pay; the softmax's share of dense time."""
    shares = by_machine(study, "share")
    parts = zip(by_machine(study, "fig11"), shares, strict=True)
    return [one for timed, share in parts for one in _break_even(timed, share)]


def _break_even(timed: Sequence[Row], share: Sequence[Row]) -> list[Row]:
    where, on = _where(timed), on_card(timed[0])
    rows: list[Row] = []
    for op, published in (("sddmm", 0.90), ("spmm", 0.71)):
        for block in BLOCK_NAMES:
            gains = [(x, _of(timed, op, block, x)["speedup"]) for x in _sparsities(timed)]
            found = crossing(gains)
            low, high = gains[0][0], gains[-1][0]
            rows.append(
                row(
                    PAPER,
                    "break-even",
                    f"{_NAMES[op]}, {BLOCK_NAMES[block]}: sparsity from which it pays{on}",
                    published if block == (1, 1) else "printed for fine-grained alone",
                    high if found is None else found,
                    basis="scenario",
                    assumptions=(where, _BREAK_EVEN),
                    note="it pays nowhere in the range"
                    if found is None
                    else f"it pays from {low:.0%} on, where the range begins"
                    if found == low
                    else None,
                )
            )
    steps = {one["op"]: one["ms"] for one in share}
    rows.append(
        row(
            PAPER,
            "break-even",
            f"softmax, share of dense attention in three steps{on}",
            0.47,
            steps["softmax"] / sum(steps.values()),
            basis="scenario",
            assumptions=("8 heads of 64, 4096 tokens, as printed", where),
            note=", ".join(f"{_NAMES[op]} {ms:.0f} ms" for op, ms in steps.items()),
        )
    )
    return rows


def crossing(gains: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity from which the gain stays at 1 or more, on straight lines; None = nowhere.

    Where all gains are 1 or more it is the first sparsity.
    """
    points = sorted(gains)
    below = [i for i, (_, gain) in enumerate(points) if gain < 1]
    if not below:
        return points[0][0]
    last = below[-1]
    if last == len(points) - 1:
        return None
    (x0, y0), (x1, y1) = points[last : last + 2]
    return x0 + (1 - y0) / (y1 - y0) * (x1 - x0)


def gain_picture(study: Sequence[Row]) -> list[Section]:
    """Gain of each step over its dense form against sparsity, one figure per step."""
    from sparseloom.report.bar_figures import lines
    from sparseloom.report.html import Section

    figures = tuple(
        lines(
            {
                name: [(x, _of(timed, op, block, x)["speedup"]) for x in _sparsities(timed)]
                for block, name in BLOCK_NAMES.items()
            },
            x_title=f"share dropped, {_NAMES[op]}{on_card(timed[0])}",
            y_title="times as fast as dense fp32",
            log_y=True,
            percent_x=True,
            rule=(1.0, "dense"),
        )
        for timed in by_machine(study, "fig11")
        for op in ("softmax", "sddmm", "spmm")
    )
    text = "One step of sparse attention over the same step dense; interleaved rounds, medians."
    return [Section("Gains of the unfused steps", text, figures, columns=2)]


def _run(request: Request) -> list[Row]:
    from sparseloom.experiments import unfused_time
    from sparseloom.experiments.on_device import hardware

    plan = unfused_time.SMALL if request.size == "small" else unfused_time.PAPER
    if request.device == "cuda":
        plan = unfused_time.on_card(plan)
    out = request.out / "unfused" / request.size / request.device
    found = unfused_time.run_study(plan, out, step=request.step)
    return [{**one, "hardware": hardware(request.device)} for one in found]


STUDY = Study("dynamic_kernels.json", _run)
STUDY_ON_CARD = Study("dynamic_kernels_gpu.json", _run, optional=True, device="cuda")


def by_machine(study: Sequence[Row], part: str | None = None) -> list[list[Row]]:
    """Rows of a part of the study, those of each machine apart, in the order of the files."""
    found: dict[str, list[Row]] = {}
    for one in study:
        if part in (None, one.get("part")):
            found.setdefault(one.get("hardware", ""), []).append(one)
    return list(found.values())


def on_card(one: Row) -> str:
    """What tells the quantities of a card from those of the CPU."""
    return f", on {one['hardware']}" if one.get("device", "cpu") == "cuda" else ""


def _where(timed: Sequence[Row]) -> str:
    one = timed[0]
    sizes = (
        f"batch {one['batch']}, {one['heads']} heads of {one['head_dim']}, {one['q_len']} tokens"
    )
    return f"{one.get('hardware', 'another machine')}; published on a V100; {sizes}"


def _spread(op: str, one: Row, dense: Row) -> str:
    return (
        f"{_NAMES[op]}: {one['ms']:.1f} ms (quartiles {one['spread']:.0%} apart), dense "
        f"{dense['ms']:.1f} ms"
    )


def _sparsities(timed: Sequence[Row]) -> list[float]:
    return sorted({one["sparsity"] for one in timed if one["block_size"]})


def _of(timed: Sequence[Row], op: str, block: tuple[int, int], sparsity: float) -> dict[str, Any]:
    for one in timed:
        if one["op"] == op and one["block_size"] == list(block) and one["sparsity"] == sparsity:
            return one
    raise ValueError(f"stored rows hold no {op} of {BLOCK_NAMES[block]} at {sparsity:.1%}")


def _dense(timed: Sequence[Row], op: str, dtype: str) -> dict[str, Any]:
    for one in timed:
        if one["op"] == op and not one["block_size"] and one["dtype"] == dtype:
            return one
    raise ValueError(f"stored rows hold no dense {op} in {dtype}")


def _dtypes(timed: Sequence[Row], op: str) -> list[str]:
    """Dtypes of the dense step, in the order they were timed in."""
    return [one["dtype"] for one in timed if one["op"] == op and not one["block_size"]]
