"""SpAtten on fine-tuned encoders: MiniLM on STS-B, SST-2 and CoLA, tokens and heads pruned.

    python -m sparseloom.experiments.spatten_quality --data DATA --out out/spatten_quality

MiniLM is first fine-tuned dense.  From there every contender gets the same further steps on the
same batches with its pruning in the forward pass; dense gets them too, and is the control.  What is
"not fine-tuned" prunes the control's model as it is.  STS-B compares cosines of sentence
embeddings, fine-tuned by their squared error; SST-2 and CoLA have a classifier on top.

Ratios: the paper's average (35 % of the tokens and 10 % of the heads pruned, §V-A), the same at
the length of a typical input and in proportion at others (§I), those that `sparseloom search`
finds on held-out training items, and the curves of Fig. 21.  Dev items are scored and choose
nothing.  Finished stages lie in `out`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from sparseloom.experiments.contenders import (
    Against,
    Log,
    rows_against,
    scored,
    slug,
    tuned,
    without_probability_dropout,
)
from sparseloom.experiments.search import search
from sparseloom.experiments.study_command import run_command
from sparseloom.methods import Dense, Method, SpAtten
from sparseloom.models import LoadedModel, load_model
from sparseloom.tasks import get_task
from sparseloom.tasks.base import Task
from sparseloom.tasks.stsb import SemanticSimilarity, cosine_loss
from sparseloom.training import finetune
from sparseloom.training.loop import LoopSettings

MODEL = "minilm"
"""What is fine-tuned."""

REFERENCE_LENGTH = 25
"""Tokens of a typical input: the mean of SST-2's dev sentences."""

TOKENS = (0.8, 0.65, 0.5, 0.35, 0.25)
HEADS = (0.9, 0.8, 0.65, 0.5)
"""Mean kept shares of the two curves."""

AVERAGE = "tokens 65 %, heads 90 %"
ADAPTIVE = f"{AVERAGE}, at {REFERENCE_LENGTH} tokens"
SEARCHED = "ratios searched"
UNTUNED = ", not fine-tuned"


@dataclasses.dataclass(frozen=True, slots=True)
class Study:
    """What the study holds equal.  `steps` scales the steps of all recipes; 0 items are all."""

    tasks: str = "sts-b,sst-2,cola"
    steps: float = 1.0
    items: int = 0
    trials: int = 30
    search_items: int = 1000
    seed: int = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How a task is fine-tuned: sentences (or pairs) per step, steps and peak rates.

    `base_steps` come before the contenders part, `steps` after.  Word embeddings stay as they are.
    `curves` says whether the contenders of the curves are fine-tuned, too.
    """

    batch: int
    base_steps: int
    steps: int
    base_lr: float
    lr: float
    adaptive: bool = True
    curves: bool = False


RECIPES: dict[str, Recipe] = {
    "sts-b": Recipe(32, 160, 160, 5e-5, 5e-5, adaptive=False, curves=True),
    "sst-2": Recipe(64, 220, 90, 1e-4, 5e-5),
    "cola": Recipe(32, 480, 240, 1e-4, 5e-5),
}

Kind = Literal["control", "average", "adaptive", "searched", "tokens", "heads"]


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """A method, what it is there for, and whether the model is fine-tuned with it."""

    method: Method
    kind: Kind
    tuned: bool = True


def contenders(recipe: Recipe, searched: SpAtten | None) -> dict[str, Contender]:
    """What is compared, in the order in which it runs."""
    average = SpAtten(token_keep=0.65, head_keep=0.9)
    found = {"dense": Contender(Dense(), "control"), AVERAGE: Contender(average, "average")}
    if recipe.adaptive:
        adaptive = dataclasses.replace(average, reference_length=REFERENCE_LENGTH)
        found[ADAPTIVE] = Contender(adaptive, "adaptive")
    if searched is not None:
        found[SEARCHED] = Contender(searched, "searched")
    for keep in TOKENS:
        method = SpAtten(token_keep=keep, head_keep=None)
        found[f"tokens {keep:.0%}"] = Contender(method, "tokens", recipe.curves)
    for keep in HEADS:
        method = SpAtten(token_keep=None, head_keep=keep)
        found[f"heads {keep:.0%}"] = Contender(method, "heads", recipe.curves)
    listed: dict[str, Contender] = {}
    for label, one in found.items():
        if one.tuned:
            listed[label] = one
        if one.kind != "control":
            listed[label + UNTUNED] = dataclasses.replace(one, tuned=False)
    return listed


def run_study(study: Study, out: Path, data: Path | None = None) -> list[dict[str, Any]]:
    """Run what is missing in `out` and return the rows of the whole study."""
    console = Console()
    rows: list[dict[str, Any]] = []
    for name in study.tasks.split(","):
        task = get_task(name).load(data)
        rows += _task_rows(study, task, out / name, console)
    return rows


def _task_rows(study: Study, task: Task, out: Path, console: Console) -> list[dict[str, Any]]:
    """The rows of one task."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[task.name]
    base = _base(study, recipe, task, out)
    control, _ = _tune(study, recipe, task, "dense", Dense(), base, out)
    found = search(
        control,
        task,
        loss=1.0,
        trials=study.trials,
        limit=study.search_items or None,
        out=out / "search",
        seed=study.seed,
        autocast=True,
        console=console,
    )
    assert found.best is None or isinstance(found.best, SpAtten)
    scores: dict[str, dict[str, Any]] = {}
    wanted = contenders(recipe, found.best)
    for label, one in wanted.items():
        loaded = control
        if one.tuned:
            loaded, _ = _tune(study, recipe, task, label, one.method, base, out)
        scores[label] = scored(
            out / f"score-{slug(label)}.json",
            task,
            loaded,
            one.method,
            limit=study.items or None,
            probe=0,
            autocast=True,
            console=console,
        )
        console.print(f"{task.name}, {label}: {scores[label]['value']:.4f}")
    rows = rows_against(Against(MODEL, task, "dense", study.seed), scores)
    for row, one in zip(rows, wanted.values(), strict=True):
        row |= {"kind": one.kind, "fine_tuned": one.tuned, **dataclasses.asdict(recipe)}
    return rows


