"""The adaptation study: every contender tuned equally, then scored on the same held-out windows.

    python -m sparseloom.experiments.adaptation --out out/adaptation

From the built-in model, with equal optimiser steps on equal batches: dense (the control), dynamic
sparse attention (its predictor warmed up first, model frozen), a fixed and a growing window.  The
tuned dynamic model is also scored dense, under the oracle, and in 8×1 vectors.  Differences of
bits per byte come with a paired bootstrap over windows.  Stages are resumable: each keeps its
checkpoint and its scores in `out`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseloom.experiments.bootstrap import paired_bootstrap
from sparseloom.experiments.contenders import (
    Against,
    Log,
    rows_against,
    scored,
    slug,
    study_folder,
    tuned,
)
from sparseloom.experiments.precision import Precision, trained_in
from sparseloom.experiments.study_command import run_command
from sparseloom.methods import Dense, DynamicSparse, Method, Oracle, RandomMask, SlidingWindow
from sparseloom.models import LoadedModel, load_model
from sparseloom.tasks import Task, get_task
from sparseloom.training import adapt, finetune


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
    mixed_precision: Precision = dataclasses.field(default_factory=trained_in)


def contenders(study: Study, dynamic: DynamicSparse) -> dict[str, tuple[Method, Method | None]]:
    """Name → method, and the method whose tuned model it is scored on where that is not its own."""
    half = (1.0 - study.sparsity) / 2
    sparser = dataclasses.replace(dynamic, sparsity=1.0 - half)
    vectors = dataclasses.replace(dynamic, block_size=(8, 1))
    return {
        "dense": (Dense(), None),
        "dynamic": (dynamic, None),
        "dynamic, half the keys": (sparser, None),
        "dynamic 8×1": (vectors, dynamic),
        "dynamic 8×1, tuned so": (vectors, None),
        "dynamic, half the keys, tuned with all": (sparser, dynamic),
        "oracle on the dynamic model": (Oracle(sparsity=study.sparsity), dynamic),
        "oracle 8×1 on the dynamic model": (
            Oracle(sparsity=study.sparsity, block_size=(8, 1)),
            dynamic,
        ),
        "dense on the dynamic model": (Dense(), dynamic),
        "window": (SlidingWindow(sparsity=study.sparsity), None),
        "window growing": (SlidingWindow(sparsity=study.sparsity, growing=True), None),
        "random": (RandomMask(sparsity=study.sparsity), None),
    }


def run_study(study: Study, out: Path) -> list[dict[str, Any]]:
    """Run what is missing in `out` and return the rows of the whole study."""
    study_folder(out, study)
    task = get_task("stdlib").load()
    dynamic = _warm_up(study, out / "predictor")
    wanted = contenders(study, dynamic)
    scores: dict[str, dict[str, Any]] = {}
    for label, (method, source) in wanted.items():
        name = next(key for key, (one, _) in wanted.items() if one is (source or method))
        loaded, trained = _tune(study, name, wanted[name][0], out)
        if isinstance(method, DynamicSparse) and isinstance(trained, DynamicSparse):
            method = dataclasses.replace(method, predictor=trained.predictor)
        scores[label] = _score(study, label, task, loaded, method, out)
    base = load_model("stdlib")
    scores["dense, untuned"] = _score(study, "dense, untuned", task, base, Dense(), out)
    label = "dynamic, model untuned"
    scores[label] = _score(study, label, task, base, dynamic, out)
    rows = rows_against(Against("stdlib", task, "dense", study.seed), scores)
    _beside_the_best_window(rows, scores)
    return rows


def _warm_up(study: Study, folder: Path) -> DynamicSparse:
    """The predictor, trained against the frozen built-in model; what the package ships."""
    wanted = DynamicSparse(sparsity=study.sparsity, projection=study.projection, bits=study.bits)

    def train(loaded: LoadedModel) -> tuple[Method, Log]:
        batches = _batches(loaded, study.warmup_steps, study.warmup_batch, study.seed)
        method = adapt(
            loaded.model,
            wanted,
            batches,
            warmup_steps=study.warmup_steps,
            predictor_lr=study.predictor_lr,
            mixed_precision=study.mixed_precision,
            seed=study.seed,
            out=folder.with_name("predictor-run"),
        )
        return method, []

    method = tuned(folder, lambda: load_model("stdlib"), wanted, train)[1]
    assert isinstance(method, DynamicSparse)
    return method


def _tune(study: Study, name: str, method: Method, out: Path) -> tuple[LoadedModel, Method]:
    """A copy of the built-in model fine-tuned under `method`."""
    folder = out / slug(name)
    method = copy.deepcopy(method)  # a predictor is trained in place

    def train(loaded: LoadedModel) -> tuple[Method, Log]:
        log = finetune(
            loaded.model,
            method,
            _batches(loaded, study.joint_steps, study.joint_batch, study.seed + 1),
            steps=study.joint_steps,
            lr=study.lr,
            predictor_lr=study.predictor_lr / 10,
            mixed_precision=study.mixed_precision,
            seed=study.seed,
            out=folder.with_name(folder.name + "-run"),
        )
        return method, log

    return tuned(folder, lambda: load_model("stdlib"), method, train)


def _batches(loaded: LoadedModel, steps: int, size: int, seed: int) -> list[Any]:
    task = get_task("stdlib").load()
    return list(task.batches(loaded, steps=steps, batch_size=size, seed=seed))


def _score(
    study: Study, label: str, task: Task, loaded: LoadedModel, method: Method, out: Path
) -> dict[str, Any]:
    file = out / f"score-{slug(label)}.json"
    return scored(file, task, loaded, method, limit=study.windows, probe=4)


def _beside_the_best_window(
    rows: list[dict[str, Any]], scores: Mapping[str, dict[str, Any]]
) -> None:
    """Adds to the better window's row by how much dynamic beats it."""
    best = min(("window", "window growing"), key=lambda name: scores[name]["value"])
    ours, theirs = (np.array(scores[name]["per_item"]) for name in ("dynamic", best))
    gain = paired_bootstrap(ours, theirs)
    row = next(row for row in rows if row["contender"] == best)
    row["dynamic_minus_this"] = gain.mean
    row["dynamic_minus_this_upper95"] = gain.upper95


def main() -> None:
    """Command line of the study."""
    run_command("adaptation", __doc__, Study(), lambda study, out, _: run_study(study, out))


if __name__ == "__main__":
    main()
