"""Which settings of a pruning method compute least while a task's metric stays within a bound?

The SpAtten authors tried "multiple sets" of ratios per task by hand and took one without loss of
accuracy (Wang et al., HPCA 2021, §V-A).  Here optuna's tree-structured Parzen estimator proposes
them, and each is scored on the same items.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparseloom.errors import require, unknown_name
from sparseloom.experiments.bootstrap import paired_bootstrap, paired_bootstrap_of
from sparseloom.experiments.compare import settings_of
from sparseloom.integrations import sparsify
from sparseloom.integrations.describe import describe
from sparseloom.integrations.stats import left_of
from sparseloom.methods import Method, SpAtten
from sparseloom.models import LoadedModel, load_model
from sparseloom.results import ResultsFile, write_results
from sparseloom.results import results as as_results
from sparseloom.schedules import HEAD_FRONT, LARGEST_END, front_layers
from sparseloom.tasks import get_task
from sparseloom.tasks.base import Score, Task

if TYPE_CHECKING:
    from rich.console import Console


def spatten(layers: int, draw: Callable[[str, float, float], float]) -> SpAtten:
    """A setting for an encoder of so many layers.

    What is drawn is what the rule of §V-A is made of: how many layers stay whole, the mean share
    that the others lose, and where between its least and that mean the first of them begins.

    Args:
        layers: of the model.
        draw: (name, lowest, highest) → a number in between.
    """
    front = round(draw("front", 1, max(1, layers // 2)))
    head_front = front_layers(layers, HEAD_FRONT)
    token_keep, start = _rule(layers, front, draw, "token")
    head_keep, head_start = _rule(layers, head_front, draw, "head")
    return SpAtten(
        token_keep=token_keep,
        head_keep=head_keep,
        front=floor(1e4 * front / layers) / 1e4,  # its ceiling is asked for
        start_ratio=start,
        head_start_ratio=head_start,
    )


def _rule(
    layers: int, whole: int, draw: Callable[[str, float, float], float], of: str
) -> tuple[float, float | None]:
    """Mean kept share over all layers, and the share that the first pruning layer loses."""
    pruned = layers - whole
    drawn = draw(f"{of}_pruned", 0.0, LARGEST_END)
    begin = draw(f"{of}_start", 0.0, 1.0)
    keep = round(1 - drawn * pruned / layers, 4)
    mean = (1 - keep) * layers / pruned
    if keep == 1 or mean > LARGEST_END:
        return 1.0 if keep == 1 else keep + 1e-4, None
    least = max(0.0, 2 * mean - LARGEST_END)
    first = round(least + begin * (mean - least), 4)
    return keep, min(max(first, least), mean)


SPACES: Mapping[str, Callable[..., Method]] = {"spatten": spatten}
"""What can be searched: tag → (layers, draw) → method."""

FIRST: Mapping[str, Sequence[Mapping[str, float]]] = {
    "spatten": (
        # The paper's average (§V-A), half of it, and a little of it.
        {"front": 1, "token_pruned": 0.42, "token_start": 0.5, "head_pruned": 0.15,
         "head_start": 0.5},
        {"front": 1, "token_pruned": 0.21, "token_start": 0.5, "head_pruned": 0.0,
         "head_start": 0.5},
        {"front": 1, "token_pruned": 0.1, "token_start": 1.0, "head_pruned": 0.0,
         "head_start": 0.5},
    )
}  # fmt: skip
"""Settings that are tried first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search.

    Attributes:
        best: what computes least within the bound; None where nothing tried was within.
        results: one row per distinct setting, in the results schema: `macs_left`, `loss` in points
            with its one-sided 95 % bound, whether it is `within` the bound, on the `pareto` front,
            and the `best`.
    """

    best: Method | None
    results: ResultsFile


def search(
    model: str | LoadedModel,
    task: str | Task,
    *,
    method: str = "spatten",
    loss: float = 1.0,
    trials: int = 40,
    limit: int | None = None,
    data: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    autocast: bool = False,
    command: str = "sparseloom search",
    console: Console | None = None,
) -> Found:
    """Try settings of a method on a model as it is, and keep the cheapest within a bound.

    The items are those of the task's held-out training part where it has one (`Task.held_out`),
    so that the items of its score stay unseen; a note in the rows says which.

    Args:
        model: a built-in name, a Hugging Face folder or hub name, or a loaded encoder.
        task: a task name, or a task.
        method: what is searched; `"spatten"`.
        loss: how much of the metric may be lost against dense, in points (hundredths).
        trials: settings to try, those of an earlier run in `out` included.
        limit: items to score; None takes all.
        data: folder of the task's data, where `task` is a name.
        out: folder that keeps the trials, so that a search that was stopped goes on, and gets the
            results as `search.json`.
        seed: of what is drawn.  A search that was stopped draws what one that was not would.
        autocast: run the model in bf16.

    Raises:
        ValueError: an unknown name, a setting out of range, a decoder, or trials of another search
            in `out`.
        ImportError: optuna is missing.
    """
    if method not in SPACES:
        raise unknown_name("method to search", method, SPACES)
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if not loss >= 0:
        raise ValueError(f"loss must be 0 or more points, got {loss}")
    optuna = require("optuna", extra="search")
    whole = get_task(task) if isinstance(task, str) else task
    if isinstance(task, str):
        whole.load(data)
    scorer = whole.held_out() or whole
    loaded = model
    if not isinstance(loaded, LoadedModel):
        torch.manual_seed(seed)
        loaded = load_model(loaded, head=whole.head, classes=whole.classes)
    if describe(loaded.model).is_causal:
        raise ValueError(
            f"model must be an encoder, which {method} shortens, and {loaded.name!r} is a decoder"
        )
    if describe(loaded.model).layers < 2:
        raise ValueError("model must have at least 2 layers: the first is never pruned, got 1")
    run = _Search(loaded, scorer, SPACES[method], loss, limit, autocast)
    about = {
        "model": loaded.name, "task": whole.name, "method": method, "loss": loss, "limit": limit,
        "seed": seed, "held_out": scorer is not whole,
    }  # fmt: skip
    said = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = _study(optuna, out, about, FIRST[method])
        _run(optuna, study, run, trials, seed, console)
    finally:
        optuna.logging.set_verbosity(said)
    found = _found(study, run, about, command)
    if out is not None:
        write_results(out / "search.json", found.results)
    return found


@dataclasses.dataclass(slots=True)
class _Search:
    """What one setting is worth."""

    loaded: LoadedModel
    task: Task
    space: Callable[..., Method]
    bound: float
    limit: int | None
    autocast: bool
    dense: dict[str, Any] | None = None

    def drawn(self, trial: Any) -> Method:
        layers = describe(self.loaded.model).layers
        return self.space(layers, lambda name, low, high: _draw(trial, name, low, high))

    def scored(self, method: Method | None) -> tuple[Score, dict[str, float]]:
        with torch.autocast(self.loaded.model.device.type, torch.bfloat16, enabled=self.autocast):
            if method is None:
                return self.task.score(self.loaded, limit=self.limit), {}
            with sparsify(self.loaded.model, method, when="always") as sparse:
                score = self.task.score(self.loaded, limit=self.limit)
                return score, left_of(sparse.stats())

    def measured(self, method: Method) -> dict[str, float]:
        """Value, loss in points and what is left of the work, of one setting."""
        assert self.dense is not None
        score, left = self.scored(method)
        dense = np.array(self.dense["per_item"])
        lost = (
            paired_bootstrap(score.per_item, dense)
            if score.gold is None
            else paired_bootstrap_of(self.task.value_of, score.per_item, dense, score.gold)
        )
        if self.task.higher_is_better:
            lost = lost.negated
        return {
            "value": score.value,
            "loss": 100 * lost.mean,
            "loss_upper95": 100 * lost.upper95,
            **left,
        }


def _draw(trial: Any, name: str, low: float, high: float) -> float:
    if name == "front":
        return trial.suggest_int(name, int(low), int(high))
    return trial.suggest_float(name, low, high)


def _study(
    optuna: Any, out: Path | None, about: dict[str, Any], first: Sequence[Mapping[str, float]]
) -> Any:
    """A fresh study, or the one that `out` keeps."""
    storage = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(out / "trials.log"))
        storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(storage=storage, study_name="search", load_if_exists=True)
    kept = study.user_attrs.get("about")
    if kept is None:
        for parameters in first:
            study.enqueue_trial(dict(parameters))
        study.set_user_attr("about", about)
    elif kept != about:
        other = next(key for key in about if kept.get(key) != about[key])
        raise ValueError(
            f"out: {out} keeps a search with {other} {kept.get(other)!r}, and this one has "
            f"{about[other]!r}; choose a fresh folder"
        )
    return study


def _run(
    optuna: Any, study: Any, run: _Search, trials: int, seed: int, console: Console | None
) -> None:
    """Score dense and as many settings as are missing."""
    from rich.progress import Progress

    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    with Progress(console=console, disable=console is None, transient=True) as bar:
        shown = bar.add_task("scoring dense", total=trials, completed=len(done))
        run.dense = study.user_attrs.get("dense")
        if run.dense is None:
            score, _ = run.scored(None)
            run.dense = {"value": score.value, "per_item": score.per_item.tolist()}
            study.set_user_attr("dense", run.dense)
        known = {trial.user_attrs["method"]: trial.user_attrs["measured"] for trial in done}
        for number in range(len(done), trials):
            # Seeded per trial, so that nothing depends on where a search was stopped.
            study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + number)
            trial = study.ask()
            method = run.drawn(trial)
            bar.update(shown, completed=number, description=f"scoring {method}")
            name = json.dumps(method.to_dict())
            if name not in known:
                known[name] = run.measured(method)
            trial.set_user_attr("method", name)
            trial.set_user_attr("measured", known[name])
            study.tell(trial, _cost(known[name], run.bound))


def _cost(measured: Mapping[str, float], bound: float) -> float:
    """What is minimised: the work left within the bound, and more than any such beyond it."""
    over = measured["loss"] - bound
    return measured["macs_left"] if over <= 0 else 1.0 + over


def _found(study: Any, run: _Search, about: dict[str, Any], command: str) -> Found:
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert run.dense is not None
    distinct: dict[str, dict[str, float]] = {}
    for trial in done:
        distinct.setdefault(trial.user_attrs["method"], trial.user_attrs["measured"])
    ranked = sorted(distinct.items(), key=lambda one: (_cost(one[1], run.bound), one[0]))
    best: Method | None = None
    rows: list[dict[str, Any]] = []
    for name, measured in ranked:
        method = Method.from_dict(json.loads(name))
        within = measured["loss"] <= run.bound
        if within and best is None:
            best = method
        rows.append(
            {
                "model": about["model"],
                "task": about["task"],
                "method": method.name,
                "settings": settings_of(method),
                "metric": run.task.metric,
                "dense_value": run.dense["value"],
                "items": len(run.dense["per_item"]),
                "bound": run.bound,
                "within": within,
                "pareto": pareto(measured, distinct.values()),
                "best": method is best,
                "seed": about["seed"],
                "note": "on held-out training items" if about["held_out"] else
                        "on the items that the task is scored on",
                **measured,
            }
        )  # fmt: skip
    return Found(best, as_results(rows, command=command))


def pareto(one: Mapping[str, float], all_of_them: Iterable[Mapping[str, float]]) -> bool:
    """Whether nothing else both computes less and loses less (one of the two: no more)."""
    return not any(
        other["macs_left"] <= one["macs_left"]
        and other["loss"] <= one["loss"]
        and (other["macs_left"] < one["macs_left"] or other["loss"] < one["loss"])
        for other in all_of_them
    )
