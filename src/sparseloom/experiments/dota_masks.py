"""Masks of adapted models on DOTA: what its scheduler loads, and what the machine takes.

    python -m sparseloom.experiments.dota_masks --name "Sentiment, MiniLM" --task imdb-sentiment
        out/sentiment/dynamic-90 out/sentiment/dynamic-95

Each folder holds a model that was adapted to dynamic sparse attention (`sl.save`); a built-in model
that brings a predictor may stand for one. Its masks are recorded on the longest of the task's first
inputs, each method at its own sparsity. What is stored is not the masks but what they cost:
key loads of the dataflows for 1 to 8 queries side by side, seconds on DOTA, on one of its Lanes
and on ELSA at 20 %, and how these change with the machine's settings. Workloads that are stored
already and have another name stay.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparseloom import hardware
from sparseloom.experiments.reproduce.dota_benchmarks import ELSA_RETENTION
from sparseloom.experiments.reproduce.dota_runs import DOTA, attention_alone, measure
from sparseloom.experiments.study_command import errors_in_one_line
from sparseloom.hardware.load_savings import load_savings
from sparseloom.results import read_results, write_results
from sparseloom.trace import PredictorShape, Selection, Trace

INPUTS = 16
"""Inputs of the task among which the longest is taken."""
# What the machine's unpublished rates do to attention; the first is the machine as it is.
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    **{f"T = {n}": {"detector.parallel_queries": n} for n in (1, 2, 6, 8)},
    "in order": {"scheduler.dataflow": "in_order"},
    "row by row": {"scheduler.dataflow": "row_by_row"},
    "no split": {"scheduler.split": False},
    "detector 64 scores a cycle": {"detector.scores_per_cycle": 64},
    "scheduler 1 push a cycle": {"scheduler.pushes_per_cycle": 1},
    "scheduler 1 step a cycle": {"scheduler.steps_per_cycle": 1},
    "SRAM 512 B a cycle": {"sram.port_bytes": 8},
    "SRAM 2 KiB a cycle": {"sram.port_bytes": 32},
    "all slow": {
        "detector.scores_per_cycle": 64,
        "scheduler.pushes_per_cycle": 1,
        "scheduler.steps_per_cycle": 1,
        "sram.port_bytes": 8,
    },
    "SRAM 64 KiB a Lane": {"sram.kib_per_lane": 64},
    "multipliers linear in width": {"rmmu.multiplier": "linear"},
    "rows split": {"rmmu.policy": "split"},
    "DRAM 64 GB/s": {"dram.gbytes_per_second": 64.0},
    "DRAM 900 GB/s": {"dram.gbytes_per_second": 900.0},
}
PRECISIONS = (2, 4, 8, 16)


def sensitivity(trace: Trace, case: str, *, fidelity: str = "cycle") -> list[dict[str, Any]]:
    """Attention's cycles of a selection with other settings of the machine and of the detection."""
    alone = attention_alone(trace)
    found: list[dict[str, Any]] = []
    for name, settings in VARIANTS.items():
        report = hardware.load(DOTA, **settings).simulate(alone, case, fidelity=fidelity)
        found.append({"variant": name, "cycles": report.cycles, "stalls": report.stalls})
    for bits in PRECISIONS:
        report = hardware.load(DOTA).simulate(with_bits(alone, case, bits), case, fidelity=fidelity)
        variant = f"detection in {bits} bits"
        found.append({"variant": variant, "cycles": report.cycles, "stalls": report.stalls})
    return found


def with_bits(trace: Trace, case: str, bits: Any) -> Trace:
    """The trace with this selection predicted at another precision, its mask as it is."""
    selection = trace.selection(case)
    calls = tuple(
        call
        if call.predictor is None
        else replace(call, predictor=PredictorShape(head_dim=call.predictor.head_dim, bits=bits))
        for call in selection.calls
    )
    changed = Selection(case, calls, selection.method, selection.quality)
    return replace(trace, selections={**trace.selections, case: changed})


def costs(trace: Trace, case: str, elsa: str, *, fidelity: str = "cycle") -> dict[str, Any]:
    """All that is stored of one recorded selection."""
    calls = trace.selection(case).calls
    predictors = {
        (call.predictor.head_dim, call.predictor.bits) for call in calls if call.predictor
    }
    return {
        "density": trace.density(case),
        "predictors": sorted(predictors),
        "loads": load_savings(trace, case),
        "numbers": measure(trace, case, elsa=elsa, fidelity=fidelity),
        "sensitivity": sensitivity(trace, case, fidelity=fidelity),
    }


