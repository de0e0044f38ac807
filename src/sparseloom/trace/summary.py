"""What a selection left, call by call and on the whole: tokens, heads, keys, values, low bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseloom.trace.schema import Selection, Workload


@dataclass(frozen=True)
class CallCounts:
    """One attention call, all sequences together.

    Attributes:
        step, layer, stage: which one.
        tokens, tokens_alive: keys that are not padding, and those of them that are left.
        heads, heads_alive: one count per sequence; of a call whose sequences differ, as the mask
            has them.
        pairs: (query, key) pairs of the heads that causality and padding allow.
        keys, values: pairs of Q·Kᵀ and of P·V that are left.
        rows, low_rows: rows that read anything, and those that fetched low bits of their keys.
    """

    step: int
    layer: int | None
    stage: str
    tokens: int
    tokens_alive: int
    heads: int
    heads_alive: int
    pairs: int
    keys: int
    values: int
    rows: int
    low_rows: int


def call_counts(workload: Workload, selection: Selection) -> list[CallCounts]:
    """The counts of each attention call, in order."""
    found: list[CallCounts] = []
    for operator, call in zip(workload.attention(), selection.calls, strict=True):
        padding = workload.padding_of(operator)
        valid = np.ones((operator.batch, operator.kv_len), np.bool_)
        if padding is not None:
            valid = np.broadcast_to(padding, valid.shape)
        alive = valid if call.tokens_alive is None else valid & call.tokens_alive
        keys = call.kept_pairs(operator, padding)
        heads = keys > 0
        if call.key_counts is not None:
            rows = int((call.key_counts > 0).sum())
        elif operator.q_len == 1:
            rows = int(heads.sum())
        else:  # of a prompt the queries of tokens that are left
            asking = alive[:, -operator.q_len :].sum(axis=1, keepdims=True)
            rows = int((asking * heads).sum())
        low = 0 if call.lsb_refetch is None else int(call.lsb_refetch.sum())
        found.append(
            CallCounts(
                step=operator.step,
                layer=operator.layer,
                stage=operator.stage,
                tokens=int(valid.sum()),
                tokens_alive=int(alive.sum()),
                heads=operator.batch * operator.heads,
                heads_alive=int(heads.sum()),
                pairs=int(workload.allowed_pairs(operator).sum()),
                keys=int(keys.sum()),
                values=int(call.value_pairs(operator, padding).sum()),
                rows=rows,
                low_rows=low,
            )
        )
    return found


def shares(workload: Workload, selection: Selection) -> dict[str, float]:
    """Of the steps that generate, or of all calls where none does: what is left, as shares.

    `tokens_alive` and `heads_alive` of all, `keys_kept` and `values_read` of all pairs, `low_rows`
    of the rows that read anything.
    """
    calls = call_counts(workload, selection)
    chosen = [one for one in calls if one.stage == "decode"] or calls

    def share(part: str, whole: str) -> float:
        all_of_it = sum(getattr(one, whole) for one in chosen)
        return sum(getattr(one, part) for one in chosen) / all_of_it if all_of_it else 0.0

    return {
        "tokens_alive": share("tokens_alive", "tokens"),
        "heads_alive": share("heads_alive", "heads"),
        "keys_kept": share("keys", "pairs"),
        "values_read": share("values", "pairs"),
        "low_rows": share("low_rows", "rows"),
    }
