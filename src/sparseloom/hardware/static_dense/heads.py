"""The runs of every head of a call: from its regions, from its mask, or of the dense loop."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.static_dense.runs import (
    HeadRuns,
    allowed_tiles,
    kept_tiles,
    runs_of_tiles,
)
from sparseloom.hardware.static_dense.sequencer import sequence
from sparseloom.regions import TILE_KEYS, TILE_QUERIES, decode_heads
from sparseloom.trace import AttentionCall, Operator, Workload


def valid_keys(workload: Workload, operator: Operator, sequence: int) -> int:
    """One past the last key of a sequence that padding allows."""
    padding = workload.padding_of(operator)
    if padding is None:
        return operator.kv_len
    found = np.flatnonzero(padding[min(sequence, len(padding) - 1)])
    return int(found[-1]) + 1 if found.size else 0


def call_heads(
    operator: Operator, call: AttentionCall, sequence: int, n_valid: int, *, follow: bool = True
) -> list[HeadRuns]:
    """Runs of the query heads that are alive, in order; equal heads share one object.

    Args:
        operator, call: what ran, and what a method kept of it.
        sequence: which one of the batch.
        n_valid: its keys before the padding.
        follow: False where the machine has no sequencer, and works on everything.

    Raises:
        MachineError: kept keys are counted and not named, or the mask keeps what no region owns.
    """
    alive = np.ones(operator.heads, np.bool_) if call.heads_alive is None else call.heads_alive
    if follow and call.key_counts is not None:
        raise MachineError(
            "a selection must name the kept keys for a machine of static regions, got their number "
            "alone (trace.kept_keys.with_keys draws some)"
        )
    allowed = allowed_tiles(operator.q_len, operator.kv_len, n_valid, is_causal=operator.is_causal)
    if not follow or (call.regions is None and call.mask is None and call.tokens_alive is None):
        return [runs_of_tiles(allowed, 0)] * int(alive.sum())
    if call.regions is not None:
        heads = _of_regions(operator, call, sequence, n_valid, allowed)
    elif call.mask is not None:
        heads = [
            _listed(kept_tiles(call.mask, sequence, h) & allowed) for h in range(call.mask.heads)
        ]
    else:
        heads = [_listed(_alive_tiles(operator, call, sequence) & allowed)]
    # Query head h reads head h · (heads told apart) // heads.
    return [heads[h * len(heads) // operator.heads] for h in np.flatnonzero(alive)]


def _listed(keep: Bool[np.ndarray, "query_tiles key_tiles"]) -> HeadRuns:
    """Runs of a mask without regions: read as a list of words, one for every run."""
    found = runs_of_tiles(keep, 1)
    most = int(np.bincount(found.query_tile, minlength=1).max(initial=1))
    return runs_of_tiles(keep, max(1, most))


def _of_regions(
    operator: Operator,
    call: AttentionCall,
    at: int,
    n_valid: int,
    allowed: Bool[np.ndarray, "query_tiles key_tiles"],
) -> list[HeadRuns]:
    """The sequencer's runs of every head of the regions, none of which the mask may exceed."""
    assert call.regions is not None
    words = decode_heads(call.regions)
    found = [sequence(regions, operator.q_len, operator.kv_len, n_valid) for regions in words]
    for h in range(0 if call.mask is None else call.mask.heads):
        assert call.mask is not None
        first, last = (n * len(found) // call.mask.heads for n in (h, h + 1))
        kept = kept_tiles(call.mask, at, h) & allowed
        for place in range(first, max(last, first + 1)):
            outside = np.argwhere(kept & (found[place].map() < 0))
            if outside.size:
                t, u = outside[0].tolist()
                raise MachineError(
                    f"the mask of head {h} must lie within its regions, but keeps query tile {t}, "
                    f"key tile {u}"
                )
    return found


def _alive_tiles(
    operator: Operator, call: AttentionCall, sequence: int
) -> Bool[np.ndarray, "query_tiles key_tiles"]:
    """Columns of tiles that hold a token which is alive."""
    assert call.tokens_alive is not None
    alive = np.pad(call.tokens_alive[sequence], (0, -operator.kv_len % TILE_KEYS))
    columns = alive.reshape(-1, TILE_KEYS).any(axis=1)
    return np.broadcast_to(columns, (-(-operator.q_len // TILE_QUERIES), columns.size))
