"""How the rank of the attention scores S = QKᵀ changes under joint training.

    python -m sparseloom.experiments.score_rank

Liu et al. (IEEE TC 2022, section 3.2) let the gradient of the predictor's squared error into both
sides: S̃ moves towards S, and S towards what a predictor of σ·head_dim columns can express, so that
its rank falls.  Here the built-in byte model is fine-tuned for a few steps from one checkpoint:
dense, jointly with the squared error into both sides or into the predictor alone, and with the
divergence of the distributions.  Two gauges per layer, means over heads and held-out windows:

- effective rank, exp of the entropy of the singular values' shares (Roy and Vetterli, 2007);
- energy within the predictor's width: the share of Σσ² in that many largest singular values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparseloom.experiments.compare import capture
from sparseloom.experiments.parts import kept_part
from sparseloom.experiments.study_command import run_command
from sparseloom.methods import Dense, DynamicSparse
from sparseloom.models import LoadedModel, load_model
from sparseloom.tasks.language_modelling import StdlibBitsPerByte
from sparseloom.training import adapt, finetune

Row = dict[str, Any]
LossName = Literal["kl", "mse"]
Gradient = Literal["predictor", "both"]


@dataclasses.dataclass(frozen=True, slots=True)
class Study:
    """What every contender is given; lengths in tokens."""

    sparsity: float = 0.9
    projection: float = 0.25
    bits: int = 4
    context: int = 512
    batch: int = 2
    warmup_steps: int = 40
    joint_steps: int = 80
    lr: float = 3e-4
    predictor_lr: float = 3e-3
    windows: int = 4
    seed: int = 5


SMALL = Study()
PAPER = Study(context=2048, batch=16, warmup_steps=500, joint_steps=5000, lr=1e-4, windows=16)


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """How a copy of the model is tuned; without a loss it is dense, or left as it is."""

    tuned: bool = True
    loss: LossName | None = None
    gradient: Gradient = "predictor"
    loss_weight: float = 1.0


CONTENDERS = {
    "before": Contender(tuned=False),
    "dense": Contender(),
    "squared error into both sides": Contender(loss="mse", gradient="both"),
    "squared error into both sides, λ = 0.1": Contender(
        loss="mse", gradient="both", loss_weight=0.1
    ),
    "squared error into the predictor": Contender(loss="mse"),
    "divergence into both sides": Contender(loss="kl", gradient="both"),
    "divergence into the predictor": Contender(loss="kl"),
}


def run_study(
    study: Study, out: Path, *, step: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Rows of record "score_rank"; contenders that are finished in `out` are not run again."""
    task = StdlibBitsPerByte(context=study.context)
    task.load()
    rows: list[Row] = []
    for label, contender in CONTENDERS.items():
        step(f"{label}")
        slug = "-".join("".join(c if c.isalnum() else " " for c in label).split())
        settings = [dataclasses.asdict(study), dataclasses.asdict(contender)]
        rows.append(
            kept_part(
                out / f"{slug}.json",
                settings,
                partial(_tune_and_measure, study, task, label, contender, out / slug),
            )
        )
    return rows


def score_singular_values(
    query: Float[Tensor, "*heads q_len head_dim"], key: Float[Tensor, "*heads kv_len head_dim"]
) -> Float[Tensor, "*heads rank"]:
    """Singular values of query · keyᵀ, largest first, without ever forming it.

    With query = Q₁R₁ and key = Q₂R₂ they are those of R₁R₂ᵀ.
    """
    left = torch.linalg.qr(query.double(), mode="r").R
    right = torch.linalg.qr(key.double(), mode="r").R
    return torch.linalg.svdvals(left @ right.mT)


def effective_rank(values: Float[Tensor, "*heads rank"]) -> Float[Tensor, "*heads"]:
    """exp(−Σ p·ln p) of the shares p = σᵢ/Σσ: between 1 and the number of singular values."""
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def energy_within(values: Float[Tensor, "*heads rank"], width: int) -> Float[Tensor, "*heads"]:
    """Share of Σσ² in the `width` largest singular values."""
    squares = values.square()
    return squares[..., :width].sum(-1) / squares.sum(-1)


@torch.no_grad()
def measure(loaded: LoadedModel, task: StdlibBitsPerByte, windows: int, width: int) -> Row:
    """Both gauges by layer, means over heads and windows; the model runs dense."""
    ranks: dict[int, list[Tensor]] = {}
    energies: dict[int, list[Tensor]] = {}
    for inputs in task.inputs(loaded, limit=windows):
        for call in capture(loaded, inputs):
            key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
            values = score_singular_values(call.query, key)
            ranks.setdefault(call.layer, []).append(effective_rank(values).mean())
            energies.setdefault(call.layer, []).append(energy_within(values, width).mean())

    def means(found: dict[int, list[Tensor]]) -> list[float]:
        return [float(torch.stack(found[layer]).mean()) for layer in sorted(found)]

    return {"effective_rank": means(ranks), "energy_within_width": means(energies)}


def _tune_and_measure(
    study: Study, task: StdlibBitsPerByte, label: str, contender: Contender, out: Path
) -> Row:
    loaded = load_model("stdlib")
    loaded.model.float()
    curve: list[dict[str, float]] = []
    if contender.tuned:
        curve = _tune(study, task, loaded, contender, out)
    loaded.model.eval()
    width = round(study.projection * 64)
    found = measure(loaded, task, study.windows, width)
    score = task.score(loaded, limit=4 * study.windows)
    return {
        "record": "score_rank",
        "model": "stdlib",
        "contender": label,
        "loss": contender.loss,
        "gradient": contender.gradient if contender.loss else None,
        "loss_weight": contender.loss_weight if contender.loss else None,
        "steps": study.joint_steps if contender.tuned else 0,
        "settings": dataclasses.asdict(study),
        "width": width,
        **found,
        "metric": "bits_per_byte",
        "value": score.value,
        "items": len(score.per_item),
        "seed": study.seed,
        "curve": curve,
    }


def _tune(
    study: Study,
    task: StdlibBitsPerByte,
    loaded: LoadedModel,
    contender: Contender,
    out: Path,
) -> list[dict[str, float]]:
    """Tune in place; returns the log of the joint steps."""

    def batches(steps: int, seed: int) -> Any:
        return task.batches(
            loaded, steps=steps, batch_size=study.batch, context=study.context, seed=seed
        )

    method: DynamicSparse | Dense = Dense()
    if contender.loss is not None:
        method = adapt(
            loaded.model,
            DynamicSparse(sparsity=study.sparsity, projection=study.projection, bits=study.bits),
            batches(study.warmup_steps, study.seed),
            warmup_steps=study.warmup_steps,
            loss=contender.loss,
            predictor_lr=study.predictor_lr,
            seed=study.seed,
            out=out,
        )
    return finetune(
        loaded.model,
        method,
        batches(study.joint_steps, study.seed + 1),
        steps=study.joint_steps,
        loss=contender.loss or "kl",
        loss_weight=contender.loss_weight,
        gradient=contender.gradient,
        lr=study.lr,
        predictor_lr=study.predictor_lr / 10,
        seed=study.seed,
        out=out,
    )


def main() -> None:
    """Command line of the study."""
    run_command(
        "score_rank", __doc__, Study(), lambda study, out, _: run_study(study, out, step=print)
    )


if __name__ == "__main__":
    main()
