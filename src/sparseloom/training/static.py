"""Fit static structured sparse attention to a model: calibrate, choose regions, fine-tune.

After Dai et al. (DAC 2023), whose abstract names entropy-aware fine-tuning for static masks; the
phases are ours: the model as it comes (or fine-tuned for its task), dense steps with the entropy
terms, calibration and choice of regions, steps with the mask in place.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from sparseloom.files import fresh_folder
from sparseloom.integrations import describe, sparsify
from sparseloom.mask import SparseMask
from sparseloom.methods import Dense, Method, StaticSparse
from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.region_search import forced_within
from sparseloom.methods.tile_statistics import TileStatistics
from sparseloom.models.modes import frozen
from sparseloom.regions import TILE_KEYS, TILE_QUERIES
from sparseloom.training.adapt import ModelLoss, finetune
from sparseloom.training.checkpoint import WEIGHTS, load_method, save_method
from sparseloom.training.entropy import EntropyLoss, EntropySettings
from sparseloom.training.loop import Batch, LoopSettings, repeat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS = "settings.json"
"""Beside the regions that a run keeps: what they were chosen with."""

Objective = Callable[[Any, Mapping[str, Tensor]], Tensor]
"""(outputs, batch) → the scalar whose dependence on attention saliency measures."""


def adapt_static(
    model: PreTrainedModel,
    method: StaticSparse,
    batches: Iterable[Batch],
    *,
    entropy_steps: int,
    masked_steps: int,
    calibration_steps: int = 8,
    entropy: EntropySettings | None = None,
    lengths: Sequence[int] | None = None,
    objective: Objective | None = None,
    teacher: nn.Module | None = None,
    lr: float = 3e-5,
    masked_lr: float | None = None,
    settings: Callable[[int], LoopSettings] = LoopSettings,
    model_loss: ModelLoss | None = None,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    seed: int = 0,
    out: Path | str | None = None,
    progress: bool = True,
) -> StaticSparse:
    """Run the phases on `model`, in place.

    Args:
        model: a supported Hugging Face model, trained for its task.
        method: settings; regions that it has are chosen anew.
        batches: as `sl.adapt`: drawn for all phases in turn.
        entropy_steps: dense steps with the entropy terms.
        masked_steps: steps with the mask, entropy terms at a tenth of their weight.
        calibration_steps: batches from which regions are chosen.
        entropy: weights and schedule; the target always follows the method's density.
        lengths, objective: of `select_regions`.
        teacher: of the teacher's term, where `entropy` gives it a weight.
        lr: peak learning rate of the dense steps.
        masked_lr: that of the masked ones; None: half of `lr`.
        settings: steps → optimiser and law of its rate.
        model_loss, mixed_precision, seed, progress: as `sl.adapt`.
        out: folder for checkpoints and regions; a run that was stopped continues there.

    Returns:
        `method` with its regions.

    Raises:
        ValueError: as `sl.adapt` and `select_regions`; also regions in `out` that were chosen with
            other settings.
    """
    for name, steps in {"entropy_steps": entropy_steps, "masked_steps": masked_steps}.items():
        if steps < 0:
            raise ValueError(f"{name} must be 0 or more, got {steps}")
    _check_budget(model, method, lengths)
    plan = replace(entropy or EntropySettings(), density=method.density)
    folder = None if out is None else Path(out)
    source = repeat(batches)

    def tune(method: Any, steps: int, rate: float, name: str) -> None:
        masked = isinstance(method, StaticSparse)
        finetune(
            model,
            method,
            source,
            steps=steps,
            lr=rate,
            entropy=EntropyLoss(plan, frozen=masked, teacher=teacher, seed=seed),
            settings=settings(steps),
            model_loss=model_loss,
            mixed_precision=mixed_precision,
            seed=seed,
            out=folder and folder / name,
            progress=progress,
        )

    if entropy_steps:
        tune(Dense(), entropy_steps, lr, "entropy")
    calibration = list(itertools.islice(source, calibration_steps))
    chosen = folder and folder / "regions"
    if chosen is not None and (chosen / WEIGHTS).exists():
        method = _kept_regions(chosen, method)
    else:
        method = select_regions(model, method, calibration, lengths=lengths, objective=objective)
        if chosen is not None:
            with fresh_folder(chosen) as fresh:
                save_method(method, fresh)
                (fresh / SETTINGS).write_text(json.dumps(method.to_dict()), "utf-8")
    if masked_steps:
        tune(method, masked_steps, lr / 2 if masked_lr is None else masked_lr, "masked")
    return method


def _kept_regions(folder: Path, method: StaticSparse) -> StaticSparse:
    """The regions of an earlier run with the same settings."""
    file, wanted = folder / SETTINGS, method.to_dict()
    if file.exists() and (found := json.loads(file.read_text("utf-8"))) != wanted:
        raise ValueError(
            f"out: {folder} holds regions of another run ({Method.from_dict(found)}; this one is "
            f"{method}); choose a fresh folder"
        )
    return cast("StaticSparse", load_method(folder, wanted))


def select_regions(
    model: nn.Module,
    method: StaticSparse,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    lengths: Sequence[int] | None = None,
    objective: Objective | None = None,
) -> StaticSparse:
    """`method` with regions for `model`, chosen from what attention does on `batches`.

    Args:
        model: runs dense, in evaluation mode; unchanged.
        method: how to choose.
        batches: keyword arguments of the model's forward.  512 to 2048 sequences are enough.
        lengths: inputs that get regions of their own, in tokens as attention sees them; batches
            are cut to each length that they exceed.  None: one length, the longest of the batches.
        objective: see `tile_statistics`.

    Raises:
        ValueError: no batches, a budget that does not hold what is forced, or no default objective.
    """
    _check_budget(model, method, lengths)
    found = tile_statistics(model, batches, lengths=lengths, objective=objective)
    return method.chosen(found)


def _check_budget(model: nn.Module, method: StaticSparse, lengths: Sequence[int] | None) -> None:
    """Refuse before anything runs what the search would refuse after calibration."""
    causal = describe(model).is_causal
    for length in lengths or ():
        forced_within(method.search, length, is_causal=causal)


def tile_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    lengths: Sequence[int] | None = None,
    objective: Objective | None = None,
    tile: tuple[int, int] = (TILE_QUERIES, TILE_KEYS),
) -> list[TileStatistics]:
    """Mass, saliency and evenness of all tiles, one for each length; arguments as above.

    Args:
        model, batches, lengths: see `select_regions`.
        objective: (outputs, batch) → a scalar whose dependence on the scores is the saliency.
            None: the margin between the right class (of the labels, else the one found) and the
            best other one, over all items; of language models over all next tokens.  Not the
            loss, which vanishes on data that the model fits.
        tile: (queries, keys) of a tile; regions need the one that is the default.
    """
    every = [dict(batch) for batch in batches]
    if not every:
        raise ValueError("batches must hold at least one batch, got none")
    shape = describe(model)
    wanted = objective or margin(is_causal=shape.is_causal)
    device = next(model.parameters()).device
    extra = _attended(model, every[0], device) - _length(every[0])
    longest = max(_length(batch) for batch in every) + extra
    sizes = sorted({min(n, longest) for n in lengths}) if lengths else [longest]
    if sizes[0] <= extra:
        raise ValueError(f"lengths must be at least {extra + 1}, got {sizes[0]}")
    sums = shape.is_causal, shape.layers, shape.heads, tile
    found = {n: TileStatistics(n, *sums) for n in sizes}
    with frozen(model, gradients=True):
        for batch in every:
            whole = _length(batch) + extra
            for n in sizes:
                shorter = [m for m in sizes if m < n]
                if shorter and whole <= shorter[-1]:  # a smaller length holds all of it
                    break
                _add(model, cut(batch, min(n, whole) - extra), wanted, found[n], device)
    return [one for one in found.values() if one.inputs]


def margin(*, is_causal: bool) -> Objective:
    """The default objective; `is_causal`: labels of a language model are the next tokens."""

    def objective(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        logits = getattr(outputs, "logits", None)
        if logits is None:
            raise ValueError(
                "objective must be given for a model without logits: (outputs, batch) → scalar"
            )
        logits, labels = logits.float(), batch.get("labels")
        if logits.shape[-1] == 1:
            return logits.sum()
        if logits.dim() == 3 and is_causal:
            logits, labels = logits[:, :-1], None if labels is None else labels[:, 1:]
        right = logits.argmax(-1) if labels is None else labels
        counts = right >= 0
        right = right.clamp(min=0)[..., None]
        ours = logits.gather(-1, right)[..., 0]
        best = logits.scatter(-1, right, -torch.inf).amax(-1)
        return ((ours - best) * counts).sum()

    return objective


def cut(batch: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """The first `length` tokens of every tensor that has one entry per token."""
    whole = _length(batch)
    return {
        name: value[..., :length] if value.dim() > 1 and value.shape[-1] == whole else value
        for name, value in batch.items()
    }


class _Outputs:
    """Observer that keeps inputs and outputs of all attention calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[AttentionInputs, Tensor]] = []

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        del mask
        self.calls.append((inputs, output))


def _add(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    objective: Objective,
    into: TileStatistics,
    device: torch.device,
) -> None:
    seen = _Outputs()
    given = {name: value.to(device) for name, value in batch.items()}
    with torch.enable_grad(), sparsify(model, Dense(), observer=seen):
        outputs = model(**{name: value for name, value in given.items() if name != "labels"})
        value = objective(outputs, given)
    made = [output for _, output in seen.calls]
    gradients = torch.autograd.grad(value, made, allow_unused=True)
    for (inputs, output), gradient in zip(seen.calls, gradients, strict=True):
        into.add(inputs, torch.zeros_like(output) if gradient is None else gradient)
    into.inputs += len(given["input_ids"])


def _attended(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> int:
    """Tokens that attention sees of a batch: some models add their own."""
    seen = _Outputs()
    with torch.no_grad(), sparsify(model, Dense(), observer=seen):
        model(**{k: v[:1].to(device) for k, v in batch.items() if k != "labels"})
    return seen.calls[0][0].key.shape[2]


def _length(batch: Mapping[str, Tensor]) -> int:
    return batch["input_ids"].shape[-1]
