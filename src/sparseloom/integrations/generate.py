"""One attention call of a model that generates with a method that chooses what steps read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseloom.integrations.counts import LayerCounts
from sparseloom.integrations.generation import GenerationLayer
from sparseloom.integrations.kept import Kept, kept_of_step
from sparseloom.integrations.stored import Stored
from sparseloom.kernels import AttentionOutput, DecodeOutput, attention, decode_attention
from sparseloom.methods.base import AttentionInputs, Pruner
from sparseloom.methods.generation import Reading, Run


def generate_step(
    layer: GenerationLayer,
    inputs: AttentionInputs,
    counts: LayerCounts,
    *,
    backend: str,
    dropout_p: float,
    observed: bool,
) -> tuple[Tensor, Kept | None]:
    """One attention call of a model that generates: a prompt, or a step.

    Args:
        layer: the cache layer, which has taken the new tokens in.
        inputs: the call.
        counts: where it is counted.
        backend: of `sparsify`, one that `decode_attention` knows.
        dropout_p: attention dropout of the prompt.
        observed: whether to tell what the call read.

    Returns:
        The output (batch, heads, q_len, head_dim), and what the call read where that is wanted;
        it has a mask where the call was not dense.

    Raises:
        ValueError: the cache holds tokens that the method has not seen.
    """
    layer.settle()
    run = layer.run
    new, total = inputs.query.shape[2], inputs.key.shape[2]
    if inputs.layer == 0 and run.length != total - new:
        raise ValueError(
            f"past_key_values holds {total - new} tokens of which method "
            f"{layer.shared.method.name!r} has seen {run.length}: start with an empty cache "
            "inside the sparsify block"
        )
    if new > 1 or new == total:
        out, name = _prompt(run, inputs, backend, dropout_p)
        counts.add(inputs, None, backend=name)
        return out, Kept(measured=run.needs_importance) if observed else None
    with torch.no_grad():
        reading = run.read(inputs)
    grouped = inputs.query.shape[1] != inputs.key.shape[1]
    stored = layer.stored
    found = decode_attention(
        inputs.query,
        stored.cache,
        keep=reading.keep,
        value_keep=reading.value_keep,
        progressive=reading.progressive,
        key_padding=inputs.key_padding if reading.keep is None else None,
        scale=inputs.scale,
        enable_gqa=grouped,
        return_importance=run.needs_importance,
        return_stats=True,
        backend=backend,
    )
    assert isinstance(found, DecodeOutput)
    if run.needs_importance:
        assert found.key_importance is not None
        assert found.head_importance is not None
        run.observe(inputs, found.key_importance, found.head_importance)
    _count(counts, inputs, found, reading, stored, backend)
    if not observed:
        return found.out, None
    assert found.stats is not None
    return found.out, kept_of_step(
        reading,
        inputs,
        found.stats,
        stored,
        cascades=isinstance(layer.shared.method, Pruner),
        measured=run.needs_importance,
    )


def _prompt(
    run: Run, inputs: AttentionInputs, backend: str, dropout_p: float
) -> tuple[Tensor, str]:
    """Dense attention of several tokens, with importance where the method asks for it."""
    assert inputs.value is not None
    tensors = (inputs.query, inputs.key, inputs.value)
    options: dict[str, Any] = {
        "is_causal": inputs.is_causal,
        "scale": inputs.scale,
        "enable_gqa": inputs.query.shape[1] != inputs.key.shape[1],
        "key_padding": inputs.key_padding,
    }
    if not run.needs_importance:
        out = attention(*tensors, dropout_p=dropout_p, **options)
        assert isinstance(out, Tensor)
        run.prompt(inputs, None, None)
        return out, "dense"
    found = attention(
        *tensors, dropout_p=dropout_p, return_importance=True, backend=backend, **options
    )
    assert isinstance(found, AttentionOutput)
    assert found.key_importance is not None
    assert found.head_importance is not None
    keys, heads = found.key_importance.detach(), found.head_importance.detach()
    padding = inputs.key_padding
    if padding is not None and not bool(padding[:, -1].all()):
        keys, heads = _without_padded_queries(inputs, padding, options, backend)
    run.prompt(inputs, keys, heads)
    return found.out, "dense"


@torch.no_grad()
def _without_padded_queries(
    inputs: AttentionInputs, padding: Tensor, options: dict[str, Any], backend: str
) -> tuple[Tensor, Tensor]:
    """Importance where padding follows text: its queries see the text, and must not count."""
    assert inputs.value is not None
    batch, heads, new = inputs.query.shape[:3]
    total = inputs.key.shape[2]
    keys = inputs.query.new_zeros((batch, heads, total), dtype=torch.float32)
    outputs = inputs.query.new_zeros((batch, heads), dtype=torch.float32)
    for b, row in enumerate(padding):
        end = int(row.nonzero()[-1]) + 1 if bool(row.any()) else 0
        queries = end - (total - new)
        if queries <= 0:
            continue
        one = slice(b, b + 1)
        found = attention(
            inputs.query[one, :, :queries],
            inputs.key[one, :, :end],
            inputs.value[one, :, :end],
            return_importance=True,
            backend=backend,
            key_padding=row[None, :end],
            is_causal=inputs.is_causal,
            scale=inputs.scale,
            enable_gqa=options["enable_gqa"],
        )
        assert isinstance(found, AttentionOutput)
        assert found.key_importance is not None
        assert found.head_importance is not None
        keys[b, :, :end] = found.key_importance[0]
        outputs[b] = found.head_importance[0]
    return keys, outputs


def _count(
    counts: LayerCounts,
    inputs: AttentionInputs,
    found: DecodeOutput,
    reading: Reading,
    stored: Stored,
    backend: str,
) -> None:
    assert found.stats is not None
    whole = 8 * inputs.query.element_size()
    counts.add_step(
        inputs,
        found.stats,
        key_bits=stored.key_bits or (whole, 0),
        value_bits=stored.value_bits or whole,
        progressive=reading.progressive is not None,
        lists=reading.keep,
        backend=f"decode {backend}" if backend != "auto" else "decode",
        index_bytes=reading.index_bytes,
        prediction_macs=reading.prediction_macs,
    )
