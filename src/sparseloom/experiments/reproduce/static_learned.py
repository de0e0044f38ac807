"""Dai et al. (DAC 2023): what learned static masks lose, and what they cost on our machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sparseloom.experiments.reproduce import Study
from sparseloom.experiments.reproduce.rows import Row, row

PAPER = "static_dac_2023"
_QUALITY = "python -m sparseloom.experiments.static_quality --task {} --results results/{}"
QUALITY = tuple(
    Study(file, None, _QUALITY.format(task, file), optional=True)
    for task, file in (
        ("imdb", "static_imdb.json"),
        ("lra-image", "static_lra_image.json"),
        ("bytes", "static_bytes.json"),
        ("bytes --densities 0.15,0.1", "static_bytes_low.json"),
        ("imdb --densities 0.25 --seed 12", "static_imdb_seed12.json"),
        ("lra-image --seed 12", "static_lra_image_seed12.json"),
        ("lra-image --seed 13", "static_lra_image_seed13.json"),
        ("bytes --seed 12", "static_bytes_seed12.json"),
        ("bytes --seed 13", "static_bytes_seed13.json"),
    )
)
"""Learned masks and fixed patterns, fine-tuned alike, against a dense control."""
_COST = "python -m sparseloom.experiments.static_cost --results results/{}"
COST = tuple(
    Study(file, None, _COST.format(file), optional=True)
    for file in ("static_cost.json", "static_cost_bytes.json")
)
"""Learned masks on the machine: of reviews, and of the language model."""
MOST_LOSS = 0.01  # relative to the dense control: "< 1 % accuracy loss"
PATTERNS = "aligned"
"""`method` of fixed patterns on the grid of the regions, in stored rows."""
_OURS = "models, data and masks are ours: the paper's are not public"
_STEPS = "the dense control took the same extra steps"


def is_static(run: Row) -> bool:
    """A contender with learned regions."""
    return run.get("method") == "static"


def relative_loss(run: Row) -> float:
    """Loss over the score of the dense control."""
    return float(run["loss"]) / abs(float(run["dense_value"])) + 0.0  # no loss is 0, never -0


def quality_rows(study: Sequence[Row]) -> list[Row]:
    """Rows of the quality study among those of all studies, of the first seed of each task."""
    runs, first = _all_seeds(study), dict[str, Any]()
    for run in runs:
        first.setdefault(run["task"], run.get("seed"))
    return [run for run in runs if run.get("seed") == first[run["task"]]]


def _all_seeds(study: Sequence[Row]) -> list[Row]:
    return [run for run in study if "contender" in run and "phase" in run]


def cost_rows(study: Sequence[Row]) -> list[Row]:
    """Rows of learned masks on the machine among those of all studies."""
    return [run for run in study if run.get("record") == "static_cost"]


def tasks(runs: Sequence[Row]) -> list[str]:
    """Their tasks, in order."""
    return list(dict.fromkeys(str(run["task"]) for run in runs))


def sparsest(runs: Sequence[Row]) -> Row | None:
    """The one of lowest density whose relative loss is within the published bound."""
    good = [run for run in runs if relative_loss(run) <= MOST_LOSS]
    return min(good, key=_density, default=None)


def headline_rows(study: Sequence[Row]) -> list[Row]:
    """Accuracy, and the cost of learned masks, beside the abstract; or what would tell."""
    found: list[Row] = []
    quality, cost = quality_rows(study), cost_rows(study)
    for task in tasks(quality):
        learned = [run for run in quality if run["task"] == task and is_static(run)]
        best = sparsest(_plain(learned))
        ours = "no density tried" if best is None else _density(best)
        found.append(_row("headline", f"{task}: lowest density within 1 % of dense", _LOSS, ours))
    if not quality:
        found.append(_absent("headline", "accuracy loss", _LOSS, QUALITY[0]))
    longest: dict[str, int] = {}
    for run in cost:
        longest[run["task_name"]] = max(run["length"], longest.get(run["task_name"], 0))
    for run in cost:
        if run["length"] == longest[run["task_name"]] and run["fidelity"] == "cycle":
            where = f"{run['task_name']}, learned masks, {run['length']} tokens"
            found += _cost(run, "headline", where)
    if not cost:
        found.append(_absent("headline", "cost of learned masks", "-58.9 % or 1.589×", COST[0]))
    return found


def accuracy(study: Sequence[Row]) -> list[Row]:
    """Loss of learned masks and of fixed patterns at equal density, against a dense control."""
    found: list[Row] = []
    runs = quality_rows(study)
    for task in tasks(runs):
        mine = [run for run in runs if run["task"] == task]
        learned = _plain([run for run in mine if is_static(run)])
        best = sparsest(learned)
        ours = "none of those tried" if best is None else _density(best)
        found.append(_row("accuracy", f"{task}: lowest density within 1 % of dense", _LOSS, ours))
        for run in sorted(learned, key=_density):
            at = _asked(run)
            found.append(_loss("accuracy", f"{task}, learned, density {at:g}", run))
            rivals = [x for x in mine if x.get("method") == PATTERNS and _asked(x) == at]
            for rival in rivals:
                found.append(_loss("accuracy", f"{task}, {rival['contender']}", rival, rival=True))
            if rivals:
                closest = min(rivals, key=relative_loss)
                gap = relative_loss(closest) - relative_loss(run)
                quantity = f"{task}, density {at:g}: best pattern's loss less the learned mask's"
                found.append(_row("accuracy", quantity, _UNKNOWN, gap))
    return found or [_absent("accuracy", "loss of learned masks", _LOSS, s) for s in QUALITY]


def seeds(study: Sequence[Row]) -> list[Row]:
    """Mean and largest loss of what ran with several seeds, each against its own dense control."""
    found: list[Row] = []
    runs = _all_seeds(study)
    for task, label in dict.fromkeys((str(run["task"]), str(run["contender"])) for run in runs):
        mine = [run for run in runs if (run["task"], run["contender"]) == (task, label)]
        if len(mine) < 2 or not (is_static(mine[0]) or mine[0].get("method") == PATTERNS):
            continue
        losses = [relative_loss(run) for run in mine]
        names = ", ".join(str(run["seed"]) for run in mine)
        note = "; ".join(
            f"{run['seed']}: {loss:.4g}" for run, loss in zip(mine, losses, strict=True)
        )
        for what, value in (("mean", sum(losses) / len(losses)), ("largest", max(losses))):
            quantity = f"{task}, {label}: relative loss, {what} of seeds {names}"
            published = _LOSS if is_static(mine[0]) else _UNKNOWN
            found.append(_row("seeds", quantity, published, value, note=note))
    return found or [_absent("seeds", "loss with other seeds", _LOSS, s) for s in QUALITY[-2:]]


def ablations(study: Sequence[Row]) -> list[Row]:
    """Without the entropy terms, by mass, without coarse regions, with a budget per head.

    Those of other seeds than a task's first are named by theirs: their control is another.
    """
    found: list[Row] = []
    first = quality_rows(study)
    for run in _all_seeds(study):
        label = str(run["contender"])
        if is_static(run) and "," in label:
            seed = "" if run in first else f" (seed {run['seed']})"
            found.append(_loss("ablations", f"{run['task']}: {label}{seed}", run, rival=True))
    return found or [_absent("ablations", "loss of ablations", _UNKNOWN, s) for s in QUALITY]


def learned(study: Sequence[Row]) -> list[Row]:
    """Masks that were learned, on the machine as it stands, beside the published headline."""
    found: list[Row] = []
    for run in cost_rows(study):
        found += _cost(run, "learned", f"{run['task_name']}, {run['length']} tokens")
    return found or [_absent("learned", "cost of learned masks", "-58.9 % or 1.589×", COST[0])]


_LOSS = "< 1 % accuracy loss"
_UNKNOWN = "not published"


def _cost(run: Row, table: str, where: str) -> Iterator[Row]:
    about = f"{run['scope']}, {run['fidelity']}, read as {run['reading']}"
    at = f"{where}, density {run['tile_density']:.3g}"
    speedup = run["dense_cycles"] / run["cycles"]
    if run["reading"] == "latency":
        pair = ("change of latency", -0.589, 1 / speedup - 1)
    else:
        pair = ("speed-up", 1.589, speedup)
    change = run["energy_total_j"] / run["dense_energy_total_j"] - 1
    for name, published, ours in (pair, ("change of energy", -0.566, change)):
        yield _row(table, f"{at}: {name} ({about})", published, ours, basis="predicted")


def _loss(table: str, name: str, run: Row, *, rival: bool = False) -> Row:
    interval = run.get("loss_interval95")
    note = None
    if interval is not None:
        scale = abs(float(run["dense_value"]))
        note = f"95 % interval {interval[0] / scale:+.4f} to {interval[1] / scale:+.4f}"
    published = _UNKNOWN if rival else _LOSS
    return _row(table, f"{name}: relative loss", published, relative_loss(run), note=note)


def _plain(runs: Sequence[Row]) -> list[Row]:
    """Without ablations, whose labels go on after a comma."""
    return [run for run in runs if "," not in str(run["contender"])]


def _density(run: Row) -> float:
    return float(run.get("tile_density", run["density"]))


def _asked(run: Row) -> float:
    return float((run.get("settings") or {}).get("density", run["density"]))


def _row(
    table: str,
    quantity: str,
    published: float | str,
    ours: float | str,
    *,
    basis: Any = "scenario",
    note: str | None = None,
) -> Row:
    return row(
        PAPER, table, quantity, published, ours, basis=basis, assumptions=(_OURS, _STEPS), note=note
    )


def _absent(table: str, quantity: str, published: str, study: Study) -> Row:
    """What a stored run would say, and the command that makes it."""
    ours = f"not stored: {study.command}"
    where = f"{quantity} ({study.file})"
    return row(PAPER, table, where, published, ours, basis="scenario", assumptions=(_OURS,))
