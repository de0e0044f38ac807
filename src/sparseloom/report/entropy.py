"""The page of `sparseloom entropy`: how spread out each head's attention is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseloom.report.html import Section, write_report
from sparseloom.results import ResultsFile

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]

_PICTURES = (
    ("entropy", "Entropy of a row", "H / ln n: 1 is uniform attention, 0 is a single key.", 1.0),
    (
        "mean_entropy",
        "Entropy of the mean row",
        "The same of the mean over inputs. A static mask has to cover this; it cannot be sharper.",
        1.0,
    ),
    (
        "mutual",
        "What the input decides",
        "The difference of the two, mutual information between input and attended key over ln n: "
        "0 where attention is the same for every input. Heads with much of it suit static masks "
        "badly.",
        1.0,
    ),
    ("effective_keys", "Effective keys", "exp(H): as many uniform keys have this entropy.", None),
)


def write_entropy_page(path: Path, results: ResultsFile) -> None:
    """Write the page from the rows of `sparseloom entropy`; it appears whole or not at all."""
    rows = [row.model_dump() for row in results.rows]
    write_report(
        path,
        title=f"How {rows[0]['model']} spreads its attention",
        summary=summary(rows),
        results={**results.model_dump(by_alias=True), "rows": rows},
        sections=[
            Section(title, text, (_map(rows, key, most),)) for key, title, text, most in _PICTURES
        ],
        notes=[
            f"Texts: {rows[0]['data']}, {rows[0]['inputs']} sequences; means over query rows that "
            "are no padding, the model dense.",
            f"What the input decides is at most ln {rows[0]['inputs']} / ln n with as many "
            "sequences: more of them can only show more.",
            "H in nats, n the keys that a row may attend to. The mass that a row has beyond its k "
            "largest probabilities is at most H / ln(k + 1).",
        ],
        template="entropy",
    )


def summary(rows: Sequence[Row]) -> list[str]:
    """A few sentences: the mean, and the heads at either end."""
    mean = {key: float(np.mean([row[key] for row in rows])) for key, *_ in _PICTURES}
    sharp = min(rows, key=lambda row: row["mean_entropy"])
    moving = max(rows, key=lambda row: row["mutual"])
    return [
        f"On average a row has {mean['entropy']:.0%} of the entropy of uniform attention, "
        f"{mean['effective_keys']:.0f} effective keys; its mean over inputs has "
        f"{mean['mean_entropy']:.0%}.",
        f"Layer {sharp['layer']}, head {sharp['head']} suits a static mask best: its mean row has "
        f"{sharp['mean_entropy']:.0%}.",
        f"Layer {moving['layer']}, head {moving['head']} moves most with the input: "
        f"{moving['mutual']:.0%} of the entropy of uniform attention is decided by it.",
    ]


def _map(rows: Sequence[Row], key: str, most: float | None) -> go.Figure:
    """Layers downwards, heads across, the number in each cell."""
    import plotly.graph_objects as go

    layers, heads = (1 + max(row[name] for row in rows) for name in ("layer", "head"))
    cells = np.full((layers, heads), np.nan)
    for row in rows:
        cells[row["layer"], row["head"]] = row[key]
    text = [[f"{x:.0f}" if most is None else f"{x:.2f}" for x in line] for line in cells]
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            zmin=0,
            zmax=most,
            x=[f"{head}" for head in range(heads)],
            y=[f"{layer}" for layer in range(layers)],
            text=text,
            texttemplate="%{text}",
            colorscale="Blues",
            showscale=False,
            hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
            xgap=2,
            ygap=2,
        )
    )
    figure.update_xaxes(title="head", type="category")
    figure.update_yaxes(title="layer", type="category", autorange="reversed")
    figure.update_layout(
        template="plotly_white",
        height=90 + 34 * layers,
        margin={"l": 60, "r": 20, "t": 10, "b": 50},
    )
    return figure
