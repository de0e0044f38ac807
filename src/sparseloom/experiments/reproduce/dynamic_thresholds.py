"""Dynamic Sparse Attention, table 1: what can be dropped without training."""

from __future__ import annotations

from collections.abc import Sequence

from sparseloom.experiments.reproduce import Request, Study
from sparseloom.experiments.reproduce.rows import Row, row

PAPER = "dsa_tc_2022"
# θ → the sparsity that the paper prints.
_PUBLISHED = {0.001: "75–95 %", 0.01: "94–97 %"}
_STAND_IN = (
    "the paper names neither model nor data of this table; MiniLM stands in, on STS-B and on IMDB "
    "reviews of 512 tokens"
)
_SCORES = "published scores at θ = 0, 0.001, 0.01: exact match 81.49, 81.50, 80.51"


def table1(study: Sequence[Row]) -> list[Row]:
    """Table 1: attention weights below θ are dropped at inference, without fine-tuning.

    `study` holds the rows of `experiments.thresholds`: sparsity over all layers and layer by
    layer, and what became of the score (STS-B) or of the embedding (IMDB).
    """
    rows: list[Row] = []
    for run in study:
        threshold = run["settings"].get("threshold")
        if threshold not in _PUBLISHED:
            continue
        where = f"{run['task']}, θ = {threshold}"
        layers = run["sparsity_by_layer"]
        found = {"sparsity, all layers": run["sparsity"]}
        found |= {f"sparsity, layer {layer}": share for layer, share in enumerate(layers)}
        rows += [_row(f"{where}: {k}", _PUBLISHED[threshold], v) for k, v in found.items()]
        metric = str(run["metric"]).replace("_", " ")
        change = run["value"] - run["dense_value"]
        rows.append(_row(f"{where}: {metric}, change", "not published", change))
    return rows


def _thresholds(request: Request) -> list[Row]:
    from sparseloom.experiments.thresholds import oracle_thresholds

    return oracle_thresholds(request.data, step=request.step)


STUDY = Study("oracle_thresholds.json", _thresholds)


def _row(quantity: str, published: str, ours: float) -> Row:
    return row(
        PAPER,
        "table1",
        quantity,
        published,
        ours,
        basis="scenario",
        assumptions=(_STAND_IN,),
        note=_SCORES,
    )
