"""Where tokens are ranked, from what cascade pruning left at each call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from sparseloom.trace.schema import AttentionCall, Operator, Workload


def with_ranking(
    workload: Workload, calls: Sequence[AttentionCall], *, rescales: bool = False
) -> tuple[AttentionCall, ...]:
    """The calls with `token_keep` where the next one has fewer tokens than it could have.

    Inside a step tokens only ever leave, and the next step begins with all of them again: at its
    end the whole context is ranked (as in the traces of SpAtten's authors).

    Args:
        workload: what ran.
        calls: one per attention operator; `tokens_alive` says who is left, None = all.
        rescales: the last call of every step but the last rescales earlier importance.
    """
    operators = workload.attention()
    found = list(calls)
    pairs = enumerate(pairwise(zip(operators, calls, strict=True)))
    for i, ((operator, call), (after, following)) in pairs:
        wanted = _alive(workload, after, following.tokens_alive)
        same_step = after.step == operator.step
        before = (operator, call.tokens_alive) if same_step else (after, None)
        now = _alive(workload, *before)
        if wanted < now:
            found[i] = replace(found[i], token_keep=wanted)
        if rescales and not same_step:
            found[i] = replace(found[i], rescales_importance=True)
    return tuple(found)


def _alive(workload: Workload, operator: Operator, alive: np.ndarray | None) -> int:
    """Tokens of the longest sequence."""
    tokens = workload.padding_of(operator) if alive is None else alive
    return operator.kv_len if tokens is None else int(tokens.sum(axis=1).max())
