"""Train the built-in byte-level language model from nothing, on this Python's standard library.

    python -m sparseloom.training.pretrain --out out/stdlib_lm

A small Llama (transformers) learns bytes with Muon for matrices and AdamW for the rest, first on
short windows, then on the full context; the learning rate is constant, then falls to zero.  The run
is resumable, seeded, and writes `curve.csv` beside the checkpoint.  The recipe is `Recipe` below;
the one that was used is stored beside the shipped weights.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparseloom.files import fresh_file
from sparseloom.tasks.stdlib import load_stdlib


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights, beside the corpus and the library versions.

    `phases` lists (steps, context, windows per step).  `decay` is the last share of all steps, in
    which the learning rates fall linearly to zero.
    """

    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rope_theta: float = 10_000.0
    context: int = 2048
    phases: tuple[tuple[int, int, int], ...] = ((1500, 512, 16), (900, 2048, 4))
    warmup: int = 40
    decay: float = 0.5
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    weight_decay: float = 0.02
    grad_clip: float = 1.0
    seed: int = 20260

    @property
    def steps(self) -> int:
        """Optimiser steps over all phases."""
        return sum(steps for steps, _, _ in self.phases)

    def phase(self, step: int) -> tuple[int, int]:
        """(context, windows) of a step."""
        for steps, context, windows in self.phases:
            if step < steps:
                return context, windows
            step -= steps
        raise ValueError("step is past the last phase")

    def rate(self, step: int) -> float:
        """Learning rate of a step as a share of its peak."""
        tail = self.decay * self.steps
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / tail)


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """A Llama of the recipe's shape with fresh weights; 256 byte values are its vocabulary."""
    # transformers 5 takes rope_theta without declaring it.
    positions: dict[str, Any] = {"rope_theta": recipe.rope_theta}
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.context,
        **positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def sample_windows(corpus: np.ndarray, context: int, count: int, seed: int) -> Tensor:
    """`count` windows of context + 1 bytes at uniform offsets; (count, context + 1) int64."""
    starts = np.random.default_rng(seed).integers(0, len(corpus) - context - 1, count)
    return torch.from_numpy(np.stack([corpus[s : s + context + 1] for s in starts])).long()


def pretrain(
    recipe: Recipe, out: Path, *, save_every: int = 200, compile_model: bool = True
) -> None:
    """Train to the end of the recipe, resuming from `out/state.pt` where it exists."""
    torch.manual_seed(recipe.seed)
    corpus = np.frombuffer(load_stdlib().train, dtype=np.uint8)
    model = build_model(recipe)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [recipe.muon_lr, recipe.adam_lr]

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    forward = torch.compile(loss_of, dynamic=False) if compile_model else loss_of

    out.mkdir(parents=True, exist_ok=True)
    state_file, curve_file = out / "state.pt", out / "curve.csv"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = int(state["step"])
        rows = curve_file.read_text().splitlines()
        kept = [row for row in rows[1:] if int(row.split(",")[0]) <= first]
        curve_file.write_text("\n".join([rows[0], *kept]) + "\n")
    else:
        curve_file.write_text("step,context,bytes_seen,train_bits_per_byte\n")

    seen = sum(context * count for context, count in map(recipe.phase, range(first)))
    losses: list[float] = []
    with Progress() as progress:
        task = progress.add_task("pretrain", total=recipe.steps, completed=first)
        for step in range(first, recipe.steps):
            context, count = recipe.phase(step)
            windows = sample_windows(corpus, context, count, recipe.seed * 1_000_003 + step)
            loss = forward(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
            for optimiser, peak in zip(optimisers, peaks, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = peak * recipe.rate(step)
                optimiser.step()
                optimiser.zero_grad()
            seen += context * count
            losses.append(loss.item() / np.log(2))
            progress.update(task, advance=1, description=f"pretrain {losses[-1]:.3f} bits/byte")
            if (step + 1) % 20 == 0:
                with curve_file.open("a", newline="") as stream:
                    row = [step + 1, context, seen, round(float(np.mean(losses)), 4)]
                    csv.writer(stream).writerow(row)
                losses = []
            if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
                optimiser_states = [optimiser.state_dict() for optimiser in optimisers]
                state = {"model": model.state_dict(), "optimisers": optimiser_states}
                with fresh_file(state_file) as fresh:
                    torch.save({**state, "step": step + 1}, fresh)

    model.half().save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=1) + "\n")


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/stdlib_lm"))
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    parser.add_argument("--no-compile", action="store_true", help="do without a C++ compiler")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pretrain(Recipe(), arguments.out, compile_model=not arguments.no_compile)


if __name__ == "__main__":
    main()
