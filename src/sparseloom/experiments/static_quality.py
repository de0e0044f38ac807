"""Static masks of dense regions against a dense control and fixed patterns at equal density.

    python -m sparseloom.experiments.static_quality --task imdb --results results/static_imdb.json

After Dai et al. (DAC 2023); region design and phases are ours.  From one model trained for its
task, every contender takes the same extra steps: dense ones first (with the entropy terms for
static masks, without them for everything else), then as many under its own mask.  Fixed patterns
run on the same tiles of 16 × 32 and are charged for their alignment.  `imdb` is MiniLM on whole
reviews of 512 tokens, `lra-image` the image model of Long Range Arena, `bytes` the built-in
byte-level language model at 2048.  All are scored on the same items; losses against the control
come with a paired bootstrap.  Stages are kept in `out`; a run that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

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
from sparseloom.experiments.sentiment import classifier
from sparseloom.experiments.study_command import run_command
from sparseloom.integrations import describe
from sparseloom.methods import Dense, Method, StaticSparse, TileAligned
from sparseloom.methods.region_search import least_density
from sparseloom.models import LoadedModel, load_model
from sparseloom.tasks import Task, get_task
from sparseloom.tasks.base import Batch
from sparseloom.tasks.classification import SentimentClassification
from sparseloom.training import EntropyLoss, EntropySettings, adapt_static, finetune, load

PATTERNS = ("window", "longformer", "bigbird", "strided", "fixed", "blocklocal", "random")
CONTROL = "dense"


@dataclasses.dataclass(frozen=True, slots=True)
class Study:
    """What the study holds equal.

    `base` is the folder of a model that is trained for the task; without one, MiniLM gets
    `dense_steps` steps, and the image model must be given.  `densities` are separated by commas,
    the main one first.  `context` is the longest input.  `first` says how many contenders
    run, 0 for all; `only` names those that run beside the control, separated by semicolons.  Main
    contenders are scored on `items`, the others on `fewer_items`.
    """

    task: str = "imdb"
    base: str = ""
    densities: str = "0.25,0.4,0.15"
    context: int = 512
    batch: int = 16
    dense_steps: int = 250
    dense_lr: float = 1e-4
    entropy_steps: int = 120
    masked_steps: int = 120
    calibration_steps: int = 32
    lr: float = 5e-5
    entropy_weight: float = 0.1
    mutual_weight: float = 0.1
    level: str = "key"
    query_rows: int = 64
    items: int = 10_000
    fewer_items: int = 2_000
    mixed_precision: Precision = dataclasses.field(default_factory=trained_in)
    seed: int = 11
    first: int = 0
    only: str = ""

    @property
    def shares(self) -> list[float]:
        """The densities."""
        return [float(word) for word in self.densities.split(",")]

    def entropy(self, phase: str) -> EntropySettings:
        """The terms of a first phase: "entropy", one of its halves, or "plain"."""
        wanted = {"entropy": (1, 1), "entropy only": (1, 0), "mutual only": (0, 1), "plain": (0, 0)}
        first, second = wanted[phase]
        return EntropySettings(
            entropy_weight=first * self.entropy_weight,
            mutual_weight=second * self.mutual_weight,
            density=min(self.shares),
            level=cast("Literal['key', 'tile']", self.level),
            query_rows=self.query_rows,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """A method, the first phase that its model comes from, and whether it is scored on all items.

    `steps` False: scored as the first phase left it.
    """

    method: Method
    phase: str = "plain"
    main: bool = False
    steps: bool = True


def contenders(study: Study) -> dict[str, Contender]:
    """What is compared, in the order in which it runs."""

    def static(density: float, phase: str = "entropy", **more: Any) -> Contender:
        # At small densities rows and columns for a [CLS] would take the whole budget.
        force = "all" if density >= 0.2 else "diagonal"
        settings: dict[str, Any] = {"density": density, "force": force, **more}
        return Contender(StaticSparse(**settings), phase, main=not more and phase == "entropy")

    def patterns(density: float) -> dict[str, Contender]:
        return {f"{p} {density}": Contender(TileAligned(p, density=density)) for p in PATTERNS}

    def ablations(density: float) -> dict[str, Contender]:
        name = f"static {density}"
        return {
            f"{name}, no entropy terms": static(density, "plain"),
            f"{name}, mu = 0": static(density, "entropy only"),
            f"{name}, lambda = 0": static(density, "mutual only"),
            f"{name}, by mass": static(density, by="mass"),
            f"{name}, no coarse": static(density, coarse=False),
            f"{name}, budget per head": static(density, budget="head"),
        }

    main, *others = study.shares
    found = {CONTROL: Contender(Dense(), main=True)}
    found |= {f"static {density}": static(density) for density in study.shares}
    found |= patterns(main)
    found |= ablations(main)
    found |= {
        "dense, entropy phase alone": Contender(Dense(), "entropy", steps=False),
        "dense, plain phase alone": Contender(Dense(), steps=False),
    }
    for density in others:
        found |= ablations(density) | patterns(density)
    return found


def run_study(study: Study, out: Path, data: Path | None = None) -> list[dict[str, Any]]:
    """Run what is missing in `out` and return the rows of the whole study.

    Raises:
        ValueError: an unknown task or contender, or no `base` for the image task.
    """
    wanted = chosen(contenders(study), CONTROL, study.only, study.first)
    task = _task(study, data)
    study_folder(out, study, free=("first", "only"))
    console = Console(stderr=True)
    run = _Run(study, out, task)
    scores: dict[str, dict[str, Any]] = {}
    more: dict[str, dict[str, Any]] = {}
    fewer = CONTROL
    if study.fewer_items != study.items:
        fewer = f"{CONTROL}, {study.fewer_items} items"
    for label, contender in wanted.items():
        loaded, method = run.tuned(label, contender)
        limits = {label: study.items if contender.main else study.fewer_items}
        if label == CONTROL:
            limits[fewer] = study.fewer_items
        for name, limit in limits.items():
            file = out / f"score-{slug(name)}.json"
            entry = scored(
                file,
                run.task,
                loaded,
                method,
                limit=limit,
                probe=0,
                autocast=study.mixed_precision == "bf16",
                console=console,
            )
            if limit == study.fewer_items:
                entry["control"] = fewer
            scores[name] = entry
            length = study.context + (study.task == "lra-image")  # its [CLS]
            more[name] = {"phase": contender.phase, **_tiles(method, loaded, length)}
            console.print(f"{name}: {entry['value']:.4f} at density {entry['density']:.4f}")
    rows = rows_against(Against(run.model, run.task, CONTROL, study.seed), scores)
    settings = dataclasses.asdict(study)
    return [{**row, **more[row["contender"]], "study": settings} for row in rows]


class _Run:
    """The stages of one study in its folder."""

    def __init__(self, study: Study, out: Path, task: Task) -> None:
        self.study, self.out, self.task = study, out, task
        self.model = {"imdb": "minilm", "bytes": "stdlib"}.get(study.task, study.task)

    def tuned(self, label: str, contender: Contender) -> tuple[LoadedModel, Method]:
        """The contender's model after all its steps."""
        study, phase = self.study, self._phase(contender.phase)
        if not contender.steps:
            return self._open(phase), contender.method
        folder = self.out / slug(label)

        def train(loaded: LoadedModel) -> tuple[Method, Log]:
            torch.manual_seed(study.seed)
            batches = self._batches(loaded, study.masked_steps, 3)
            method, more = contender.method, study.calibration_steps
            if isinstance(method, StaticSparse):
                calibration = self._batches(loaded, more, 4)
                method = adapt_static(
                    loaded.model,
                    method,
                    [*calibration, *batches],
                    entropy_steps=0,
                    masked_steps=study.masked_steps,
                    calibration_steps=more,
                    entropy=study.entropy(contender.phase),
                    lengths=_lengths(study, method),
                    masked_lr=study.lr,
                    mixed_precision=study.mixed_precision,
                    seed=study.seed,
                    out=folder.with_name(folder.name + "-run"),
                )
                file = folder.with_name(folder.name + "-run") / "masked" / "fine-tune.pt"
                log: Log = torch.load(file, weights_only=True)["log"]
                return method, log
            return method, self._finetune(loaded, method, batches, study.lr, folder)

        return tuned(folder, lambda: self._open(phase), contender.method, train)

    def _phase(self, name: str) -> Path:
        """The model after the dense steps of a first phase."""
        study, folder = self.study, self.out / f"phase-{slug(name)}"

        def train(loaded: LoadedModel) -> tuple[Method, Log]:
            torch.manual_seed(study.seed)
            plan = study.entropy(name)
            terms = EntropyLoss(plan, seed=study.seed) if name != "plain" else None
            batches = self._batches(loaded, study.entropy_steps, 2)
            return Dense(), self._finetune(loaded, Dense(), batches, study.lr, folder, terms)

        tuned(folder, lambda: self._open(self._base()), Dense(), train)
        return folder

    def _base(self) -> Path | str:
        """The model that is trained for its task."""
        study, folder = self.study, self.out / "base"
        if study.base or study.task == "bytes":
            return study.base or "stdlib"
        if study.task != "imdb":
            raise ValueError(f"base must be given for the task {study.task!r}")

        def train(loaded: LoadedModel) -> tuple[Method, Log]:
            batches = self._batches(loaded, study.dense_steps, 0)
            return Dense(), self._finetune(loaded, Dense(), batches, study.dense_lr, folder)

        tuned(folder, lambda: self._open("minilm"), Dense(), train)
        return folder

    def _open(self, source: Path | str) -> LoadedModel:
        if self.study.task == "imdb":
            return classifier(source, self.study.seed)
        if isinstance(source, str) and source == "stdlib":
            return load_model("stdlib")
        model, _ = load(source)
        if self.study.task == "bytes":
            return dataclasses.replace(load_model("stdlib"), model=model.float())
        return LoadedModel(str(source), model, None)

    def _finetune(
        self,
        loaded: LoadedModel,
        method: Method,
        batches: Iterable[Batch],
        lr: float,
        folder: Path,
        entropy: EntropyLoss | None = None,
    ) -> Log:
        batches = list(batches)
        return finetune(
            loaded.model,
            method,
            batches,
            steps=len(batches),
            lr=lr,
            mixed_precision=self.study.mixed_precision,
            entropy=entropy,
            seed=self.study.seed,
            out=folder.with_name(folder.name + "-run"),
        )

    def _batches(self, loaded: LoadedModel, steps: int, stage: int) -> list[Batch]:
        study = self.study
        return list(
            self.task.batches(
                loaded,
                steps=steps,
                batch_size=study.batch,
                context=study.context if study.task == "bytes" else None,
                seed=study.seed + stage,
            )
        )


