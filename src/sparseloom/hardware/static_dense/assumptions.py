"""What a report of the dense accelerator with regions rests on, as sentences."""

from __future__ import annotations

from sparseloom.hardware.report import Fidelity
from sparseloom.hardware.static_dense.config import StaticDenseConfig
from sparseloom.trace import Selection, Trace

_WORK = {
    "core": "attention core (QKᵀ, softmax, PV)",
    "mha": "attention with its projections",
    "model": "every matrix product of the model",
}


def scope_text(s: StaticDenseConfig) -> str:
    """What is charged, to print beside every figure: `attention core (…), without DRAM`."""
    if not s.scope.dram:
        return f"{_WORK[s.scope.work]}, without DRAM"
    return f"{_WORK[s.scope.work]}, with DRAM at {s.scope.dram_pj_per_byte:g} pJ/B"


def assumptions(
    s: StaticDenseConfig,
    trace: Trace,
    selection: Selection,
    fidelity: Fidelity,
    worked: float,
    kept: float,
    chunked: int,
) -> tuple[str, ...]:
    """The sentences of a run.

    Args:
        s: the machine file.
        trace, selection, fidelity: what was simulated, and how.
        worked, kept: pairs of worked tiles, and pairs that the selection keeps.
        chunked: attention calls that were cut into chunks of keys.
    """
    operators = trace.workload.attention()
    found = [
        f"scope: {scope_text(s)}",
        "after Dai et al. 2023; region design ours; energies and the mix of head templates were "
        "fitted to the published headline",
        "heads one after another, operands in INT8 in the global buffer; a call starts with empty "
        "buffers and is charged to its last output",
    ]
    calls = selection.calls
    regions = any(call.regions is not None for call in calls)
    if not s.sequencer.present:
        found.append("the dense base alone: the selection is not followed")
    elif regions:
        found.append("regions are read from the trace and sequenced query tile by query tile")
    elif any(call.mask is not None or call.tokens_alive is not None for call in calls):
        found.append("a mask without regions is read as lists of runs, one word for each")
    if s.sequencer.present and kept and worked:
        found.append(
            f"whole tiles of 16 × 32 are worked on: {worked / kept:.3g} pairs for every one kept"
        )
    if s.array == "systolic":
        found.append(
            "weight-stationary array: keys outer, all queries of a key tile streamed; maxima and "
            "sums of all rows are held; pooled keys are charged by whole groups; operands come in "
            "time, and energy is counted as for the vector array"
        )
    elif s.sparse_utilisation < 1:
        found.append(f"inside regions the array is used to {s.sparse_utilisation:.0%}")
    if any(call.value_mask is not None or call.value_counts is not None for call in calls):
        found.append("PV follows the runs of QKᵀ: further pruned values are worked on")
    if chunked:
        found.append(
            "keys beyond what the weight and probability buffers hold are worked on in chunks, "
            "whose partial outputs go through the global buffer in 24 bits"
        )
    longest = max((op.kv_len for op in operators), default=0)
    if longest > 1 << s.softmax.power_sum_integer_bits:
        bits = (longest - 1).bit_length()
        found.append(f"the power sum is widened to Q({bits},6) for {longest} keys")
    if any(op.is_causal for op in operators):
        found.append("tiles that causality forbids whole are skipped, by the dense loop too")
    if trace.workload.paddings:
        found.append("tiles beyond the last valid key are skipped, by the dense loop too")
    if any(op.kv_heads != op.heads for op in operators):
        found.append("query heads that share keys and values load them separately")
    if s.scope.work != "core":
        found.append("norms and activations run behind the matrix products")
    if s.scope.dram:
        what = "Q, K, V and O" + (" and weights" if s.scope.work != "core" else "")
        found.append(
            f"{what} move over DRAM once per sequence at {s.scope.dram_gbytes_per_second:g} GB/s"
        )
    if fidelity == "analytic":
        found.append("closed form: operands come behind the arithmetic of the head before")
    return tuple(found)
