"""Quality, measured time and accelerator cost of several methods on one model and one task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparseloom import hardware
from sparseloom.experiments.timing import interleave
from sparseloom.integrations import record, sparsify
from sparseloom.methods import AttentionInputs, Dense, DynamicSparse, Method, parse_method
from sparseloom.results import ResultsFile, collect_machine, collect_versions

if TYPE_CHECKING:
    from rich.console import Console

    from sparseloom.mask import SparseMask
    from sparseloom.models import LoadedModel
    from sparseloom.tasks import Score, Task


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison: its rows in the results schema and the per-item scores behind them."""

    results: ResultsFile
    scores: dict[str, Score]


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
        ValueError: an unknown model, task, method or machine, or a setting out of range.
        FileNotFoundError: data that is not there.
    """
    from sparseloom.models import load_model
    from sparseloom.tasks import get_task

    chosen = unique_methods([parse_method(m) if isinstance(m, str) else m for m in methods])
    costed = {name: hardware.load(name) for name in machines}
    scorer = get_task(task)
    loaded = load_model(model)
    chosen = [with_predictor(method, loaded) for method in chosen]
    scorer.load(data)
    torch.manual_seed(seed)

    steps = _Progress(console, total=3 * len(chosen))
    scores: dict[str, Score] = {}
    stats: dict[str, list[dict[str, Any]]] = {}
    sample = scorer.sample(loaded)
    traces = {}
    for name, method in _named(chosen):
        steps.say(f"scoring {name}")
        with sparsify(loaded.model, method) as sparse:
            scores[name] = scorer.score(loaded, limit=limit)
            stats[name] = sparse.stats()
        steps.say(f"recording {name}")
        if diagnose and method.name != "dense":
            with sparsify(loaded.model, method, diagnose=True) as sparse, torch.no_grad():
                loaded.model(**sample)
                stats[name] = _merge(stats[name], sparse.stats())
        traces[name] = record(loaded.model, method, sample, name=name) if costed else None

    steps.say("timing")
    whole, attention = time_methods(loaded, dict(_named(chosen)), sample, repeats, steps.say)
    dense = scores["dense"]
    rows = []
    for name, method in _named(chosen):
        reports = {key: machine.simulate(traces[name], name) for key, machine in costed.items()}
        layers = stats[name]
        allowed = sum(layer["allowed_pairs"] for layer in layers)
        rows.append(
            {
                "model": model,
                "task": task,
                "method": method.name,
                "settings": {k: v for k, v in method.to_dict().items() if k not in ("method", "version")},
                "sparsity": getattr(method, "sparsity", None),
                "density": sum(layer["kept_pairs"] for layer in layers) / allowed if allowed else 1.0,
                "metric": scorer.metric,
                "value": scores[name].value,
                "dense_value": dense.value,
                "items": scores[name].items,
                "macs": _per_forward(layers, "attention_macs") + _per_forward(layers, "prediction_macs"),
                "attention_ms": _ms(attention, name),
                "model_ms": _ms(whole, name),
                "dense_attention_ms": _ms(attention, "dense"),
                "dense_model_ms": _ms(whole, "dense"),
                "spread": whole[name].spread if whole else None,
                "prediction_accuracy": [
                    {
                        "layer": layer["layer"],
                        "overlap": layer["prediction_overlap"],
                        "retained_mass": layer["retained_mass"],
                        "oracle_mass": layer["oracle_mass"],
                    }
                    for layer in layers
                    if layer.get("prediction_overlap") is not None
                ],
                "cycles": {key: report.cycles for key, report in reports.items()},
                "ran": sorted({f"{layer['ran']}:{layer['backend']}" for layer in layers}),
                "seed": seed,
                "note": "; ".join(scores[name].notes),
            }
        )  # fmt: skip
    steps.close()
    results = ResultsFile(
        command=command, machine=collect_machine(), versions=collect_versions(), rows=rows
    )
    return Comparison(results, scores)


def unique_methods(methods: Sequence[Method]) -> list[Method]:
    """Dense first, then the rest in order, each once."""
    rest = [method for method in methods if method.name != "dense"]
    unique: list[Method] = [Dense()]
    for method in rest:
        if method not in unique:
            unique.append(method)
    return unique


def with_predictor(method: Method, loaded: LoadedModel) -> Method:
    """The method with the predictor that came with the model, where it needs one.

    Raises ValueError when the model brings none, or one of another projection.
    """
    if not isinstance(method, DynamicSparse) or method.predictor is not None:
        return method
    shipped = loaded.method
    if not isinstance(shipped, DynamicSparse) or shipped.predictor is None:
        raise ValueError(
            f"method: {method.name!r} needs a trained predictor and model {loaded.name!r} brings none; "
            f"make one with `sparseloom adapt --model {loaded.name} …` and pass its folder as model"
        )
    if shipped.projection != method.projection:
        raise ValueError(
            f"method: projection={method.projection} but the predictor that came with model "
            f"{loaded.name!r} has projection={shipped.projection}"
        )
    return dataclasses.replace(method, predictor=shipped.predictor)


def time_methods(
    loaded: LoadedModel,
    methods: dict[str, Method],
    sample: dict[str, Any],
    repeats: int,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Interleaved times of one forward pass, and of its attention alone, for every method.

    Attention time is the sum over layers of what the method does from queries, keys, values and
    hidden states to the output: prediction, selection and attention.
    """
    from sparseloom.experiments.attention_time import attention_contender

    if repeats < 1:
        return {}, {}
    model = loaded.model
    calls = capture(loaded, sample)
    whole, attention = {}, {}
    for name, method in methods.items():

        def forward(method: Method = method) -> None:
            with torch.no_grad(), sparsify(model, method):
                model(**sample)

        whole[name] = forward
        attention[name] = attention_contender(method, calls)
    say("timing attention")
    attention_times = interleave(attention, repeats=repeats)
    say("timing the model")
    return interleave(whole, repeats=repeats), attention_times


def capture(loaded: LoadedModel, sample: dict[str, Any]) -> list[AttentionInputs]:
    """The attention inputs of every layer in one dense forward pass."""
    calls: list[AttentionInputs] = []

    class Keep:
        def on_attention(self, inputs: AttentionInputs, mask: SparseMask | None, output: object) -> None:
            calls.append(inputs)

    with torch.no_grad(), sparsify(loaded.model, Dense(), observer=Keep()):
        loaded.model(**sample)
    return calls


def _named(methods: Sequence[Method]) -> list[tuple[str, Method]]:
    from sparseloom.methods import format_method

    return [(format_method(method), method) for method in methods]


def _merge(scored: list[dict[str, Any]], diagnosed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("prediction_overlap", "retained_mass", "oracle_mass")
    by_layer = {layer["layer"]: layer for layer in diagnosed}
    return [
        {**layer, **{key: by_layer[layer["layer"]].get(key) for key in keys}} for layer in scored
    ]


def _per_forward(layers: list[dict[str, Any]], key: str) -> float:
    return sum(layer[key] / max(1, layer["calls"]) for layer in layers)


def _ms(times: dict[str, Any], name: str) -> float | None:
    return times[name].ms if times else None


class _Progress:
    """One line of progress on the console; silent without one."""

    def __init__(self, console: Console | None, total: int) -> None:
        from rich.progress import Progress

        self._progress = Progress(console=console, disable=console is None, transient=True)
        self._task = self._progress.add_task("comparing", total=total)
        self._progress.start()

    def say(self, what: str) -> None:
        self._progress.update(self._task, advance=1, description=what)

    def close(self) -> None:
        self._progress.stop()
