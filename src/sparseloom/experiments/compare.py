"""Quality, measured time and accelerator cost of several methods on one model and one task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparseloom import hardware
from sparseloom.experiments.attention_time import attention_contender
from sparseloom.experiments.timing import Timing, interleave
from sparseloom.integrations import record, sparsify
from sparseloom.integrations.describe import chooses_in_cache, describe
from sparseloom.integrations.stats import LayerStats, density_of
from sparseloom.methods import (
    AttentionInputs,
    Calibrated,
    Dense,
    DynamicSparse,
    Method,
    Pruner,
    Selector,
    StaticSparse,
    costs,
    parse_method,
)
from sparseloom.results import ResultsFile
from sparseloom.results import results as as_results
from sparseloom.training import calibrate, load_method, select_regions

if TYPE_CHECKING:
    from rich.console import Console

    from sparseloom.mask import SparseMask
    from sparseloom.models import LoadedModel
    from sparseloom.tasks import Score, Task
    from sparseloom.tasks.base import Batch


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison: its rows in the results schema and the per-item scores behind them."""

    results: ResultsFile
    scores: dict[str, Score]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as plain dicts, absent keys as None."""
        return [row.model_dump() for row in self.results.rows]

    def to_dict(self) -> dict[str, Any]:
        """The results file as a plain dict, absent keys as None."""
        return {**self.results.model_dump(by_alias=True), "rows": self.rows}


def compare(
    model: str,
    task: str,
    methods: Sequence[str | Method],
    *,
    data: Path | None = None,
    limit: int | None = None,
    machines: Sequence[str] = ("dota_asplos_2022",),
    seed: int = 0,
    diagnose: bool = True,
    repeats: int = 5,
    command: str = "sparseloom compare",
    console: Console | None = None,
) -> Comparison:
    """Score, time and cost every method; dense comes first and is always among them.

    Args:
        model: a built-in name, a Hugging Face folder or hub name.
        task: a task name of `sparseloom.tasks`.
        methods: method strings (`"window:sparsity=0.9"`) or methods.
        data: folder with the task's data, where it needs any.
        limit: items to score; None scores all.
        machines: accelerators to cost one forward pass on.
        seed: fixes what a task samples.
        diagnose: also measure prediction accuracy against the oracle (on the first batch).
        repeats: interleaved timing rounds; 0 leaves the times out.

    Raises:
        ValueError: an unknown model, task, method or machine, a setting out of range, or a method
            that chooses what generation reads of a cache.
        FileNotFoundError: data that is not there.
    """
    from sparseloom.models import load_model
    from sparseloom.tasks import get_task

    chosen = unique_methods([parse_method(m) if isinstance(m, str) else m for m in methods])
    costed = {name: hardware.load(name) for name in machines}
    scorer = get_task(task)
    scorer.load(data)
    loaded = load_model(model, head=scorer.head, classes=scorer.classes)
    _refuse_reading_methods(chosen, loaded)
    named = {str(method): with_predictor(method, loaded, scorer, seed=seed) for method in chosen}
    torch.manual_seed(seed)
    sample = next(iter(scorer.inputs(loaded, limit=1)))

    rows: list[dict[str, Any]] = []
    scores: dict[str, Score] = {}
    with _Progress(console, total=len(named) + 2 * (repeats > 0)) as say:
        for name, method in named.items():
            say(f"scoring {name}")
            with sparsify(loaded.model, method, when="always") as sparse:
                scores[name] = scorer.score(loaded, limit=limit)
                layers = sparse.stats()
            quality = _quality(loaded, method, sample) if diagnose else {}
            cycles = _cycles(loaded, method, sample, costed)
            rows.append(
                {
                    "model": model,
                    "task": task,
                    "method": method.name,
                    "settings": settings_of(method),
                    "sparsity": getattr(method, "sparsity", None),
                    **_work(layers),
                    "metric": scorer.metric,
                    "value": scores[name].value,
                    "dense_value": scores["dense"].value,
                    "items": scores[name].items,
                    **quality,
                    "cycles": cycles,
                    "seed": seed,
                    "note": "; ".join(scores[name].notes),
                }
            )
        if repeats > 0:
            calls = capture(loaded, sample)
            whole, attention = time_methods(loaded, named, sample, calls, repeats, say)
            for (name, method), row in zip(named.items(), rows, strict=True):
                row |= {
                    "rule": _rule(method, calls),
                    "attention_ms": attention[name].ms,
                    "model_ms": whole[name].ms,
                    "dense_attention_ms": attention["dense"].ms,
                    "dense_model_ms": whole["dense"].ms,
                    "spread": whole[name].spread,
                }
    return Comparison(as_results(rows, command=command), scores)


def _refuse_reading_methods(methods: Sequence[Method], loaded: LoadedModel) -> None:
    """Tasks score whole passes, in which what chooses among cached keys leaves nothing out."""
    shape = describe(loaded.model)
    for method in methods:
        if chooses_in_cache(method, shape):
            shorter = "; spatten:prompt=shorten prunes whole passes" * isinstance(method, Pruner)
            raise ValueError(
                f"method: {method} chooses what steps of generation read, and here whole passes "
                "are scored, in which it would run dense: see `sparseloom trace --new-tokens` for "
                f"what it reads{shorter}"
            )


def unique_methods(methods: Sequence[Method]) -> list[Method]:
    """Dense first, then the rest in order, each once."""
    rest = [method for method in methods if method.name != "dense"]
    unique: list[Method] = [Dense()]
    for method in rest:
        if method not in unique:
            unique.append(method)
    return unique


CALIBRATION_BATCHES = 8
"""Training batches of two texts that a method's settings are read off, where need be."""


