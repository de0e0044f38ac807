"""MiniLM on 512-token documents with tokens and heads pruned, beside dense SDPA: whole-model time.

    python -m sparseloom.experiments.spatten_encoder

The documents are English text that comes with Python (`pydoc_data.topics`).  Contenders run in
turns in one process, the unchanged model among them; the time of a pruned pass includes entering
and leaving the `sparsify` block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseloom.experiments.study_command import run_command
from sparseloom.experiments.timing import interleave
from sparseloom.integrations import sparsify
from sparseloom.integrations.stats import left_of
from sparseloom.methods import Method, SpAtten
from sparseloom.models import LoadedModel, load_model

CONTENDERS = (
    SpAtten(token_keep=None, head_keep=None),
    SpAtten(token_keep=0.65, head_keep=None),
    SpAtten(token_keep=0.5, head_keep=None),
    SpAtten(token_keep=0.5, head_keep=0.9),
)
"""Nothing pruned (what the bookkeeping costs), the paper's average, half, and half with heads."""


def documents(loaded: LoadedModel, batch: int, length: int) -> dict[str, Tensor]:
    """The first `batch` full windows of `length` tokens."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer: Any = loaded.tokenizer
    ids = tokenizer(text[: batch * length * 8], add_special_tokens=False, verbose=False)
    inner = torch.tensor(ids["input_ids"][: batch * (length - 2)]).view(batch, length - 2)
    first, last = (torch.full((batch, 1), one) for one in _edges(tokenizer))
    tokens = torch.cat([first, inner, last], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def rows(
    batches: Sequence[int] = (1, 8), *, length: int = 512, repeats: int = 7
) -> list[dict[str, Any]]:
    """One row per batch size and contender."""
    loaded = load_model("minilm")
    found: list[dict[str, Any]] = []
    for batch in batches:
        inputs = documents(loaded, batch, length)
        runs: dict[str, Callable[[], object]] = {"dense": _run(loaded.model, None, inputs)}
        runs |= {str(method): _run(loaded.model, method, inputs) for method in CONTENDERS}
        times = interleave(runs, repeats=repeats, warmup=2)
        for method in CONTENDERS:
            with torch.no_grad(), sparsify(loaded.model, method) as sparse:
                loaded.model(**inputs)
            layers = sparse.stats()
            whole, ours = times["dense"], times[str(method)]
            left = left_of(layers)
            found.append(
                {
                    "record": "spatten_encoder",
                    "model": "minilm",
                    "batch": batch,
                    "length": length,
                    "threads": torch.get_num_threads(),
                    "method": str(method),
                    "tokens_alive": left["tokens_alive"],
                    "heads_alive": left["heads_alive"],
                    "macs": left["macs_left"],
                    "dense_ms": whole.ms,
                    "ms": ours.ms,
                    "speedup": whole.ms / ours.ms,
                    "best_speedup": whole.best_ms / ours.best_ms,
                    "spread": ours.spread,
                    "dense_spread": whole.spread,
                    "repeats": repeats,
                }
            )
    return found


def _run(
    model: nn.Module, method: Method | None, inputs: dict[str, Tensor]
) -> Callable[[], object]:
    def dense() -> None:
        with torch.no_grad():
            model(**inputs)

    def pruned() -> None:
        assert method is not None
        with torch.no_grad(), sparsify(model, method):
            model(**inputs)

    return dense if method is None else pruned


def _edges(tokenizer: Any) -> tuple[int, int]:
    return tokenizer.cls_token_id, tokenizer.sep_token_id


@dataclass(frozen=True, slots=True)
class Settings:
    """Measured rounds, all contenders in each."""

    repeats: int = 7


def run_study(settings: Settings) -> list[dict[str, Any]]:
    """All rows, said one by one."""
    found = rows(repeats=settings.repeats)
    for row in found:
        sys.stdout.write(
            f"batch {row['batch']}  {row['method']}: {row['dense_ms']:.1f} → {row['ms']:.1f} ms, "
            f"{row['speedup']:.2f}×\n"
        )
    return found


def main() -> None:
    """Command line of the measurement."""
    run_command(
        "spatten_encoder", __doc__, Settings(), lambda settings, *_: run_study(settings),
        keeps=False, reads=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
