"""DOTA's time and actions from operator sizes and kept pairs: one formula per stage.

With p elements per Lane, L Lanes and m low-precision products per element and cycle
(derived from the published array, for one sequence of n tokens):

- linear      3·n·d·d_qkv / (p·L)
- detection   ⌈h/L⌉ · (2·n·d·k_h + n²·k_h) / (p·m)
- attention   ⌈h/L⌉ · max(2·r·n²·d_h / p, r·n² / 16)
- other       (n·d_qkv·d + 2·n·d·d_ff) / (p·L)

Here r·n² is what the real mask keeps, head by head, and a call ends with its slowest Lane; with
equal heads that is the same formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Int64

from sparseloom.hardware.dota.config import DotaConfig, Rmmu
from sparseloom.trace import AttentionCall, Operator, PredictorShape, Workload

FOLDED = ("attention_output", "ffn", "head")  # Lanes hold partial sums of these products


@dataclass(frozen=True)
class Cost:
    """One stage of one sequence: its compute cycles and the actions behind its energy.

    Work without cycles of its own (norms and activations) runs behind the other stages.
    """

    component: str
    cycles: float = 0.0
    pe_cycles: float = 0.0
    mfu_cycles: float = 0.0
    detector_cycles: float = 0.0
    accumulator_cycles: float = 0.0
    sram_bytes: float = 0.0
    dram_bytes: float = 0.0
    facts: Mapping[str, float | int | str] = field(default_factory=dict)


def operator_costs(
    config: DotaConfig,
    workload: Workload,
    operator: Operator,
    call: AttentionCall | None,
    *,
    input_is_here: bool = False,
) -> list[list[Cost]]:
    """The stages of one operator, per sequence.

    `input_is_here` says that the product before this one read the same input from DRAM, as where
    queries, keys and values are three products.
    """
    if operator.is_attention:
        return list(_attention(config, workload, operator, call or AttentionCall()))
    gemm = operator.kind == "gemm"
    one = gemm_cost(config, operator, input_is_here) if gemm else elements_cost(config, operator)
    return [[one]] * operator.batch


def gemm_cost(config: DotaConfig, operator: Operator, input_is_here: bool) -> Cost:
    """A product of one sequence; `input_is_here` as in `operator_costs`."""
    rmmu, lanes = config.rmmu, config.lanes
    macs = operator.rows * operator.inner * operator.columns
    outputs = operator.rows * operator.columns
    width = rmmu.base_bits / 8
    folded = operator.role in FOLDED
    additions = outputs * lanes / config.accumulator.additions_per_cycle if folded else 0.0
    # Queries, keys and values stay in the Lane that made them, and so does what attention gives.
    moved = operator.inner * operator.columns
    local = input_is_here or operator.role == "attention_output"
    moved += 0 if local else operator.rows * operator.inner
    moved += 0 if operator.role == "qkv" else outputs
    return Cost(
        "linear" if operator.role == "qkv" else "other",
        cycles=max(macs / (rmmu.elements * lanes), additions),
        pe_cycles=macs,
        accumulator_cycles=additions,
        sram_bytes=_array_bytes(rmmu, macs) + outputs * width * (lanes if folded else 1),
        dram_bytes=moved * width,
        facts={"role": operator.role, "macs": macs},
    )


def elements_cost(config: DotaConfig, operator: Operator) -> Cost:
    """Norms or activations of one sequence."""
    elements = operator.rows * operator.columns
    return Cost(
        "hidden",
        mfu_cycles=elements / config.mfu.elements_per_cycle,
        sram_bytes=2 * elements * config.rmmu.base_bits / 8,
    )


def _attention(
    config: DotaConfig, workload: Workload, operator: Operator, call: AttentionCall
) -> Iterator[list[Cost]]:
    padding = workload.padding_of(operator)
    group = config.detector.parallel_queries
    allowed = workload.allowed_pairs(operator)
    kept = call.kept_pairs(operator, padding)
    key_loads = call.kept_pairs(operator, padding, group=group)
    values, value_loads = kept, key_loads
    if call.value_mask is not None or call.value_counts is not None:
        values = call.value_pairs(operator, padding)
        value_loads = call.value_pairs(operator, padding, group=group)
    alive = np.ones(operator.heads, np.bool_) if call.heads_alive is None else call.heads_alive
    for b in range(operator.batch):
        scale = 1.0
        if config.closed_form.pairs == "square":
            scale = operator.q_len * operator.kv_len / max(1, int(allowed[b].max()))
        here = [scale * a[b][alive] for a in (allowed, kept, values, key_loads, value_loads)]
        stages: list[Cost] = []
        if call.predictor is not None and alive.any():
            stages.append(
                detection_cost(
                    config, workload.model.hidden_size, operator, call.predictor, here[0]
                )
            )
        stages.append(kept_cost(config, operator, *here))
        yield stages


def detection_cost(
    config: DotaConfig,
    hidden_size: int,
    operator: Operator,
    predictor: PredictorShape,
    pairs: Float64[np.ndarray, "heads"],
) -> Cost:
    """The predictor of one sequence's call, for these pairs in each head that is alive."""
    rmmu, bits = config.rmmu, predictor.bits
    width = predictor.head_dim
    if config.closed_form.detection == "whole_words":
        word = rmmu.word(bits)
        width = -(-width // word) * word
    products = rmmu.products(bits)
    # New tokens are projected as queries and as keys; a cross-attention has its keys beside it.
    tokens = 2 * operator.q_len
    if operator.kind == "cross_attention":
        tokens = operator.q_len + (operator.kv_len if operator.stage == "prefill" else 0)
    projections = np.full_like(pairs, tokens * hidden_size * width)
    scores = pairs * width
    element_cycles = (projections + scores) / products
    code_bytes = predictor.head_dim * bits / 8
    reads = pairs.sum() / config.detector.parallel_queries * code_bytes + pairs.sum() / 8
    cached = 0 if resident(config, operator) else operator.kv_len * code_bytes * pairs.size
    weights = 2 * hidden_size * code_bytes * pairs.size
    return Cost(
        "detection",
        cycles=_lane_cycles(config, element_cycles / rmmu.elements),
        pe_cycles=float(element_cycles.sum()),
        detector_cycles=float(scores.sum()) / products / rmmu.elements,
        sram_bytes=float(_array_bytes(rmmu, projections.sum() / products) + reads),
        dram_bytes=float(cached + weights),
        facts={"bits": bits, "head_dim": predictor.head_dim, "pairs": float(pairs.sum())},
    )


def kept_cost(
    config: DotaConfig,
    operator: Operator,
    allowed: Float64[np.ndarray, "heads"],
    kept: Float64[np.ndarray, "heads"],
    values: Float64[np.ndarray, "heads"],
    key_loads: Float64[np.ndarray, "heads"],
    value_loads: Float64[np.ndarray, "heads"],
) -> Cost:
    """Attention of one sequence's call on what is kept, head by head.

    allowed, kept, values: pairs that may be kept, pairs of Q·Kᵀ, pairs of P·V; key_loads,
    value_loads: vectors read for them.
    """
    width = config.rmmu.base_bits / 8
    macs = kept * operator.head_dim + values * operator.value_dim
    softmax = kept / config.mfu.scores_per_cycle
    cycles = np.maximum(macs / config.rmmu.elements, softmax)
    vectors = key_loads * operator.head_dim + value_loads * operator.value_dim
    both = operator.head_dim + operator.value_dim
    rows = operator.q_len * both * kept.size
    earlier = max(0, operator.kv_len - operator.q_len)
    moved = 0.0
    if not resident(config, operator):
        moved = float(vectors.sum()) + rows
    elif operator.kind == "attention":
        moved = float(earlier * both * kept.size)
    return Cost(
        "attention",
        cycles=_lane_cycles(config, cycles),
        pe_cycles=float(macs.sum()),
        mfu_cycles=float(softmax.sum()),
        sram_bytes=float(vectors.sum() + rows) * width,
        dram_bytes=moved * width,
        facts={
            "kept_pairs": float(kept.sum()),
            "density": float(kept.sum() / max(1.0, float(allowed.sum()))),
        },
    )


def resident(config: DotaConfig, operator: Operator) -> bool:
    """Whether the keys and values of one head are in the Lane's SRAM while attention runs.

    While tokens are generated they never are: the caches of all layers would have to fit.
    """
    bits = operator.kv_len * (operator.head_dim + operator.value_dim) * config.rmmu.base_bits
    return operator.stage == "prefill" and bits <= config.sram.kib_per_lane * 8192


def _lane_cycles(config: DotaConfig, heads: Float64[np.ndarray, "heads"]) -> float:
    """When the last Lane is done; head a runs on Lane a mod L, one head after another."""
    if heads.size == 0:
        return 0.0
    if config.closed_form.lane_balance == "ideal":
        return float(heads.mean()) * -(-heads.size // config.lanes)
    return max(float(heads[lane :: config.lanes].sum()) for lane in range(config.lanes))


def _array_bytes(rmmu: Rmmu, element_cycles: float | Int64[np.ndarray, ""]) -> float:
    """Bytes an output-stationary array reads: one operand per row and per column each cycle."""
    per_cycle = (rmmu.rows + rmmu.columns) * rmmu.base_bits / 8
    return float(element_cycles / rmmu.elements * per_cycle)