def with_predictor(
    method: Method, loaded: LoadedModel, task: Task | None = None, *, seed: int = 0
) -> Method:
    """The method with what it needs of the model: a predictor or settings that came with it.

    Settings that are read off text (`Calibrated`, thresholds of predictions), and static regions,
    come from the training half of `task` where the model brings none.

    Raises ValueError when the model brings none, or one of another width or precision.
    """
    if isinstance(method, Calibrated):
        return _calibrated(method, loaded, task, seed) if method.needs_calibration else method
    if isinstance(method, StaticSparse):
        return method if method.regions is not None else _static(method, loaded, task, seed)
    if not isinstance(method, DynamicSparse) or method.predictor is not None:
        return method
    shipped = saved_method(loaded)
    if not isinstance(shipped, DynamicSparse) or shipped.predictor is None:
        raise ValueError(
            f"method: {method} needs a trained predictor and model {loaded.name!r} brings none; "
            f"train one with `sparseloom adapt --model {loaded.name} --out DIR`, then --model DIR"
        )
    made = dataclasses.replace(method, predictor=shipped.predictor)
    if not made.needs_thresholds:
        return made
    if shipped.thresholds is not None and shipped.thresholds_at == made.sparsity:
        known = {"thresholds": shipped.thresholds, "thresholds_at": shipped.thresholds_at}
        return dataclasses.replace(made, **known)
    return calibrate(loaded.model, made, _calibration(made, loaded, task, seed))


def _calibration(
    method: Method, loaded: LoadedModel, task: Task | None, seed: int
) -> Iterable[Batch]:
    """Training batches that settings are read off."""
    if task is None:
        raise ValueError(
            f"method: {method} has settings that are read off text, and model {loaded.name!r} "
            f"brings none for it: run `sparseloom adapt --model {loaded.name} --method {method} "
            "--out DIR` first, then --model DIR"
        )
    return task.batches(loaded, steps=CALIBRATION_BATCHES, batch_size=2, seed=seed)


def _static(
    method: StaticSparse, loaded: LoadedModel, task: Task | None, seed: int
) -> StaticSparse:
    shipped = saved_method(loaded)
    if isinstance(shipped, StaticSparse) and shipped == method and shipped.regions is not None:
        return shipped
    return select_regions(loaded.model, method, _calibration(method, loaded, task, seed))


def _calibrated(method: Calibrated, loaded: LoadedModel, task: Task | None, seed: int) -> Method:
    shipped = saved_method(loaded)
    if isinstance(shipped, Calibrated) and shipped.is_calibrated_from(method):
        return shipped
    return calibrate(loaded.model, method, _calibration(method, loaded, task, seed))


def saved_method(loaded: LoadedModel) -> Method | None:
    """The method saved beside the model's weights (`sl.save`), or None."""
    settings = getattr(loaded.model.config, "sparse", None)
    if settings is None:
        return None
    folder = Path(str(loaded.model.config.name_or_path))
    return load_method(folder, settings)


