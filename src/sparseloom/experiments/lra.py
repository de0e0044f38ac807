"""The Long Range Arena studies: one vanilla model from scratch, then every contender from it.

    python -m sparseloom.experiments.lra --task text --size small --out out/lra

All contenders take the same further steps on the same batches: the dense control, dynamic sparse
attention at three sparsities, over projection sizes and precisions (table 2 of Liu et al., IEEE TC
2022), a static local window, random keys, and a dense model that sees only as many tokens as one
query keeps at 99 %.  All are scored on the same test examples and compared with the dense control
by a paired bootstrap.  Stages keep what they made in `--out`: a finished one never runs twice, a
stopped one goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from sparseloom.experiments.bootstrap import paired_bootstrap
from sparseloom.experiments.contenders import Against, rows_against, scored, slug, study_folder
from sparseloom.experiments.lra_sizes import LraStudy, study_of
from sparseloom.experiments.study_command import run_command
from sparseloom.integrations import method_shape
from sparseloom.methods import Dense, DynamicSparse, Learned, Method, RandomMask, SlidingWindow
from sparseloom.models.base import LoadedModel
from sparseloom.models.lra import LraForSequenceClassification
from sparseloom.models.lra_presets import lra_config
from sparseloom.tasks import get_task
from sparseloom.tasks.base import Batch
from sparseloom.tasks.lra import LraTask
from sparseloom.training import adapt, finetune, load, save
from sparseloom.training.loop import LoopSettings

PROJECTIONS = (0.1, 0.16, 0.2, 0.25, 0.33)
BITS = (2, 4, 8, 32)
CONTROL = "dense"
"""The contender that all others are compared with."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run attention, and where its model comes from.

    Attributes:
        name: unique in a study.
        method: weights of a `Learned` method are made where they are missing.
        start: "checkpoint", the vanilla model and the study's further steps; "scratch", the whole
            recipe with the method in place.
        context: tokens that it sees of each input, in training and in the score; None for all.
    """

    name: str
    method: Method
    start: Literal["checkpoint", "scratch"] = "checkpoint"
    context: int | None = None


def contenders_of(study: LraStudy) -> list[Contender]:
    """The contenders of the published tables; main points first."""

    def dynamic(sparsity: float, projection: float = 0.25, bits: int = 4) -> DynamicSparse:
        return DynamicSparse(
            sparsity=sparsity, projection=projection, bits=bits, minimum_keys=1, rotary=False
        )

    kept = max(1, math.ceil(round(0.01 * study.length, 6)))
    config = lra_config(study.task, length=study.length, **study.model)
    head_dim = config.qkv_size // config.num_attention_heads
    # Of such heads the published sizes leave a predictor one to three numbers.
    whole = (0.9, 0.95) if max(PROJECTIONS) * head_dim < 4 else ()
    return [
        Contender(CONTROL, Dense()),
        Contender("dynamic 90 %", dynamic(0.9)),
        Contender("dynamic 95 %", dynamic(0.95)),
        Contender("dynamic 99 %", dynamic(0.99)),
        Contender("local 99 %", SlidingWindow(sparsity=0.99)),
        Contender("random 90 %", RandomMask(sparsity=0.9, minimum_keys=1)),
        Contender(f"dense, first {kept} tokens", Dense(), context=kept),
        *(
            Contender(f"dynamic 90 %, {bits} bits", dynamic(0.9, bits=bits))
            for bits in BITS
            if bits != 4
        ),
        *(
            Contender(f"dynamic 90 %, sigma {size}", dynamic(0.9, projection=size))
            for size in PROJECTIONS
            if size != 0.25
        ),
        *(
            Contender(f"dynamic {100 * share:.0f} %, sigma 1.0", dynamic(share, 1.0))
            for share in whole
        ),
    ]


class Runner:
    """One study in one folder.  `say` is told what starts and what came out."""

    def __init__(
        self,
        study: LraStudy,
        out: Path,
        *,
        data: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
        progress: bool = False,
    ) -> None:
        self.study = study
        self.out = out / f"{study.task}-{study.size}"
        self.say = say
        self.progress = progress
        task = get_task(f"lra-{study.task}")
        assert isinstance(task, LraTask)
        self.task = task
        task.load(data)
        task.length = study.length
        study_folder(self.out, study)

    def run(self, contenders: Sequence[Contender] | None = None) -> list[dict[str, Any]]:
        """Run what is missing and return the rows of the study.

        Raises:
            ValueError: the first contender is not the dense control.
        """
        return [*self.steps(contenders)][-1]

    def steps(
        self, contenders: Sequence[Contender] | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """After each contender the rows so far."""
        wanted = list(contenders or contenders_of(self.study))
        if wanted[0].name != CONTROL:
            raise ValueError(f"contenders must begin with {CONTROL!r}, got {wanted[0].name!r}")
        scores: dict[str, dict[str, Any]] = {}
        shared = Against(
            f"lra-{self.study.task} {self.study.size}", self.task, CONTROL, self.study.seed
        )
        for contender in wanted:
            scores[contender.name] = self.contender(contender)
            rows = rows_against(shared, scores)
            yield [row | self._more(one, scores) for one, row in zip(wanted, rows, strict=False)]

    def contender(self, contender: Contender) -> dict[str, Any]:
        """Train and score one contender, or read what it gave."""
        study, task = self.study, self.task
        folder = self.out / slug(contender.name)
        file = self.out / f"score-{slug(contender.name)}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        model, method = self._trained(contender, folder)
        task.length = contender.context or study.length
        try:
            entry = scored(
                file,
                task,
                LoadedModel(contender.name, model.eval(), None),
                method,
                limit=study.items,
                probe=study.diagnosed,
                console=Console(stderr=True),
            )
        finally:
            task.length = study.length
        self.say(f"{contender.name}: accuracy {entry['value']:.4f}")
        return entry

    # ------------------------------------------------------------------ private

    def _batches(
        self, model: PreTrainedModel, steps: int, seed: int, context: int | None, size: int | None
    ) -> Iterator[Batch]:
        size = size or self.study.recipe.batch_size
        return self.task.batches(model, steps=steps, batch_size=size, context=context, seed=seed)

    def _vanilla(self) -> Path:
        """The vanilla model, trained from scratch with the recipe."""
        folder = self.out / "vanilla"
        if not (folder / "config.json").exists():
            self._from_scratch(Contender("vanilla", Dense(), "scratch"), folder)
        return folder

    def _trained(self, contender: Contender, folder: Path) -> tuple[PreTrainedModel, Method]:
        """A contender's model, trained or read."""
        if (folder / "config.json").exists():
            return load(folder)
        if contender.start == "scratch":
            return self._from_scratch(contender, folder)
        study, method = self.study, contender.method
        model, _ = load(self._vanilla())
        if isinstance(method, DynamicSparse):
            method = dataclasses.replace(method, predictor=self._predictor(method).predictor)
        self.say(f"{contender.name}: {study.joint_steps} further steps")
        return self._train(
            folder,
            model,
            method,
            self._batches(
                model, study.joint_steps, study.seed + 1, contender.context, study.joint_batch
            ),
            LoopSettings(study.joint_steps),
            lr=study.lr,
            predictor_lr=study.predictor_lr / 3,
        )

    def _from_scratch(self, contender: Contender, folder: Path) -> tuple[PreTrainedModel, Method]:
        study = self.study
        recipe = study.recipe
        torch.manual_seed(study.seed)
        config = lra_config(study.task, length=study.length, **study.model)
        model = LraForSequenceClassification(config)
        self.say(f"{contender.name}: {recipe.steps} steps from scratch")
        return self._train(
            folder,
            model,
            contender.method,
            self._batches(model, recipe.steps, study.seed, contender.context, None),
            study.settings(),
            lr=recipe.peak_lr,
            predictor_lr=recipe.peak_lr,
        )

    def _train(
        self,
        folder: Path,
        model: PreTrainedModel,
        method: Method,
        batches: Iterator[Batch],
        settings: LoopSettings,
        *,
        lr: float,
        predictor_lr: float,
    ) -> tuple[PreTrainedModel, Method]:
        """Train model and method together and keep both, with their curve, as `folder`."""
        study = self.study
        if isinstance(method, Learned) and method.module is None:
            method = method.initialise(method_shape(model), seed=study.seed)
        started = time.monotonic()
        log = finetune(
            model,
            method,
            batches,
            steps=settings.steps,
            lr=lr,
            predictor_lr=predictor_lr,
            query_rows=study.query_rows,
            mixed_precision=study.mixed_precision,
            settings=settings,
            seed=study.seed,
            out=folder.with_name(folder.name + "-run"),
            progress=self.progress,
        )
        curve = {"curve": _thin(log), "train_seconds": round(time.monotonic() - started, 1)}
        _write(folder.with_name(folder.name + "-curve.json"), curve)
        save(model, method, folder)
        return model, method

    def _predictor(self, method: DynamicSparse) -> DynamicSparse:
        """The predictor of this size and precision, fitted to the frozen vanilla model."""
        study = self.study
        folder = self.out / f"predictor-{method.projection}-{method.bits}"
        if (folder / "config.json").exists():
            return cast("DynamicSparse", load(folder)[1])
        model, _ = load(self._vanilla())
        self.say(f"predictor of {method}: {study.warmup_steps} steps")
        batches = self._batches(model, study.warmup_steps, study.seed + 2, None, study.joint_batch)
        fitted = adapt(
            model,
            method,
            batches,
            warmup_steps=study.warmup_steps,
            predictor_lr=study.predictor_lr,
            query_rows=study.query_rows,
            mixed_precision=study.mixed_precision,
            seed=study.seed,
            out=folder.with_name(folder.name + "-run"),
            progress=self.progress,
        )
        save(model, fitted, folder)
        return fitted

    def _more(self, contender: Contender, scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What a row holds beside the comparison: its training, and which items were right."""
        curve = self.out / f"{slug(contender.name)}-curve.json"
        right = np.array(scores[contender.name]["per_item"])
        own = paired_bootstrap(right, np.zeros_like(right))
        return {
            "start": contender.start,
            "length": contender.context or self.study.length,
            "value_interval95": list(own.interval95),
            "right": np.packbits(right.astype(np.uint8)).tobytes().hex(),
            "study": dataclasses.asdict(self.study),
            **json.loads(curve.read_text(encoding="utf-8")),
        }


def _thin(log: list[dict[str, float]], points: int = 60) -> list[list[float]]:
    """[last step, mean model loss] of at most `points` equal stretches of a log."""
    width = max(1, math.ceil(len(log) / points))
    parts = [log[first : first + width] for first in range(0, len(log), width)]
    return [[part[-1]["step"], sum(one["loss"] for one in part) / len(part)] for part in parts]


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(file)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which study runs: a task, a size of `lra_sizes`, a seed."""

    task: str = "text"
    size: str = "small"
    seed: int = 0

    def stored(self) -> Path:
        """Where its rows are kept."""
        return Path(f"results/lra_{self.task}.json")


def run_choice(choice: Choice, out: Path, data: Path | None) -> Iterator[list[dict[str, Any]]]:
    """The rows of the study after each of its contenders."""
    study = study_of(choice.task, choice.size, seed=choice.seed)
    return reporting_runner(study, out, data).steps()


def reporting_runner(study: LraStudy, out: Path, data: Path | None) -> Runner:
    """A runner that says on standard error what it does, and when."""
    begun = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - begun:6.0f} s] {text}\n")
        sys.stderr.flush()

    return Runner(study, out, data=data, say=say, progress=sys.stderr.isatty())


def main() -> None:
    """Command line of the studies; results are written after every contender."""
    run_command("lra", __doc__, Choice(), run_choice, stored=Choice.stored)


if __name__ == "__main__":
    main()
