"""Three systems in one table: static masks, dynamic prediction, cascade pruning.

At equal density and at equal loss of accuracy; accuracy and time are read from stored studies,
simulated cost is worked out here. Every cost is over the same machine's own dense run: the machines
differ in size, node and memory, and their absolute numbers are no comparison of methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from sparseloom import hardware
from sparseloom.experiments.reproduce import Study
from sparseloom.experiments.reproduce.dota_benchmarks import SIGMA, even_mask
from sparseloom.experiments.reproduce.rows import Row, row
from sparseloom.experiments.reproduce.static_learned import (
    COST,
    MOST_LOSS,
    QUALITY,
    cost_rows,
    quality_rows,
    relative_loss,
    sparsest,
    tasks,
)
from sparseloom.hardware.report import Report
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    PredictorShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)

PAPER = "static_dac_2023"
MACHINES = {
    "static": "dense_static_dac_2023",
    "dynamic": "dota_asplos_2022",
    "cascade": "spatten_hpca_2021",
}
DENSITIES = (0.4, 0.25, 0.1)
LENGTH, LAYERS, HEADS, HEAD_DIM = 512, 6, 12, 32  # MiniLM on whole reviews
DYNAMIC = tuple(
    Study(f"{name}.json", None, f"python -m sparseloom.experiments.{name}", optional=True)
    for name in ("sentiment", "adaptation")
)
CASCADE = Study(
    "spatten_quality.json", None, "python -m sparseloom.experiments.spatten_quality", optional=True
)
TIMES = (
    Study("static_time.json", None, "python -m sparseloom.experiments.static_time", optional=True),
    Study(
        "dynamic_end_to_end.json", None, "sparseloom reproduce dynamic fig13 --run", optional=True
    ),
    Study(
        "spatten_encoder.json",
        None,
        "python -m sparseloom.experiments.spatten_encoder",
        optional=True,
    ),
)
OTHERS = (*DYNAMIC, CASCADE, *TIMES)
_BOTH = "no paper compares the three"
_EACH = "each over its own machine's dense run"
_TASKS = "tasks differ where a study has none in common: each row names its own"
_DRAWN = (
    "static: runs of tiles; dynamic: keys evenly spaced, predictor of a quarter of the width in 4 "
    "bits; cascade: tokens drawn, gone from the first layer on"
)


def systems(study: Sequence[Row]) -> list[Row]:
    """Static, dynamic and cascade at equal density and equal loss: accuracy, time, cost."""
    return [
        *_equal_density_cost(),
        *_learned_cost(study),
        *_equal_density_loss(study),
        *_equal_loss(study),
        *_times(study),
    ]


# --------------------------------------------------------------------------------- cost


@cache
def reports(system: str, density: float) -> tuple[Report, Report]:
    """Attention of a MiniLM at a density, and dense, on the system's machine."""
    shape = ModelShape(
        layers=LAYERS,
        hidden_size=HEADS * HEAD_DIM,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
    )
    every = transformer_operators(shape, q_len=LENGTH)
    attention = tuple(operator for operator in every if operator.is_attention)
    workload = Workload(shape, attention, name="MiniLM", scope="attention")
    trace = Trace(workload, {system: Selection(system, (_call(system, density),) * LAYERS)})
    machine = hardware.load(MACHINES[system])
    return machine.simulate(trace, system), machine.simulate(trace, "dense")


