"""A picture of one head of a ``SparseMask``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    import sparseloom.mask

_COLOURS = [[0.0, "#f7f8fa"], [0.001, "#cfdcf2"], [1.0, "#123f8c"]]
_EDGE = "#c2410c"
_STEPS = 256  # queries up to which the causal edge is drawn as the staircase that it is


def plot_mask(
    mask: sparseloom.mask.SparseMask,
    name: str,
    *,
    is_causal: bool,
    max_cells: int,
    place: tuple[Figure, int | None, int | None] | None,
) -> Figure:
    """See ``SparseMask.plot``; ``mask`` has one batch entry and one head."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError("mask.plot needs plotly: pip install plotly") from error
    if max_cells < 1:
        raise ValueError(f"max_cells must be at least 1, got {max_cells}")
    cells, step = cell_shares(mask, max_cells)
    grouped = step != mask.block_size
    heatmap = go.Heatmap(
        z=cells if grouped else cells.astype(np.uint8),
        # plotly places a cell by its centre; block (0, 0) covers queries and keys from 0 on.
        y0=step[0] / 2,
        dy=step[0],
        x0=step[1] / 2,
        dx=step[1],
        zmin=0,
        zmax=float(cells.max()) or 1.0,
        colorscale=_COLOURS,
        showscale=grouped and place is None,
        colorbar={"title": "share kept", "tickformat": ".0%"},
        hovertemplate="query %{y}<br>key %{x}<br>kept %{z:.0%}<extra></extra>",
    )
    figure, row, col = (go.Figure(), None, None) if place is None else place
    where: dict[str, Any] = {} if row is None else {"row": row, "col": col}
    figure.add_trace(heatmap, **where)
    if is_causal:
        for trace in _causal_edge(go, mask.q_len, mask.kv_len):
            figure.add_trace(trace, **where)
    figure.update_xaxes(title_text="key", range=[0, mask.kv_len], constrain="domain", **where)
    figure.update_yaxes(title_text="query", range=[mask.q_len, 0], constrain="domain", **where)
    if place is None:
        if 0.25 <= mask.q_len / mask.kv_len <= 4:
            figure.update_yaxes(scaleanchor="x")
        share = f"density {mask.density(is_causal=is_causal):.2%}"
        figure.update_layout(
            title=f"{name}: {share}{' (causal)' if is_causal else ''}<br><sup>"
            f"{mask.q_len} queries × {mask.kv_len} keys, block {mask.block_size[0]} × "
            f"{mask.block_size[1]}, cell {step[0]} × {step[1]}</sup>",
            width=640,
            height=660,
            plot_bgcolor="white",
        )
    return figure


def cell_shares(
    mask: sparseloom.mask.SparseMask, max_cells: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Share of blocks kept in each cell of the picture, and the cell's queries and keys."""
    groups = (-(-mask.q_blocks // max_cells), -(-mask.kv_blocks // max_cells))
    sizes = (mask.q_blocks, mask.kv_blocks)
    rows, columns = (-(-size // group) for size, group in zip(sizes, groups, strict=True))
    row = mask.entry_rows().cpu().numpy() // groups[0]
    column = mask.indices.cpu().numpy() // groups[1]
    kept = np.bincount(row * columns + column, minlength=rows * columns).reshape(rows, columns)
    of = [
        np.minimum(group, size - group * np.arange(-(-size // group)))
        for size, group in zip(sizes, groups, strict=True)
    ]
    shares = (kept / np.outer(of[0], of[1])).astype(np.float32)
    return shares, (groups[0] * mask.block_size[0], groups[1] * mask.block_size[1])


def _causal_edge(go: Any, q_len: int, kv_len: int) -> list[Any]:
    """The edge right of the last key that each query may see, and a veil over what lies beyond."""
    shift = kv_len - q_len
    if q_len <= _STEPS:
        query = np.repeat(np.arange(q_len + 1), 2)[1:-1]
        key = np.repeat(np.arange(q_len), 2) + shift + 1
    else:
        query = np.array([0, max(0, -shift), q_len])
        key = query + shift
    x, y = key.clip(0, kv_len).tolist(), query.tolist()
    quiet = {"mode": "lines", "hoverinfo": "skip", "showlegend": False}
    # Through the upper right corner: the closed outline is what may not be seen.
    corner = {"x": [*x, kv_len], "y": [*y, 0]}
    veil = {"fill": "toself", "fillcolor": "rgba(120, 120, 120, 0.35)", "line": {"width": 0}}
    return [
        go.Scatter(**corner, **veil, **quiet),
        go.Scatter(x=x, y=y, line={"color": _EDGE, "width": 1.5}, **quiet),
    ]
