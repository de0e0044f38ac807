"""One resumable optimisation loop: learning rate, clipping, progress, checkpoints.

accelerate chooses device and precision; torch has the optimisers.  The loop only owns the order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sparseloom.files import fresh_file

Batch = Mapping[str, Tensor]
Step = Callable[[Batch], tuple[Tensor, dict[str, float]]]


Law = Literal["linear", "rsqrt", "cosine"]


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How long and how boldly to train.

    Attributes:
        steps: optimiser steps.
        warmup: share of `steps` over which the rate rises linearly; above 1 it never gets there.
        grad_clip: largest norm of all gradients together; None leaves them as they are.
        save_every: steps between checkpoints.
        law: what follows the rise: `"linear"`, down to a tenth of the peak; `"rsqrt"`, as one over
            the root of the step; `"cosine"`, half a cosine over `steps`, down to nothing.
        betas, eps, weight_decay: of AdamW.
    """

    steps: int
    warmup: float = 0.05
    grad_clip: float | None = 1.0
    save_every: int = 50
    law: Law = "linear"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.law not in get_args(Law):
            names = ", ".join(map(repr, get_args(Law)))
            raise ValueError(f"law must be one of {names}, got {self.law!r}")

    def rate(self, step: int) -> float:
        """Learning rate of a step as a share of its peak."""
        rising = self.warmup * self.steps
        rise = (step + 1) / max(1.0, rising)
        if self.law == "linear":
            return min(1.0, rise, 0.1 + 0.9 * (self.steps - step) / max(1, self.steps))
        if self.law == "rsqrt":
            return min(1.0, rise) * math.sqrt(max(1.0, rising) / max(step + 1, rising, 1.0))
        progress = max(0.0, step + 1 - rising) / max(1, self.steps)
        return min(1.0, rise) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def make_accelerator(mixed_precision: str) -> Any:
    """An `accelerate.Accelerator`; its absence is one clear sentence."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'sparseloom[train]'") from error
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        # accelerate knows one precision per process; ours may train several models in a row.
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=mixed_precision)


def run_loop(
    name: str,
    step: Step,
    batches: Iterator[Batch],
    modules: Mapping[str, nn.Module],
    groups: list[dict[str, Any]],
    settings: LoopSettings,
    *,
    accelerator: Any,
    checkpoint: Path | None,
    progress: bool,
    before_step: Callable[[int], None] | None = None,
    generators: Sequence[torch.Generator] = (),
    about: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Run `step` on each batch, step the optimiser, and return what `step` logged.

    `groups` are AdamW parameter groups with their own peak `lr`.  With a `checkpoint` file the
    loop continues after the last saved step, to the end that it would have come to unbroken: the
    batches before it are drawn and dropped, and torch's generators and `generators` go on from
    where they were.  The file holds these, `modules`, optimiser and log, and `about`: all that
    decides the run beside its batches, as JSON holds it.
    `before_step` is called with the number of each step from 0.

    Raises:
        ValueError: too few batches, or a checkpoint of another run.
        FloatingPointError: the loss is not a finite number.
    """
    optimiser = torch.optim.AdamW(
        groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    peaks = [group["lr"] for group in optimiser.param_groups]
    log: list[dict[str, float]] = []
    first, drawn = 0, None
    wanted = json.dumps(about or {})
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["name"] != name or state["steps"] != settings.steps:
            raise ValueError(
                f"out: {checkpoint} belongs to another run ({state['name']}, {state['steps']} "
                f"steps; this one is {name}, {settings.steps} steps); choose a fresh folder"
            )
        _refuse_other(checkpoint, json.loads(state.get("about", "{}")), json.loads(wanted))
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimiser.load_state_dict(state["optimiser"])
        log, first, drawn = state["log"], int(state["step"]), state.get("random")

    def draw(index: int) -> Batch:
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"batches ended after {index} of the {settings.steps} {name} steps; "
                "pass a list (it is repeated) or a longer iterable"
            )
        return batch

    for index in range(first):
        draw(index)
    if drawn is not None:
        _go_on_drawing(drawn, generators)
    with _Bar(name, settings.steps, first, progress) as advance:
        for index in range(first, settings.steps):
            batch = draw(index)
            rate = settings.rate(index)
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            if before_step is not None:
                before_step(index)
            with accelerator.autocast():
                loss, values = step(
                    {key: tensor.to(accelerator.device) for key, tensor in batch.items()}
                )
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {index}")
            accelerator.backward(loss)
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            if settings.grad_clip is not None:
                nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
            optimiser.step()
            optimiser.zero_grad()
            log.append({"step": float(index + 1), **values})
            advance(values)
            done = index + 1
            if checkpoint is not None and (
                done % settings.save_every == 0 or done == settings.steps
            ):
                run: dict[str, Any] = {"name": name, "steps": settings.steps, "about": wanted}
                run["random"] = _drawn(generators)
                _save(checkpoint, run, done, modules, optimiser, log)
    return log


def repeat(batches: Iterable[Batch]) -> Iterator[Batch]:
    """A list or tuple over and over; any other iterable once."""
    if not isinstance(batches, (list, tuple)):
        yield from batches
        return
    if not batches:
        raise ValueError("batches must hold at least one batch, got an empty list")
    while True:
        yield from batches


def _refuse_other(file: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of other settings; a file that tells none may be of any."""
    other = next((key for key in kept if kept[key] != wanted.get(key)), None)
    if other is not None:
        raise ValueError(
            f"out: {file} belongs to a run with {other} {kept[other]!r}, and this one has "
            f"{wanted.get(other)!r}; choose a fresh folder"
        )


def _drawn(generators: Sequence[torch.Generator]) -> list[Tensor]:
    """The states of `generators`, of torch's own, and of its CUDA device where there is one."""
    states = [*(one.get_state() for one in generators), torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _go_on_drawing(states: Sequence[Tensor], generators: Sequence[torch.Generator]) -> None:
    own = len(generators)
    for one, state in zip(generators, states, strict=False):
        one.set_state(state)
    torch.set_rng_state(states[own])
    if torch.cuda.is_available() and len(states) > own + 1:
        torch.cuda.set_rng_state(states[own + 1])


def _save(
    path: Path,
    run: Mapping[str, Any],
    done: int,
    modules: Mapping[str, nn.Module],
    optimiser: torch.optim.Optimizer,
    log: list[dict[str, float]],
) -> None:
    state = {
        **run,
        "step": done,
        "modules": {key: module.state_dict() for key, module in modules.items()},
        "optimiser": optimiser.state_dict(),
        "log": log,
    }
    with fresh_file(path) as fresh:
        torch.save(state, fresh)


class _Bar:
    """A rich progress bar that shows the last logged values; silent when not wanted."""

    def __init__(self, name: str, total: int, done: int, show: bool) -> None:
        from rich.progress import Progress

        self._progress = Progress(disable=not show, transient=True)
        self._name = name
        self._task = self._progress.add_task(name, total=total, completed=done)

    def __enter__(self) -> Callable[[dict[str, float]], None]:
        self._progress.start()
        return self._advance

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _advance(self, values: dict[str, float]) -> None:
        shown = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        self._progress.update(self._task, advance=1, description=f"{self._name}  {shown}")