def settings_of(method: Method) -> dict[str, object]:
    """The settings of a method without its tag and version."""
    return {k: v for k, v in method.to_dict().items() if k not in {"method", "version"}}


def time_methods(
    loaded: LoadedModel,
    methods: Mapping[str, Method],
    sample: Mapping[str, Any],
    calls: Sequence[AttentionInputs],
    repeats: int,
    say: Callable[[str], None],
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Interleaved times of one forward pass, and of its attention alone, for every method.

    Attention time is the sum over layers of what the method does from queries, keys, values and
    hidden states to the output: prediction, selection and attention.  Methods select in every
    call, whatever the cost rule would say: the times are those of what was scored.  Of a method
    that prunes, attention is that over what is left, with the importance that it ranks by.
    """

    def forward(method: Method) -> None:
        with torch.no_grad(), sparsify(loaded.model, method, when="always"):
            loaded.model(**sample)

    say("timing attention")
    attention = interleave(
        {
            name: attention_contender(
                method, capture(loaded, sample, method) if isinstance(method, Pruner) else calls
            )
            for name, method in methods.items()
        },
        repeats=repeats,
    )
    say("timing the model")  # scoring has warmed it up
    whole = interleave(
        {name: partial(forward, method) for name, method in methods.items()},
        repeats=repeats,
        warmup=0,
    )
    return whole, attention


def capture(
    loaded: LoadedModel, sample: Mapping[str, Any], method: Method | None = None
) -> list[AttentionInputs]:
    """The attention inputs of every layer in one forward pass, dense without a method."""
    calls: list[AttentionInputs] = []

    class Keep:
        def on_attention(
            self, inputs: AttentionInputs, mask: SparseMask | None, output: object
        ) -> None:
            del mask, output
            calls.append(inputs)

    with torch.no_grad(), sparsify(loaded.model, method or Dense(), observer=Keep()):
        loaded.model(**sample)
    return calls


def _rule(method: Method, calls: Sequence[AttentionInputs]) -> str | None:
    """What the cost rule would do with these calls: "sparse" where it would let one select."""
    if not isinstance(method, Selector) or method.work(calls[0].shape) is None:
        return None
    with torch.no_grad():
        return "sparse" if any(costs.pays(method, inputs) for inputs in calls) else "dense"


def _quality(
    loaded: LoadedModel, method: Method, sample: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Per layer: share of the oracle's keys found, probability kept, and kept by the oracle."""
    # The oracle is what the others are measured against.
    if not isinstance(method, Selector) or method.name in {"dense", "oracle"}:
        return {}
    with torch.no_grad(), sparsify(loaded.model, method, diagnose=True) as sparse:
        loaded.model(**sample)
    layers = [layer for layer in sparse.stats() if "prediction_overlap" in layer]
    return {
        "prediction_accuracy": [layer["prediction_overlap"] for layer in layers],
        "retained_mass": [layer["retained_mass"] for layer in layers],
        "oracle_mass": [layer["oracle_mass"] for layer in layers],
    }


def _cycles(
    loaded: LoadedModel,
    method: Method,
    sample: Mapping[str, Any],
    machines: Mapping[str, hardware.Machine],
) -> dict[str, int]:
    if not machines:
        return {}
    trace = record(loaded.model, method, sample)
    return {name: machine.simulate(trace).cycles for name, machine in machines.items()}


def _work(layers: Sequence[LayerStats]) -> dict[str, Any]:
    """Density over all layers, multiply-accumulates of one call, and what really ran."""
    calls = max(1, layers[0]["calls"]) if layers else 1
    return {
        "density": density_of(layers),
        "macs": sum(layer["attention_macs"] + layer["prediction_macs"] for layer in layers) / calls,
        "ran": sorted({f"{layer['ran']}, {layer['backend']}" for layer in layers}),
    }


class _Progress:
    """A progress bar on the console; silent without one."""

    def __init__(self, console: Console | None, total: int) -> None:
        from rich.progress import Progress

        self._progress = Progress(console=console, disable=console is None, transient=True)
        self._task = self._progress.add_task("starting", total=total)
        self._done = -1

    def __enter__(self) -> Callable[[str], None]:
        self._progress.start()
        return self._say

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _say(self, what: str) -> None:
        self._done += 1
        self._progress.update(self._task, completed=self._done, description=what)
