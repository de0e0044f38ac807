"""Published tables beside ours: one module per paper, one function per table or figure.

A paper's modules have `TABLES`, functions by table.  A table that rests on long runs is listed in
`STUDIES`, too, with the stored runs that it reads; its function takes their rows.  One that can be
drawn is listed in `PICTURES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparseloom.errors import unknown_name

if TYPE_CHECKING:
    from sparseloom.report.html import Section

__all__ = ["PAPERS", "Request", "Study", "Table", "find_tables", "reproduce"]

PAPERS = {
    "dsa_tc_2022": ("dynamic",),
    "dota_asplos_2022": ("dota", "dota_speed", "dota_scheduler"),
    "elsa_isca_2021": ("elsa_rows",),
    "spatten_hpca_2021": ("spatten_algorithm", "spatten_hw"),
    "static_dac_2023": ("static",),
}
"""Paper → its modules here."""

ALIASES = {
    "dota": "dota_asplos_2022",
    "dynamic": "dsa_tc_2022",
    "elsa": "elsa_isca_2021",
    "liu_2022": "dsa_tc_2022",
    "spatten": "spatten_hpca_2021",
    "static": "static_dac_2023",
    "dai_2023": "static_dac_2023",
}
"""Other name → paper."""

PARTS = {
    "spatten-algorithm": ("spatten_hpca_2021", "spatten_algorithm"),
    "spatten-hw": ("spatten_hpca_2021", "spatten_hw"),
}
"""Name of a part of a paper → the paper, and the module of that part."""

Row = dict[str, Any]
Size = Literal["small", "paper"]
SIZES: tuple[Size, ...] = ("small", "paper")
Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Request:
    """How a study is to be run.

    Attributes:
        size: "small" fits two CPU cores in under 20 minutes, "paper" is the published size.
        data: folder of the data sets; None = SPARSELOOM_DATA.
        out: folder for what an interrupted run needs to go on.
        step: told what comes next.
        device: studies of this device are run; those of others stay as they are stored.
    """

    size: Size = "small"
    data: Path | None = None
    out: Path = Path("out/reproduce")
    step: Callable[[str], None] = lambda _: None
    device: Device = "cpu"


@dataclass(frozen=True, slots=True)
class Study:
    """A long run whose rows are stored.

    Attributes:
        file: where they lie in the folder of results.
        run: runs it; None where it is no part of `--run`, and `command` says how.
        command: what else writes the file.
        optional: the table has rows without it, too.
        device: what it runs on.
    """

    file: str
    run: Callable[[Request], list[Row]] | None = None
    command: str = ""
    optional: bool = False
    device: Device = "cpu"


@dataclass(frozen=True, slots=True)
class Table:
    """One table or figure of a paper, the studies that it rests on, and how it is drawn.

    `pictures` takes the rows of the studies.
    """

    paper: str
    name: str
    function: Callable[..., list[Row]]
    studies: tuple[Study, ...] = field(default=())
    pictures: Callable[[list[Row]], list[Section]] | None = None

    @property
    def title(self) -> str:
        """What it compares, in a sentence."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


def find_tables(paper: str | None = None, name: str | None = None) -> list[Table]:
    """The tables of a paper or of a part of it, or one of them, or all.

    Raises ValueError naming what there is.
    """
    wanted = [(one, part) for one, parts in PAPERS.items() for part in parts]
    if paper in PARTS:
        wanted = [PARTS[paper]]
    elif paper is not None:
        paper = ALIASES.get(paper, paper)
        if paper not in PAPERS:
            raise unknown_name("paper", paper, PAPERS)
        wanted = [(paper, part) for part in PAPERS[paper]]
    found: list[Table] = []
    for one, part in wanted:
        module = import_module(f"{__name__}.{part}")
        studies: dict[str, tuple[Study, ...]] = getattr(module, "STUDIES", {})
        pictures: dict[str, Any] = getattr(module, "PICTURES", {})
        tables: dict[str, Callable[..., list[Row]]] = module.TABLES
        found += [
            Table(one, table, make, studies.get(table, ()), pictures.get(table))
            for table, make in tables.items()
        ]
    if name is not None and name not in [table.name for table in found]:
        raise unknown_name("table", name, [table.name for table in found])
    return [table for table in found if name in (None, table.name)]


def reproduce(
    table: Table,
    *,
    run: bool = False,
    request: Request | None = None,
    results: Path = Path("results"),
    command: str | None = None,
) -> list[Row]:
    """Rows of the results schema: published, ours, the difference, and what is not modelled.

    Args:
        table: one of `find_tables`.
        run: run the studies behind the table first, and store their rows.
        request: how they are run.
        results: the folder of stored rows.
        command: what the stored rows say that wrote them.

    A table that rests on several studies takes those that are stored.

    Raises:
        FileNotFoundError: none of its studies is stored, or the data is not there.
        ValueError: a study behind the table is not run from here.
    """
    if not table.studies:
        return table.function()
    if run:
        _run(table, request or Request(), results, command)
    return table.function(stored_rows(table, results))


def stored_rows(table: Table, results: Path) -> list[Row]:
    """Rows of the studies that a table rests on, of all that are stored.

    Raises:
        FileNotFoundError: none is, and the table has no rows without.
    """
    from sparseloom.results import read_results

    there = [study.file for study in table.studies if (results / study.file).is_file()]
    if not there and not all(study.optional for study in table.studies):
        files = " and ".join(str(results / study.file) for study in table.studies)
        verb = "is" if len(table.studies) == 1 else "are"
        runs = any(study.run for study in table.studies)
        how = "run the study with --run" if runs else f"write it with {table.studies[0].command}"
        raise FileNotFoundError(
            f"{table.paper} {table.name} rests on a stored study and {files} {verb} not there: "
            f"{how}, or name the folder with --results"
        )
    return [
        row for file in there for row in json.loads(read_results(results / file).to_json())["rows"]
    ]


def missing_files(table: Table, results: Path) -> Sequence[str]:
    """Files of studies that a table would use, too, if they were there."""
    return [study.file for study in table.studies if not (results / study.file).is_file()]


def is_stored(table: Table, results: Path) -> bool:
    """Whether the table has what it needs: no study, or one that is stored."""
    found = len(table.studies) - len(missing_files(table, results))
    return found > 0 or all(study.optional for study in table.studies)


def _run(table: Table, request: Request, results: Path, command: str | None) -> None:
    from sparseloom.results import write_results

    needed = [study for study in table.studies if not study.optional]
    if needed and all(study.run is None for study in needed):
        raise ValueError(
            f"{table.paper} {table.name} is not run from here: "
            f"{table.studies[0].command} writes {table.studies[0].file}"
        )
    chosen = [one for one in table.studies if one.run and one.device == request.device]
    if request.device != "cpu" and not chosen:
        raise ValueError(f"{table.paper} {table.name} has no run on {request.device}")
    for study in chosen:
        if study.run is not None:
            request.step(f"{table.name}: {study.file}")
            write_results(results / study.file, study.run(request), command=command)