def _call(system: str, density: float) -> AttentionCall:
    if system == "dynamic":
        predictor = PredictorShape(head_dim=round(SIGMA * HEAD_DIM), bits=4)
        return AttentionCall(even_mask(LENGTH, density), predictor=predictor)
    if system == "cascade":
        # Queries leave with their tokens: a share of both sides.
        alive = np.zeros(LENGTH, np.bool_)
        kept = round(float(np.sqrt(density)) * LENGTH)
        alive[np.random.default_rng(0).permutation(LENGTH)[:kept]] = True
        mask = MaskArrays.from_bool((alive[:, None] & alive)[None, None])
        return AttentionCall(mask, tokens_alive=alive[None])
    rows, columns = LENGTH // 16, LENGTH // 32
    tiles = round(density * rows * columns)
    keep = np.zeros((rows, columns), np.bool_)
    for t in range(rows):
        count = tiles // rows + (t < tiles % rows)
        first = min(t // 2, columns - count)
        keep[t, first : first + count] = True
    whole = keep.repeat(16, axis=0).repeat(32, axis=1)[None, None]
    return AttentionCall(MaskArrays.from_bool(whole, block_size=(16, 32)))


def _equal_density_cost() -> Iterator[Row]:
    for density in DENSITIES:
        for system, machine in MACHINES.items():
            sparse, dense = reports(system, density)
            about = f"attention alone, {machine}"
            for name, ours in (
                ("simulated cycles over dense", sparse.cycles / dense.cycles),
                ("simulated energy over dense", sparse.total_energy / dense.total_energy),
            ):
                yield _row(f"density {density:g}, {system}: {name} ({about})", ours, _EACH, _DRAWN)


def _learned_cost(study: Sequence[Row]) -> Iterator[Row]:
    runs = [run for run in cost_rows(study) if run["reading"] == "latency"]
    for run in runs:
        at = f"{run['task_name']}, {run['length']} tokens, density {run['tile_density']:.3g}"
        about = f"{run['scope']}, {run['fidelity']}, {run['accelerator']}"
        ours = run["cycles"] / run["dense_cycles"]
        yield _row(f"{at}, static, learned: simulated cycles over dense ({about})", ours, _EACH)
    if not runs:
        yield _absent("static, learned: simulated cycles over dense", COST[0])


# ----------------------------------------------------------------------------- accuracy


def _scored(study: Sequence[Row]) -> dict[str, list[Row]]:
    """Fine-tuned contenders of each system, by what wrote them."""
    found: dict[str, list[Row]] = {"static": [], "dynamic": [], "cascade": []}
    kinds = {"dynamic": "dynamic", "spatten": "cascade"}
    for run in quality_rows(study):
        if run["method"] == "static" and "," not in str(run["contender"]):
            found["static"].append(run)
    for run in study:
        untuned = run.get("fine_tuned") is False or "not fine-tuned" in str(run.get("contender"))
        if "loss" in run and "phase" not in run and run.get("method") in kinds and not untuned:
            found[kinds[str(run["method"])]].append(run)
    return found


def _equal_density_loss(study: Sequence[Row]) -> Iterator[Row]:
    """The loss of what each system has, task by task, nearest to each density of static masks."""
    scored = _scored(study)
    wanted = sorted({round(_density(run), 2) for run in scored["static"]}) or list(DENSITIES[:2])
    for density in wanted:
        for system, runs in scored.items():
            if not runs:
                at = f"nearest to density {density:g}, {system}"
                yield _absent(f"{at}: relative loss", _source(system))
                continue
            for task in tasks(runs):
                mine = [run for run in runs if run["task"] == task]
                run = min(mine, key=lambda run: abs(_density(run) - density))
                at = f"nearest to density {density:g}, {system} ({task}, {_density(run):.3g})"
                yield _row(f"{at}: relative loss", relative_loss(run), _TASKS)


def _equal_loss(study: Sequence[Row]) -> Iterator[Row]:
    for system, runs in _scored(study).items():
        bound = f"within {MOST_LOSS:.0%} of dense, {system}"
        for task in tasks(runs):
            best = sparsest([run for run in runs if run["task"] == task])
            ours = "none of those tried" if best is None else _density(best)
            yield _row(f"{bound} ({task}): lowest density", ours, _TASKS)
        if not runs:
            yield _absent(f"{bound}: lowest density", _source(system))


def _density(run: Row) -> float:
    return float(run.get("tile_density", run["density"]))


def _source(system: str) -> Study:
    return {"static": QUALITY[0], "dynamic": DYNAMIC[0], "cascade": CASCADE}[system]


# --------------------------------------------------------------------------------- time


def _times(study: Sequence[Row]) -> Iterator[Row]:
    """Measured speed-ups over dense in the same run, each with its own shape."""
    found: dict[str, list[tuple[str, float]]] = {"static": [], "dynamic": [], "cascade": []}
    for run in study:
        if run.get("speedup") is None:
            continue
        method = str(run.get("method") or run.get("contender"))
        if run.get("record") == "spatten_encoder":
            what = f"{method}, batch {run['batch']}, {run['length']} tokens, whole model"
            found["cascade"].append((what, run["speedup"]))
        elif method.startswith(("static", "dynamic")):
            what = f"{run['contender']}, {run.get('op', 'attention')}, {run['dtype']}"
            what += f", {run['q_len']} tokens"
            what += f" of {run['head_dim']} dims" if "head_dim" in run else ""
            found[method.partition(":")[0].split()[0]].append((what, run["speedup"]))
    for (system, runs), source in zip(found.items(), TIMES, strict=True):
        for what, speedup in runs:
            yield _row(f"{system}: measured speed-up ({what})", speedup, "this processor")
        if not runs:
            yield _absent(f"{system}: measured speed-up", source)


def _row(quantity: str, ours: float | str, *assumptions: str) -> Row:
    return row(PAPER, "systems", quantity, _BOTH, ours, basis="scenario", assumptions=assumptions)


def _absent(quantity: str, study: Study) -> Row:
    where = f"{quantity} ({study.file})"
    return _row(where, f"not stored: {study.command}", _TASKS)
