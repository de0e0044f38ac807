"""The self-contained HTML report: one file, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseloom.files import fresh_file
from sparseloom.report.figures import family

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from jinja2 import Environment


_PLOT = {"displaylogo": False, "responsive": True, "displayModeBar": False}


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a sentence that says how to read what follows, and figures.

    `columns` figures stand side by side where the window is wide enough.  `html` is markup that
    stands before them.
    """

    title: str
    text: str
    figures: tuple[go.Figure, ...] = ()
    columns: int = 1
    html: str = ""


def write_report(
    path: Path,
    *,
    title: str,
    summary: Sequence[str],
    results: Mapping[str, Any],
    sections: Sequence[Section],
    notes: Sequence[str],
    template: str = "report",
) -> None:
    """Render the report to `path`; the file appears whole or not at all.

    `results` is the machine-readable results (its rows become the table and its header the
    conditions), `summary` a few sentences computed from them, `notes` what a reader must know to
    judge the figures.  `template` says how rows become the table: "report" for comparisons, "bench"
    for timed operations.
    """
    from plotly.offline import get_plotlyjs

    rendered = [
        {
            "title": section.title,
            "text": section.text,
            "html": section.html,
            "columns": section.columns,
            "figures": [
                figure.to_html(full_html=False, include_plotlyjs=False, config=_PLOT)
                for figure in section.figures
            ],
        }
        for section in sections
    ]
    page = (
        environment()
        .get_template(f"{template}.html.j2")
        .render(
            title=title,
            summary=summary,
            results=results,
            machines=_machines(results["rows"]),
            sections=rendered,
            notes=notes,
            plotlyjs=get_plotlyjs() if any(section.figures for section in sections) else "",
        )
    )
    with fresh_file(path) as fresh:
        fresh.write_text(page, "utf-8")


def environment() -> Environment:
    """The templates of this package."""
    from jinja2 import Environment, PackageLoader

    found = Environment(
        loader=PackageLoader("sparseloom.report"), autoescape=True, trim_blocks=True
    )
    filters: dict[str, Any] = {"number": _number, "ratio": _ratio, "family": family}
    found.filters.update(filters)
    return found


def _machines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Machines that comparison rows give cycles for; other rows have one number there."""
    found = (row.get("cycles") for row in rows)
    return sorted({name for cycles in found if isinstance(cycles, Mapping) for name in cycles})


def _number(value: float | None, digits: int = 3) -> str:
    """A table cell: thousands grouped above 10 000, `digits` decimals below."""
    if value is None:
        return "–"
    if abs(value) >= 1e9:
        return f"{value / 1e9:.2f} G"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.1f} M"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.{digits}f}"


def _ratio(theirs: float | None, ours: float | None) -> str:
    """How many times faster ours is."""
    return "–" if not theirs or not ours else f"{theirs / ours:.2f}×"
