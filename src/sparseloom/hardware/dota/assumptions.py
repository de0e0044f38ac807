"""What a DOTA report rests on, as sentences."""

from __future__ import annotations

from sparseloom.hardware.dota.config import DotaConfig
from sparseloom.hardware.report import Fidelity
from sparseloom.trace import PredictorShape, Selection, Workload


def assumptions(
    s: DotaConfig, workload: Workload, selection: Selection, fidelity: Fidelity, seed: int | None
) -> tuple[str, ...]:
    """What a report rests on for this trace.

    Args:
        s: the machine.
        workload, selection: what ran.
        fidelity: how closely time was followed.
        seed: of keys that were drawn, None where none were.
    """
    stepped = fidelity == "cycle"
    found = _stepped(s, seed) if stepped else _closed(s, workload, selection)
    found += _about_detection(s, selection, stepped)
    operators = workload.attention()
    if s.accelerators > 1:
        found.append(
            f"{s.accelerators} accelerators take sequences in turn and have equal slots of one "
            "DRAM; stages are those of the one that ends last, energy and bytes those of all"
        )
    if any(op.kv_heads != op.heads for op in operators):
        found.append("query heads that share keys and values load them separately")
    if workload.scope == "attention":
        found.append("the trace lists attention alone: projections and feed-forward are not here")
    if workload.paddings:
        found.append("padded tokens are charged in the matrix products")
    return tuple(found)


_ENERGY = (
    "module power and area are unconfirmed rows whose sums agree with the published totals; "
    "SRAM and DRAM energy per bit are defaults"
)


def _stepped(s: DotaConfig, seed: int | None) -> list[str]:
    """Of the cycle fidelity."""
    found = [
        "every rate of detector, scheduler, SRAM and DRAM is a default: the paper prints none",
        "stages depend on each other; the weights of the next product arrive during the last "
        "blocks of this one, norms and activations overlap with the product that reads them",
        "keys and values of a head stay in its Lane where they fit, and its queries are projected "
        "just before; inputs and outputs of all other products pass through DRAM",
        "queries and outputs of a group move beside its keys and take no port of the SRAM",
        _ENERGY,
    ]
    if s.scheduler.dataflow == "out_of_order":
        found.append("the order of the scheduler's scan and its splitting are a reconstruction")
    if s.sram.conflicts == "ideal":
        found.append("vectors never meet in a bank: only the SRAM's bandwidth counts")
    if seed is not None:
        found.append(f"the trace counts kept keys without naming them: drawn, seed {seed}")
    return found


def _closed(s: DotaConfig, workload: Workload, selection: Selection) -> list[str]:
    """Of the closed form."""
    found = [
        "closed form: stages run one after another at ideal utilisation; pipeline fill, the "
        "scheduler, bank conflicts and DRAM latency are not modelled",
        "one sequence at a time; norms and activations run behind the matrix products",
        "keys and values are loaded once for each "
        f"{s.detector.parallel_queries} consecutive queries (the least possible)",
        _ENERGY,
    ]
    form = s.closed_form
    if form.pairs == "square":
        found.append(
            "attention is charged as density × q_len × kv_len and detection as q_len × kv_len, "
            "also where causality or padding forbids pairs"
        )
    else:
        found.append(
            "attention is charged for the pairs that the mask keeps, detection for the pairs that "
            "causality and padding allow"
        )
    if form.lane_balance == "measured":
        found.append("heads take turns on the Lanes and a call ends with its slowest Lane")
    else:
        found.append("heads share the Lanes evenly, whatever each one keeps")
    if form.memory == "bandwidth":
        found.append(
            f"a stage lasts at least as long as its DRAM traffic at {s.dram.gbytes_per_second:g} "
            "GB/s: weights once per sequence, inputs and outputs of the linear and feed-forward "
            "products, and keys and values where they do not stay in SRAM"
        )
    else:
        found.append("DRAM traffic is counted for energy and costs no time")
    if any(op.stage == "decode" for op in workload.attention()):
        found.append(
            "generation keeps all elements busy on one query, which the token-parallel array may "
            "not reach"
        )
    if any(call.key_counts is not None for call in selection.calls):
        found.append("the trace counts kept keys without naming them: no load is shared")
    return found


def _about_detection(s: DotaConfig, selection: Selection, stepped: bool) -> list[str]:
    used = [call.predictor for call in selection.calls if call.predictor is not None]
    shapes = {(shape.head_dim, shape.bits): shape for shape in used}
    found: list[str] = []
    if len(used) < len(selection.calls):
        which = "some attention calls" if used else "attention"
        found.append(
            f"no detection is charged for {which}: selection {selection.name!r} computes no "
            "prediction there, so its mask costs nothing"
        )
    return found + [_detection_sentence(s, shapes[key], stepped) for key in sorted(shapes)]


def _detection_sentence(s: DotaConfig, shape: PredictorShape, stepped: bool) -> str:
    products = s.rmmu.products(shape.bits)
    text = (
        f"detection with {shape.head_dim} values per head in {shape.bits} bits: {products} "
        "products per element and cycle"
    )
    if shape.bits > s.rmmu.base_bits:
        text += f", the array having nothing wider than {s.rmmu.base_bits} bits"
    word = s.rmmu.word(shape.bits)
    if shape.head_dim % word:
        fuller = -(-shape.head_dim // word) * word / shape.head_dim
        charged = stepped or s.closed_form.detection == "whole_words"
        how = "is charged" if charged else "is not charged"
        text += f"; filling words of {word} values would take {fuller:.3g} times as long and {how}"
    return text
