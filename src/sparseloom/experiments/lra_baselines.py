"""The baselines of the Long Range Arena, each trained from scratch with the same steps and seed.

    python -m sparseloom.experiments.lra_baselines --task text --out out/lra_baselines

Every contender has the vanilla model's sizes and recipe, the method in place from the first step.
At the size "small" the inputs are shorter than the published ones, and what a method counts in
tokens is as much smaller (`SMALL`), so that every method still leaves something out; at "paper" the
published configurations run (`sparseloom.methods.ARENA`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sparseloom.experiments.lra import CONTROL, Choice, Contender, reporting_runner
from sparseloom.experiments.lra_sizes import LraStudy, study_of
from sparseloom.experiments.study_command import run_command
from sparseloom.methods import ARENA, Dense, DynamicSparse, parse_method

SMALL = MappingProxyType(
    {
        "local": "blocklocal:block=16",
        "sparse transformer": "fixed:stride=32,columns=8,global_tokens=1",
        "longformer": "longformer:window=64",
        "bigbird": "bigbird:block=16,random_blocks=1",
        "linformer": "linformer:rank=16,share_kv=true",
        "performer": "performer:kernel=relu,features=0",
        "reformer": "reformer:rounds=1,buckets=10",
        "sinkhorn": "sinkhorn:block=16",
        "synthesizer": "synthesizer:rank=8",
        "linear transformer": "linear",
    }
)
"""The published configurations with sizes for inputs of a few hundred tokens."""


def baseline_study(task: str, size: str = "small", *, seed: int = 0) -> LraStudy:
    """The study that trains one vanilla model, at "small" with shorter inputs and fewer steps."""
    study = study_of(task, size, seed=seed)
    if size == "paper":
        return study
    recipe = dataclasses.replace(study.recipe, steps=400, warmup_steps=60)
    return dataclasses.replace(study, length=256, recipe=recipe, items=1000, diagnosed=8)


def baselines_of(study: LraStudy) -> list[Contender]:
    """The dense control, the ten baselines, and dynamic sparse attention from scratch."""
    texts = SMALL if study.size == "small" else ARENA
    ours = DynamicSparse(sparsity=0.9, minimum_keys=1, rotary=False)
    return [
        Contender(CONTROL, Dense(), "scratch"),
        *(Contender(name, parse_method(text), "scratch") for name, text in texts.items()),
        Contender("dynamic 90 %", ours, "scratch"),
    ]


def run_choice(choice: Choice, out: Path, data: Path | None) -> Iterator[list[dict[str, Any]]]:
    """The rows of the study after each of its contenders."""
    study = baseline_study(choice.task, choice.size, seed=choice.seed)
    return reporting_runner(study, out, data).steps(baselines_of(study))


def main() -> None:
    """Command line of the study; results are written after every contender."""
    run_command("lra_baselines", __doc__, Choice(), run_choice)


if __name__ == "__main__":
    main()
