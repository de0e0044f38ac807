"""Published tables beside ours: one file per paper, one function per table or figure.

A paper's module has `TABLES`, functions by table.  A table that rests on a long study is listed in
`STUDIES`, too: (file in `results/`, function that runs the study on the folder of the data sets);
its function takes the rows of the study.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from sparseloom.errors import unknown_name

__all__ = ["PAPERS", "Table", "find_tables", "reproduce"]

PAPERS = {"dsa_tc_2022": "dsa", "dota_asplos_2022": "dota", "spatten_hpca_2021": "spatten_hw"}
"""Paper → its module here."""

ALIASES = {"spatten-hw": "spatten_hpca_2021"}
"""Other name → paper."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """One table or figure of a paper, and the study that it rests on, if there is one."""

    paper: str
    name: str
    function: Callable[..., list[Row]]
    study: tuple[str, Callable[[Path | None], list[Row]]] | None = None

    @property
    def title(self) -> str:
        """What it compares, in a sentence."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


def find_tables(paper: str | None = None, name: str | None = None) -> list[Table]:
    """The tables of a paper, or one of them, or all.

    Raises ValueError naming what there is.
    """
    if paper is not None:
        paper = ALIASES.get(paper, paper)
    if paper is not None and paper not in PAPERS:
        raise unknown_name("paper", paper, PAPERS)
    found: list[Table] = []
    for one in PAPERS if paper is None else (paper,):
        module = import_module(f"{__name__}.{PAPERS[one]}")
        studies: dict[str, Any] = getattr(module, "STUDIES", {})
        tables: dict[str, Callable[..., list[Row]]] = module.TABLES
        found += [Table(one, table, make, studies.get(table)) for table, make in tables.items()]
    if name is not None and name not in [table.name for table in found]:
        raise unknown_name("table", name, [table.name for table in found])
    return [table for table in found if name in (None, table.name)]


def reproduce(
    table: Table, *, run: bool = False, data: Path | None = None, results: Path = Path("results")
) -> list[Row]:
    """Rows of the results schema: published, ours, the difference, and what is not modelled.

    Args:
        table: one of `find_tables`.
        run: run the study behind the table instead of reading its stored rows.
        data: folder of the data sets (else SPARSELOOM_DATA), for studies that need them.
        results: the folder of stored rows.

    Raises:
        FileNotFoundError: there are no stored rows, or the data is not there.
    """
    if table.study is None:
        return table.function()
    name, study = table.study
    if run:
        return table.function(study(data))
    from sparseloom.results import read_results

    file = results / name
    if not file.is_file():
        raise FileNotFoundError(
            f"{table.paper} {table.name} rests on a stored study and {file} is not there: run the "
            "study with --run, or name the folder with --results"
        )
    stored = json.loads(read_results(file).to_json())["rows"]
    return table.function(stored)
