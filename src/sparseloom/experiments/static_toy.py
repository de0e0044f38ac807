"""Entropy-aware fine-tuning and mask selection on a toy: looking up content among 32 tokens.

    python -m sparseloom.experiments.static_toy

A model of two layers and four heads reads a query key and 30 items of a key and a bit; its answer
is the bit of the one item whose key was asked for, wherever that item stands, so attention has to
follow content and static masks are at their worst.  It is trained dense, then further with the
entropy terms at several weights, then under masks of 4 × 4 tiles that are chosen by mass or by
saliency.  Says how entropy, the entropy of mean rows, the mass covered and accuracy go together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from sparseloom.experiments.parts import kept_part
from sparseloom.experiments.study_command import run_command
from sparseloom.integrations import sparsify
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Dense, Selector
from sparseloom.methods.region_search import SearchSettings, tile_values
from sparseloom.methods.region_tiles import best_tiles
from sparseloom.models.lra import LraConfig, LraForSequenceClassification
from sparseloom.training import EntropyLoss, EntropySettings, finetune
from sparseloom.training.entropy_statistics import entropy_statistics
from sparseloom.training.loop import LoopSettings
from sparseloom.training.static import tile_statistics

KEYS, ITEMS, TILE = 16, 30, (4, 4)
LENGTH = ITEMS + 2  # with the query key and the model's own [CLS]


@dataclass(frozen=True, slots=True)
class Study:
    """What the study holds equal; pairs of weights and densities are separated by commas.

    `weights` are λ/μ.
    """

    weights: str = "0/0,0.1/0,1/0,0/0.1,0.1/0.1"
    densities: str = "0.4,0.25,0.15"
    seeds: int = 3
    batch: int = 64
    dense_steps: int = 900
    entropy_steps: int = 300
    masked_steps: int = 250
    lr: float = 2e-3
    items: int = 2048


@dataclass(frozen=True)
class GivenMasks(Selector):
    """One mask per layer, as they were chosen."""

    name: ClassVar[str] = "given"

    masks: tuple[SparseMask, ...] = field(default=(), compare=False, repr=False)

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The layer's."""
        return self.masks[inputs.layer]


def lookups(count: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the task: the key asked for is among the items exactly once."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        asked = torch.randint(KEYS, (size, 1), generator=generator)
        others = torch.randint(KEYS - 1, (size, ITEMS), generator=generator)
        keys = others + (others >= asked)  # never the one asked for
        place = torch.randint(ITEMS, (size, 1), generator=generator)
        keys.scatter_(1, place, asked)
        bits = torch.randint(2, (size, ITEMS), generator=generator)
        labels = bits.gather(1, place)[:, 0]
        ids = torch.cat([1 + asked, 1 + KEYS + 2 * keys + bits], 1)
        yield {"input_ids": ids, "labels": labels}


def run_study(study: Study, out: Path) -> list[dict[str, Any]]:
    """Run what is missing in `out` and return the rows: one for each seed and pair of weights."""
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    for seed in range(study.seeds):
        start: dict[str, Tensor] = {}  # the dense model that all pairs of weights go on from
        for pair in study.weights.split(","):
            file = out / f"seed-{seed}-{pair.replace('/', '-')}.json"
            settings = {**dataclasses.asdict(study), "seed": seed, "pair": pair}

            def make(
                seed: int = seed, pair: str = pair, start: dict[str, Tensor] = start
            ) -> dict[str, Any]:
                if not start:
                    start.update(_dense(study, seed))
                return _one(study, seed, start, *map(float, pair.split("/")))

            rows.append(kept_part(file, settings, make))
            console.print(rows[-1])
    return rows


def _dense(study: Study, seed: int) -> dict[str, Tensor]:
    model = _model(seed)
    _tune(model, Dense(), study.dense_steps, study, seed)
    return model.state_dict()


def _one(
    study: Study,
    seed: int,
    start: dict[str, Tensor],
    entropy_weight: float,
    mutual_weight: float,
) -> dict[str, Any]:
    model = _model(seed)
    model.load_state_dict(start)
    # No target: how far the terms go is what the study asks.
    terms = EntropySettings(
        entropy_weight=entropy_weight, mutual_weight=mutual_weight, density=1e-6, query_rows=None
    )
    _tune(model, Dense(), study.entropy_steps, study, seed + 100, EntropyLoss(terms))
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads = entropy_statistics(model, lookups(4, 128, 7), every=1)
    found: dict[str, Any] = {
        "record": "static_toy",
        "entropy_weight": entropy_weight,
        "mutual_weight": mutual_weight,
        "seed": seed,
        "entropy": float(np.mean([head.entropy for head in heads])),
        "mean_entropy": float(np.mean([head.mean_entropy for head in heads])),
        "dense": _accuracy(model, Dense(), study),
        "masks": [],
    }
    (statistics,) = tile_statistics(model, lookups(8, 64, 8), tile=TILE)
    grid = statistics.mass.shape
    must = np.broadcast_to(np.eye(grid[2], grid[3], dtype=bool), grid)
    for by in ("mass", "saliency"):
        value = tile_values(statistics, SearchSettings(by=by))
        for density in map(float, study.densities.split(",")):
            keep = best_tiles(value, must.copy(), density)
            method = GivenMasks(tuple(_mask(layer) for layer in keep))
            model.load_state_dict(trained)
            before = _accuracy(model, method, study)
            _tune(model, method, study.masked_steps, study, seed + 200)
            found["masks"].append(
                {
                    "by": by,
                    "density": density,
                    "mass": float((statistics.mass * keep).sum() / statistics.mass.sum()),
                    "before": before,
                    "accuracy": _accuracy(model, method, study),
                }
            )
    return found


def _model(seed: int) -> LraForSequenceClassification:
    torch.manual_seed(seed)
    config = LraConfig(
        vocab_size=1 + 3 * KEYS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        learned_positions=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return LraForSequenceClassification(config)


def _mask(keep: np.ndarray) -> SparseMask:
    return SparseMask.from_block_bool(
        torch.from_numpy(keep)[None], block_size=TILE, q_len=LENGTH, kv_len=LENGTH
    )


def _tune(
    model: Any,
    method: Any,
    steps: int,
    study: Study,
    seed: int,
    entropy: EntropyLoss | None = None,
) -> None:
    finetune(
        model,
        method,
        lookups(steps, study.batch, 1000 + seed),
        steps=steps,
        lr=study.lr,
        entropy=entropy,
        settings=LoopSettings(steps, betas=(0.9, 0.98)),
        seed=seed,
        progress=False,
    )


@torch.no_grad()
def _accuracy(model: Any, method: Any, study: Study) -> float:
    model.eval()
    right = 0
    with sparsify(model, method, when="always"):
        for batch in lookups(study.items // 256, 256, 5):
            logits = model(input_ids=batch["input_ids"]).logits
            right += int((logits.argmax(-1) == batch["labels"]).sum())
    return right / (study.items // 256 * 256)


def main() -> None:
    """Command line of the study."""
    run_command("static_toy", __doc__, Study(), lambda study, out, _: run_study(study, out))


if __name__ == "__main__":
    main()
