"""Plotly figures of simulated machines: parts, states of units, rooflines, timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseloom.hardware import timeline
from sparseloom.hardware.report import Events, Report

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]

PALETTE = (
    "#0b6e99", "#c9622b", "#57b4d8", "#e5a96b", "#8c6bb1", "#4f9d69", "#b5485d", "#8a8a8a",
    "#2f4b7c", "#d9a400", "#6fa8a0", "#a0522d", "#c28ab8", "#5b6870",
)  # fmt: skip
BUSY, IDLE = "#0b6e99", "#eef2f4"
# States other than idle and busy: none of them as blue or as pale as those.
_WAITS = tuple(colour for colour in PALETTE if colour != BUSY)
_CELLS = 1200
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"), (1e-12, "p"))


def parts_figure(
    names: Sequence[str], parts: Sequence[Mapping[str, float]], what: str, unit: str
) -> go.Figure:
    """Stacked shares of each run's total, which stands behind its name."""
    import plotly.graph_objects as go

    figure = _bars(f"share of {what}", len(names))
    totals = [sum(part.values()) for part in parts]
    labels = [f"{n}  ({_scaled(t, unit)})" for n, t in zip(names, totals, strict=True)]
    # Largest first, so that the colours go to what matters.
    keys = sorted(
        {key for part in parts for key in part},
        key=lambda key: -max(part.get(key, 0.0) / (total or 1.0)
                             for part, total in zip(parts, totals, strict=True)),
    )  # fmt: skip
    for i, key in enumerate(keys):
        values = [part.get(key, 0.0) for part in parts]
        if not any(values):
            continue
        figure.add_trace(
            go.Bar(
                y=labels,
                x=[v / t if t else 0.0 for v, t in zip(values, totals, strict=True)],
                name=key,
                orientation="h",
                marker_color=PALETTE[i % len(PALETTE)],
                hovertext=[f"{key}: {_scaled(value, unit)}" for value in values],
                hoverinfo="text",
            )
        )
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    return figure


def unit_cycles_figure(report: Report) -> go.Figure:
    """A bar per unit: busy, the causes it waited for, idle."""
    import plotly.graph_objects as go

    units = list(report.unit_cycles)
    figure = _bars("cycles", len(units))
    colours = state_colours(_states(report))
    for code in sorted(_states(report), key=lambda code: (code == "idle", code != "busy")):
        figure.add_trace(
            go.Bar(
                y=units,
                x=[report.unit_cycles[unit].get(code, 0) for unit in units],
                name=code,
                orientation="h",
                marker_color=colours[code],
                hovertemplate="%{y}: " + code + ", %{x:,} cycles<extra></extra>",
            )
        )
    return figure


def speed_figure(rows: Sequence[Row], names: Sequence[str]) -> go.Figure:
    """How many times as fast as the first run on its trace each one is; that is the rule at 1."""
    import plotly.graph_objects as go

    figure = _bars("times as fast", len(rows))
    base: dict[str, float] = {}
    for row in rows:
        base.setdefault(row["trace"], row["seconds"])
    speeds = [base[row["trace"]] / row["seconds"] if row["seconds"] else 0.0 for row in rows]
    figure.add_trace(
        go.Bar(
            y=list(names),
            x=speeds,
            orientation="h",
            marker_color=BUSY,
            text=[f"{speed:.3g}×" for speed in speeds],
            textposition="auto",
            hoverinfo="skip",
        )
    )
    figure.add_vline(x=1, line_dash="dot", line_color="#444444")
    above = [speed for speed in speeds if speed > 0]
    if above and max(above) > 30 * min(above):
        figure.update_xaxes(type="log", dtick=1)
    figure.update_layout(showlegend=False)
    return figure


def roofline_figure(rows: Sequence[Row], names: Sequence[str]) -> go.Figure:
    """The roof of each machine and a dot per run that counts its operations."""
    import plotly.graph_objects as go

    figure = go.Figure(layout=_layout(460))
    figure.update_xaxes(type="log", dtick="D2", title="operations per byte")
    figure.update_yaxes(type="log", dtick="D2", exponentformat="SI", title="operations per second")
    points = [
        (row["operations"] / row["dram_bytes"], row["operations"] / row["seconds"])
        if row.get("operations") and row["dram_bytes"] and row["seconds"]
        else None
        for row in rows
    ]
    roofs = {(row["machine"], row["config_hash"]): row.get("roof") for row in rows}
    machines = list(roofs)
    ridges = [roof["operations"] / roof["bytes"] for roof in roofs.values() if roof]
    at = [*ridges, *(point[0] for point in points if point)]
    x = np.geomspace(min(at, default=1.0) / 8, max(at, default=1.0) * 8, 200)
    for i, (machine, settings) in enumerate(machines):
        roof = roofs[machine, settings]
        if roof is None:
            continue
        y = np.minimum(roof["operations"], roof["bytes"] * x)
        line = {"color": PALETTE[i % len(PALETTE)]}
        name = f"{machine}: {_scaled(roof['operations'], 'op/s')}, {_scaled(roof['bytes'], 'B/s')}"
        figure.add_trace(go.Scatter(x=x.tolist(), y=y.tolist(), name=name, mode="lines", line=line))
    labelled: list[tuple[float, float]] = []
    for row, name, point in zip(rows, names, points, strict=True):
        if point is None:
            continue
        colour = PALETTE[machines.index((row["machine"], row["config_hash"])) % len(PALETTE)]
        limit = row.get("roof")
        reached = ""
        if limit:
            share = point[1] / min(limit["operations"], limit["bytes"] * point[0])
            reached = f", {share:.0%} of what this intensity allows"
        figure.add_trace(
            go.Scatter(
                x=[point[0]],
                y=[point[1]],
                mode="markers+text" if _apart(point, labelled) else "markers",
                text=[name],
                textposition="bottom center",
                marker={"size": 11, "color": colour, "line": {"width": 1, "color": "#ffffff"}},
                hovertext=f"{name}: {_scaled(point[1], 'op/s')}{reached}",
                hoverinfo="text",
                showlegend=False,
            )
        )
        if _apart(point, labelled):
            labelled.append(point)
    return figure


