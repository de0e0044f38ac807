"""Plotly figures of comparison rows and masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from sparseloom.mask import SparseMask

Row = Mapping[str, Any]

COLOURS = {
    "dense": "#444444",
    "oracle": "#8a8a8a",
    "dynamic": "#0b6e99",
    "dynamic 8×1": "#57b4d8",
    "window": "#c9622b",
    "window growing": "#e5a96b",
    "random": "#8c6bb1",
}
_CELLS = 256


def family(row: Row) -> str:
    """The curve a row belongs to: its method, with the variant that a reader must tell apart."""
    settings = row["settings"]
    name = str(row["method"])
    block = settings.get("block_size")
    if block is not None and tuple(block) != (1, 1):
        name += f" {block[0]}×{block[1]}"
    return name + (" growing" if settings.get("growing") else "")


def quality_figure(rows: Sequence[Row]) -> go.Figure:
    """Task value against density kept, one line per method; the dense value as a rule."""
    figure = _lines(rows, "value", "density kept", str(rows[0]["metric"]).replace("_", " "))
    dense = rows[0]["dense_value"]
    figure.add_hline(y=dense, line_dash="dot", line_color=COLOURS["dense"], annotation_text="dense")
    return figure


def speed_figure(rows: Sequence[Row], measure: str) -> go.Figure:
    """Time of `measure` ("attention" or "model") against density; dense SDPA as a rule."""
    figure = _lines(rows, f"{measure}_ms", "density kept", f"{measure} time, ms")
    dense = next((r[f"dense_{measure}_ms"] for r in rows if r.get(f"dense_{measure}_ms")), None)
    if dense is not None:
        figure.add_hline(
            y=dense, line_dash="dot", line_color=COLOURS["dense"], annotation_text="dense SDPA"
        )
    figure.update_yaxes(rangemode="tozero")
    return figure


def cycles_figure(rows: Sequence[Row], machine: str) -> go.Figure:
    """Cycles of one forward pass on `machine` against density."""
    flat = [{**row, "_cycles": row["cycles"].get(machine)} for row in rows if row.get("cycles")]
    figure = _lines(flat, "_cycles", "density kept", f"cycles on {machine}")
    dense = next((row["_cycles"] for row in flat if row["method"] == "dense"), None)
    if dense is not None:
        figure.add_hline(
            y=dense, line_dash="dot", line_color=COLOURS["dense"], annotation_text="dense"
        )
    figure.update_yaxes(rangemode="tozero")
    return figure


def accuracy_figure(rows: Sequence[Row], sparsity: float) -> go.Figure:
    """Per layer, at one sparsity: the share of the oracle's probability mass that each mask
    retains (solid), and of its keys (dotted)."""
    import plotly.graph_objects as go

    figure = _figure("layer", "share of the oracle's")
    for row in rows:
        keys = row.get("prediction_accuracy")
        if not keys or row["method"] == "oracle" or row["sparsity"] != sparsity:
            continue
        mass = [
            _ratio(ours, best)
            for ours, best in zip(row["retained_mass"], row["oracle_mass"], strict=True)
        ]
        for what, values, dash in (("mass", mass, "solid"), ("keys", keys, "dot")):
            figure.add_trace(
                go.Scatter(
                    x=list(range(len(keys))),
                    y=values,
                    name=f"{family(row)}: {what}",
                    mode="lines+markers",
                    line={"dash": dash, "color": COLOURS.get(family(row))},
                )
            )
    figure.update_yaxes(range=[0, 1.02])
    figure.update_xaxes(dtick=1)
    return figure


def bench_figure(rows: Sequence[Row], axis: str) -> go.Figure:
    """How many times faster than SDPA fp32 each contender is against `axis` ("sparsity" or
    "q_len"), one line per contender, block, mask, dtype and passes; SDPA itself as a rule."""
    import plotly.graph_objects as go

    titles = {"sparsity": "share dropped", "q_len": "queries"}
    figure = _figure(titles[axis], "times as fast as SDPA fp32")
    curves: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        if row.get("mask") is not None:
            hover = f"{row['ms']:.2f} ms"
            curves.setdefault(bench_curve(row, axis), []).append((row[axis], row["speedup"], hover))
    for name, points in curves.items():
        x, y, hover = zip(*sorted(points), strict=True)
        figure.add_trace(go.Scatter(x=x, y=y, hovertext=hover, name=name, mode="lines+markers"))
    figure.add_hline(y=1, line_dash="dot", line_color=COLOURS["dense"], annotation_text="SDPA fp32")
    figure.update_yaxes(type="log", dtick="D2")
    if axis == "sparsity":
        figure.update_xaxes(tickformat=".0%")
    else:
        figure.update_xaxes(type="log", dtick=math.log10(2))
    figure.update_layout(height=520)
    return figure


def peak_figure(rows: Sequence[Row]) -> go.Figure:
    """Share of the measured arithmetic peak that each row reached, as bars."""
    import plotly.graph_objects as go

    figure = _figure("", "share of the measured peak")
    timed = [row for row in rows if row.get("peak_fraction") is not None]
    names = [f"{bench_curve(row, 'q_len')}, {row['q_len']}" for row in timed]
    shares = [row["peak_fraction"] for row in timed]
    figure.add_trace(go.Bar(x=names, y=shares, marker_color=COLOURS["dynamic"]))
    figure.update_yaxes(tickformat=".0%")
    figure.update_layout(height=560, margin={"b": 260})
    return figure


def bench_curve(row: Row, axis: str) -> str:
    """What a row of the benchmark has in common with the others on its line."""
    name = str(row["contender"])
    if row.get("block_size"):
        name += " {}×{}".format(*row["block_size"])
    if axis != "sparsity" and row.get("sparsity"):
        name += f" {row['sparsity']:.0%}"
    else:
        name += f" {row['q_len']}"
    if row.get("mask") not in (None, "random"):
        name += f" {row['mask']}"
    if row["dtype"] not in ("float32", "int4") and row["dtype"] not in name:
        name += f" {row['dtype']}"
    return name + (" with gradients" if row.get("passes") == "forward+backward" else "")


def mask_figure(
    oracle: SparseMask, predicted: SparseMask, *, head: int, name: str = "", zoom: int = 160
) -> go.Figure:
    """Oracle and predicted mask of one head: both whole (shaded by density), and a close-up.

    The close-up shows the last `zoom` queries against the last `zoom` keys pair by pair: kept by
    both, by the oracle only, by the predictor only.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    first, second = (mask.to_bool()[0, min(head, mask.heads - 1)] for mask in (oracle, predicted))
    titles = [f"{name} oracle".strip(), f"{name} predicted".strip(), f"last {zoom} × {zoom} pairs"]
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.05)
    for column, keep in enumerate((first, second), start=1):
        cells = _shrink(keep.numpy())
        figure.add_trace(
            go.Heatmap(z=cells, colorscale="Blues", zmin=0, zmax=255, showscale=False), 1, column
        )
    corner = slice(-zoom, None)
    code = (first[corner, corner].numpy() * 1 + second[corner, corner].numpy() * 2).astype(np.uint8)
    colours = ["#ffffff", "#c9622b", "#57b4d8", "#1d3b4a"]
    scale = [[i / 4 + d, c] for i, c in enumerate(colours) for d in (0.0, 0.25)]
    figure.add_trace(
        go.Heatmap(
            z=code,
            zmin=-0.5,
            zmax=3.5,
            colorscale=scale,
            colorbar={
                "tickvals": [0, 1, 2, 3],
                "ticktext": ["dropped", "oracle only", "predicted only", "both"],
                "len": 0.9,
            },
        ),
        1,
        3,
    )
    for column in (1, 2, 3):
        axis = "" if column == 1 else str(column)
        figure.update_yaxes(autorange="reversed", scaleanchor=f"x{axis}", row=1, col=column)
        figure.update_xaxes(constrain="domain", row=1, col=column)
    figure.update_xaxes(showticklabels=False)
    figure.update_yaxes(showticklabels=False)
    figure.update_layout(
        template="plotly_white", height=390, margin={"l": 10, "r": 10, "t": 40, "b": 10}
    )
    return figure


