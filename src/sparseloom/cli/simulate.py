"""`sparseloom simulate`: what traces cost on accelerators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

import typer

from sparseloom.cli.options import Json, Seed, command_line
from sparseloom.cli.output import (
    Column,
    Row,
    emit,
    format_number,
    number,
    progress_console,
    value,
)
from sparseloom.cli.simulate_all import simulate_all

if TYPE_CHECKING:
    from sparseloom.hardware import Machine, Report
    from sparseloom.trace import Trace

ALL = "all"
LIST = "benchmark:list"
_WHY_NOT = {
    "--machine": "its machines are those of one comparison",
    "--set": "all machines get one size",
    "--timeline": "a timeline shows one machine",
    "--window": "a window is of one machine",
    "--scope": "not every accelerator runs more than attention",
}
FIRST_CYCLES = (0, 20_000)
"""What a timeline shows of a cycle-by-cycle run unless told otherwise."""


class Run(NamedTuple):
    """One selection of a trace on one machine."""

    machine: Machine
    source: str
    trace: Trace
    selection: str


def simulate(
    machine: Annotated[
        str,
        typer.Argument(
            help="As spatten_hpca_2021 (`info` lists them), a machine file, or `all`: every "
            "accelerator at one size, beside its published configuration."
        ),
    ],
    traces: Annotated[
        list[str],
        typer.Argument(
            metavar="TRACE...",
            help="Trace folder, SpAtten CSV file, or benchmark:NAME (benchmark:list shows them).",
        ),
    ],
    others: Annotated[
        list[str] | None,
        typer.Option("--machine", help="Another machine beside the first; may be repeated."),
    ] = None,
    selection: Annotated[
        list[str] | None,
        typer.Option("--selection", help="Selection to cost; may be repeated; default: all."),
    ] = None,
    scope: Annotated[
        Literal["attention", "model"] | None,
        typer.Option("--scope", help="Attention alone or all operators; default: as recorded."),
    ] = None,
    fidelity: Annotated[
        str,
        typer.Option("--fidelity", help="analytic or cycle; others follow where they can."),
    ] = "analytic",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change MACHINE; may be repeated."),
    ] = None,
    seed: Seed = 0,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", help="Write a Perfetto timeline (.json, .json.gz) of one run."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with tables and figures.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            "--window",
            metavar="START:END",
            help="Cycles of which timelines show every unit; default: 0:20000.",
        ),
    ] = None,
    within: Annotated[
        float | None,
        typer.Option(
            "--within", help="With `all`: accuracies so close count as equal; default: 0."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the results to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Cost traces on accelerators: cycles, energy, area, what waited for what."""
    from sparseloom import hardware
    from sparseloom.results import results, write_results
    from sparseloom.trace.sources import open_trace

    if LIST in traces:
        _list_benchmarks(as_json=as_json)
        return
    if machine == ALL:
        given = {
            "--machine": others,
            "--set": set_,
            "--timeline": timeline,
            "--window": window,
            "--scope": None if scope == "attention" else scope,
        }
        for option, found in given.items():
            if found:
                raise ValueError(f"{option} has no place with all: {_WHY_NOT[option]}")
        simulate_all(
            traces,
            selections=selection,
            fidelity=fidelity,
            seed=seed,
            within=within or 0.0,
            html=html,
            out=out,
            as_json=as_json,
        )
        return
    if within is not None:
        raise ValueError("--within says which accuracies are equal among all: simulate all")
    cycles = _window(window)
    if window is not None and timeline is None and html is None:
        raise ValueError("--window says what --timeline and --html show: name one of them")
    first = hardware.load(machine, **hardware.parse_overrides(set_ or []))
    machines = [first, *(hardware.load(name) for name in others or [])]
    opened = [(source, open_trace(source, scope)) for source in dict.fromkeys(traces)]
    runs = [
        Run(one, source, trace, name)
        for source, trace in opened
        for name in selection or ["dense", *(n for n in trace.selections if n != "dense")]
        for one in machines
    ]
    if timeline is not None and len(runs) != 1:
        names = ", ".join(dict.fromkeys(run.selection for run in runs))
        raise ValueError(
            f"--timeline shows one run, got {len(runs)}: one trace, one machine, and one "
            f"--selection ({names})"
        )
    if cycles is None and (timeline or html):
        cycles = FIRST_CYCLES if fidelity in first.logged else None
    reports = _simulated(runs, fidelity=fidelity, seed=seed, window=cycles)
    rows = [
        {**row, "trace": run.source, **_roof(run.machine)}
        for run, report in zip(runs, reports, strict=True)
        for row in report.rows()
    ]
    found = results(rows, command=command_line())
    if out is not None:
        write_results(out, found)
    if timeline is not None:
        reports[0].to_perfetto(timeline)
    if html is not None:
        from sparseloom.report.simulate import write_simulate_report

        write_simulate_report(html, found, reports)
    files = [str(file) for file in (out, timeline, html) if file is not None]
    emit(
        found,
        as_json=as_json,
        columns=_columns(rows),
        notes=["", *_assumptions(rows), *files],
    )


