"""`sparseloom explain`: which tokens of a text each layer of a pruned model still reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseloom.cli.options import Json, Model, Threads, command_line, set_threads
from sparseloom.cli.output import Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from sparseloom.methods import SpAtten
    from sparseloom.report.words import Line


def explain(
    model: Model = "stdlib",
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="What the model reads; may be repeated. Default: examples."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="As spatten:recent=8,front=0.2.")
    ] = "spatten",
    token_keep: Annotated[
        str | None,
        typer.Option("--token-keep", help="Mean share of tokens, or one per layer: 1x0.7x0.4."),
    ] = None,
    head_keep: Annotated[
        str | None, typer.Option("--head-keep", help="The same for heads; none keeps all.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also draw a page to this file.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Draw which tokens survive each layer of cascade pruning, and what the model then answers.

    Encoders are shown in one pass; decoders in the step after the prompt.
    """
    from sparseloom.experiments.explain import examples
    from sparseloom.experiments.explain import explain as run
    from sparseloom.models import load_model
    from sparseloom.results import results

    chosen = _method(method, token_keep, head_keep)
    set_threads(threads)
    loaded = load_model(model)
    settings = {k: v for k, v in chosen.to_dict().items() if k not in {"method", "version"}}
    told = {"model": model, "method": chosen.name, "settings": settings}
    texts = examples(loaded) if text is None else text
    found = results(
        [{**run(loaded, one, chosen).to_row(), **told} for one in texts], command=command_line()
    )
    if html is not None:
        from sparseloom.report.words import write_words_page

        write_words_page(html, found)
    if as_json:
        typer.echo(found.to_json(), nl=False)
        return
    _show([row.model_dump() for row in found.rows])
    if html is not None:
        typer.echo(f"\n{html}")


def _method(text: str, token_keep: str | None, head_keep: str | None) -> SpAtten:
    from sparseloom.methods import SpAtten, parse_method

    given = {"token_keep": token_keep, "head_keep": head_keep}
    for key, value in given.items():
        if value is not None:
            text += f"{',' if ':' in text else ':'}{key}={value}"
    chosen = parse_method(text)
    if not isinstance(chosen, SpAtten):
        raise ValueError(f"--method must be one that prunes in a cascade (spatten:…), got {text!r}")
    return chosen


def _show(rows: list[Row]) -> None:
    """The pictures, in the terminal; without colours pruned tokens are dots."""
    from rich.console import Console
    from rich.table import Table

    from sparseloom.report.words import lines, outcome

    console = Console(highlight=False)
    for row in rows:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(justify="right", style="dim", no_wrap=True)
        table.add_column(overflow="fold", ratio=1)
        table.add_column(justify="right", style="dim", no_wrap=True)
        for line in lines(row):
            table.add_row(
                f"{line.number}  {line.tokens_alive}/{len(line.words)}",
                _line(line, console),
                f"{line.heads_alive}/{len(line.heads)} heads",
            )
        console.print()
        console.print(table)
        console.print(outcome(row), markup=False)


def _line(line: Line, console: Console) -> Text:
    from rich.text import Text

    shades = console.is_terminal and not console.no_color
    found = Text()
    for word in line.words:
        text = word.text.replace("\n", "")
        found.append(word.gap)
        if not word.alive:
            found.append(text if shades else "·" * len(text), style="dim")
        else:
            strong = word.rank <= max(1, line.tokens_alive // 4)
            style = "bold" if strong else ""
            found.append(text, style=f"{style} underline".strip() if word.new else style)
    return found
