"""The built-in model at four times its context, dense and sparse: 8192 bytes instead of 2048.

    python -m sparseloom.experiments.long_context --out out/long_context

Rotary positions are interpolated (`rope_type` "yarn" with the factor of the lengths), the model is
fine-tuned dense at the new length, its predictor, trained at the old length, further at the new
one, and from there every contender gets the same extra steps, as in the adaptation study.  What is
finished lies in `out` and is not made again.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from sparseloom.experiments.compare import with_predictor
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
from sparseloom.methods import Dense, DynamicSparse, Method, Oracle, SlidingWindow
from sparseloom.models import LoadedModel, load_model
from sparseloom.tasks.language_modelling import StdlibBitsPerByte
from sparseloom.training import adapt, finetune


@dataclasses.dataclass(frozen=True, slots=True)
class Study:
    """What the study holds equal."""

    length: int = 8192
    dense_steps: int = 40
    dense_lr: float = 3e-4
    warmup_steps: int = 80
    joint_steps: int = 20
    lr: float = 5e-5
    predictor_lr: float = 2e-3
    query_rows: int = 128
    projection: float = 0.5
    windows: int = 16
    probe: int = 1
    seed: int = 5
    mixed_precision: Precision = dataclasses.field(default_factory=trained_in)


def stretched(length: int) -> LoadedModel:
    """The built-in model with rotary positions interpolated to `length` tokens (YaRN, Peng et al.
    2023, as transformers implements it).

    Raises ValueError when `length` is not above the model's own context.
    """
    loaded = load_model("stdlib")
    config: Any = copy.deepcopy(loaded.model.config)
    before = loaded.context
    if length <= before:
        raise ValueError(f"length must be above {before}, the built-in model's, got {length}")
    scaling = {
        "rope_type": "yarn",
        "factor": length / before,
        "original_max_position_embeddings": before,
    }
    config.max_position_embeddings = length
    if getattr(config, "rope_parameters", None) is not None:  # transformers 5
        config.rope_parameters = {**config.rope_parameters, **scaling}
    else:
        config.rope_scaling = scaling
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.model.state_dict())
    return LoadedModel(f"stdlib-{length}", model.eval(), None)


def run_study(study: Study, out: Path) -> list[dict[str, Any]]:
    """Run what is missing in `out` and return the rows of the whole study.

    Raises ValueError when the length is not above the built-in model's context.
    """
    stretched(study.length)  # a length that cannot be must not leave a folder behind
    study_folder(out, study)
    task = StdlibBitsPerByte(context=study.length)
    task.load()

    def batches(loaded: LoadedModel, steps: int, seed: int) -> list[Any]:
        return list(task.batches(loaded, steps=steps, batch_size=1, seed=seed))

    def fresh() -> LoadedModel:
        return stretched(study.length)

    def tune(method: Method, steps: int, lr: float, run: Path, loaded: LoadedModel) -> Log:
        return finetune(
            loaded.model,
            method,
            batches(loaded, steps, study.seed + (1 if run.name == "base-run" else 2)),
            steps=steps,
            lr=lr,
            predictor_lr=study.predictor_lr / 10,
            query_rows=study.query_rows,
            mixed_precision=study.mixed_precision,
            seed=study.seed,
            out=run,
        )

    def train_base(loaded: LoadedModel) -> tuple[Method, Log]:
        return Dense(), tune(Dense(), study.dense_steps, study.dense_lr, out / "base-run", loaded)

    def base() -> LoadedModel:
        return tuned(out / "base", fresh, Dense(), train_base)[0]

    def warm_up(loaded: LoadedModel) -> tuple[Method, Log]:
        wanted = DynamicSparse(sparsity=0.9, projection=study.projection)
        short = with_predictor(wanted, load_model("stdlib"))
        assert isinstance(short, DynamicSparse)
        method = adapt(
            loaded.model,
            short,
            batches(loaded, study.warmup_steps, study.seed + 3),
            warmup_steps=study.warmup_steps,
            predictor_lr=study.predictor_lr,
            query_rows=study.query_rows,
            mixed_precision=study.mixed_precision,
            seed=study.seed,
            out=out / "predictor-run",
        )
        return method, []

    dynamic = tuned(out / "predictor", base, DynamicSparse(), warm_up)[1]
    assert isinstance(dynamic, DynamicSparse)
    own = {
        "dense": Dense(),
        "dynamic 90 %": dynamic,
        "dynamic 95 %": dataclasses.replace(dynamic, sparsity=0.95),
        "window 90 %": SlidingWindow(sparsity=0.9),
    }
    scores: dict[str, dict[str, Any]] = {}

    def score(label: str, loaded: LoadedModel, method: Method) -> None:
        file = out / f"score-{slug(label)}.json"
        scores[label] = scored(
            file,
            task,
            loaded,
            method,
            limit=study.windows,
            probe=study.probe,
            autocast=study.mixed_precision == "bf16",
        )

    for label, method in own.items():
        method = copy.deepcopy(method)  # a predictor is trained in place
        run = out / f"{slug(label)}-run"

        def train(
            loaded: LoadedModel, method: Method = method, run: Path = run
        ) -> tuple[Method, Log]:
            return method, tune(method, study.joint_steps, study.lr, run, loaded)

        loaded, trained = tuned(out / slug(label), base, method, train)
        score(label, loaded, trained)
        if label == "dynamic 90 %":
            score("oracle 90 % on the model of dynamic 90 %", loaded, Oracle(sparsity=0.9))
    score("dense, only stretched", fresh(), Dense())
    score("dense, before the extra steps", base(), Dense())
    return rows_against(Against(f"stdlib-{study.length}", task, "dense", study.seed), scores)


def main() -> None:
    """Command line of the study."""
    run_command("long_context", __doc__, Study(), lambda study, out, _: run_study(study, out))


if __name__ == "__main__":
    main()
