"""How large the Long Range Arena studies are: the published size, and one for two CPU cores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from sparseloom.errors import unknown_name
from sparseloom.models.lra_presets import LENGTHS, RECIPES, LraRecipe
from sparseloom.training.loop import LoopSettings

Size = Literal["small", "paper"]


@dataclass(frozen=True, slots=True)
class LraStudy:
    """What one study holds equal over its contenders.

    Attributes:
        task: "text", "retrieval", "image" or "listops".
        size: "small" or "paper".
        length: input tokens.
        recipe: how the vanilla model, and any contender from scratch, is trained.
        model: settings in which the model differs from the published one.
        grad_clip: of the training from scratch; the published recipe has none.
        warmup_steps: predictor-only steps against the frozen model.
        joint_steps: further steps of every contender, the dense control included.
        joint_batch: examples per further step; None for the recipe's.
        lr, predictor_lr: peak rates of the further steps; AdamW with the defaults of `adapt`.
        query_rows: rows of the predictor loss per sequence.
        items: test examples that are scored; None for all.
        diagnosed: test examples on which prediction is compared with exact top-k.
        mixed_precision: accelerate's name.
        seed: of weights and batches.
    """

    task: str
    size: Size
    length: int
    recipe: LraRecipe
    model: dict[str, Any] = field(default_factory=dict[str, Any])
    grad_clip: float | None = None
    warmup_steps: int = 500
    joint_steps: int = 1000
    joint_batch: int | None = None
    lr: float = 5e-5
    predictor_lr: float = 1e-3
    query_rows: int = 256
    items: int | None = None
    diagnosed: int = 64
    mixed_precision: Literal["no", "bf16"] = "no"
    seed: int = 0

    def settings(self) -> LoopSettings:
        """The training loop of the recipe."""
        recipe = self.recipe
        return LoopSettings(
            recipe.steps,
            warmup=recipe.warmup_steps / recipe.steps,
            grad_clip=self.grad_clip,
            law=recipe.law,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        )


def _paper(task: str, joint_steps: int) -> LraStudy:
    recipe = RECIPES[task]
    return LraStudy(
        task, "paper", LENGTHS[task], recipe, joint_steps=joint_steps, lr=0.1 * recipe.peak_lr,
        mixed_precision="bf16",
    )  # fmt: skip


def _small(task: str, length: int, recipe: dict[str, Any], **settings: Any) -> LraStudy:
    return LraStudy(
        task, "small", length, dataclasses.replace(RECIPES[task], **recipe), grad_clip=1.0,
        **settings,
    )  # fmt: skip


# Attention dropout is 0 in the small models: on a CPU it takes dense attention off its fast path.
_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_TINY_IMAGE = {
    "hidden_size": 64, "qkv_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_SHORT = {
    "warmup_steps": 100, "joint_steps": 100, "joint_batch": 16, "lr": 2e-4, "predictor_lr": 5e-3,
    "query_rows": 64, "diagnosed": 32,
}  # fmt: skip
_FAST = {"batch_size": 32, "peak_lr": 1e-3}

_STUDIES: dict[tuple[str, str], LraStudy] = {
    # Steps of the paper's adaptation are not published; these are defaults.
    ("text", "paper"): _paper("text", 5000),
    ("retrieval", "paper"): _paper("retrieval", 2000),
    ("image", "paper"): _paper("image", 3500),
    ("listops", "paper"): _paper("listops", 2000),
    ("text", "small"): _small(
        "text", 512, {"steps": 4000, "warmup_steps": 400, **_FAST}, model=_TINY, items=1000,
        **_SHORT,
    ),
    ("retrieval", "small"): _small(
        "retrieval", 512, {"steps": 1200, "warmup_steps": 120, **_FAST}, model=_TINY, **_SHORT
    ),
    ("image", "small"): _small(
        "image", 1024, {"steps": 1500, "warmup_steps": 100, "batch_size": 16, "peak_lr": 1e-3},
        model=_TINY_IMAGE, items=1000, **{**_SHORT, "joint_batch": 8, "diagnosed": 16},
    ),
    ("listops", "small"): _small(
        "listops", 512, {"steps": 700, "warmup_steps": 100, **_FAST}, model=_TINY, items=1000,
        **_SHORT,
    ),
}  # fmt: skip


def study_of(task: str, size: str = "small", **changes: Any) -> LraStudy:
    """The study of a task (with or without `lra-`) at a size, with some settings changed.

    Raises:
        ValueError: no such task or size.
    """
    name = task.removeprefix("lra-")
    if name not in RECIPES:
        raise unknown_name("task", task, RECIPES)
    if (name, size) not in _STUDIES:
        raise unknown_name("size", size, ("small", "paper"))
    return dataclasses.replace(_STUDIES[name, size], **changes)
