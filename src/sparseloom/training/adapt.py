"""Fit a predictor to a model, then, if asked, fine-tune both with the mask in place.

Liu et al. (IEEE TC 2022), §3: L = L_model + λ·L_predictor (equations 6 and 7).  Two phases:
the predictor alone against the frozen dense model, then both together with the mask as a constant.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from sparseloom.integrations import method_shape, sparsify
from sparseloom.methods import Dense, DynamicSparse, Learned, Method, Predicting, StaticSparse
from sparseloom.models.modes import frozen, in_mode
from sparseloom.training.calibrate import calibrate
from sparseloom.training.entropy import EntropyLoss, EntropySettings
from sparseloom.training.loop import Batch, LoopSettings, make_accelerator, repeat, run_loop
from sparseloom.training.losses import LOSSES
from sparseloom.training.predictor_loss import Collector, LossName, RowSampler, predictor_loss
from sparseloom.training.ramp import SparsityRamp

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ModelLoss = Callable[[Any, Batch], Tensor]
LearnedMethod = TypeVar("LearnedMethod", bound=Learned)


def adapt(
    model: PreTrainedModel,
    method: LearnedMethod,
    batches: Iterable[Batch],
    *,
    warmup_steps: int = 300,
    joint_steps: int = 0,
    loss: LossName = "kl",
    loss_weight: float = 1.0,
    gradient: Literal["predictor", "both"] | None = None,
    lr: float = 1e-4,
    predictor_lr: float = 2e-3,
    query_rows: int | None = 256,
    ramp: SparsityRamp | None = None,
    entropy: EntropySettings | None = None,
    calibration_steps: int = 8,
    model_loss: ModelLoss | None = None,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    seed: int = 0,
    out: Path | str | None = None,
    progress: bool = True,
) -> LearnedMethod:
    """Train the weights of `method` (and with `joint_steps` > 0 the model itself, in place).

    Args:
        model: a supported Hugging Face model.  Left unchanged when `joint_steps` is 0.
        method: its settings; weights that it already has are trained further.
        batches: keyword arguments of the model's forward, one dict per step.  A list is repeated,
            any other iterable is drawn from once.  `labels` are needed for joint steps, unless
            `model_loss` computes the loss.
        warmup_steps: predictor-only steps against the frozen dense model; for methods that
            predict scores (`Predicting`).  For `StaticSparse` dense steps of the model itself,
            with the entropy terms; its regions are chosen after them.
        joint_steps: steps of model and predictor together, attention masked by the method.
        loss: `"kl"`, divergence of the attention distributions, or `"mse"`, equation 6.
        loss_weight: λ of equation 7.
        gradient: where the joint phase's predictor loss flows: `"predictor"` only (default for
            KL) or into `"both"` sides, which also lowers the rank of the scores (the paper's
            choice and the default for MSE).
        lr, predictor_lr: peak AdamW learning rates of model and predictor.
        query_rows: predictor-loss rows drawn per sequence and step; None takes all.
        entropy: the entropy terms of `StaticSparse`.
        calibration_steps: batches that the regions of `StaticSparse` are chosen from, and the
            thresholds of a `DynamicSparse` that selects by them and has none: they are read off
            the trained predictor, and joint steps run with the same share of best keys.
        ramp: lets the sparsity of the joint steps rise to the method's own; None: no rise.
        model_loss: (outputs, batch) → scalar; default `outputs.loss`.  Where it is given, the model
            does not get the `labels` of a batch.
        mixed_precision: accelerate's name of the forward's precision.
        seed: draws predictor weights and query rows.
        out: folder for checkpoints; a run that was stopped continues there.
        progress: show a progress bar.

    Returns:
        `method` with trained weights; `dataclasses.replace(result, sparsity=…)` runs the same
        predictor at another sparsity.

    Raises:
        ValueError: steps or rates out of range, unknown loss, batches too few, or a checkpoint
            of another run in `out`.
    """
    _check(warmup_steps, joint_steps, loss, lr, predictor_lr, query_rows)
    if isinstance(method, StaticSparse):
        from sparseloom.training.static import adapt_static  # which needs `finetune`

        made = adapt_static(
            model,
            method,
            batches,
            entropy_steps=warmup_steps,
            masked_steps=joint_steps,
            calibration_steps=calibration_steps,
            entropy=entropy,
            lr=lr,
            model_loss=model_loss,
            mixed_precision=mixed_precision,
            seed=seed,
            out=out,
            progress=progress,
        )
        return cast("LearnedMethod", made)
    accelerator = make_accelerator(mixed_precision)
    adapted = method
    if isinstance(method, DynamicSparse) and method.needs_thresholds:
        # Thresholds belong to a trained predictor: until then its best keys are chosen.
        adapted = cast("LearnedMethod", replace(method, selection="topk"))
    if adapted.module is None:
        if not warmup_steps and not joint_steps:
            raise ValueError(
                f"warmup_steps and joint_steps must not both be 0 for {method.name} without "
                "weights, which would stay as they are drawn"
            )
        adapted = cast("LearnedMethod", adapted.initialise(method_shape(model), seed=seed))
    model.to(accelerator.device)
    module = _module(adapted).to(accelerator.device)
    folder = None if out is None else Path(out)
    source = repeat(batches)
    rows = RowSampler(query_rows, seed)

    if warmup_steps:
        if not isinstance(adapted, Predicting):
            raise ValueError(
                f"warmup_steps must be 0 for {method.name}, which predicts no scores, got "
                f"{warmup_steps}"
            )
        with frozen(model), sparsify(model, Dense(), observer=(seen := Collector())):
            predicting = adapted

            def warm_up(batch: Batch) -> tuple[Tensor, dict[str, float]]:
                with torch.no_grad():
                    model(**{k: v for k, v in batch.items() if k != "labels"})
                value = predictor_loss(predicting, seen.take(), rows, loss, detach=True)
                return value, {loss: value.item()}

            module.train()
            run_loop(
                "warm-up",
                warm_up,
                source,
                {"predictor": module},
                [{"params": list(module.parameters()), "lr": predictor_lr}],
                LoopSettings(warmup_steps),
                accelerator=accelerator,
                checkpoint=folder and folder / "warm-up.pt",
                progress=progress,
                generators=[rows.generator],
                about={
                    "method": method.name,
                    "sizes": predicting.sizes(),
                    "loss": loss,
                    "predictor_lr": predictor_lr,
                    "query_rows": query_rows,
                    "mixed_precision": accelerator.mixed_precision,
                    "seed": seed,
                },
            )
            module.eval()

    if joint_steps:
        finetune(
            model,
            adapted,
            source,
            steps=joint_steps,
            loss=loss,
            loss_weight=loss_weight,
            gradient=gradient,
            lr=lr,
            predictor_lr=predictor_lr,
            query_rows=query_rows,
            ramp=ramp,
            model_loss=model_loss,
            accelerator=accelerator,
            seed=seed,
            out=folder,
            progress=progress,
        )
    if isinstance(method, DynamicSparse) and method.needs_thresholds:
        assert isinstance(adapted, DynamicSparse)
        tuned = replace(adapted, selection=method.selection)
        calls = itertools.islice(source, calibration_steps)
        return cast("LearnedMethod", calibrate(model, tuned, calls))
    return adapted


def finetune(
    model: PreTrainedModel,
    method: Method,
    batches: Iterable[Batch],
    *,
    steps: int,
    loss: LossName = "kl",
    loss_weight: float = 1.0,
    gradient: Literal["predictor", "both"] | None = None,
    lr: float = 1e-4,
    predictor_lr: float = 2e-3,
    query_rows: int | None = 256,
    ramp: SparsityRamp | None = None,
    model_loss: ModelLoss | None = None,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    accelerator: Any = None,
    settings: LoopSettings | None = None,
    entropy: EntropyLoss | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Fine-tune `model` in place with its attention run by `method`; returns the logged losses.

    The weights of a `Learned` method learn too (fresh ones are made by `adapt`).  For a
    `Predicting` one the loss is L_model + λ·L_predictor (equation 7); for every other method,
    `Dense()` included, it is L_model alone, which gives the control of equal training.
    Arguments are those of `adapt`; `settings` sets the optimiser and the law of its rate where the
    defaults do not fit (its steps must be `steps`).  `entropy` adds terms on the attention
    probabilities to the loss.
    """
    settings = settings or LoopSettings(steps)
    if settings.steps != steps:
        raise ValueError(f"settings.steps must be {steps}, as `steps` says, got {settings.steps}")
    _check(0, steps, loss, lr, predictor_lr, query_rows)
    accelerator = accelerator or make_accelerator(mixed_precision)
    model.to(accelerator.device)
    module = _module(method) if isinstance(method, Learned) else None
    detach = (gradient or ("predictor" if loss == "kl" else "both")) == "predictor"
    rows = RowSampler(query_rows, seed + 1)
    seen = Collector()
    of_model = model_loss or _own_loss
    modules: dict[str, nn.Module] = {"model": model}
    groups: list[dict[str, Any]] = [{"params": _trainable(model), "lr": lr}]
    if module is not None:
        modules["predictor"] = module.to(accelerator.device)
        if own := list(module.parameters()):
            groups.append({"params": own, "lr": predictor_lr})
    if entropy is not None:
        modules["entropy"] = entropy.to(accelerator.device)
    now = 0

    def joint(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        given = batch if model_loss is None else {k: v for k, v in batch.items() if k != "labels"}
        outputs = model(**given)
        total = task = of_model(outputs, batch)
        values = {"loss": task.item()}
        calls = seen.take_masked() if watched else []
        if isinstance(method, Predicting):
            inputs = [call for call, _ in calls]
            extra = predictor_loss(method, inputs, rows, loss, detach=detach)
            total, values[loss] = total + loss_weight * extra, extra.item()
        if entropy is not None:
            more, terms = entropy(calls, step=now, steps=steps, outputs=outputs, batch=batch)
            total, values = total + more, {**values, **terms}
        return total, values

    watched = isinstance(method, Predicting) or entropy is not None
    with ExitStack() as stack:
        stack.enter_context(in_mode(model, training=True))
        if module is not None:
            stack.callback(module.train().eval)
        observer = seen if watched else None
        sparse = stack.enter_context(sparsify(model, method, when="always", observer=observer))

        def before_step(step: int) -> None:
            nonlocal now
            now = step
            if ramp is not None:
                sparse.use(ramp.at(method, step, steps))

        return run_loop(
            f"fine-tune {method.name}",
            joint,
            # An iterator as it is: a generator around it would close it for the phases to come.
            repeat(batches) if isinstance(batches, (list, tuple)) else iter(batches),
            modules,
            groups,
            settings,
            accelerator=accelerator,
            checkpoint=None if out is None else Path(out) / "fine-tune.pt",
            progress=progress,
            before_step=before_step,
            generators=[rows.generator],
            about={
                "method": method.to_dict(),
                "loss": loss,
                "loss_weight": loss_weight,
                "detach": detach,
                "lr": lr,
                "predictor_lr": predictor_lr,
                "query_rows": query_rows,
                "ramp": None if ramp is None else asdict(ramp),
                "entropy": None if entropy is None else asdict(entropy.settings),
                "settings": asdict(replace(settings, save_every=1)),
                "mixed_precision": accelerator.mixed_precision,
                "seed": seed,
            },
        )


def _module(method: Learned) -> nn.Module:
    if method.module is None:
        raise ValueError(
            f"method: {method.name} has no weights yet; make them with initialise or sl.adapt"
        )
    return method.module


def _own_loss(outputs: Any, batch: Batch) -> Tensor:
    del batch
    if getattr(outputs, "loss", None) is None:
        raise ValueError("batches need `labels` for joint steps, or pass model_loss")
    return outputs.loss


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _check(
    warmup_steps: int,
    joint_steps: int,
    loss: str,
    lr: float,
    predictor_lr: float,
    query_rows: int | None,
) -> None:
    for name, steps in {"warmup_steps": warmup_steps, "joint_steps": joint_steps}.items():
        if steps < 0:
            raise ValueError(f"{name} must be 0 or more, got {steps}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    for name, rate in {"lr": lr, "predictor_lr": predictor_lr}.items():
        if not rate > 0:
            raise ValueError(f"{name} must be positive, got {rate}")
    if query_rows is not None and query_rows < 1:
        raise ValueError(f"query_rows must be 1 or more (or None for all), got {query_rows}")
