"""How long a simulation cycle by cycle takes on recorded masks, at published sizes.

    python -m sparseloom.experiments.simulator_time

Masks are recorded from an adapted model of ours, on one real input cut to the benchmark's length,
and dealt to the layers and heads of the published model, over again where it has more of them.
The first simulation, which compiles its loops where no cache of them is there, is not measured.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sparseloom import hardware
from sparseloom.experiments.dota_masks import record_masks
from sparseloom.experiments.reproduce.dota_benchmarks import BENCHMARKS, Benchmark
from sparseloom.experiments.reproduce.dota_runs import DOTA
from sparseloom.experiments.study_command import run_command
from sparseloom.experiments.timing import interleave
from sparseloom.trace import MaskArrays, Selection, Trace, Workload, transformer_operators


@dataclasses.dataclass(frozen=True, slots=True)
class Study:
    """What is timed: `FOLDER:TASK` of the adapted model for each benchmark, and how often."""

    squad: str = "out/sentiment/dynamic-90:imdb-sentiment"
    text: str = "out/adaptation/dynamic:stdlib"
    repeats: int = 7


def dealt(trace: Trace, case: str, benchmark: Benchmark) -> Trace:
    """The benchmark, its heads running the masks that were recorded, in turn.

    Causality is that of the recorded masks.

    Raises:
        ValueError: a recorded call has no mask, or one of another length.
    """
    calls = trace.selection(case).calls
    heads: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for call in calls:
        if call.mask is None or call.mask.q_len != benchmark.length:
            found = "none" if call.mask is None else f"one of {call.mask.q_len} queries"
            raise ValueError(f"masks must have {benchmark.length} queries, got {found}")
        for offsets in call.mask.offsets[0]:
            heads.append(call.mask.indices[offsets[0] : offsets[-1]])
            rows.append(offsets - offsets[0])
    first = calls[0].mask
    assert first is not None
    shape = benchmark.shape().model_copy(update={"is_causal": first.is_causal})
    selected = [
        dataclasses.replace(
            calls[layer % len(calls)],
            mask=_joined(heads, rows, layer * shape.heads, shape.heads, first),
        )
        for layer in range(shape.layers)
    ]
    operators = transformer_operators(shape, q_len=benchmark.length)
    workload = Workload(shape, operators, name=benchmark.name)
    return Trace(workload, {case: Selection(case, tuple(selected))})


def _joined(
    heads: list[np.ndarray], rows: list[np.ndarray], first: int, count: int, like: MaskArrays
) -> MaskArrays:
    """Recorded heads `first` … `first + count`, counted round and round, as one mask."""
    chosen = [(first + i) % len(heads) for i in range(count)]
    begins = np.cumsum([0, *(heads[i].size for i in chosen)])[:-1]
    offsets = np.stack([rows[i] + begin for i, begin in zip(chosen, begins, strict=True)])
    indices = np.concatenate([heads[i] for i in chosen])
    return dataclasses.replace(like, indices=indices, offsets=offsets[None])


def timed(trace: Trace, case: str, repeats: int) -> dict[str, Any]:
    """Seconds of simulations of the whole trace in both fidelities, and what they counted."""
    machine = hardware.load(DOTA)
    cycles: dict[str, int] = {}

    def simulate(fidelity: Any) -> None:
        cycles[fidelity] = machine.simulate(trace, case, fidelity=fidelity).cycles

    runs = {name: (lambda name=name: simulate(name)) for name in ("cycle", "analytic")}
    times = interleave(runs, repeats=repeats)
    return {
        name: {
            "seconds": times[name].ms / 1e3,
            "best_seconds": times[name].best_ms / 1e3,
            "spread": times[name].spread,
            "cycles": cycles[name],
        }
        for name in runs
    }


def study(settings: Study, out: Path, data: Path | None) -> list[dict[str, Any]]:
    """A row for each benchmark."""
    del out  # nothing is kept between runs
    sources = {"SQuAD": settings.squad, "Text": settings.text}
    rows: list[dict[str, Any]] = []
    for benchmark in BENCHMARKS:
        if benchmark.name not in sources:
            continue
        folder, _, task = sources[benchmark.name].rpartition(":")
        if not folder:
            raise ValueError(
                f"{benchmark.name.lower()} must be FOLDER:TASK, got {sources[benchmark.name]!r}"
            )
        recorded, case, _ = record_masks(folder, task, data, tokens=benchmark.length)
        calls = recorded.selection(case).calls
        trace = dealt(recorded, case, benchmark)
        rows.append(
            {
                "record": "simulator_time",
                "benchmark": benchmark.name,
                "masks_of": folder,
                "recorded_heads": sum(call.mask.heads for call in calls if call.mask is not None),
                "shape": trace.workload.model.model_dump(),
                "tokens": benchmark.length,
                "density": trace.density(case),
                "accelerator": DOTA,
                "numbers": timed(trace, case, settings.repeats),
            }
        )
    return rows


def main() -> None:
    """Command line of the study."""
    run_command("simulator_time", __doc__, Study(), study)


if __name__ == "__main__":
    main()
