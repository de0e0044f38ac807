"""What a command prints: a table for people on standard output, or JSON for machines.

Progress goes to standard error, so that `--json` can be piped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sparseloom.results import ResultsFile

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], object]]


def progress_console() -> Console:
    """Where progress is shown."""
    return Console(stderr=True)


def emit(
    results: ResultsFile,
    *,
    as_json: bool,
    columns: Sequence[Column],
    notes: Sequence[str] = (),
    only: Callable[[Row], bool] | None = None,
) -> None:
    """Print the results: all of them as JSON, or the chosen columns and the notes as text.

    `only` says which rows the table shows.
    """
    text = results.to_json()
    if as_json:
        sys.stdout.write(text)
        return
    rows: list[Row] = json.loads(text)["rows"]
    print_table([row for row in rows if only is None or only(row)], columns)
    for note in notes:
        Console(soft_wrap=True, highlight=False).print(note, markup=False)


def print_table(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """A table of `columns`; those that are empty in every row are left out."""
    cells = [[_text(read(row)) for row in rows] for _, read in columns]
    shown = [i for i, column in enumerate(cells) if any(cell != "–" for cell in column)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i in shown:
        numeric = all(cell == "–" or cell[0] in "+-−0123456789" for cell in cells[i])
        table.add_column(columns[i][0], justify="right" if numeric else "left", overflow="fold")
    for j in range(len(rows)):
        table.add_row(*(cells[i][j] for i in shown))
    console = Console(highlight=False)
    if not console.is_terminal:
        # A file or a pipe has no width to fit into.
        console.width = 1000
    console.print(table)


def value(key: str) -> Callable[[Row], object]:
    """A column that shows the row's own value."""
    return lambda row: row.get(key)


def percent(key: str) -> Callable[[Row], object]:
    """A column that shows a share as a percentage."""
    return lambda row: None if row.get(key) is None else f"{row[key]:.1%}"


def number(key: str, digits: int = 3) -> Callable[[Row], object]:
    """A column that shows a number, large ones in engineering units."""
    return lambda row: format_number(row.get(key), digits)


def format_number(given: float | None, digits: int = 3) -> str | None:
    """`1234567.0` → `1.23 M`; smaller numbers with `digits` decimals."""
    if given is None:
        return None
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(given) >= size:
            return f"{given / size:.2f} {unit}"
    if isinstance(given, int) or abs(given) >= 1e4:
        return f"{given:,.0f}"
    return f"{given:.{digits}f}"


def settings_text(row: Row) -> str:
    """What a row's method was told beyond its defaults: `sparsity=0.9, block_size=8x1`."""
    from sparseloom.methods import METHODS

    known = METHODS.get(str(row["method"]))
    fields: Mapping[str, Any] = getattr(known, "__dataclass_fields__", {})
    default = {name: field.default for name, field in fields.items()}
    parts: list[str] = []
    for key, setting in (row["settings"] or {}).items():
        pair = isinstance(setting, list | tuple) and len(setting) == 2
        usual = default.get(key)
        if setting is None or (
            key != "sparsity" and (tuple(setting) if pair else setting) == usual
        ):
            continue
        parts.append(f"{key}={'x'.join(map(str, setting)) if pair else setting}")
    return ", ".join(parts)


def _text(given: object) -> str:
    if given is None or given == "" or given == []:
        return "–"
    if isinstance(given, bool):
        return "yes" if given else "no"
    return str(given)
