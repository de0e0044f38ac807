"""`sparseloom adapt`: train or calibrate what a method needs of a model, and save both."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseloom.cli.options import (
    Data,
    Json,
    Model,
    Seed,
    TaskName,
    Threads,
    command_line,
    set_threads,
)
from sparseloom.cli.output import Column, emit, number, percent, settings_text, value

if TYPE_CHECKING:
    from sparseloom.methods import Method
    from sparseloom.models import LoadedModel
    from sparseloom.tasks import Task


class Gradient(StrEnum):
    """Where the predictor loss of joint steps flows."""

    predictor = "predictor"
    both = "both"


class Loss(StrEnum):
    """What the predictor is trained towards."""

    kl = "kl"
    mse = "mse"


def adapt(
    out: Annotated[Path, typer.Option("--out", help="Folder for the adapted model.")],
    model: Model = "stdlib",
    task: TaskName = "stdlib",
    method: Annotated[
        str, typer.Option("--method", help="As dynamic:sparsity=0.9,projection=0.5,bits=4.")
    ] = "dynamic:sparsity=0.9,projection=0.5",
    data: Data = None,
    warmup_steps: Annotated[
        int, typer.Option("--warmup-steps", min=0, help="Predictor alone, model frozen.")
    ] = 300,
    joint_steps: Annotated[
        int, typer.Option("--joint-steps", min=0, help="Model and predictor together.")
    ] = 0,
    calibration_steps: Annotated[
        int,
        typer.Option(
            "--calibration-steps", min=1, help="Batches that thresholds or regions are taken from."
        ),
    ] = 8,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts per step.")] = 2,
    length: Annotated[
        int | None, typer.Option("--context", min=16, help="Tokens per text; default: the model's.")
    ] = None,
    loss: Annotated[Loss, typer.Option("--loss", help="Loss of the predictor.")] = Loss.kl,
    loss_weight: Annotated[
        float, typer.Option("--loss-weight", min=0.0, help="λ of equation 7.")
    ] = 1.0,
    gradient: Annotated[
        Gradient | None,
        typer.Option("--gradient", help="Where it flows in joint steps; default: by the loss."),
    ] = None,
    ramp_from: Annotated[
        float | None,
        typer.Option("--ramp-from", help="Sparsity of the first joint step; default: the last's."),
    ] = None,
    ramp_share: Annotated[
        float, typer.Option("--ramp-share", help="Share of the joint steps in which it rises.")
    ] = 0.2,
    entropy_weight: Annotated[
        float, typer.Option("--entropy-weight", min=0.0, help="static: weight of the entropy.")
    ] = 0.03,
    mutual_weight: Annotated[
        float,
        typer.Option("--mutual-weight", min=0.0, help="static: weight of what the input decides."),
    ] = 0.03,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate of the model.")] = 1e-4,
    predictor_lr: Annotated[
        float, typer.Option("--predictor-lr", help="Peak learning rate of the predictor.")
    ] = 2e-3,
    limit: Annotated[
        int, typer.Option("--limit", min=0, help="Items to score afterwards; 0 scores none.")
    ] = 8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in --out.")
    ] = False,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fine-tune model and predictor; a run that was stopped continues from its checkpoints.

    They lie in OUT-checkpoints until the run is finished.

    A method that is calibrated (elsa) reads its thresholds off training text instead.  For static
    masks the warm-up steps are dense ones of the model, with the entropy terms; regions are chosen
    after them, and the joint steps run with the mask.
    """
    import torch

    from sparseloom.methods import (
        Calibrated,
        DynamicSparse,
        Learned,
        StaticSparse,
        parse_method,
    )
    from sparseloom.models import load_model
    from sparseloom.results import results
    from sparseloom.tasks import get_task
    from sparseloom.training import EntropySettings, SparsityRamp, calibrate, save
    from sparseloom.training import adapt as train

    chosen = parse_method(method)
    calibrated = isinstance(chosen, Calibrated)
    if not calibrated and not isinstance(chosen, Learned):
        raise ValueError(
            f"--method must be one with weights (dynamic:…), regions (static:…) or thresholds "
            f"(elsa:…), got {method!r}"
        )
    if calibrated and joint_steps:
        raise ValueError(
            f"--joint-steps must be 0 for {chosen.name}, which is calibrated to the model as it "
            f"is, got {joint_steps}"
        )
    if out.exists() and not overwrite:
        raise FileExistsError(f"--out {out} exists: choose another folder or pass --overwrite")
    set_threads(threads)
    scorer = get_task(task)
    scorer.load(data)
    torch.manual_seed(seed)  # a fresh classifier draws its weights
    loaded = load_model(model, head=scorer.head, classes=scorer.classes)
    steps = calibration_steps if calibrated else warmup_steps + joint_steps
    if isinstance(chosen, StaticSparse) or (
        isinstance(chosen, DynamicSparse) and chosen.needs_thresholds
    ):
        steps += calibration_steps
    batches = scorer.batches(loaded, steps=steps, batch_size=batch_size, context=length, seed=seed)
    checkpoints = out.with_name(f"{out.name}-checkpoints")
    adapted: Method
    if isinstance(chosen, Calibrated):
        adapted = calibrate(loaded.model, chosen, batches)
    else:
        adapted = train(
            loaded.model,
            chosen,
            batches,
            warmup_steps=warmup_steps,
            joint_steps=joint_steps,
            loss=loss.value,
            loss_weight=loss_weight,
            gradient=None if gradient is None else gradient.value,
            ramp=None if ramp_from is None else SparsityRamp(ramp_from, ramp_share),
            entropy=EntropySettings(entropy_weight=entropy_weight, mutual_weight=mutual_weight),
            calibration_steps=calibration_steps,
            lr=lr,
            predictor_lr=predictor_lr,
            seed=seed,
            out=checkpoints,
        )
    save(loaded.model, adapted, out, overwrite=overwrite)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(out)
    shutil.rmtree(checkpoints, ignore_errors=True)
    rows = _scored(scorer, loaded, adapted, limit, model, seed) if limit else []
    columns: list[Column] = [
        ("method", value("method")),
        ("settings", settings_text),
        ("density", percent("density")),
        (scorer.metric.replace("_", " "), number("value", 4)),
        ("dense, as trained", number("dense_value", 4)),
    ]
    emit(
        results(rows, command=command_line()),
        as_json=as_json,
        columns=columns,
        notes=["", f"{out}  use it as --model {out}"],
    )


def _scored(
    task: Task, loaded: LoadedModel, method: Method, limit: int, name: str, seed: int
) -> list[dict[str, Any]]:
    from sparseloom.integrations import sparsify
    from sparseloom.integrations.stats import density_of

    dense = task.score(loaded, limit=limit)
    with sparsify(loaded.model, method, when="always") as sparse:
        score = task.score(loaded, limit=limit)
        layers = sparse.stats()
    settings = {k: v for k, v in method.to_dict().items() if k not in {"method", "version"}}
    return [
        {
            "model": name,
            "task": task.name,
            "method": method.name,
            "settings": settings,
            "sparsity": settings.get("sparsity"),
            "density": density_of(layers),
            "metric": task.metric,
            "value": score.value,
            "dense_value": dense.value,
            "items": score.items,
            "seed": seed,
            "note": "; ".join(score.notes),
        }
    ]