def _task(study: Study, data: Path | None) -> Task:
    names = {"imdb": "imdb-sentiment", "lra-image": "lra-image", "bytes": "stdlib"}
    if study.task not in names:
        raise ValueError(f"task must be one of {', '.join(names)}, got {study.task!r}")
    if study.task == "imdb":
        return SentimentClassification(study.context).load(data)
    task = get_task(names[study.task]).load(data)
    if study.task == "lra-image":
        cast("Any", task).length = study.context
    return task


def _lengths(study: Study, method: StaticSparse) -> list[int] | None:
    """Reviews are of many lengths; the other tasks have one.

    A length has regions of its own where the density holds what is forced there; shorter inputs
    run those of the next one.
    """
    if study.task != "imdb":
        return None
    held = [
        n
        for n in (128, 256, 384)
        if n < study.context and least_density(method.search, n, is_causal=False) <= method.density
    ]
    return [*held, study.context]


def _tiles(method: Method, loaded: LoadedModel, length: int) -> dict[str, float]:
    """What a machine of tiles computes at the full length, as a share of all tiles."""
    shape = describe(loaded.model)
    if isinstance(method, StaticSparse):
        assert method.regions is not None
        whole = int(method.regions.lengths[-1])
        return {"tile_density": method.tile_density(whole, is_causal=shape.is_causal)}
    if isinstance(method, TileAligned):
        share = method.tile_density(length, shape.heads, shape.layers, is_causal=shape.is_causal)
        return {"tile_density": share}
    return {"tile_density": 1.0}


def main() -> None:
    """Command line of the study."""
    run_command("static_quality", __doc__, Study(), run_study)


if __name__ == "__main__":
    main()
