"""The attention of what is left of a sequence, with the importance of its tokens and heads."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparseloom.integrations.prunable import Heads
from sparseloom.kernels import attention, choose_backend
from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.cascade import Cascade, slots_of


class Measured(NamedTuple):
    """One attention call.

    Attributes:
        out: (batch, heads, tokens, head_dim).
        backend: what computed it.
        keys: (batch, heads, tokens), probabilities summed over real queries; None if not asked.
        heads: (batch, heads), Σ|out| over real queries; None if not asked.
    """

    out: Tensor
    backend: str
    keys: Tensor | None = None
    heads: Tensor | None = None


def attend(inputs: AttentionInputs, dropout: float, *, measure: bool) -> Measured:
    """Run one call.

    Args:
        inputs: the call; queries and keys are the same tokens.
        dropout: probability of the model's attention dropout.
        measure: whether importance is asked for.  It is a constant, and sees no dropout.
    """
    assert inputs.value is not None
    query, key, value, valid = inputs.query, inputs.key, inputs.value, inputs.key_padding
    options: Any = {
        "key_padding": valid,
        "scale": inputs.scale,
        "is_causal": inputs.is_causal,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    learns = torch.is_grad_enabled() and (query.requires_grad or value.requires_grad)
    apart = measure and (learns or dropout > 0)
    out, name = None, "auto"
    if apart or not measure:
        name = choose_backend(query, key, value, dropout_p=dropout, **options)
        out = attention(query, key, value, dropout_p=dropout, backend=name, **options)
        assert isinstance(out, Tensor)
        if not measure:
            return Measured(out, name)
        query, key, value = query.detach(), key.detach(), value.detach()
    if valid is not None:
        # A zero query spreads evenly over the keys it sees: what padding adds is known exactly.
        query = query.masked_fill(~valid[:, None, :, None], 0.0)
    found = attention(query, key, value, return_importance=True, **options)
    assert not isinstance(found, Tensor)
    columns = found.key_importance
    assert columns is not None
    if valid is not None:
        added = _added_by_padding(valid, is_causal=inputs.is_causal)
        columns = (columns - added[:, None]).masked_fill(~valid[:, None], 0.0)
    if out is None:
        name = choose_backend(query, key, value, return_importance=True, **options)
        out = found.out
    rows = out.detach().abs().sum(-1, dtype=torch.float32)  # (B, h, n)
    if valid is not None:
        rows = rows.masked_fill(~valid[:, None], 0.0)
    return Measured(out, name, columns, rows.sum(-1))


def attend_by_head(
    inputs: AttentionInputs, cascade: Cascade, heads: Heads, dropout: float
) -> tuple[Measured, Bool[Tensor, "batch heads tokens"], Bool[Tensor, "batch tokens"]]:
    """One head after the other; after each the tokens are ranked anew, and some leave.

    Scores of tokens and heads are brought up to date.

    Args:
        inputs: the call of all heads.
        cascade: scores and survivors.
        heads: which heads the call has; None = all.
        dropout: as in `attend`.

    Returns:
        The call (zeros where a token had left), the tokens of each of its heads, and who stays.
    """
    assert inputs.value is not None
    batch, count, tokens, head_dim = inputs.query.shape
    group = count // inputs.key.shape[1]
    stays = cascade.valid
    done = torch.zeros(batch, dtype=torch.int64, device=stays.device)
    outs: list[Tensor] = []
    seen: list[Tensor] = []
    name = "auto"
    for place in range(count):
        head = place if heads is None else int(heads[place])
        slots, valid = slots_of(stays)

        def one(tensor: Tensor, at: int, slots: Tensor = slots) -> Tensor:
            rows = slots[:, None, :, None].expand(-1, 1, -1, head_dim)
            return tensor[:, at : at + 1].gather(2, rows)

        found = attend(
            dataclasses.replace(
                inputs,
                query=one(inputs.query, place),
                key=one(inputs.key, place // group),
                value=one(inputs.value, place // group),
                key_padding=None if bool(valid.all()) else valid,
                hidden_states=None,
            ),
            dropout,
            measure=True,
        )
        assert found.keys is not None
        assert found.heads is not None
        name = found.backend
        rows = (found.out[:, 0] * valid[..., None]).to(found.out.dtype)
        places = slots[..., None].expand_as(rows)
        outs.append(rows.new_zeros(batch, tokens, head_dim).scatter_add(1, places, rows))
        keys = found.keys[:, 0] * valid
        keys = keys.new_zeros(batch, tokens).scatter_add(1, slots, keys)
        cascade.gather_head(head, keys, found.heads[:, 0])
        alive = cascade.heads_alive[:, head]
        seen.append(stays & alive[:, None])
        done = done + alive
        stays = cascade.narrow(stays, inputs.layer, done)
    return Measured(torch.stack(outs, 1), name), torch.stack(seen, 1), stays


def _added_by_padding(
    valid: Bool[Tensor, "batch tokens"], *, is_causal: bool
) -> Float[Tensor, "batch tokens"]:
    """What zero queries in the place of padding add to the probabilities of each key."""
    real = valid.sum(1, keepdim=True)
    if not is_causal:
        padding = valid.shape[1] - real
        return (padding / real.clamp(min=1)).expand(valid.shape)
    seen = valid.cumsum(1)
    share = torch.where(valid, 0.0, 1 / seen.clamp(min=1)) * (seen > 0)
    return share.flip(1).cumsum(1).flip(1)
