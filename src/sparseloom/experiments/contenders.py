"""Studies of contenders: each tuned once, scored on the same items, compared item by item.

What is finished lies in the study's folder and is never made again: a tuned model as a saved
model, a score as a JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from sparseloom.errors import unknown_name
from sparseloom.experiments.bootstrap import (
    PairedDifference,
    paired_bootstrap,
    paired_bootstrap_of,
)
from sparseloom.experiments.compare import settings_of
from sparseloom.integrations import sparsify
from sparseloom.integrations.stats import left_of
from sparseloom.methods import Dense, Method, Selector
from sparseloom.models import LoadedModel
from sparseloom.tasks import Task
from sparseloom.training import load, save

Log = list[dict[str, float]]
Contender = TypeVar("Contender")


def study_folder(out: Path, study: Any, free: Collection[str] = ()) -> None:
    """Make the folder of a study, which belongs to it alone: its stages are known by name only.

    Args:
        out: of the stages.
        study: its settings, a dataclass instance.
        free: settings that stages do not depend on.

    Raises:
        ValueError: stages of other settings lie there.
    """
    ours = {key: value for key, value in asdict(study).items() if key not in free}
    ours = json.loads(json.dumps(ours))
    file = out / "study.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(ours), encoding="utf-8")
        part.replace(file)
        return
    kept = json.loads(file.read_text(encoding="utf-8"))
    other = next((key for key in sorted({*kept, *ours}) if kept.get(key) != ours.get(key)), None)
    if other is not None:
        raise ValueError(
            f"out: {out} belongs to a study with {other} {kept.get(other)!r}, and this one has "
            f"{ours.get(other)!r}; choose a fresh folder"
        )


def chosen(
    every: Mapping[str, Contender], control: str, only: str, first: int = 0
) -> dict[str, Contender]:
    """The contenders that run, in the order of `every`.

    Args:
        every: those that there are, by name.
        control: always among them, where it is one of the first.
        only: names separated by semicolons; empty for all.
        first: how many of `every` are there to choose from; 0 for all.

    Raises:
        ValueError: `only` names one that there is none of, or `first` is negative.
    """
    if first < 0:
        raise ValueError(f"first must be 0 for all contenders or how many run, got {first}")
    names = [name.strip() for name in only.split(";") if name.strip()]
    for name in names:
        if name not in every:
            raise unknown_name("only", name, every)
    return {
        name: one
        for name, one in list(every.items())[: first or None]
        if not names or name in (control, *names)
    }


def tuned(
    folder: Path,
    make: Callable[[], LoadedModel],
    method: Method,
    train: Callable[[LoadedModel], tuple[Method, Log]],
) -> tuple[LoadedModel, Method]:
    """The model and method that `folder` holds, or those that `train` makes of a fresh model.

    `train` returns the method with its trained weights and the log of its steps, which is stored
    as FOLDER-curve.json.
    """
    fresh = make()
    if (folder / "config.json").exists():
        model, stored = load(folder)
        return LoadedModel(fresh.name, model.float(), fresh.tokenizer), stored
    method, log = train(fresh)
    folder.with_name(f"{folder.name}-curve.json").write_text(json.dumps(log))
    save(fresh.model, method, folder)
    if fresh.tokenizer is not None:
        fresh.tokenizer.save_pretrained(folder)
    fresh.model.eval()
    return fresh, method


def scored(
    file: Path,
    task: Task,
    loaded: LoadedModel,
    method: Method,
    *,
    limit: int | None,
    probe: int,
    autocast: bool = False,
    console: Any = None,
) -> dict[str, Any]:
    """Score per item, density, and how well the method's choices were predicted; kept in `file`.

    Args:
        limit: items to score.
        probe: items on which selected masks are compared with the exact ones (slow); 0 for none.
        autocast: run the model in bf16.
        console: where a progress bar is shown.
    """
    if file.exists():
        return json.loads(file.read_text())
    from rich.progress import Progress

    device = loaded.model.device.type
    with (
        torch.autocast(device, torch.bfloat16, enabled=autocast),
        Progress(console=console, transient=True) as bar,
        sparsify(loaded.model, method, when="always") as sparse,
    ):
        shown = bar.add_task(f"score {file.stem}", total=None)
        score = task.score(
            loaded,
            limit=limit,
            progress=lambda done, total: bar.update(shown, completed=done, total=total),
        )
        layers = sparse.stats()
    quality: dict[str, Any] = {}
    if probe and isinstance(method, Selector) and not isinstance(method, Dense):
        with torch.no_grad(), sparsify(loaded.model, method, diagnose=True) as sparse:
            for inputs in task.inputs(loaded, limit=probe):
                loaded.model(**inputs)
        rows = sparse.stats()
        quality = {
            "prediction_accuracy": [row["prediction_overlap"] for row in rows],
            "retained_mass": [row["retained_mass"] for row in rows],
            "oracle_mass": [row["oracle_mass"] for row in rows],
            "prediction_accuracy_by_head": [row["prediction_overlap_by_head"] for row in rows],
            "retained_mass_by_head": [row["retained_mass_by_head"] for row in rows],
            "oracle_mass_by_head": [row["oracle_mass_by_head"] for row in rows],
        }
    entry = {
        "method": method.name,
        "settings": settings_of(method),
        "value": score.value,
        "per_item": [float(x) for x in score.per_item],
        "density": sum(x["kept_pairs"] for x in layers) / sum(x["allowed_pairs"] for x in layers),
        "macs": sum(x["attention_macs"] + x["prediction_macs"] for x in layers)
        / len(score.per_item),
        "prediction_macs_share": sum(x["prediction_macs"] for x in layers)
        / sum(x["dense_macs"] for x in layers),
        "accuracy": quality,
        "notes": list(score.notes),
    }
    if score.gold is not None:
        entry["gold"] = [float(x) for x in score.gold]
    if "linear_macs" in layers[0]:
        entry["left"] = left_of(layers)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(entry))
    part.replace(file)
    return entry


@dataclass(frozen=True, slots=True)
class Against:
    """What the rows of one study have in common: names, and the contender they are held against."""

    model: str
    task: Task
    control: str
    seed: int


def rows_against(study: Against, scores: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per contender in the results schema, with its paired loss against the control.

    `difference` is ours − control; `loss` counts what is lost as positive whichever way the
    metric points, with its one-sided 95 % bound.  An entry may name another control (`control`),
    such as the same one scored on as few items.
    """
    control = scores[study.control]
    rows: list[dict[str, Any]] = []
    for label, entry in scores.items():
        theirs = scores.get(entry.get("control", study.control), control)
        against = _against(study.task, entry, theirs)
        lost = against.negated if study.task.higher_is_better else against
        rows.append(
            {
                "model": study.model,
                "task": study.task.name,
                "contender": label,
                "method": entry["method"],
                "settings": entry["settings"],
                "sparsity": entry["settings"].get("sparsity"),
                "density": entry["density"],
                **({"macs": entry["macs"]} if "macs" in entry else {}),  # not in older scores
                "metric": study.task.metric,
                "value": entry["value"],
                "dense_value": theirs["value"],
                "difference": against.mean,
                "difference_upper95": against.upper95,
                "loss": lost.mean,
                "loss_upper95": lost.upper95,
                "loss_interval95": list(lost.interval95),
                "items": against.items,
                **entry["accuracy"],
                **entry.get("left", {}),
                "seed": study.seed,
                "note": "; ".join(entry["notes"]),
            }
        )
    return rows


def _against(task: Task, one: Mapping[str, Any], other: Mapping[str, Any]) -> PairedDifference:
    """One entry minus the other."""
    ours, theirs = np.array(one["per_item"]), np.array(other["per_item"])
    if "gold" not in one:
        return paired_bootstrap(ours, theirs)
    return paired_bootstrap_of(task.value_of, ours, theirs, np.array(one["gold"]))


def slug(label: str) -> str:
    """A label as the name of a file."""
    kept = "".join(c if c.isalnum() or c == "." else "-" for c in label.replace("×", "x"))
    return "-".join(part for part in kept.split("-") if part)
