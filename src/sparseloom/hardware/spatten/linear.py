"""Fully connected layers on SpAtten's arrays (SpAtten-e2e): weights streamed once per product."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sparseloom.hardware.report import Stage
from sparseloom.hardware.spatten.config import SpAttenConfig
from sparseloom.hardware.units.dram_config import MemoryConfig
from sparseloom.hardware.units.dram_stream import streaming_bandwidth
from sparseloom.trace import Operator, Selection, Workload


@lru_cache(maxsize=16)
def _streamed(text: str) -> float:
    return streaming_bandwidth(MemoryConfig.model_validate_json(text))


def measured_bandwidth(memory: MemoryConfig) -> float:
    """Bytes per clock that this memory streams, at cycle fidelity."""
    return _streamed(memory.model_dump_json(by_alias=True))


def linear_stages(
    config: SpAttenConfig, workload: Workload, selection: Selection, bytes_per_cycle: float
) -> list[Stage]:
    """A stage per product: the longer of its weights' bytes and its multiplications.

    Both arrays work on a product. Weights are read once for all tokens of a step; activations stay
    on chip. Where tokens have left, the rows of later products leave too (section III-A; the
    tokens of a block are ranked before its feed-forward part).
    """
    share = after = 1.0
    upcoming = list(_shares(workload, selection))
    position = -1
    found: list[Stage] = []
    macs_per_cycle = config.scores.multipliers + config.values.multipliers
    for operator in workload.operators:
        if operator.is_attention:
            position += 1
            after = upcoming[min(position + 1, len(upcoming) - 1)]
            if position + 1 < len(upcoming) and after > upcoming[position]:
                after = upcoming[position]
            continue
        if operator.kind != "gemm":
            continue
        if operator.role == "qkv":
            share = upcoming[min(position + 1, len(upcoming) - 1)] if upcoming else 1.0
        elif operator.role in ("attention_output", "ffn", "head"):
            share = after
        rows = max(1.0, np.ceil(operator.rows * share)) * operator.batch
        weights = operator.inner * operator.columns * config.fully_connected.weight_bits / 8
        fetch = weights / bytes_per_cycle
        work = rows * operator.inner * operator.columns / macs_per_cycle
        found.append(
            Stage(
                component="linear",
                cycles=max(fetch, work),
                layer=operator.layer,
                step=operator.step,
                stall_cycles=max(0.0, fetch - work),
                stall_cause="waits for data from dram" if fetch > work else "",
                facts={
                    "role": operator.role,
                    "macs": int(rows * operator.inner * operator.columns),
                    "weight_bytes": int(weights),
                },
            )
        )
    return found


def _shares(workload: Workload, selection: Selection) -> list[float]:
    """Tokens alive at each attention call, as a share of the queries; 1 in generation."""
    found: list[float] = []
    for operator, call in zip(workload.attention(), selection.calls, strict=True):
        found.append(_share(operator, call.tokens_alive))
    return found


def _share(operator: Operator, alive: np.ndarray | None) -> float:
    if alive is None or operator.q_len != operator.kv_len:
        return 1.0
    return float(alive.mean())
