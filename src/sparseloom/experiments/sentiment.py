"""Sparse attention fine-tuned for sentiment: MiniLM on whole IMDB reviews of up to 512 tokens.

    python -m sparseloom.experiments.sentiment --data DATA --out out/sentiment

MiniLM is first fine-tuned dense on a fixed subset of the training reviews.  From that checkpoint
every contender gets the same extra steps on the same batches: dense (the control), dynamic sparse
attention (its predictor warmed up first, model frozen) at several sparsities, block sizes and
precisions, random masks and static windows.  All are scored on the same test reviews, and losses
against the control come with a paired bootstrap.  Everything is resumable: finished stages lie in
`out`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparseloom.experiments.contenders import (
    Against,
    Log,
    chosen,
    rows_against,
    scored,
    slug,
    study_folder,
    tuned,
)
from sparseloom.experiments.precision import Precision, trained_in
from sparseloom.experiments.study_command import run_command
from sparseloom.integrations.describe import attention_modules
from sparseloom.methods import Dense, DynamicSparse, Method, RandomMask, SlidingWindow
from sparseloom.models import LoadedModel, load_model
from sparseloom.tasks.classification import SentimentClassification
from sparseloom.training import adapt, finetune

CONTROL = "dense"


@dataclasses.dataclass(frozen=True, slots=True)
class Study:
    """What the study holds equal.  Documents seen are steps × `batch`.

    `first` says how many of the contenders run, in their order, 0 for all; `only` names those that
    run beside the control, separated by semicolons.
    """

    length: int = 512
    batch: int = 16
    dense_steps: int = 250
    dense_lr: float = 1e-4
    warmup_steps: int = 300
    joint_steps: int = 120
    query_rows: int = 32
    lr: float = 5e-5
    predictor_lr: float = 1e-2
    projection: float = 0.5
    items: int = 10_000
    fewer_items: int = 2_000
    probe: int = 32
    seed: int = 11
    mixed_precision: Precision = dataclasses.field(default_factory=trained_in)
    first: int = 0
    only: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """A method, on what it is tuned (another contender's model, or its own), and how it counts."""

    method: Method
    tuned_as: str | None = None
    main: bool = False


def contenders(study: Study) -> dict[str, Contender]:
    """What is compared, in the order in which it runs."""

    def dynamic(sparsity: float = 0.9, bits: int = 4, **settings: Any) -> DynamicSparse:
        settings = {"projection": study.projection, "minimum_keys": 1, **settings}
        return DynamicSparse(sparsity=sparsity, bits=bits, **settings)

    return {
        CONTROL: Contender(Dense(), main=True),
        "dynamic 90 %": Contender(dynamic(), main=True),
        "dynamic 95 %": Contender(dynamic(0.95), main=True),
        "dynamic 90 %, (8,1)": Contender(dynamic(block_size=(8, 1)), main=True),
        "random 90 %": Contender(RandomMask(sparsity=0.9, minimum_keys=1)),
        "dynamic 90 %, INT2": Contender(dynamic(bits=2)),
        "dynamic 99 %": Contender(dynamic(0.99)),
        "window 99 %": Contender(SlidingWindow(sparsity=0.99)),
        "dynamic 90 %, FP32": Contender(dynamic(bits=32)),
        "dynamic 90 %, (4,1)": Contender(dynamic(block_size=(4, 1)), "dynamic 90 %, (8,1)"),
        "dense on the model of dynamic 90 %": Contender(Dense(), "dynamic 90 %"),
        "dynamic 90 %, σ 0.25": Contender(dynamic(projection=0.25)),
        "dynamic 90 %, INT8": Contender(dynamic(bits=8)),
        "window 90 %": Contender(SlidingWindow(sparsity=0.9)),
    }


def run_study(study: Study, out: Path, data: Path | None = None) -> list[dict[str, Any]]:
    """Run what is missing in `out` and return the rows of the whole study.

    Raises:
        ValueError: `only` names a contender that there is none of.
    """
    every = contenders(study)
    wanted = chosen(every, CONTROL, study.only, study.first)
    study_folder(out, study, free=("first", "only"))
    console = Console()
    task = SentimentClassification(study.length).load(data)
    base = _base(study, task, out)
    scores: dict[str, dict[str, Any]] = {}
    fewer = CONTROL
    if study.fewer_items != study.items:
        fewer = f"{CONTROL}, {study.fewer_items} reviews"
    for label, contender in wanted.items():
        source = every[contender.tuned_as or label].method
        loaded, method = _tune(study, task, contender.tuned_as or label, source, base, out)
        if contender.tuned_as is not None:
            method = _with_weights(contender.method, method)
        limits = {label: study.items} if contender.main else {label: study.fewer_items}
        if label == CONTROL:
            limits[fewer] = study.fewer_items
        for name, limit in limits.items():
            file = out / f"score-{slug(name)}.json"
            entry = scored(
                file,
                task,
                loaded,
                method,
                limit=limit,
                probe=study.probe,
                autocast=study.mixed_precision == "bf16",
                console=console,
            )
            if limit == study.fewer_items:
                entry["control"] = fewer
            scores[name] = entry
            console.print(f"{name}: {entry['value']:.4f} at density {entry['density']:.4f}")
    return rows_against(Against("minilm", task, CONTROL, study.seed), scores)


def _base(study: Study, task: SentimentClassification, out: Path) -> Path:
    """MiniLM fine-tuned dense: where every contender starts."""
    folder = out / "base"

    def train(loaded: LoadedModel) -> tuple[Method, Log]:
        batches = task.batches(
            loaded, steps=study.dense_steps, batch_size=study.batch, seed=study.seed
        )
        return Dense(), finetune(
            loaded.model,
            Dense(),
            batches,
            steps=study.dense_steps,
            lr=study.dense_lr,
            mixed_precision=study.mixed_precision,
            seed=study.seed,
            out=out / "base-run",
        )

    tuned(folder, lambda: classifier("minilm", study.seed), Dense(), train)
    return folder


def _tune(
    study: Study,
    task: SentimentClassification,
    label: str,
    method: Method,
    base: Path,
    out: Path,
) -> tuple[LoadedModel, Method]:
    """A copy of the base model after the extra steps under `method`."""

    def train(loaded: LoadedModel) -> tuple[Method, Log]:
        run, fitted, steps = out / f"{slug(label)}-run", method, study.warmup_steps
        if isinstance(method, DynamicSparse):
            fitted = adapt(
                loaded.model,
                method,
                task.batches(loaded, steps=steps, batch_size=study.batch, seed=study.seed + 1),
                warmup_steps=steps,
                predictor_lr=study.predictor_lr,
                query_rows=study.query_rows,
                mixed_precision=study.mixed_precision,
                seed=study.seed,
                # What is warmed up depends on the predictor alone, so contenders share it.
                out=out / f"predictor-{method.bits}-{method.projection}-run",
            )
        torch.manual_seed(study.seed)
        return fitted, finetune(
            loaded.model,
            fitted,
            task.batches(
                loaded, steps=study.joint_steps, batch_size=study.batch, seed=study.seed + 2
            ),
            steps=study.joint_steps,
            lr=study.lr,
            predictor_lr=study.predictor_lr / 10,
            query_rows=study.query_rows,
            mixed_precision=study.mixed_precision,
            seed=study.seed,
            out=run,
        )

    return tuned(out / slug(label), lambda: classifier(base, study.seed), method, train)


def classifier(source: str | Path, seed: int) -> LoadedModel:
    """Without dropout of probabilities: PyTorch has no fast CPU attention with it."""
    torch.manual_seed(seed)
    loaded = load_model(str(source), head="classifier")
    for module in attention_modules(loaded.model):
        dropout = getattr(module, "dropout", None)
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.0
    return loaded


def _with_weights(method: Method, trained: Method) -> Method:
    """`method` with the predictor that another one was tuned with."""
    if isinstance(method, DynamicSparse) and isinstance(trained, DynamicSparse):
        return dataclasses.replace(method, predictor=trained.predictor)
    return method


def main() -> None:
    """Command line of the study."""
    run_command("sentiment", __doc__, Study(), run_study)


if __name__ == "__main__":
    main()