def _lines(rows: Sequence[Row], key: str, x_title: str, y_title: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = _figure(x_title, y_title)
    curves: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        if row["method"] == "dense" or row.get(key) is None:
            continue
        hover = f"sparsity {row['sparsity']:.0%}" if row.get("sparsity") is not None else ""
        curves.setdefault(family(row), []).append((row["density"], row[key], hover))
    for name, points in curves.items():
        x, y, hover = zip(*sorted(points), strict=True)
        figure.add_trace(
            go.Scatter(
                x=x, y=y, hovertext=hover, name=name, mode="lines+markers",
                line={"color": COLOURS.get(name)},
            )
        )  # fmt: skip
    figure.update_xaxes(tickformat=".1%")
    return figure


def _figure(x_title: str, y_title: str) -> go.Figure:
    import plotly.graph_objects as go

    return go.Figure(
        layout={
            "template": "plotly_white",
            "height": 380,
            "margin": {"l": 60, "r": 20, "t": 20, "b": 90},
            "xaxis": {"title": x_title},
            "yaxis": {"title": y_title},
            "legend": {"orientation": "h", "y": -0.25},
        }
    )


def _shrink(keep: np.ndarray) -> np.ndarray:
    """Share of kept pairs per cell of at most 256 × 256, square-rooted so that thin lines show."""
    rows, columns = (min(_CELLS, size) for size in keep.shape)
    y = np.arange(keep.shape[0]) * rows // keep.shape[0]
    x = np.arange(keep.shape[1]) * columns // keep.shape[1]
    sums = np.zeros((rows, columns))
    by_row = np.zeros((rows, keep.shape[1]))
    np.add.at(by_row, y, keep)
    np.add.at(sums.T, x, by_row.T)
    area = np.outer(np.bincount(y, minlength=rows), np.bincount(x, minlength=columns))
    return (np.sqrt(sums / area) * 255).astype(np.uint8)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
