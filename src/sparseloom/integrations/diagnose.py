"""How good a choice of pairs was, against the exact choice on the same queries and keys."""

from __future__ import annotations

from typing import Any

from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, Method
from sparseloom.methods.oracle import Oracle
from sparseloom.methods.quality import overlap, retained_mass


def measure(inputs: AttentionInputs, mask: SparseMask, method: Method) -> dict[str, list[float]]:
    """Prediction overlap, retained mass, and the mass the oracle retains, by head.

    The oracle is exact top-k with the method's own sparsity, block size and least number of keys.
    For a method without a sparsity (a threshold, a fixed width) it gets the mask's density.
    """
    who: Any = {"is_causal": inputs.is_causal, "key_padding": inputs.key_padding}
    sparsity, least = getattr(method, "sparsity", None), getattr(method, "minimum_keys", 1)
    if sparsity is None or getattr(method, "threshold", None) is not None:
        sparsity, least = max(0.0, 1.0 - mask.density(**who)), 1
    exact = Oracle(sparsity=sparsity, block_size=mask.block_size, minimum_keys=least).select(inputs)
    mass: Any = {"scale": inputs.scale, "query_padding": inputs.query_padding, **who}
    found = {
        "prediction_overlap": overlap(mask, exact, **who),
        "retained_mass": retained_mass(inputs.query, inputs.key, mask, **mass),
        "oracle_mass": retained_mass(inputs.query, inputs.key, exact, **mass),
    }
    heads = inputs.query.shape[1]
    return {name: by.mean(0).expand(heads).tolist() for name, by in found.items()}
