"""Dynamic Sparse Attention, table 4 and figures 12 and 13: a whole encoder, timed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparseloom.experiments.reproduce import Request, Study
from sparseloom.experiments.reproduce.dynamic_kernels import by_machine, on_card
from sparseloom.experiments.reproduce.rows import Row, row

if TYPE_CHECKING:
    from sparseloom.report.html import Section

PAPER = "dsa_tc_2022"
SDPA, EAGER = "dense, SDPA", "dense, unfused"
# Over dense attention and over the dense model, FP16 on a V100.
TABLE_4 = {"DSA-95, 1×4": (1.23, 1.19), "DSA-95, 1×8": (1.97, 1.71)}
_STATEMENTS = {
    "DSA-90, 1×8": "about 1: prediction in INT8 eats the gain",
    "DSA-95, 1×8": "faster than dense",
    "Performer": "not faster than dense at these lengths",
    "Reformer": "not faster than dense at these lengths",
    "Linformer": "not faster than dense at these lengths",
}
_BAR = "a bar without a number"
_RANDOM = (
    "random weights and an untrained predictor: masks of equal rows, whose time does not depend on "
    "what was learned"
)
_BASELINE = "what the published dense attention ran on is not printed: ours beside both"


def table4(study: Sequence[Row]) -> list[Row]:
    """Table 4: attention and the whole model at 95 %, prediction and selection included."""
    rows: list[Row] = []
    for dtype, timed in _runs(study):
        for name, published in TABLE_4.items():
            for op, speedup in zip(("attention", "model"), published, strict=True):
                ours = _of(timed, op, name)
                for base in (SDPA, EAGER):
                    dense = _of(timed, op, base)
                    rows.append(
                        row(
                            PAPER,
                            "table4",
                            f"{op}, {name}, over {base}, {dtype}{on_card(dense)}",
                            speedup,
                            dense["ms"] / ours["ms"],
                            basis="scenario",
                            assumptions=(_where(timed), _RANDOM, _BASELINE),
                            note=_times(op, ours, dense),
                        )
                    )
    return rows


def fig12(study: Sequence[Row]) -> list[Row]:
    """Figure 12: latency against dense, Performer, Reformer and Linformer."""
    rows: list[Row] = []
    for dtype, timed in _runs(study):
        for op in ("attention", "model"):
            dense = _of(timed, op, SDPA)
            for one in timed:
                if one["op"] != op or one is dense:
                    continue
                rows.append(
                    row(
                        PAPER,
                        "fig12",
                        f"{op}, {one['contender']}: times as fast as {SDPA}, {dtype}"
                        f"{on_card(dense)}",
                        _STATEMENTS.get(one["contender"], _BAR),
                        dense["ms"] / one["ms"],
                        basis="scenario",
                        assumptions=(_where(timed), _RANDOM, _BASELINE),
                        note=_times(op, one, dense),
                    )
                )
    return rows


def fig13(study: Sequence[Row]) -> list[Row]:
    """Figure 13: peak memory against dense attention in three steps."""
    rows: list[Row] = []
    for dtype, run in _runs(study):
        for op in ("attention", "model"):
            timed = [one for one in run if one["op"] == op and one.get("peak_bytes") is not None]
            if not timed:
                continue
            eager = _of(timed, op, EAGER)
            rows += [
                row(
                    PAPER,
                    "fig13",
                    f"{op}, {one['contender']}: peak over that of {EAGER}, {dtype}{on_card(one)}",
                    _BAR,
                    one["peak_bytes"] / eager["peak_bytes"],
                    basis="scenario",
                    assumptions=(_where(timed), "one pass, beyond weights and inputs"),
                    note=f"{op}, {one['contender']}: {one['peak_bytes'] / 2**20:.0f} MiB",
                )
                for one in timed
                if one is not eager
            ]
    return rows


def latency_picture(study: Sequence[Row]) -> list[Section]:
    """Bars of time per forward pass."""
    from sparseloom.report.bar_figures import bars
    from sparseloom.report.html import Section

    figures = tuple(
        bars(
            {
                op: {one["contender"]: one["ms"] for one in run if one["op"] == op}
                for op in ("attention", "model")
            },
            title=f"ms, {dtype}{on_card(run[0])}",
        )
        for dtype, run in _runs(study)
    )
    text = "Medians of interleaved rounds on this machine; prediction and selection included."
    return [Section("Time of one forward pass", text, figures)]


def memory_picture(study: Sequence[Row]) -> list[Section]:
    """Bars of peak memory."""
    from sparseloom.report.bar_figures import bars
    from sparseloom.report.html import Section

    peaks = {
        f"{op}, {dtype}{on_card(run[0])}": {
            one["contender"]: one["peak_bytes"] / 2**20
            for one in run
            if one["op"] == op and one.get("peak_bytes") is not None
        }
        for dtype, run in _runs(study)
        for op in ("attention", "model")
    }
    text = "Physical memory of one pass above weights and inputs."
    return [Section("Peak memory", text, (bars(peaks, title="MiB"),))]


def _run(request: Request) -> list[Row]:
    from sparseloom.experiments import end_to_end
    from sparseloom.experiments.on_device import hardware

    plan = end_to_end.SMALL if request.size == "small" else end_to_end.PAPER
    if request.device == "cuda":
        plan = end_to_end.on_card(plan)
    out = request.out / "end_to_end" / request.size / request.device
    found = end_to_end.run_study(plan, out, step=request.step)
    return [{**one, "hardware": hardware(request.device)} for one in found]


STUDY = Study("dynamic_end_to_end.json", _run)
STUDY_ON_CARD = Study("dynamic_end_to_end_gpu.json", _run, optional=True, device="cuda")


def _runs(study: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Each dtype on each machine, with its rows."""
    return [
        (dtype, [one for one in timed if one["dtype"] == dtype])
        for timed in by_machine(study)
        for dtype in dict.fromkeys(one["dtype"] for one in timed)
    ]


def _where(timed: Sequence[Row]) -> str:
    one = timed[0]
    sizes = f"batch {one['batch']}, {one['layers']} layers, {one['q_len']} tokens"
    return (
        f"{one.get('hardware', 'another machine')}; published on a V100 in FP16, batch 16; {sizes}"
    )


def _times(op: str, ours: Row, dense: Row) -> str:
    return (
        f"{op}: {ours['contender']} {ours['ms']:.0f} ms (quartiles {ours['spread']:.0%} apart), "
        f"{dense['contender']} {dense['ms']:.0f} ms"
    )


def _of(timed: Sequence[Row], op: str, contender: str) -> Row:
    for one in timed:
        if one["op"] == op and one["contender"] == contender:
            return one
    raise ValueError(f"stored rows hold no {op} of {contender!r}")
