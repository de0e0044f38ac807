"""Plotly pictures of attention heads: probabilities and kept pairs, head beside head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go

_CELLS = 192
_LEAST = -4.0  # decimal logarithm of the smallest probability that shows


def head_grid(
    maps: Sequence[Sequence[np.ndarray]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    probabilities: bool,
) -> go.Figure:
    """One map (q_len, kv_len) per row and column, queries from top to bottom.

    Args:
        maps: probabilities, shown on a logarithmic scale down to 1e-4, or booleans of kept pairs.
        rows, columns: what they are called.
        probabilities: which of the two.

    Maps of more than 192 tokens are shrunk: a cell shows its largest probability, or the share of
    its pairs that are kept.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=len(rows),
        cols=len(columns),
        row_titles=list(rows),
        column_titles=list(columns),
        horizontal_spacing=0.015,
        vertical_spacing=0.03,
    )
    for i, line in enumerate(maps, start=1):
        for j, cells in enumerate(line, start=1):
            z = log_cells(cells) if probabilities else kept_cells(cells)
            figure.add_trace(
                go.Heatmap(
                    z=z,
                    zmin=0,
                    zmax=255,
                    colorscale="Viridis" if probabilities else "Blues",
                    showscale=False,
                    hoverinfo="skip",
                ),
                i,
                j,
            )
    figure.update_xaxes(showticklabels=False, constrain="domain")
    figure.update_yaxes(showticklabels=False, autorange="reversed")
    figure.update_layout(
        template="plotly_white",
        height=60 + 255 * len(rows),
        margin={"l": 10, "r": 30, "t": 40, "b": 10},
    )
    return figure


def log_cells(probabilities: np.ndarray) -> np.ndarray:
    """Largest probability of each cell, its logarithm from 1e-4 (0) to 1 (255)."""
    largest = _pooled(probabilities.astype(np.float64), np.maximum)
    logs = np.log10(np.maximum(largest, 10.0**_LEAST))
    return np.round((1 - logs / _LEAST) * 255).astype(np.uint8)


def kept_cells(keep: np.ndarray) -> np.ndarray:
    """Share of kept pairs of each cell, square-rooted so that single pairs show."""
    kept = _pooled(keep.astype(np.float64), np.add)
    pairs = _pooled(np.ones(keep.shape), np.add)
    return np.round(np.sqrt(kept / pairs) * 255).astype(np.uint8)


def _pooled(cells: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """At most 192 rows and columns, neighbours combined."""
    for axis in (0, 1):
        size = cells.shape[axis]
        starts = np.unique(np.arange(min(size, _CELLS)) * size // min(size, _CELLS))
        cells = combine.reduceat(cells, starts, axis=axis)
    return cells
