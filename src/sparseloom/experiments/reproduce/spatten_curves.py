"""SpAtten (HPCA 2021), figure 21: what pruned tokens and heads cost in quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseloom.experiments.reproduce import Study
from sparseloom.experiments.reproduce.rows import Row, row
from sparseloom.experiments.reproduce.spatten_reductions import GENERATION, generated_with_spatten

if TYPE_CHECKING:
    from sparseloom.report.html import Section

PAPER = "spatten_hpca_2021"
QUALITY = Study(
    "spatten_quality.json", None, "python -m sparseloom.experiments.spatten_quality --data DATA"
)
CURVES = Study(
    "spatten_curves.json", None,
    f"{QUALITY.command} --tasks sts-b --results results/spatten_curves.json", optional=True,
)  # fmt: skip
STUDIES = (QUALITY, CURVES, GENERATION)

KINDS = ("average", "rising", "adaptive", "searched", "tokens", "heads")
# Reduction of tokens (GPT-2-Small on PTB), of heads (BERT-Base on CoLA) → change of accuracy in %.
TOKENS: dict[float, float] = {
    1.0: 0.0, 2.6: 0.5, 3.4: -0.5, 4.0: -1.0, 4.5: -1.5, 5.2: -5.5, 6.5: -21.0, 7.3: -32.0,
    8.2: -40.0,
}  # fmt: skip
HEADS: dict[float, float] = {
    1.05: 3.0, 1.12: 1.0, 1.2: 0.5, 1.3: -0.3, 1.5: -8.5, 1.6: -11.0, 1.8: -14.0, 2.0: -16.5,
}  # fmt: skip
_SHOWN = (-60, 10)
_add = partial(row, PAPER, "fig21", basis="scenario")
_READ_OFF = "the published curve is read off the figure, and straight between its points"


def fig21(study: Sequence[Row]) -> list[Row]:
    """Figure 21: quality against tokens and heads pruned, one without the other."""
    rows = [made for one in study if generated_with_spatten(one) for made in _generated(one)]
    tuned = [one for one in _latest(study) if one.get("kind") in KINDS]
    rows += [made for one in tuned for made in _encoder(one)]
    if not tuned:
        rows.append(
            _add(
                "fine-tuned encoders", "heads 1.2× and tokens about 4× without loss",
                "not run here yet",
                note=f"no rows in {QUALITY.file}: {QUALITY.command} writes them",
            )
        )  # fmt: skip
    return rows


def fig21_picture(study: list[Row]) -> list[Section]:
    """Published and own curves, tokens and heads."""
    from sparseloom.report.bar_figures import lines
    from sparseloom.report.html import Section

    sections: list[Section] = []
    for what, published, label in (
        ("tokens", TOKENS, "published, GPT-2-Small on PTB"),
        ("heads", HEADS, "published, BERT-Base on CoLA"),
    ):
        curves: dict[str, list[tuple[float, float]]] = {label: list(published.items())}
        for one in _latest(study):
            found = _point(one, what)
            if found is not None:
                curves.setdefault(found[0], []).append(found[1:])
        figure = lines(
            curves, x_title=f"{what} over those kept", y_title="change of quality, %",
            rule=(0.0, "dense"),
        )  # fmt: skip
        figure.update_yaxes(range=_SHOWN)
        text = (
            "Scores in points over dense; language models by the change of their perplexity, with "
            f"its sign turned round; points below {_SHOWN[0]} % lie outside."
        )
        sections.append(Section(f"Quality against {what} pruned", text, (figure,)))
    return sections


def perplexity_change(one: Mapping[str, Any]) -> float:
    """Of a language model, in %: bits over dense as a factor."""
    return 100 * (2 ** one["difference"] - 1)


def _latest(study: Sequence[Row]) -> list[Row]:
    """All rows, but of encoders' contenders that two studies hold only those of the second."""
    named = {
        (one["task"], one["contender"]) if "kind" in one else number: one
        for number, one in enumerate(study)
    }
    return [*named.values()]


def _generated(one: Row) -> list[Row]:
    """A run that prunes tokens or heads alone, in generation."""
    rows: list[Row] = []
    for what in ("tokens", "heads"):
        found = _point(one, what)
        if found is None:
            continue
        _, factor, _ = found
        rows.append(
            _add(
                f"{one['model']}, {one['contender']}: perplexity, change in %",
                _published(what, factor), perplexity_change(one),
                assumptions=(
                    f"{one['model']} on {one['text']}, not fine-tuned: {one['windows']} windows, "
                    f"prompt of {one['prompt']}, {one['steps']} steps",
                    _READ_OFF,
                ),
                note=f"{one['value']:.3f} {one['metric']}, {one['difference']:+.3f} over dense",
            )
        )  # fmt: skip
    return rows


def _encoder(one: Row) -> list[Row]:
    """A contender of the study of fine-tuned encoders."""
    how = "fine-tuned with it" if one["fine_tuned"] else "not fine-tuned with it"
    low, high = (100 * -bound for bound in reversed(one["loss_interval95"]))
    factors = {"tokens": one.get("tokens_alive"), "heads": one.get("heads_alive")}
    kind = one["kind"]
    published = "no loss at 35 % of the tokens and 10 % of the heads, on average"
    if alive := factors.get(kind):
        published = _published(kind, 1 / alive)
    return [
        _add(
            f"{one['model']}, {one['task']}, {one['contender']}: points over dense",
            published, -100 * one["loss"],
            assumptions=(f"{one['model']} on {one['task']}, {how}", _READ_OFF),
            note=f"{one['items']} items, 95 % interval {low:+.2f} to {high:+.2f}",
        )
    ]  # fmt: skip


def _point(one: Mapping[str, Any], what: str) -> tuple[str, float, float] | None:
    """(curve, reduction, change of quality) of a run that prunes nothing else."""
    if one.get("kind") == what and (alive := one.get(f"{what}_alive")):
        how = "" if one["fine_tuned"] else ", not fine-tuned"
        return f"{one['model']}, {one['task']}{how}", 1 / alive, -100 * one["loss"]
    if not generated_with_spatten(one):
        return None
    settings = one["settings"]
    others = {"tokens": settings["head_keep"], "heads": settings["token_keep"]}[what]
    keep = settings["token_keep" if what == "tokens" else "head_keep"]
    if others is not None or keep is None or settings["value_keep"] < 1:
        return None
    if settings["key_bits"] or settings["value_bits"] or settings["decay"] < 1:
        return None
    mean = float(np.mean(keep))
    near = f", newest {settings['recent']}" if settings["recent"] > 1 else ""
    return f"{one['model']}{near}", 1 / mean, -perplexity_change(one)


def _published(what: str, factor: float) -> str:
    """What the figure shows there, in words."""
    curve = TOKENS if what == "tokens" else HEADS
    model = "GPT-2-Small on PTB" if what == "tokens" else "BERT-Base on CoLA"
    if factor > max(curve):
        return f"beyond the figure at {factor:.1f}×"
    change = float(np.interp(factor, list(curve), list(curve.values())))
    return f"about {change:+.1f} % of accuracy at {factor:.1f}× ({model})"
