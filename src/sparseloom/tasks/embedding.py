"""Sentence and document embeddings of an encoder, in padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparseloom.models.base import LoadedModel
from sparseloom.models.minilm import mean_pool
from sparseloom.tasks.base import Batch, Progress, evaluating

_POOL = 32
"""Training batches that are drawn together and sorted by length, to compute little on padding."""


def tokenized(loaded: LoadedModel, texts: Sequence[str], *, max_length: int | None = None) -> Batch:
    """`texts` as one padded batch on the CPU, cut at `max_length` tokens (default: the model's)."""
    if loaded.tokenizer is None:
        raise ValueError(f"embeddings need a model with a tokenizer, but {loaded.name!r} has none")
    longest = min(max_length or loaded.context, loaded.context)
    batch = loaded.tokenizer(
        list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    return dict(batch)


def length_batches(texts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Indices of `texts` in batches of similar length, so that little is computed on padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def shuffled_batches(
    texts: Sequence[str], *, steps: int, batch_size: int, seed: int
) -> Iterator[list[int]]:
    """Indices of `texts` in a random order, each once before any comes again, for `steps` batches.

    The texts of one batch are of similar length.
    """
    generator = np.random.default_rng(seed)
    waiting: list[int] = []
    made = 0
    while made < steps:
        waiting = waiting or generator.permutation(len(texts)).tolist()
        pool, waiting = waiting[: _POOL * batch_size], waiting[_POOL * batch_size :]
        sorted_batches = length_batches([texts[i] for i in pool], batch_size)
        for index in generator.permutation(len(sorted_batches))[: steps - made]:
            yield [pool[i] for i in sorted_batches[index]]
            made += 1


def embed(
    loaded: LoadedModel,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "texts width"]:
    """Unit-length mean-pooled embeddings of `texts`, in their order, in float32 on the CPU."""
    batches = length_batches(texts, batch_size)
    order = [i for chosen in batches for i in chosen]
    backbone = loaded.model.base_model
    rows: list[Tensor] = []
    with evaluating(loaded.model) as device:
        for done, chosen in enumerate(batches, 1):
            batch = tokenized(loaded, [texts[i] for i in chosen], max_length=max_length)
            batch = {key: value.to(device) for key, value in batch.items()}
            hidden = backbone(**batch).last_hidden_state
            rows.append(mean_pool(hidden, batch["attention_mask"]).float().cpu())
            if progress is not None:
                progress(min(done * batch_size, len(order)), len(order))
    pooled = torch.cat(rows)
    embeddings = torch.empty_like(pooled)
    embeddings[torch.tensor(order)] = pooled
    return embeddings
