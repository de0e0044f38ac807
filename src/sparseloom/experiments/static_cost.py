"""What learned static masks cost on the machine of static regions, at every length they have.

    python -m sparseloom.experiments.static_cost --folders out/static_quality/static-0.4 \
        --task imdb-sentiment

After Dai et al. (DAC 2023); machine and regions are ours.  `folders`, separated by commas, hold
models saved with their regions.  The machine's constants are those of its file: nothing is fitted
to the masks.  Both readings of the published headline, in closed form and cycle by cycle; scope and
dense run stand in every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from sparseloom import hardware
from sparseloom.experiments.reproduce.static_machine import READINGS
from sparseloom.experiments.reproduce.static_templates import tile_mask
from sparseloom.experiments.study_command import run_command
from sparseloom.hardware.static_dense import StaticDense
from sparseloom.hardware.static_dense.assumptions import scope_text
from sparseloom.regions import decode_heads
from sparseloom.trace import (
    AttentionCall,
    ModelShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)

Words = Callable[[int, int], np.ndarray]
"""(length, layer) → the encoded regions of the layer's heads."""


@dataclasses.dataclass(frozen=True, slots=True)
class Study:
    """Models with regions, what they were trained for, and what is charged of them.

    `lengths`, separated by commas; empty: those that the regions were chosen for.
    """

    folders: str = ""
    task: str = ""
    lengths: str = ""
    scope: str = "core"
    dram: bool = False


def trace_of(shape: ModelShape, words: Words, length: int) -> Trace:
    """A whole input of so many tokens under the regions, as the selection "static"."""
    operators = transformer_operators(shape, q_len=length)
    calls: list[AttentionCall] = []
    for layer in range(shape.layers):
        encoded = words(length, layer)
        mask = tile_mask(decode_heads(encoded), length, is_causal=shape.is_causal)
        calls.append(AttentionCall(mask, regions=encoded))
    workload = Workload(shape, operators, name=f"{length} tokens")
    return Trace(workload, {"static": Selection("static", tuple(calls))})


def costs(
    shape: ModelShape,
    words: Words,
    lengths: Sequence[int],
    *,
    scope: Literal["core", "mha", "model"] = "core",
    dram: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows of one model: every length, both readings, both fidelities.

    `cycles` and `energy_total_j` beside those of the dense base, whose sequencer is idle;
    `tile_density` is tiles of work over the tiles that the dense base works on.
    """
    options: dict[str, Any] = {"scope.work": scope, "scope.dram": dram}
    for length in lengths:
        trace = trace_of(shape, words, length)
        for reading, name in READINGS.items():
            machine = hardware.load(name, **options)
            assert isinstance(machine, StaticDense)
            for fidelity in machine.fidelities:
                sparse, dense = (
                    machine.simulate(trace, one, fidelity=fidelity) for one in ("static", "dense")
                )
                tiles = [
                    sum(int(stage.facts.get("tiles", 0)) for stage in report.stages)
                    for report in (sparse, dense)
                ]
                yield {
                    "record": "static_cost",
                    "length": length,
                    "reading": reading,
                    "accelerator": name,
                    "fidelity": fidelity,
                    "scope": scope_text(machine.settings),
                    "tile_density": tiles[0] / tiles[1],
                    "cycles": sparse.cycles,
                    "dense_cycles": dense.cycles,
                    "energy_total_j": sparse.total_energy,
                    "dense_energy_total_j": dense.total_energy,
                    "energy_table": sparse.energy_table,
                    "config_hash": sparse.config_hash,
                    "stalls": sparse.stalls,
                    "assumptions": list(sparse.assumptions),
                }


def run_study(study: Study, out: Path, data: Path | None = None) -> list[dict[str, Any]]:
    """Rows of all folders.

    Raises:
        ValueError: no folder, or a model without regions.
    """
    del out, data
    folders = [Path(word) for word in study.folders.split(",") if word]
    if not folders:
        raise ValueError("folders must name at least one model with regions, got none")
    from sparseloom.integrations import describe
    from sparseloom.training import load

    found: list[dict[str, Any]] = []
    for folder in folders:
        model, method = load(folder)
        table: Any = getattr(method, "regions", None)
        if table is None:
            raise ValueError(f"folders must hold models with static regions, got {folder}")
        shape, words = describe(model), cast("Words", table.encoded)
        lengths = [int(word) for word in study.lengths.split(",") if word] or table.lengths.tolist()
        scope = cast("Literal['core', 'mha', 'model']", study.scope)
        for row in costs(shape, words, lengths, scope=scope, dram=study.dram):
            found.append({**row, "task_name": study.task or folder.name, "folder": folder.name})
    return found


def main() -> None:
    """Command line of the study."""
    run_command("static_cost", __doc__, Study(), run_study)


if __name__ == "__main__":
    main()
