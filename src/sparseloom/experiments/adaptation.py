"""The adaptation study: every contender tuned equally, then scored on the same held-out windows.

    python -m sparseloom.experiments.adaptation --out out/adaptation

From the built-in model, with equal optimiser steps on equal batches: dense (the control), dynamic
sparse attention (its predictor warmed up first, model frozen), a fixed and a growing window.  The
tuned dynamic model is also scored dense, under the oracle, and in 8×1 vectors.  Differences of
bits per byte come with a paired bootstrap over windows.  Stages are resumable: each keeps its
checkpoint and its scores in `out`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparseloom.experiments.bootstrap import paired_bootstrap
from sparseloom.experiments.compare import settings_of
from sparseloom.integrations import sparsify
from sparseloom.methods import Dense, DynamicSparse, Method, Oracle, SlidingWindow
from sparseloom.models import LoadedModel, load_model
from sparseloom.results import write_results
from sparseloom.tasks import get_task
from sparseloom.training import adapt, finetune, load, save


@dataclasses.dataclass(frozen=True, slots=True)
class Study:
    """What the study holds equal.  `windows` are scored, `joint_steps` × `batch` are trained on."""

    sparsity: float = 0.9
    projection: float = 0.5
    bits: int = 4
    windows: int = 64
    warmup_steps: int = 400
    warmup_batch: int = 2
    joint_steps: int = 60
    joint_batch: int = 2
    lr: float = 1e-4
    predictor_lr: float = 3e-3
    seed: int = 7


def run_study(study: Study, out: Path) -> list[dict[str, Any]]:
    """Run what is missing in `out` and return the rows of the whole study."""
    out.mkdir(parents=True, exist_ok=True)
    dynamic = _warm_up(study, out / "predictor")
    contenders: dict[str, Method] = {
        "dense": Dense(),
        "dynamic": dynamic,
        "window": SlidingWindow(sparsity=study.sparsity),
        "window growing": SlidingWindow(sparsity=study.sparsity, growing=True),
    }
    scores: dict[str, dict[str, Any]] = {}
    for name, method in contenders.items():
        loaded, tuned = _tune(study, name, method, out)
        for label, run in _scored_as(study, name, tuned).items():
            scores[label] = _score(study, label, loaded, run, out)
    base = load_model("stdlib")
    scores["dense, untuned"] = _score(study, "dense, untuned", base, Dense(), out)
    scores["dynamic, model untuned"] = _score(study, "dynamic, model untuned", base, dynamic, out)
    return _rows(study, scores)


def _scored_as(study: Study, name: str, tuned: Method) -> Mapping[str, Method]:
    """The methods that one tuned model is scored under."""
    if not isinstance(tuned, DynamicSparse):
        return {name: tuned}
    return {
        "dynamic": tuned,
        "dynamic 8×1": dataclasses.replace(tuned, block_size=(8, 1)),
        "oracle on the dynamic model": Oracle(sparsity=study.sparsity),
        "oracle 8×1 on the dynamic model": Oracle(sparsity=study.sparsity, block_size=(8, 1)),
        "dense on the dynamic model": Dense(),
    }


def _warm_up(study: Study, folder: Path) -> DynamicSparse:
    """The predictor, trained against the frozen built-in model; what the package ships."""
    if (folder / "config.json").exists():
        method = load(folder)[1]
        assert isinstance(method, DynamicSparse)
        return method
    loaded = load_model("stdlib")
    batches = _batches(loaded, study.warmup_steps, study.warmup_batch, study.seed)
    method = adapt(
        loaded.model,
        DynamicSparse(sparsity=study.sparsity, projection=study.projection, bits=study.bits),
        batches,
        warmup_steps=study.warmup_steps,
        predictor_lr=study.predictor_lr,
        mixed_precision="bf16",
        seed=study.seed,
        out=folder.with_name("predictor-run"),
    )
    save(loaded.model, method, folder)
    return method


def _tune(study: Study, name: str, method: Method, out: Path) -> tuple[LoadedModel, Method]:
    """A fresh copy of the built-in model fine-tuned under `method`, or the finished one."""
    folder = out / name.replace(" ", "-")
    if (folder / "config.json").exists():
        model, tuned = load(folder)
        return LoadedModel(name, model.float(), None), tuned
    loaded = load_model("stdlib")
    batches = _batches(loaded, study.joint_steps, study.joint_batch, study.seed + 1)
    log = finetune(
        loaded.model,
        method,
        batches,
        steps=study.joint_steps,
        lr=study.lr,
        predictor_lr=study.predictor_lr / 10,
        mixed_precision="bf16",
        seed=study.seed,
        out=folder.with_name(folder.name + "-run"),
    )
    (out / f"{folder.name}-curve.json").write_text(json.dumps(log))
    save(loaded.model, method, folder)
    return loaded, method


def _batches(loaded: LoadedModel, steps: int, size: int, seed: int) -> list[Any]:
    task = get_task("stdlib").load()
    return list(task.batches(loaded, steps=steps, batch_size=size, seed=seed))


def _score(
    study: Study, label: str, loaded: LoadedModel, method: Method, out: Path
) -> dict[str, Any]:
    """Bits per byte of each window, density and prediction accuracy; kept in `out`."""
    file = out / f"score-{label.replace(' ', '-').replace(',', '').replace('×', 'x')}.json"
    if file.exists():
        return json.loads(file.read_text())
    task = get_task("stdlib").load()
    with sparsify(loaded.model, method, when="always") as sparse:
        score = task.score(loaded, limit=study.windows)
        layers = sparse.stats()
    accuracy: dict[str, list[float]] = {}
    if not isinstance(method, Dense):
        with torch.no_grad(), sparsify(loaded.model, method, diagnose=True) as sparse:
            for inputs in task.inputs(loaded, limit=4):
                loaded.model(**inputs)
        rows = sparse.stats()
        accuracy = {
            "prediction_accuracy": [row["prediction_overlap"] for row in rows],
            "retained_mass": [row["retained_mass"] for row in rows],
            "oracle_mass": [row["oracle_mass"] for row in rows],
        }
    allowed = sum(layer["allowed_pairs"] for layer in layers)
    kept = sum(layer["kept_pairs"] for layer in layers)
    entry = {
        "method": method.name,
        "settings": settings_of(method),
        "value": score.value,
        "per_item": [float(x) for x in score.per_item],
        "density": kept / allowed,
        "accuracy": accuracy,
        "notes": list(score.notes),
    }
    file.write_text(json.dumps(entry))
    return entry


def _rows(study: Study, scores: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    dense = np.array(scores["dense"]["per_item"])
    dynamic = np.array(scores["dynamic"]["per_item"])
    best = min(("window", "window growing"), key=lambda name: scores[name]["value"])
    rows = []
    for label, entry in scores.items():
        ours = np.array(entry["per_item"])
        against = paired_bootstrap(ours, dense)
        row = {
            "model": "stdlib",
            "task": "stdlib",
            "contender": label,
            "method": entry["method"],
            "settings": entry["settings"],
            "sparsity": None if entry["method"] == "dense" else study.sparsity,
            "density": entry["density"],
            "metric": "bits_per_byte",
            "value": entry["value"],
            "dense_value": scores["dense"]["value"],
            "difference": against.mean,
            "difference_upper95": against.upper95,
            "items": against.items,
            **entry["accuracy"],
            "seed": study.seed,
            "note": "; ".join(entry["notes"]),
        }
        if label == best:
            gain = paired_bootstrap(dynamic, ours)
            row["dynamic_minus_this"] = gain.mean
            row["dynamic_minus_this_upper95"] = gain.upper95
        rows.append(row)
    return rows


def main() -> None:
    """Command line of the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/adaptation"))
    parser.add_argument("--results", type=Path, default=Path("results/adaptation.json"))
    for field in dataclasses.fields(Study):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    out, results = arguments.pop("out"), arguments.pop("results")
    rows = run_study(Study(**arguments), out)
    write_results(results, rows, command="python -m sparseloom.experiments.adaptation")


if __name__ == "__main__":
    main()
