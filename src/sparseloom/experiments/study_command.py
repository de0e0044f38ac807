"""The command line of a study: its settings as options, and the command that its results name."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparseloom.errors import BAD_INPUT, one_line, tracebacks_wanted
from sparseloom.results import write_results

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class NoSettings:
    """Those of a study in which there is nothing to vary."""


def run_command(
    name: str,
    description: str | None,
    defaults: Any,
    run: Callable[[Any, Path, Path | None], Rows | Iterator[Rows]],
    *,
    stored: Callable[[Any], Path] | None = None,
    keeps: bool = True,
    reads: bool = True,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run `python -m sparseloom.experiments.NAME` and write its rows.

    The results name the command with every setting (and --results) that was not the default, or
    whose default the machine decides, so that they say how they were made.  Bad input ends in one
    line and exit code 2, as with `sparseloom`.

    Args:
        name: of the module, and of the file in `results/` and the folder in `out/`.
        description: the module's docstring; its first line is shown by `--help`.
        defaults: the study's settings, a dataclass instance with a default in every field.
        run: (settings, folder of stages, folder of data or None) → rows, or one list of them after
            the other, each of which takes the place of the one before.
        stored: (settings) → where rows are written unless --results says otherwise; None:
            `results/NAME.json`.
        keeps, reads: whether it keeps stages, reads data; else it has no --out, no --data.
        arguments: words of the command line; None takes the process's.
    """
    first = (description or "").strip().split("\n")[0]
    parser = argparse.ArgumentParser(f"python -m sparseloom.experiments.{name}", description=first)
    parser.set_defaults(out=Path(f"out/{name}"), data=None)
    if keeps:
        parser.add_argument("--out", type=Path, help=f"stages that are kept, default: out/{name}")
    if reads:
        parser.add_argument("--data", type=Path, help="default: $SPARSELOOM_DATA")
    usual = stored or (lambda _: Path(f"results/{name}.json"))
    shown = f"default: {usual(defaults)}{', named by the settings' if stored else ''}"
    parser.add_argument("--results", type=Path, default=None, help=shown)
    fields = dataclasses.fields(defaults)
    for field in fields:
        value = getattr(defaults, field.name)
        shown = f"default: {value}".replace("%", "%%")
        if value is False:
            parser.add_argument(_flag(field.name), action="store_true")
        else:
            parser.add_argument(_flag(field.name), type=type(value), default=value, help=shown)
    given = vars(parser.parse_args(arguments))
    out, data, results = (given.pop(word) for word in ("out", "data", "results"))
    of_machine = {
        field.name for field in fields if field.default_factory is not dataclasses.MISSING
    }
    changed = [
        f" {_flag(key)}" + f" {shlex.quote(str(value))}" * (value is not True)
        for key, value in given.items()
        if value != getattr(defaults, key) or key in of_machine
    ]
    settings = dataclasses.replace(defaults, **given)
    if results not in (None, usual(settings)):
        changed.append(f" --results {shlex.quote(str(results))}")
    with errors_in_one_line(out if keeps else None):
        found = run(settings, out, data)
        for rows in [found] if isinstance(found, list) else found:
            write_results(results or usual(settings), rows, command=parser.prog + "".join(changed))


@contextmanager
def errors_in_one_line(out: Path | None = None) -> Generator[None]:
    """What a command line does where its input is bad (exit code 2) or it is stopped (130).

    Args:
        out: the folder from which the same command goes on, if there is one.
    """
    try:
        yield
    except BAD_INPUT as error:
        if tracebacks_wanted():
            raise
        sys.stderr.write(f"error: {one_line(error)}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        goes_on = "" if out is None else f"; the same command goes on from what lies in {out}"
        sys.stderr.write(f"error: interrupted{goes_on}\n")
        raise SystemExit(130) from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
