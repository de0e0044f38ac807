"""Long Range Arena's published table beside ours, and what fine-tuning costs against scratch."""

from __future__ import annotations

from collections.abc import Sequence

from sparseloom.experiments.reproduce import Study
from sparseloom.experiments.reproduce.dynamic_quality import LRA, contender_settings
from sparseloom.experiments.reproduce.rows import Row, row

PAPER = "dsa_tc_2022"
TASKS = ("lra-text", "lra-retrieval", "lra-image")
# Tay et al. 2020: Text, Retrieval, Image, in %.
PUBLISHED = {
    "dense": (64.27, 57.46, 42.44),
    "local": (52.98, 53.39, 41.46),
    "sparse-transformer": (63.58, 59.59, 44.24),
    "longformer": (62.85, 56.89, 42.22),
    "linformer": (53.94, 52.27, 38.56),
    "reformer": (56.10, 53.40, 38.07),
    "sinkhorn": (61.20, 53.83, 41.23),
    "synthesizer": (61.68, 54.67, 41.61),
    "bigbird": (64.02, 59.29, 40.83),
    "linear-transformer": (65.90, 53.09, 42.34),
    "performer": (65.40, 53.82, 42.77),
}
OTHER_NAMES = {
    "window": "local",
    "blocklocal": "local",
    "strided": "sparse-transformer",
    "fixed": "sparse-transformer",
    "linear": "linear-transformer",
}
"""Method's tag → its name in the published table, where they differ."""
_TABLE = "published by Tay et al. (2020) for models trained with their recipe and length"


def lra(study: Sequence[Row]) -> list[Row]:
    """Long Range Arena: the field's methods trained from scratch, beside the published table."""
    rows: list[Row] = []
    for one in study:
        if one.get("task") not in TASKS or one.get("start") != "scratch":
            continue
        tag = str(one["method"])
        name = OTHER_NAMES.get(tag, tag)
        published = PUBLISHED.get(name)
        rows.append(
            row(
                PAPER,
                "lra",
                f"{one['task']}, {one['contender']}: accuracy, %",
                published[TASKS.index(one["task"])] if published else "not published",
                100 * one["value"],
                basis="scenario",
                assumptions=(*contender_settings(one), _TABLE),
                note=f"{one['items']} test items",
            )
        )
    return rows


def finetuning(study: Sequence[Row]) -> list[Row]:
    """Section 3: what adapting a trained model costs, over training it from scratch."""
    rows: list[Row] = []
    for task in TASKS:
        mine = [one for one in study if one.get("task") == task and one.get("study")]
        adapted = [one for one in mine if one["method"] == "dynamic" and one["start"] != "scratch"]
        dynamic = next(iter(adapted), None)
        if dynamic is None:
            continue
        settings = dynamic["study"]
        scratch = settings["recipe"]["steps"]
        tuned = settings["warmup_steps"] + settings["joint_steps"]
        tokens = settings["recipe"]["batch_size"] * settings["length"]
        found = {
            "steps of the predictor and of joint training over steps from scratch": tuned / scratch,
            "tokens from scratch, millions": scratch * tokens / 1e6,
            "tokens of adaptation, millions": tuned * tokens / 1e6,
        }
        if dynamic.get("train_seconds"):
            found["joint training, seconds"] = dynamic["train_seconds"]
        rows += [
            row(
                PAPER,
                "fine-tuning",
                f"{task}: {quantity}",
                "not printed",
                ours,
                basis="scenario",
                assumptions=contender_settings(dynamic),
            )
            for quantity, ours in found.items()
        ]
    return rows


STUDIES: tuple[Study, ...] = (
    *LRA,
    Study("lra_baselines.json", command="python -m sparseloom.experiments.lra_baselines"),
)