def _base(study: Study, recipe: Recipe, task: Task, out: Path) -> Path:
    """MiniLM fine-tuned dense: where every contender starts."""
    steps = _steps(study, recipe.base_steps)

    def train(loaded: LoadedModel) -> tuple[Method, Log]:
        return Dense(), _train(loaded, Dense(), task, recipe, steps, recipe.base_lr, study.seed)

    tuned(out / "base", lambda: _fresh(MODEL, task, study.seed), Dense(), train)
    return out / "base"


def _tune(
    study: Study, recipe: Recipe, task: Task, label: str, method: Method, base: Path, out: Path
) -> tuple[LoadedModel, Method]:
    """A copy of the base model after the further steps under `method`."""
    steps = _steps(study, recipe.steps)

    def train(loaded: LoadedModel) -> tuple[Method, Log]:
        return method, _train(loaded, method, task, recipe, steps, recipe.lr, study.seed + 1)

    return tuned(out / slug(label), lambda: _fresh(base, task, study.seed), method, train)


def _train(
    loaded: LoadedModel,
    method: Method,
    task: Task,
    recipe: Recipe,
    steps: int,
    lr: float,
    seed: int,
) -> Log:
    pairs = isinstance(task, SemanticSimilarity)
    draw = task.labelled_batches if pairs else task.batches
    loaded.model.get_input_embeddings().requires_grad_(False)
    torch.manual_seed(seed)
    return finetune(
        loaded.model,
        method,
        draw(loaded, steps=steps, batch_size=recipe.batch, seed=seed),
        steps=steps,
        lr=lr,
        model_loss=cosine_loss if pairs else None,
        mixed_precision="bf16",
        settings=LoopSettings(steps, warmup=0.1, betas=(0.9, 0.999), weight_decay=0.01),
        seed=seed,
    )


def _fresh(source: str | Path, task: Task, seed: int) -> LoadedModel:
    torch.manual_seed(seed)  # of a fresh classifier
    head = "encoder" if isinstance(task, SemanticSimilarity) else "classifier"
    return without_probability_dropout(load_model(source, head=head, classes=task.classes))


def _steps(study: Study, steps: int) -> int:
    return max(1, round(study.steps * steps))


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of two Markdown tables: the contenders of every task, and STS-B's curves.

    Losses are in points (hundredths of the metric), with the one-sided 95 % bound.
    """
    lines = [
        "| task | contender | tokens | heads | MACs | fine-tuned | points lost | not fine-tuned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by = {(row["task"], row["contender"]): row for row in rows}
    for (task, label), row in by.items():
        if row["kind"] == "control":
            value = f"{100 * row['value']:.1f}"
            lines.append(f"| {task} | dense | 100% | 100% | 100% | {value} | – | – |")
        elif row["kind"] in ("average", "adaptive", "searched") and row["fine_tuned"]:
            lines.append(f"| {task} | {label} | {_cells(row, by[task, label + UNTUNED])} |")
    lines += [
        "",
        "| kept on STS-B | tokens | heads | MACs | fine-tuned | points lost | not fine-tuned |",
        "|---|---|---|---|---|---|---|",
    ]
    for (task, label), row in by.items():
        if row["kind"] in ("tokens", "heads") and row["fine_tuned"]:
            lines.append(f"| {label} | {_cells(row, by[task, label + UNTUNED])} |")
    return lines


def _cells(row: Mapping[str, Any], untuned: Mapping[str, Any]) -> str:
    shares = [f"{row[key]:.0%}" for key in ("tokens_alive", "heads_alive", "macs_left")]
    lost = f"{100 * row['loss']:.1f} (≤ {100 * row['loss_upper95']:.1f})"
    cells = [*shares, f"{100 * row['value']:.1f}", lost, f"{100 * untuned['value']:.1f}"]
    return " | ".join(cells)


def main() -> None:
    """Command line of the study."""
    run_command("spatten_quality", __doc__, Study(), run_study)


if __name__ == "__main__":
    main()
