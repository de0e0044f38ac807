"""The baselines of the Long Range Arena, each trained from scratch with the same steps and seed.

    python -m sparseloom.experiments.lra_baselines --task text --out out/lra-baselines

Every contender has the vanilla model's sizes and recipe, the method in place from the first step.
At the size "small" the inputs are shorter than the published ones, and what a method counts in
tokens is as much smaller (`SMALL`), so that every method still leaves something out; at "paper" the
published configurations run (`sparseloom.methods.ARENA`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import cast

from sparseloom.experiments.lra import CONTROL, Contender, Runner
from sparseloom.experiments.lra_sizes import LraStudy, Size, study_of
from sparseloom.methods import ARENA, Dense, DynamicSparse, parse_method
from sparseloom.results import write_results

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


def baseline_study(task: str, size: Size = "small", *, seed: int = 0) -> LraStudy:
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


def main() -> None:
    """Command line of the study; results are written after every contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", default="text", choices=("text", "retrieval", "image", "listops"))
    parser.add_argument("--size", default="small", choices=("small", "paper"))
    parser.add_argument("--out", type=Path, default=Path("out/lra-baselines"))
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=Path("results/lra_baselines.json"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    study = baseline_study(given.task, cast("Size", given.size), seed=given.seed)
    begun = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - begun:6.0f} s] {text}\n")
        sys.stderr.flush()

    runner = Runner(study, given.out, data=given.data, say=say, progress=sys.stderr.isatty())
    command = (
        f"python -m sparseloom.experiments.lra_baselines --task {given.task} --size {given.size}"
    )
    for rows in runner.steps(baselines_of(study)):
        write_results(given.results, rows, command=command)


if __name__ == "__main__":
    main()
