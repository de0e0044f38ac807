"""How sparse is attention already?  Probabilities below θ dropped, nothing trained.

    python -m sparseloom.experiments.thresholds

Table 1 of Liu et al. (IEEE TC 2022) drops attention weights below θ = 0.001 and 0.01 at inference
and prints 75–95 % and 94–97 % sparsity at 81.50 and 80.51 exact match (dense: 81.49), for a model
and data that it does not name.  Here MiniLM stands in, on two sides of the question: STS-B (short
sentences; Spearman correlation) and IMDB reviews that fill 512 tokens (change of the embedding).
One difference: the weights that are left are normalised again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor

from sparseloom.experiments.study_command import run_command
from sparseloom.integrations import Sparsified, sparsify
from sparseloom.integrations.stats import density_of
from sparseloom.methods import Oracle
from sparseloom.methods.settings import check_at_least
from sparseloom.models import LoadedModel, load_model
from sparseloom.tasks.base import evaluating
from sparseloom.tasks.imdb import MovieReviews
from sparseloom.tasks.stsb import SemanticSimilarity

THRESHOLDS = (0.001, 0.01)
PUBLISHED = {
    0.001: "Table 1: 75–95 % sparse, EM 81.50, F1 88.70 (dense 81.49, 88.70)",
    0.01: "Table 1: 94–97 % sparse, EM 80.51, F1 87.85 (dense 81.49, 88.70)",
}
_LENGTH = 512

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class EmbeddingChange:
    """How far document embeddings moved from the dense model's, one number per document.

    one_minus_cosine: 1 − cosine of the angle between the two embeddings.
    relative_l2: |sparse − dense| / |dense| of the mean-pooled hidden states, before scaling.
    """

    one_minus_cosine: Float[np.ndarray, " documents"]
    relative_l2: Float[np.ndarray, " documents"]

    @classmethod
    def between(
        cls, dense: Float[Tensor, "documents width"], other: Float[Tensor, "documents width"]
    ) -> EmbeddingChange:
        """Compare embeddings row by row."""
        cosine = torch.nn.functional.cosine_similarity(dense, other)
        moved = (other - dense).norm(dim=1) / dense.norm(dim=1)
        return cls((1 - cosine).numpy(), moved.numpy())


def oracle_thresholds(
    data: Path | None = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    documents: int = 64,
    pairs: int | None = None,
    step: Step = lambda _: None,
) -> list[dict[str, Any]]:
    """Rows of the results schema: STS-B and IMDB, dense and at every threshold.

    Args:
        data: folder of the data sets; default SPARSELOOM_DATA.
        thresholds: probabilities below which a pair is dropped.
        documents: IMDB reviews of 512 tokens.
        pairs: STS-B dev pairs; None takes all 1,500.
        step: called with the name of each part before it runs.

    `sparsity_by_layer` counts pairs of real keys (padding excluded) over all queries.

    Raises:
        ValueError: nothing to read.
        FileNotFoundError: data that is not there.
    """
    check_at_least("documents", documents, 1)
    if pairs is not None:
        check_at_least("pairs", pairs, 1)
    loaded = load_model("minilm")
    similarity, reviews = SemanticSimilarity().load(data), MovieReviews().load(data)
    texts = reviews.documents(loaded, length=_LENGTH, count=documents)

    step("STS-B, dense")
    dense_score = similarity.score(loaded, limit=pairs)
    step("IMDB, dense")
    dense = pooled(loaded, texts)
    rows = [
        _row("sts-b", None, "spearman", dense_score.value, dense_score.value)
        | {"items": dense_score.items}
    ]
    for threshold in thresholds:
        step(f"STS-B, θ = {threshold}")
        with sparsify(loaded.model, Oracle(threshold=threshold), when="always") as sparse:
            score = similarity.score(loaded, limit=pairs)
        rows.append(
            _row("sts-b", threshold, "spearman", score.value, dense_score.value)
            | {"items": score.items}
            | _sparsity(sparse)
        )
        step(f"IMDB, θ = {threshold}")
        with sparsify(loaded.model, Oracle(threshold=threshold), when="always") as sparse:
            change = EmbeddingChange.between(dense, pooled(loaded, texts))
        cosine, moved = change.one_minus_cosine, change.relative_l2
        rows.append(
            _row("imdb", threshold, "one_minus_cosine", float(cosine.mean()), 0.0)
            | {
                "items": documents,
                "tokens": _LENGTH,
                "largest": float(cosine.max()),
                "relative_l2": float(moved.mean()),
                "largest_relative_l2": float(moved.max()),
            }
            | _sparsity(sparse)
        )
    return rows


def pooled(
    loaded: LoadedModel, documents: Int[Tensor, "documents tokens"], *, batch_size: int = 4
) -> Float[Tensor, "documents width"]:
    """Mean of the last hidden states over all tokens, in float64 on the CPU."""
    means: list[Tensor] = []
    with evaluating(loaded.model) as device:
        for batch in documents.split(batch_size):
            hidden = loaded.model(input_ids=batch.to(device)).last_hidden_state
            means.append(hidden.double().mean(1).cpu())
    return torch.cat(means)


def _row(
    task: str, threshold: float | None, metric: str, value: float, dense: float
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": "minilm",
        "task": task,
        "method": "dense" if threshold is None else "oracle",
        "settings": {} if threshold is None else {"threshold": threshold},
        "metric": metric,
        "value": value,
        "dense_value": dense,
    }
    if threshold in PUBLISHED:
        row["published"] = PUBLISHED[threshold]
    return row


def _sparsity(sparse: Sparsified) -> dict[str, Any]:
    layers = sparse.stats()
    density = density_of(layers)
    return {
        "sparsity": 1 - density,
        "density": density,
        "sparsity_by_layer": [1 - layer["density"] for layer in layers],
    }


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is read: reviews, and pairs of sentences (0 takes all of the dev set)."""

    documents: int = 64
    pairs: int = 0


def run_study(settings: Settings, data: Path | None) -> list[dict[str, Any]]:
    """Rows of the study, under a progress bar."""
    parts = 2 + 2 * len(THRESHOLDS)
    with Progress() as progress:
        task = progress.add_task("", total=parts)

        def step(name: str) -> None:
            done = int(progress.tasks[0].description != "")
            progress.update(task, advance=done, description=name)

        rows = oracle_thresholds(
            data, documents=settings.documents, pairs=settings.pairs or None, step=step
        )
        progress.update(task, completed=parts)
    return rows


def main() -> None:
    """Command line of the study."""
    run_command(
        "thresholds", __doc__, Settings(),
        lambda settings, _out, data: run_study(settings, data),
        stored=lambda _: Path("results/oracle_thresholds.json"), keeps=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
