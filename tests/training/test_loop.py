"""Laws of the learning rate, and the optimiser that settings ask for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from sparseloom.training.loop import LoopSettings, make_accelerator, run_loop

pytest.importorskip("accelerate", reason="training needs the train extra")


def test_the_default_rises_and_falls_to_a_tenth() -> None:
    settings = LoopSettings(100)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.964])
    assert rates[99] == pytest.approx(0.109)


def test_rsqrt_is_the_published_law() -> None:
    settings = LoopSettings(20_000, warmup=0.4, law="rsqrt")
    for step in (1, 4000, 8000, 12_345, 20_000):
        published = 0.05 * min(1.0, step / 8000) / math.sqrt(max(step, 8000))
        assert 0.05 / math.sqrt(8000) * settings.rate(step - 1) == pytest.approx(published)
    short = LoopSettings(5_000, warmup=1.6, law="rsqrt")  # ends inside its warm-up
    assert 0.05 / math.sqrt(8000) * short.rate(4999) == pytest.approx(3.5e-4, rel=0.01)


def test_cosine_is_the_published_law() -> None:
    settings = LoopSettings(35_000, warmup=175 / 35_000, law="cosine")
    for step in (1, 100, 175, 5_000, 35_000):
        progress = max(0.0, (step - 175) / 35_000)
        published = min(1.0, step / 175) * 0.5 * (1 + math.cos(math.pi * progress))
        assert settings.rate(step - 1) == pytest.approx(published)


def test_an_unknown_law_is_refused() -> None:
    law: Any = "quadratic"
    with pytest.raises(Exception, match="law"):  # the tests' own type check may come first
        LoopSettings(10, law=law)


def run(settings: LoopSettings, gradient: float) -> float:
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    batches = iter([{"x": torch.full((1, 1), gradient)}] * settings.steps)

    def step(batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
        loss = module(batch["x"]).sum()
        return loss, {"loss": loss.item()}

    run_loop(
        "test", step, batches, {"m": module}, [{"params": list(module.parameters()), "lr": 0.1}],
        settings, accelerator=make_accelerator("no"), checkpoint=None, progress=False,
    )  # fmt: skip
    return module.weight.item()


def test_weight_decay_epsilon_and_clipping_reach_the_optimiser() -> None:
    # One AdamW step: w·(1 - lr·decay) - lr·g/(|g| + eps), bias corrections cancelling.
    assert run(LoopSettings(1, weight_decay=0.5), 3.0) == pytest.approx(1 - 0.05 - 0.1)
    assert run(LoopSettings(1, eps=1.0), 3.0) == pytest.approx(1 - 0.1 / 2)  # clipped to 1
    assert run(LoopSettings(1, eps=1.0, grad_clip=None), 3.0) == pytest.approx(1 - 0.1 * 3 / 4)