def timeline_figure(report: Report) -> go.Figure:
    """Units over the window's cycles, as cells that show the state which fills most of them.

    Raises:
        ValueError: the report keeps no events.
    """
    import plotly.graph_objects as go

    events = report.events
    if events is None:
        raise ValueError(f"the report of {report.machine} keeps no events: simulate with a window")
    codes, edges = cells(events)
    used = sorted({0, *np.unique(codes).tolist()})
    order = {code: i for i, code in enumerate(used)}
    colours = state_colours(_states(report))
    shown = [colours[events.causes[code]] for code in used]
    scale = [[(i + d) / len(used), colour] for i, colour in enumerate(shown) for d in (0, 1)]
    figure = go.Figure(layout=_layout(110 + 26 * len(events.units)))
    figure.add_trace(
        go.Heatmap(
            x=((edges[:-1] + edges[1:]) / 2).tolist(),
            y=list(events.units),
            z=np.vectorize(order.__getitem__)(codes).tolist(),
            zmin=-0.5,
            zmax=len(used) - 0.5,
            colorscale=scale,
            showscale=False,
            ygap=3,
            text=[[events.causes[code] for code in row] for row in codes.tolist()],
            hovertemplate="%{y}, cycle %{x:.0f}: %{text}<extra></extra>",
        )
    )
    for code, colour in zip(used, shown, strict=True):
        figure.add_trace(
            go.Scatter(
                x=[None], y=[None], mode="markers", name=events.causes[code],
                marker={"symbol": "square", "size": 11, "color": colour},
            )
        )  # fmt: skip
    figure.update_xaxes(title="cycle", range=[edges[0], edges[-1]])
    figure.update_yaxes(autorange="reversed", automargin=True, ticksuffix="  ")
    return figure


def cells(events: Events, limit: int = _CELLS) -> tuple[np.ndarray, np.ndarray]:
    """The state of every unit that fills most of each cell of time.

    Returns:
        codes (units, cells), and the cells' edges in cycles (cells + 1), from the window's start
        to its end or to the last interval in it, whichever comes first.
    """
    first = events.window[0]
    last = min(events.window[1], int(events.intervals[:, 3].max(initial=first + 1)))
    edges = np.linspace(first, last, min(limit, last - first) + 1)
    count = len(edges) - 1
    filled = np.zeros((len(events.causes), len(events.units), count))
    width = (last - first) / count
    for one in timeline.slices(events):
        start, end = (one.start - first) / width, (one.end - first) / width
        a, b = int(start), min(int(np.ceil(end)), count)
        share = np.minimum(np.arange(a, b) + 1, end) - np.maximum(np.arange(a, b), start)
        filled[one.code, one.unit, a:b] += share
    filled[0] = 1 - filled.sum(axis=0)
    return filled.argmax(axis=0), edges


def state_colours(states: Sequence[str]) -> dict[str, str]:
    """A colour for each state, the same for the same states."""
    waits = sorted(state for state in states if state not in ("idle", "busy"))
    return {
        "idle": IDLE,
        "busy": BUSY,
        **{state: _WAITS[i % len(_WAITS)] for i, state in enumerate(waits)},
    }


def _apart(point: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    """Whether a label under the dot would cover none of those under the others."""
    x, y = np.log10(point)
    return all(abs(x - u) > 1 or abs(y - v) > 0.3 for u, v in np.log10([*others]).reshape(-1, 2))


def _states(report: Report) -> list[str]:
    """What any unit did in the run."""
    found = (code for codes in report.unit_cycles.values() for code in codes)
    return list(dict.fromkeys(found))


def _bars(x_title: str, bars: int) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure(layout=_layout(150 + 30 * bars))
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(autorange="reversed", automargin=True, ticksuffix="  ")
    return figure


def _layout(height: int) -> dict[str, Any]:
    return {
        "template": "plotly_white",
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 10, "b": 50},
        "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "traceorder": "normal"},
    }


def _scaled(value: float, unit: str) -> str:
    """`1.2e9, "B/s"` → `1.2 GB/s`; areas and the like without prefixes."""
    steps = () if unit == "mm²" else _PREFIXES if abs(value) >= 1 else _SMALL
    for size, prefix in steps:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
