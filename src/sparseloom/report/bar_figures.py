"""Plotly bars and lines of published comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

_COLOURS = ("#0b6e99", "#c9622b", "#57b4d8", "#8c6bb1", "#8a8a8a", "#5a9e6f", "#b5446e", "#444444")


def bars(groups: Mapping[str, Mapping[str, float]], *, title: str) -> go.Figure:
    """Bars beside each other: one colour per group, one place per name.

    Args:
        groups: group → name → height.
        title: of the vertical axis.
    """
    import plotly.graph_objects as go

    figure = _figure("", title)
    for (group, values), colour in zip(groups.items(), _cycle(len(groups)), strict=True):
        figure.add_trace(
            go.Bar(x=list(values), y=list(values.values()), name=group, marker_color=colour)
        )
    figure.update_layout(barmode="group", margin={"b": 130})
    return figure


def lines(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_title: str,
    y_title: str,
    log_y: bool = False,
    percent_x: bool = False,
    rule: tuple[float, str] | None = None,
) -> go.Figure:
    """Lines with markers; `rule` is a level with its name."""
    import plotly.graph_objects as go

    figure = _figure(x_title, y_title)
    for (name, points), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
        x, y = zip(*sorted(points), strict=True)
        figure.add_trace(
            go.Scatter(x=x, y=y, name=name, mode="lines+markers", line={"color": colour})
        )
    if rule is not None:
        figure.add_hline(y=rule[0], line_dash="dot", line_color="#444", annotation_text=rule[1])
    if log_y:
        figure.update_yaxes(type="log", dtick="D2")
    if percent_x:
        figure.update_xaxes(tickformat=".0%")
    return figure


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _figure(x_title: str, y_title: str) -> go.Figure:
    import plotly.graph_objects as go

    return go.Figure(
        layout={
            "template": "plotly_white",
            "height": 420,
            "margin": {"l": 60, "r": 20, "t": 20, "b": 90},
            "xaxis": {"title": x_title},
            "yaxis": {"title": y_title},
            "legend": {"orientation": "h", "y": 1.08},
        }
    )
