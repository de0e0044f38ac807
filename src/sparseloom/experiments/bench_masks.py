"""Masks to time kernels on: drawn at random, chosen in the built-in model, or out of a trace."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Method

_CHUNK = 1 << 22  # numbers drawn at once


def random_mask(
    q_len: int,
    kv_len: int,
    *,
    heads: int,
    block_size: tuple[int, int],
    sparsity: float,
    is_causal: bool,
    seed: int,
    device: torch.device | str = "cpu",
) -> SparseMask:
    """Each query block keeps ⌈(1 − sparsity)·allowed⌉ random key blocks and always its last.

    It is drawn where it is to lie; what is drawn depends on the kind of device.
    """
    bq, bk = block_size
    rows, columns = -(-q_len // bq), -(-kv_len // bk)
    allowed = torch.full((rows,), columns, device=device)
    if is_causal:
        last = ((torch.arange(rows, device=device) + 1) * bq).clamp(max=q_len) - 1 + kv_len - q_len
        allowed = last // bk + 1
    counts = ((1 - sparsity) * allowed.double() - 1e-6).ceil().long().clamp(min=1)
    counts, allowed = counts.repeat(heads), allowed.repeat(heads)
    generator = torch.Generator(device).manual_seed(seed)
    step = max(1, _CHUNK // int(counts.max()))
    kept = [
        _draw(counts[i : i + step], allowed[i : i + step], generator)
        for i in range(0, len(counts), step)
    ]
    ends = counts.cumsum(0).view(1, heads, rows)
    offsets = torch.cat([ends[..., :1] - counts.view(1, heads, rows)[..., :1], ends], dim=-1)
    indices = torch.cat(kept).to(torch.int32)
    return SparseMask(indices, offsets, block_size=block_size, q_len=q_len, kv_len=kv_len)


def _draw(
    counts: Int64[Tensor, " rows"], allowed: Int64[Tensor, " rows"], generator: torch.Generator
) -> Int64[Tensor, " kept"]:
    """`counts` ascending places below `allowed` for each row, the last of them allowed - 1.

    Sorted random numbers, stretched over the places that are free and moved apart by one each.
    """
    free, device = int(counts.max()) - 1, counts.device
    place = torch.arange(free, device=device)
    used = place < counts[:, None] - 1
    drawn = torch.rand(len(counts), free, generator=generator, dtype=torch.float64, device=device)
    drawn = drawn.masked_fill(~used, 2.0).sort(-1).values
    room = (allowed - counts + 1)[:, None]
    chosen = (drawn * room).long().minimum(room - 1) + place
    last = (allowed - 1)[:, None]
    chosen = torch.cat([torch.where(used, chosen, last), last], -1)
    # Unused places repeat the last one: keep one of it.
    return chosen[torch.cat([used, torch.ones_like(last, dtype=torch.bool)], -1)]


def model_mask(
    length: int, *, heads: int, block_size: tuple[int, int], sparsity: float
) -> SparseMask:
    """What dynamic sparse attention keeps in the built-in model on its own text: `heads` heads,
    taken layer by layer; causal.

    Raises:
        ValueError: more tokens than the model's context, or more heads than it has.
    """
    from sparseloom.methods import DynamicSparse

    calls, method = _model_calls()
    assert isinstance(method, DynamicSparse)
    chosen = dataclasses.replace(method, block_size=block_size, sparsity=sparsity)
    context = calls[0].query.shape[2]
    known = sum(inputs.query.shape[1] for inputs in calls)
    if length > context:
        raise ValueError(f"--mask model has masks of at most {context} tokens, got {length}")
    if heads > known:
        raise ValueError(f"--mask model has {known} heads in all layers, got {heads}")
    masks: list[SparseMask] = []
    with torch.no_grad():
        for inputs in calls:
            if sum(mask.heads for mask in masks) < heads:
                masks.append(chosen.select(_first_tokens(inputs, length)))
    return _stack(masks, heads)


def trace_masks(folder: Path) -> dict[str, tuple[SparseMask, bool]]:
    """Of each selection in a trace, the mask of its middle attention call and its causality.

    Raises:
        ValueError: no selection holds masks, or the folder is no trace.
    """
    from sparseloom.trace import Trace

    found: dict[str, tuple[SparseMask, bool]] = {}
    for name, selection in Trace.load(folder).selections.items():
        masks = [call.mask for call in selection.calls if call.mask is not None]
        if not masks:
            continue
        mask = masks[len(masks) // 2]
        found[name] = (
            SparseMask(
                torch.from_numpy(mask.indices),
                torch.from_numpy(mask.offsets),
                block_size=mask.block_size,
                q_len=mask.q_len,
                kv_len=mask.kv_len,
            )[0],
            mask.is_causal,
        )
    if not found:
        raise ValueError(f"trace {folder} holds no masks: record a method that selects")
    return found


@functools.cache
def _model_calls() -> tuple[list[AttentionInputs], Method]:
    """The attention of every layer in one pass over the model's whole context."""
    from sparseloom.experiments.compare import capture, saved_method
    from sparseloom.models import load_model
    from sparseloom.tasks import get_task

    loaded = load_model("stdlib")
    task = get_task("stdlib")
    task.load(None)
    method = saved_method(loaded)
    assert method is not None
    return capture(loaded, next(iter(task.inputs(loaded, limit=1)))), method


def _first_tokens(inputs: AttentionInputs, length: int) -> AttentionInputs:
    hidden, rotary = inputs.hidden_states, inputs.rotary
    return dataclasses.replace(
        inputs,
        query=inputs.query[:, :, :length],
        key=inputs.key[:, :, :length],
        value=None,
        key_padding=None,
        hidden_states=None if hidden is None else hidden[:, :length],
        rotary=None if rotary is None else (rotary[0][:, :length], rotary[1][:, :length]),
    )


def _stack(masks: list[SparseMask], heads: int) -> SparseMask:
    """The heads of several masks as one mask, the first `heads` of them."""
    offsets, indices, before = [], [], 0
    for mask in masks:
        offsets.append(mask.offsets + before)
        indices.append(mask.indices)
        before += mask.nnz
    first = masks[0]
    whole = SparseMask(
        torch.cat(indices),
        torch.cat(offsets, dim=1),
        block_size=first.block_size,
        q_len=first.q_len,
        kv_len=first.kv_len,
    )
    return whole[:, :heads]
