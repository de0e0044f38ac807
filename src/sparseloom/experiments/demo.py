"""The demo: the built-in model on real source text, made sparse, timed here and costed on DOTA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparseloom.experiments.compare import Comparison, capture, compare, with_predictor
from sparseloom.kernels.cpu import native
from sparseloom.methods import DynamicSparse, Method, Oracle, SlidingWindow

if TYPE_CHECKING:
    from rich.console import Console

    from sparseloom.models import LoadedModel
    from sparseloom.report.html import Section
    from sparseloom.results import ResultsFile

MACHINE = "dota_asplos_2022"
HEADLINE = 0.9
"""The sparsity that the summary speaks of and whose masks are drawn."""
PREDICTOR: dict[str, Any] = {"projection": 0.5, "bits": 4}
"""Settings of the predictor that comes with the built-in model."""


def demo_methods(sparsities: tuple[float, ...]) -> list[Method]:
    """Oracle, dynamic (fine-grained and 8×1) and both windows at every sparsity."""
    methods: list[Method] = []
    for sparsity in sparsities:
        methods += [
            Oracle(sparsity=sparsity),
            DynamicSparse(sparsity=sparsity, **PREDICTOR),
            DynamicSparse(sparsity=sparsity, block_size=(8, 1), **PREDICTOR),
            SlidingWindow(sparsity=sparsity),
            SlidingWindow(sparsity=sparsity, growing=True),
        ]
    return methods


def run_demo(
    out: Path,
    *,
    quick: bool = False,
    adapt: bool = False,
    seed: int = 0,
    command: str = "sparseloom demo",
    console: Console | None = None,
) -> ResultsFile:
    """Write `results.json` and `report.html` into `out` and return the results.

    Args:
        out: folder, made if needed.
        quick: one sparsity and a few windows instead of three and more.
        adapt: train the predictor anew (minutes) instead of taking the shipped one; the adapted
            model is saved in `out/adapted`.
        seed: for sampling and, with `adapt`, training.
        command: how the demo was called, kept in the results.
        console: where progress is shown; None shows none.
    """
    from sparseloom.models import load_model
    from sparseloom.report.html import write_report
    from sparseloom.results import write_results

    out.mkdir(parents=True, exist_ok=True)
    model = "stdlib"
    if adapt:
        model = str(_adapt(out / "adapted", quick=quick, seed=seed, progress=console is not None))
    methods = demo_methods((HEADLINE,) if quick else (0.8, HEADLINE, 0.95))
    comparison = compare(
        model,
        "stdlib",
        methods,
        limit=2 if quick else 8,
        machines=(MACHINE,),
        seed=seed,
        repeats=1 if quick else 3,
        command=command,
        console=console,
    )
    loaded = load_model(model)
    write_results(out / "results.json", comparison.results)
    write_report(
        out / "report.html",
        title="sparseloom demo: a byte-level language model at 2048 tokens",
        summary=summary(comparison),
        results=comparison.to_dict(),
        sections=sections(comparison, loaded),
        notes=_notes(comparison),
    )
    return comparison.results


def summary(comparison: Comparison) -> list[str]:
    """What the rows say at the headline sparsity, in sentences."""
    rows = {_key(row): row for row in comparison.rows}
    dense = rows["dense", None, None, False]
    dynamic = rows["dynamic", HEADLINE, (1, 1), False]
    vectors = rows["dynamic", HEADLINE, (8, 1), False]
    windows = [row for key, row in rows.items() if key[0] == "window" and key[1] == HEADLINE]
    window = min(windows, key=lambda row: row["value"])
    mass = min(
        ours / best
        for ours, best in zip(dynamic["retained_mass"], dynamic["oracle_mass"], strict=True)
    )
    cycles = dense["cycles"][MACHINE] / dynamic["cycles"][MACHINE]
    slow = ""
    if any("reference" in name for name in dynamic["ran"]):
        reason = native.missing_reason() or "it does not take this model's attention"
        slow = (
            f"  The C++ backend did not run ({reason}); the reference kernel computes every score "
            "and masks it: it shows quality, not speed."
        )
    return [
        f"Dense attention needs {dense['value']:.4f} bits per byte on {dense['items']} held-out "
        "windows of 2048 bytes.",
        f"Dynamic sparse attention keeps {dynamic['density']:.1%} of the pairs and needs "
        f"{dynamic['value'] - dense['value']:+.4f} bits per byte; its masks hold at least "
        f"{mass:.0%} of the oracle's probability mass in every layer.  In 8×1 vectors: "
        f"{vectors['value'] - dense['value']:+.4f}.",
        f"The better window of equal density, without any tuning, needs "
        f"{window['value'] - dense['value']:+.4f}.",
        f"Measured here, prediction and selection included: attention "
        f"{_speed(dynamic, 'attention')} (8×1: {_speed(vectors, 'attention')}), whole model "
        f"{_speed(dynamic, 'model')} (8×1: {_speed(vectors, 'model')}) of dense SDPA's speed."
        + slow,
        f"On DOTA (closed form) the same pass takes {cycles:.2f} times fewer cycles than dense.",
    ]


def sections(comparison: Comparison, loaded: LoadedModel) -> list[Section]:
    """The figures of the report."""
    from sparseloom.report import figures
    from sparseloom.report.html import Section

    rows = comparison.rows
    return [
        Section(
            "Quality and speed against density",
            "Left: lower is better; the dotted rule is dense attention on the same weights.  "
            "Right: time of one forward pass here; below the rule is faster than dense.",
            (figures.quality_figure(rows), figures.speed_figure(rows, "model")),
            columns=2,
        ),
        Section(
            "Attention alone, and an accelerator",
            "Left: prediction, selection and attention of all layers.  Right: cycles of the whole "
            "pass on DOTA, from the masks that this run recorded.",
            (figures.speed_figure(rows, "attention"), figures.cycles_figure(rows, MACHINE)),
            columns=2,
        ),
        Section(
            "How good is the prediction, layer by layer",
            "Solid: probability mass under the mask, as a share of the mass under the oracle's "
            f"mask of the same size, at sparsity {HEADLINE:.0%}.  Dotted: share of the oracle's "
            "keys found.",
            (figures.accuracy_figure(rows, HEADLINE),),
        ),
        Section(
            "Masks side by side",
            f"One head a row at sparsity {HEADLINE:.0%} (queries downwards, keys to the right); "
            "darker means denser.  The close-up compares the two pair by pair.",
            tuple(mask_figures(loaded)),
        ),
    ]


def mask_figures(loaded: LoadedModel) -> list[Any]:
    """Oracle and predicted masks: of each layer in the middle and at the end, the first head."""
    from sparseloom.report.figures import mask_figure
    from sparseloom.tasks import get_task

    task = get_task("stdlib")
    task.load(None)
    calls = capture(loaded, next(iter(task.inputs(loaded, limit=1))))
    dynamic = with_predictor(DynamicSparse(sparsity=HEADLINE, **PREDICTOR), loaded)
    assert isinstance(dynamic, DynamicSparse)
    oracle = Oracle(sparsity=HEADLINE)
    figures = []
    for layer, head in ((len(calls) // 2 - 1, 0), (len(calls) - 1, 0)):
        with torch.no_grad():
            masks = oracle.select(calls[layer]), dynamic.select(calls[layer])
        figures.append(mask_figure(*masks, head=head, name=f"layer {layer}, head {head}:"))
    return figures


def _adapt(folder: Path, *, quick: bool, seed: int, progress: bool) -> Path:
    from sparseloom.models import load_model
    from sparseloom.tasks import get_task
    from sparseloom.training import adapt, save

    loaded = load_model("stdlib")
    task = get_task("stdlib")
    task.load(None)
    steps = 40 if quick else 400  # 400: as the shipped predictor; 40 only shows the way
    batches = task.batches(loaded, steps=steps, batch_size=2, seed=seed)
    method = adapt(
        loaded.model,
        DynamicSparse(sparsity=HEADLINE, **PREDICTOR),
        batches,
        warmup_steps=steps,
        predictor_lr=3e-3,
        seed=seed,
        progress=progress,
    )
    save(loaded.model, method, folder, overwrite=True)
    return folder


def _key(row: dict[str, Any]) -> tuple[str, float | None, tuple[int, int] | None, bool]:
    settings = row["settings"]
    block = settings.get("block_size")
    return (
        row["method"],
        row["sparsity"],
        None if block is None else tuple(block),
        bool(settings.get("growing")),
    )


def _speed(row: dict[str, Any], what: str) -> str:
    return f"{row[f'dense_{what}_ms'] / row[f'{what}_ms']:.2f}×"


def _notes(comparison: Comparison) -> list[str]:
    ran = sorted({name for row in comparison.rows for name in row["ran"]})
    notes = sorted({row["note"] for row in comparison.rows if row["note"]})
    return [
        f"What ran: {', '.join(ran)} (sparse or dense, and the kernel backend).",
        "Windows are untuned here; the study in results/ tunes every contender equally.",
        "Time is the median of interleaved rounds on this machine; other programs disturb it.",
        *notes,
    ]


__all__ = ["demo_methods", "mask_figures", "run_demo", "sections", "summary"]
