"""Published tables beside ours: one file per paper, one function per table or figure.

A paper's module has `TABLES`, functions by table; `STORED` names those that take minutes or need
data, and take the folder of the data sets as their argument: they are read from
`results/reproduce/` unless they are asked to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from sparseloom.errors import unknown_name

__all__ = ["PAPERS", "Table", "find_tables", "reproduce"]

PAPERS = {"dsa_tc_2022": "dsa", "dota_asplos_2022": "dota"}
"""Paper → its module here."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """One table or figure of a paper."""

    paper: str
    name: str
    function: Callable[..., list[Row]]
    stored: bool

    @property
    def title(self) -> str:
        """What it compares, in a sentence."""
        return (self.function.__doc__ or "").strip().split("\n")[0]

    def file(self, results: Path) -> Path:
        """Where a stored run lies below the folder `results`."""
        return results / "reproduce" / f"{self.paper}_{self.name}.json"


def find_tables(paper: str | None = None, name: str | None = None) -> list[Table]:
    """The tables of a paper, or one of them, or all.

    Raises ValueError naming what there is.
    """
    if paper is not None and paper not in PAPERS:
        raise unknown_name("paper", paper, PAPERS)
    found: list[Table] = []
    for one in PAPERS if paper is None else (paper,):
        module = import_module(f"{__name__}.{PAPERS[one]}")
        stored: frozenset[str] = getattr(module, "STORED", frozenset())
        tables: dict[str, Callable[..., list[Row]]] = module.TABLES
        found += [Table(one, table, make, table in stored) for table, make in tables.items()]
    if name is not None and name not in [table.name for table in found]:
        raise unknown_name("table", name, [table.name for table in found])
    return [table for table in found if name in (None, table.name)]


def reproduce(
    table: Table, *, run: bool = False, data: Path | None = None, results: Path = Path("results")
) -> list[Row]:
    """Rows of the results schema: published, ours, the difference, and what is not modelled.

    Args:
        table: one of `find_tables`.
        run: make a stored run anew.
        data: folder of the data sets (else SPARSELOOM_DATA), for tables that need them.
        results: the folder of stored runs.

    Raises:
        FileNotFoundError: there is no stored run, or the data is not there.
    """
    if not table.stored:
        return table.function()
    if run:
        return table.function(data)
    from sparseloom.results import read_results

    file = table.file(results)
    if not file.is_file():
        raise FileNotFoundError(
            f"no stored run of {table.paper} {table.name} at {file}: make it with --run, or name "
            "the folder with --results"
        )
    return [row.model_dump(exclude_unset=True) for row in read_results(file).rows]
