"""The commands of `sparseloom`, listed in the order of the help."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from sparseloom.cli.adapt import adapt
from sparseloom.cli.bench import bench
from sparseloom.cli.compare import compare, demo
from sparseloom.cli.entropy import entropy
from sparseloom.cli.explain import explain
from sparseloom.cli.info import info, show_version
from sparseloom.cli.search import search
from sparseloom.cli.simulate import simulate
from sparseloom.cli.studies import reproduce
from sparseloom.cli.trace import trace

app = typer.Typer(
    name="sparseloom",
    help="Make the attention of a Transformer sparse, run what is left, say what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _common(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None: ...


def _prose(docstring: str | None) -> str:
    """Paragraphs without the line breaks of the source, which Typer would keep."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for _command in (
    demo,
    compare,
    explain,
    entropy,
    adapt,
    search,
    bench,
    trace,
    simulate,
    reproduce,
    info,
):
    app.command(help=_prose(_command.__doc__))(_command)