def record_masks(
    folder: str, task: str, data: Path | None, *, tokens: int | None = None
) -> tuple[Trace, str, str]:
    """One input of a task through an adapted model: the trace, its selection, and ELSA's.

    The input is the longest of a few, cut to `tokens` where that is given.

    Raises:
        ValueError: the model's method is not dynamic sparse attention, or no input is so long.
    """
    from sparseloom.experiments.compare import saved_method
    from sparseloom.integrations import record
    from sparseloom.methods import DynamicSparse, Elsa
    from sparseloom.models import load_model
    from sparseloom.tasks import get_task

    scorer = get_task(task)
    scorer.load(data)
    loaded = load_model(folder, head=scorer.head, classes=scorer.classes)
    method = saved_method(loaded)
    if not isinstance(method, DynamicSparse):
        raise ValueError(f"folder {folder} must hold a model with dynamic attention, got {method}")
    inputs = _longest(scorer.inputs(loaded, limit=INPUTS))
    if tokens is not None:
        longest = inputs["input_ids"].shape[1]
        if longest < tokens:
            raise ValueError(f"tokens must be at most {longest}, the longest input, got {tokens}")
        inputs = {key: value[:, :tokens] for key, value in inputs.items()}
    ours = record(loaded.model, method, inputs)
    theirs = record(loaded.model, Elsa(retention=ELSA_RETENTION), inputs)
    (case,), (elsa,) = ours.selections, theirs.selections
    return replace(ours, selections={**ours.selections, **theirs.selections}), case, elsa


def _longest(batches: Any) -> dict[str, Any]:
    """The longest input, alone, without its padding."""
    best: dict[str, Any] = {}
    size = -1
    for batch in batches:
        mask = batch.get("attention_mask")
        ids = batch["input_ids"]
        lengths = mask.sum(dim=1) if mask is not None else ids.new_full((len(ids),), ids.shape[1])
        i = int(lengths.argmax())
        if int(lengths[i]) > size:
            size = int(lengths[i])
            best = {
                key: value[i : i + 1, :size]
                for key, value in batch.items()
                if getattr(value, "shape", ())[:2] == ids.shape[:2]
            }
    return best


def study(
    name: str, task: str, folders: Sequence[str], *, data: Path | None = None, fidelity: str
) -> list[dict[str, Any]]:
    """A row for each folder.

    Args:
        name: of the workload.
        task: whose inputs, and whose sweep tells the retentions.
        folders: of adapted models, or built-in names.
        data: folder of the task's data.
        fidelity: of DOTA and ELSA.
    """
    rows: list[dict[str, Any]] = []
    for folder in folders:
        trace, case, elsa = record_masks(folder, task, data)
        model = trace.workload.model
        method = trace.selection(case).method
        dense = measure(trace, "dense", elsa=elsa, fidelity=fidelity)
        rows.append(
            {
                "record": "dota_masks",
                "workload": name,
                "task_name": task,
                "folder": folder,
                "sparsity": method.get("sparsity"),
                "tokens": trace.workload.attention()[0].q_len,
                "shape": model.model_dump(),
                "dense": dense,
                "elsa_density": trace.density(elsa),
                **costs(trace, case, elsa, fidelity=fidelity),
            }
        )
    return rows


def merged(file: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stored rows of other workloads, and these."""
    names = {row["workload"] for row in rows}
    stored = read_results(file).rows if file.is_file() else []
    others = [row.model_dump(exclude_unset=True) for row in stored]
    return [*(row for row in others if row.get("workload") not in names), *rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and add its rows to the results."""
    first = (__doc__ or "").strip().split("\n")[0]
    parser = argparse.ArgumentParser(
        "python -m sparseloom.experiments.dota_masks", description=first
    )
    parser.add_argument("folders", nargs="+", help="adapted models, or built-in names")
    parser.add_argument("--name", required=True, help="of the workload")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, default=None, help="default: $SPARSELOOM_DATA")
    parser.add_argument("--fidelity", default="cycle", choices=("analytic", "cycle"))
    parser.add_argument("--results", type=Path, default=Path("results/dota_masks.json"))
    given = parser.parse_args(arguments)
    with errors_in_one_line():
        _run(given, parser.prog)


def _run(given: argparse.Namespace, prog: str) -> None:
    rows = study(given.name, given.task, given.folders, data=given.data, fidelity=given.fidelity)
    words = ["--name", given.name, "--task", given.task, *given.folders]
    if given.fidelity != "cycle":
        words += ["--fidelity", given.fidelity]
    for row in rows:
        row["run"] = f"{prog} {shlex.join(words)}"
    every = merged(given.results, rows)
    # One command for each workload: all of them made the file.
    runs = dict.fromkeys(row["run"] for row in every if "run" in row)
    write_results(given.results, every, command=" && ".join(runs))


if __name__ == "__main__":
    main()
