"""Old and new ideas of predicting which keys matter, in one table.

    python -m sparseloom.experiments.predictors --out out/predictors

On the built-in model at its full context: every predictor is trained alone, the model frozen, with
equal steps on equal batches, and scored on equal held-out windows at one sparsity, beside the
oracle, a fixed window and random keys.  One trained predictor of dynamic sparse attention also
runs with one mask for all heads, in local top-k and in 64×64 blocks.  Resumable: every predictor
and every score is kept in `out`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

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
from sparseloom.methods import (
    AttentionGate,
    Dense,
    DynamicSparse,
    LightningIndexer,
    Method,
    Oracle,
    Predicting,
    RandomMask,
    SlidingWindow,
)
from sparseloom.models import LoadedModel, load_model
from sparseloom.tasks import Task, get_task
from sparseloom.training import adapt

BLOCK = (64, 64)
_CURVE = 10  # steps between the points of a stored curve


@dataclasses.dataclass(frozen=True, slots=True)
class Study:
    """What the study holds equal; `windows` are scored, `probe` of them beside the oracle, and
    `steps` × `batch` are trained on."""

    sparsity: float = 0.9
    projection: float = 0.5
    bits: int = 4
    tile: int = 256
    windows: int = 12
    probe: int = 2
    steps: int = 150
    batch: int = 1
    context: int = 2048
    predictor_lr: float = 3e-3
    seed: int = 7
    mixed_precision: Precision = dataclasses.field(default_factory=trained_in)


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """A predictor to train, and the names and methods that it is scored as."""

    method: Predicting
    loss: Literal["kl", "mse"]
    scored_as: Mapping[str, Callable[[Any], Method]]


def same(method: Method) -> Method:
    """The method as it was trained."""
    return method


def changed(**settings: Any) -> Callable[[Any], Method]:
    """The same weights at other settings."""

    def change(method: Any) -> Method:
        return dataclasses.replace(method, **settings)

    return change


def trained(study: Study) -> dict[str, Trained]:
    """The predictors of the study by the name of their folder."""
    sparsity = study.sparsity
    plain = DynamicSparse(sparsity=sparsity, projection=study.projection, bits=study.bits)
    return {
        "dynamic": Trained(
            plain,
            "kl",
            {
                "dynamic": same,
                "dynamic, one mask for all heads": changed(mask_heads="one"),
                "dynamic, local top-k": changed(tile=study.tile),
                "dynamic 64×64": changed(block_size=BLOCK),
            },
        ),
        "dynamic-mse": Trained(plain, "mse", {"dynamic, MSE": same}),
        "dynamic-plain": Trained(
            dataclasses.replace(plain, rotary=False), "kl", {"dynamic, not rotated": same}
        ),
        "indexer": Trained(LightningIndexer(sparsity=sparsity), "kl", {"indexer": same}),
        "gate": Trained(AttentionGate(sparsity=sparsity, block_size=BLOCK), "kl", {"gate": same}),
    }


def untrained(study: Study) -> dict[str, Method]:
    """What the predictors are set beside."""
    sparsity = study.sparsity
    return {
        "dense": Dense(),
        "oracle": Oracle(sparsity=sparsity),
        "oracle 64×64": Oracle(sparsity=sparsity, block_size=BLOCK),
        "window": SlidingWindow(sparsity=sparsity),
        "random": RandomMask(sparsity=sparsity),
    }


def run_study(study: Study, out: Path) -> list[dict[str, Any]]:
    """Run what is missing in `out` and return the rows of the whole study."""
    study_folder(out, study)
    task = get_task("stdlib").load()
    base = load_model("stdlib")
    scores: dict[str, dict[str, Any]] = {}
    more: dict[str, dict[str, Any]] = {}

    def score(label: str, method: Method) -> None:
        file = out / f"score-{slug(label)}.json"
        found = scored(file, task, base, method, limit=study.windows, probe=study.probe)
        scores[label] = found
        more[label] = {"prediction_macs_share": found["prediction_macs_share"]}

    for label, method in untrained(study).items():
        score(label, method)
    for name, entry in trained(study).items():
        method, curve = _train(study, entry, task, out / name)
        for label, change in entry.scored_as.items():
            score(label, change(method))
            more[label].update(
                warmup_steps=study.steps, batch=study.batch, loss_name=entry.loss, curve=curve
            )
    rows = rows_against(Against("stdlib", task, "dense", study.seed), scores)
    return [{**row, **more[row["contender"]]} for row in rows]


def _train(
    study: Study, entry: Trained, task: Task, folder: Path
) -> tuple[Method, list[list[float]]]:
    """The trained predictor and its loss, (step, mean of the last ten steps)."""
    run = folder.with_name(f"{folder.name}-run")

    def train(loaded: LoadedModel) -> tuple[Method, Log]:
        sizes = {"steps": study.steps, "batch_size": study.batch, "context": study.context}
        method = adapt(
            loaded.model,
            entry.method,
            list(task.batches(loaded, **sizes, seed=study.seed)),
            warmup_steps=study.steps,
            loss=entry.loss,
            predictor_lr=study.predictor_lr,
            mixed_precision=study.mixed_precision,
            seed=study.seed,
            out=run,
        )
        return method, torch.load(run / "warm-up.pt", weights_only=True)["log"]

    method = tuned(folder, lambda: load_model("stdlib"), entry.method, train)[1]
    log: Log = json.loads(folder.with_name(f"{folder.name}-curve.json").read_text())
    parts = [log[i : i + _CURVE] for i in range(0, len(log), _CURVE)]
    means = [
        [part[-1]["step"], float(np.mean([row[entry.loss] for row in part]))] for part in parts
    ]
    return method, means


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as a table in Markdown, best first."""
    lines = [
        "| selection | density | bits per byte | against dense | retained mass | of the oracle's "
        "| prediction, share of dense MACs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["value"]):
        ours, best = row.get("retained_mass") or [], row.get("oracle_mass") or []
        worst = min((a / b for a, b in zip(ours, best, strict=True)), default=None)
        dense = row["contender"] == "dense"
        cells = [
            row["contender"],
            f"{row['density']:.1%}",
            f"{row['value']:.4f}",
            "–" if dense else f"{row['difference']:+.4f} (≤ {row['difference_upper95']:+.4f})",
            "–" if worst is None else f"{np.mean(ours):.1%}",
            "–" if worst is None else f"{worst:.1%}",
            f"{row['prediction_macs_share']:.2%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Command line of the study; its table is printed."""

    def run(study: Study, out: Path, _: Path | None) -> list[dict[str, Any]]:
        rows = run_study(study, out)
        sys.stdout.write("\n".join(table(rows)) + "\n")
        return rows

    run_command("predictors", __doc__, Study(), run)


if __name__ == "__main__":
    main()