def _simulated(
    runs: list[Run], *, fidelity: str, seed: int, window: tuple[int, int] | None
) -> list[Report]:
    """All reports. The first machine must have the fidelity; the others take it where they have it,
    else their own. So with the window: one machine at least must log events."""
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

    first = runs[0].machine
    logs = any(fidelity in run.machine.logged for run in runs)
    reports: list[Report] = []
    columns = (SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "{task.description}")
    console = progress_console()
    # A file or a pipe would get an empty line instead.
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("", total=len(runs))
        for run in runs:
            progress.update(task, description=f"{run.machine.name}, {run.source} {run.selection}")
            own = run.machine is first or fidelity in run.machine.fidelities
            used = fidelity if own else run.machine.fidelities[0]
            reports.append(
                run.machine.simulate(
                    run.trace,
                    run.selection,
                    fidelity=used,
                    seed=seed,
                    window=window if used in run.machine.logged or not logs else None,
                )
            )
            progress.advance(task)
    return reports


def _roof(machine: Machine) -> dict[str, Any]:
    roof = machine.roof()
    return {} if roof is None else {"roof": roof._asdict()}


def _assumptions(rows: list[dict[str, Any]]) -> list[str]:
    """Each once; under the machine's name where there are several."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        found.setdefault(row["machine"], {}).update(dict.fromkeys(row["assumptions"]))
    lines: list[str] = []
    for machine, sentences in found.items():
        lines += [f"{machine}:"] if len(found) > 1 else []
        lines += [f"- {sentence}" for sentence in sentences]
    return lines


def _window(given: str | None) -> tuple[int, int] | None:
    if given is None:
        return None
    start, colon, end = given.partition(":")
    if not (colon and start.isdecimal() and end.isdecimal() and int(start) < int(end)):
        raise ValueError(f"--window must be START:END in whole cycles, START first, got {given!r}")
    return int(start), int(end)


def _list_benchmarks(*, as_json: bool) -> None:
    from sparseloom.results import results
    from sparseloom.trace.spatten_benchmarks import benchmarks

    rows: list[dict[str, Any]] = [
        {
            "record": "benchmark",
            "name": f"benchmark:{one.name}",
            "model": one.model,
            "text": one.task,
            "tokens": one.length,
            "new_tokens": one.new_tokens,
            "length_from": one.length_origin,
            "selections": ["dense", *one.settings()],
        }
        for one in benchmarks()
    ]
    columns: list[Column] = [
        ("name", value("name")),
        ("model", value("model")),
        ("text", value("text")),
        ("tokens", value("tokens")),
        ("generated", value("new_tokens")),
        ("length from", value("length_from")),
        ("selections", lambda row: ", ".join(row["selections"])),
    ]
    emit(results(rows, command=command_line()), as_json=as_json, columns=columns)


def _columns(rows: list[dict[str, Any]]) -> list[Column]:
    several = len({(row["machine"], row["config_hash"]) for row in rows}) > 1
    first = rows[0]["machine"]
    return [
        ("machine", value("machine")),
        ("trace", value("trace")),
        ("selection", value("selection")),
        ("scope", value("scope")),
        ("fidelity", value("fidelity")),
        ("cycles", number("cycles")),
        ("against dense", _against(rows, "selection", "dense", "cycles", "fewer")),
        ("time", _time),
        (
            f"against {first}",
            _against(rows, "config_hash", rows[0]["config_hash"], "seconds", "as fast")
            if several
            else value(""),
        ),
        ("energy", _energy),
        ("area mm²", number("area_mm2", 2)),
        ("GOP/s", _rate),
        ("DRAM bytes", number("dram_bytes")),
        ("utilisation", _utilisation),
    ]


def _against(
    rows: list[dict[str, Any]], key: str, base: object, measure: str, word: str
) -> Callable[[Row], object]:
    """How many times less of `measure` a row takes than the row that has `base` under `key` and is
    like it otherwise."""

    def place(row: Row) -> tuple[object, ...]:
        same = {"trace", "scope", "selection", "config_hash"} - {key}
        return tuple(row[name] for name in sorted(same))

    bases = {place(row): row for row in rows if row[key] == base}

    def times(row: Row) -> str | None:
        found = bases.get(place(row))
        if found is None or row[key] == base or not row.get(measure):
            return None
        return f"{found[measure] / row[measure]:.3g}× {word}"

    return times


def _time(row: Row) -> str | None:
    seconds = row.get("seconds")
    return None if seconds is None else f"{seconds * 1e3:.4g} ms"


def _energy(row: Row) -> str | None:
    parts = cast("dict[str, float] | None", row.get("energy_j"))
    return f"{sum(parts.values()) * 1e3:.4g} mJ" if parts else None


def _rate(row: Row) -> str | None:
    done, seconds = row.get("operations"), row.get("seconds")
    return f"{done / seconds / 1e9:,.4g}" if done and seconds else None


def _utilisation(row: Row) -> str | None:
    found = row.get("utilisation")
    if isinstance(found, dict):
        return ", ".join(f"{unit} {share:.0%}" for unit, share in found.items())
    return None if found is None else f"{format_number(found * 100, 0)} %"
