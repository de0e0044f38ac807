"""An encoder whose sequence gets shorter from layer to layer, as a pruning method wants it.

Every layer of the model gets a forward of ours for as long as the model is sparsified.  It runs
the attention of the tokens and heads that are left, asks the method who stays, and runs output
projection and feed-forward on those.  A token that leaves keeps the state in which it entered that
layer; after the last layer all states are put back in their places, so that outputs keep their
length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sparseloom.integrations.call import Session
from sparseloom.integrations.encoder_layers import EncoderLayer, Heads, encoder_layers
from sparseloom.integrations.kept import KeptObserver, kept_of_survivors
from sparseloom.integrations.padding import PaddingReader
from sparseloom.integrations.stats import LayerCounts, PrunedLayer
from sparseloom.kernels import attention, choose_backend
from sparseloom.methods.base import AttentionInputs, Survivors
from sparseloom.methods.cascade import Cascade
from sparseloom.methods.spatten import SpAtten

_UNSUPPORTED = ("encoder_hidden_states", "past_key_values", "past_key_value", "head_mask")


@dataclass
class Pass:
    """One forward pass: who is left, and what is needed to put the others back.

    Attributes:
        cascade: scores and survivors.
        length: of the input.
        stages: of each shortening, the states before it, the slots that stayed, and which of
            these count.
        seen: of each layer so far, the tokens and heads of its attention.
    """

    cascade: Cascade
    length: int
    stages: list[tuple[Tensor, Tensor, Tensor]]
    seen: list[Survivors]


class Shortening:
    """The layers of one encoder under one method."""

    def __init__(self, model: nn.Module, attentions: list[nn.Module], session: Session) -> None:
        assert isinstance(session.method, SpAtten)
        self.session, self.method = session, session.method
        self.layers = encoder_layers(model, attentions)
        self.last_pass: Pass | None = None
        self._running: Pass | None = None
        _check_method(self.method, self.layers)

    def attach(self, index: int) -> Callable[[], None]:
        """Give one layer our forward; returns what takes it back."""
        module = self.layers[index].module
        own = vars(module)
        before = own.get("forward")

        @torch.compiler.disable
        def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            return self._forward(index, *args, **kwargs)

        own["forward"] = MethodType(forward, module)

        def take_back() -> None:
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before

        return take_back

    def _forward(
        self,
        index: int,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor]:
        layer = self.layers[index]
        states = kwargs.get("x") if hidden_states is None else hidden_states  # DistilBERT of 4.x
        assert states is not None
        mask = kwargs.get("attn_mask") if attention_mask is None else attention_mask
        _refuse(layer.module, args, kwargs)
        if index == 0:
            self._running = self._begin(states, mask)
        run = self._running
        if run is None or run.cascade.valid.shape[1] != states.shape[1]:
            raise RuntimeError(
                f"layer {index} must follow the layers before it in one forward pass: the method "
                f"{self.method.name} prunes over all of them"
            )
        states = self._layer(index, layer, run, states)
        if index == len(self.layers) - 1:
            states = _put_back(states, run.stages)
            self.last_pass, self._running = run, None
            run.stages = []  # keep no activations alive
        return (states,) if layer.as_tuple else states

    def _begin(self, states: Tensor, mask: Tensor | None) -> Pass:
        batch, length, _ = states.shape
        valid = _valid(mask, self.session.read_padding, length)
        if valid is None:
            valid = torch.ones(1, length, dtype=torch.bool, device=states.device)
        cascade = self.method.start(
            len(self.layers), self.layers[0].heads, valid.expand(batch, -1), is_causal=False
        )
        return Pass(cascade, length, [], [])

    def _layer(self, index: int, layer: EncoderLayer, run: Pass, states: Tensor) -> Tensor:
        cascade = run.cascade
        before = _snapshot(cascade, run.length)
        heads = _agreed(cascade.heads_alive)
        prunes = index + 1 < len(self.layers) and cascade.prunes_after(index)
        inputs, out, importance, backend = self._attention(
            index, layer, cascade, states, heads, measure=prunes
        )
        survivors = Survivors(None, None)
        if importance is not None:
            survivors = self.method.prune(inputs, *importance, cascade)
        heads_now = cascade.heads_alive
        lengths, places = cascade.valid.sum(1), cascade.positions
        slots = cascade.apply(survivors)
        context = out.transpose(1, 2)  # (B, n, h, D)
        if slots is not None:
            run.stages.append((states, slots, cascade.valid))
            context, states = _take(context, slots), _take(states, slots)
        states = layer.feed_forward(layer.join(layer.merge(context, heads), states))
        run.seen.append(before)
        self._count(index, inputs, backend, run, lengths, heads_now)
        if (observer := self.session.observer) is not None:
            if isinstance(observer, KeptObserver):
                kept = kept_of_survivors(before, measured=prunes, places=places, head_places=heads)
                observer.on_kept(kept)
            observer.on_attention(inputs, None, out)
        return states

    def _attention(
        self,
        index: int,
        layer: EncoderLayer,
        cascade: Cascade,
        states: Tensor,
        heads: Heads,
        *,
        measure: bool,
    ) -> tuple[AttentionInputs, Tensor, tuple[Tensor, Tensor] | None, str]:
        """One layer's attention, and the importance of its tokens and heads where it is asked."""
        query, key, value = layer.split(states, heads)
        padded = not bool(cascade.valid.all())
        alive = cascade.heads_alive if heads is None else cascade.heads_alive[:, heads]
        valid = cascade.valid if padded else None
        inputs = AttentionInputs(
            query=query,
            key=key,
            value=value,
            layer=index,
            is_causal=False,
            scale=layer.head_dim**-0.5,
            key_padding=valid,
            hidden_states=states,
        )
        dropout = _probability(layer.dropout)
        out, columns, backend = _compute(inputs, dropout, measure=measure)
        importance = None
        if columns is not None:
            rows = out.detach().abs().sum(-1, dtype=torch.float32)  # (B, h, n)
            if valid is not None:
                rows = rows.masked_fill(~valid[:, None], 0.0)
            importance = (
                _all_heads(columns, heads, layer.heads),
                _all_heads(rows.sum(-1), heads, layer.heads),
            )
        if not bool(alive.all()):
            out = out.masked_fill(~alive[:, :, None, None], 0.0)
        return inputs, out, importance, backend

    def _count(
        self,
        index: int,
        inputs: AttentionInputs,
        backend: str,
        run: Pass,
        lengths: Tensor,
        heads: Tensor,
    ) -> None:
        layer, cascade = self.layers[index], run.cascade
        first = run.seen[0].tokens
        assert first is not None
        self.session.counts.setdefault(index, LayerCounts()).add_pruned(
            PrunedLayer(
                width=inputs.hidden_states.shape[-1],  # pyright: ignore[reportOptionalMemberAccess]
                inner=layer.inner,
                heads=layer.heads,
                head_dim=layer.head_dim,
                element_size=inputs.query.element_size(),
                lengths=first.sum(1).tolist(),
                tokens=lengths.tolist(),
                tokens_after=cascade.valid.sum(1).tolist(),
                heads_alive=heads.sum(1).tolist(),
                heads_after=cascade.heads_alive.sum(1).tolist(),
            ),
            backend=backend,
        )


def _compute(
    inputs: AttentionInputs, dropout: float, *, measure: bool
) -> tuple[Tensor, Tensor | None, str]:
    """The attention output, if asked the column sums over real queries, and the backend."""
    assert inputs.value is not None
    query, key, value, valid = inputs.query, inputs.key, inputs.value, inputs.key_padding
    options: Any = {"key_padding": valid, "scale": inputs.scale}
    learns = torch.is_grad_enabled() and (query.requires_grad or value.requires_grad)
    apart = measure and (learns or dropout > 0)  # ranking is a constant, and sees no dropout
    out, name = None, "auto"
    if apart or not measure:
        name = choose_backend(query, key, value, dropout_p=dropout, **options)
        out = attention(query, key, value, dropout_p=dropout, backend=name, **options)
        assert isinstance(out, Tensor)
        if not measure:
            return out, None, name
        query, key, value = query.detach(), key.detach(), value.detach()
    if valid is not None:
        # A zero query spreads evenly over the keys: what padding adds to each is known exactly.
        query = query.masked_fill(~valid[:, None, :, None], 0.0)
    found = attention(query, key, value, return_importance=True, **options)
    assert not isinstance(found, Tensor)
    columns = found.key_importance
    assert columns is not None
    if valid is not None:
        real = valid.sum(1)
        added = (valid.shape[1] - real) / real.clamp(min=1)
        columns = (columns - added[:, None, None]).masked_fill(~valid[:, None], 0.0)
    if out is None:
        name = choose_backend(query, key, value, return_importance=True, **options)
        out = found.out
    return out, columns, name


def _put_back(
    states: Float[Tensor, "batch kept width"], stages: list[tuple[Tensor, Tensor, Tensor]]
) -> Float[Tensor, "batch length width"]:
    """All tokens in their places: those that left with the state that they had."""
    for earlier, slots, counts in reversed(stages):
        if not bool(counts.all()):  # left-over slots must not overwrite anything
            states = torch.where(counts[..., None], states, _take(earlier, slots))
        places = slots[..., None].expand(-1, -1, earlier.shape[-1])
        states = earlier.scatter(1, places, states.to(earlier.dtype))
    return states


def _take(
    states: Float[Tensor, "batch tokens *rest"], slots: Int64[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept *rest"]:
    """The rows in these slots; whole rows are copied, which is faster than a gather."""
    batch, tokens = states.shape[:2]
    flat = slots + tokens * torch.arange(batch, device=slots.device)[:, None]
    rows = states.reshape(batch * tokens, *states.shape[2:]).index_select(0, flat.flatten())
    return rows.unflatten(0, (batch, slots.shape[1]))


def _snapshot(cascade: Cascade, length: int) -> Survivors:
    batch = cascade.valid.shape[0]
    tokens = torch.zeros(batch, length, dtype=torch.bool, device=cascade.valid.device)
    tokens = tokens.scatter(1, cascade.positions, cascade.valid)
    return Survivors(tokens, cascade.heads_alive)


def _agreed(alive: Bool[Tensor, "batch heads"]) -> Heads:
    """The heads that any sequence still has; None where these are all."""
    some = alive.any(0)
    return None if bool(some.all()) else some.nonzero().flatten()


def _all_heads(values: Float[Tensor, "batch some *rest"], heads: Heads, total: int) -> Tensor:
    """Values of some heads as values of all, 0 for the others."""
    if heads is None:
        return values
    full = values.new_zeros(values.shape[0], total, *values.shape[2:])
    return full.index_copy(1, heads, values)


def _probability(dropout: Any) -> float:
    return float(dropout.p) if dropout.training else 0.0


def _valid(
    mask: Tensor | None, read: PaddingReader, length: int
) -> Bool[Tensor, "mask_batch length"] | None:
    """The tokens that are not padding, from a 2-D (DistilBERT of 4.x) or a 4-D mask."""
    if mask is not None and mask.dim() == 2:
        return mask.bool()
    return read(mask, q_len=length, is_causal=False)


def _refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if given or any(value is not None and value is not False for value in args):
        raise NotImplementedError(
            f"{given[0] if given else 'head_mask'}: cascade pruning does not support "
            "cross-attention, caches in encoders, or masks over heads"
        )
    if module.training and getattr(module, "gradient_checkpointing", False):
        raise NotImplementedError(
            "gradient_checkpointing: cascade pruning cannot run a layer again by itself; "
            "switch it off with model.gradient_checkpointing_disable()"
        )


def _check_method(method: SpAtten, layers: list[EncoderLayer]) -> None:
    if method.key_bits is not None or method.value_bits is not None:
        raise NotImplementedError(
            "key_bits, value_bits: quantised keys and values are not supported in encoders"
        )
    if method.granularity != "layer":
        raise NotImplementedError(
            f"granularity {method.granularity!r} is not supported in encoders, use 'layer'"
        )
    count = len(layers)
    first = {"front": method.kept_tokens(count, 1 << 20)[0] < 1 << 20,
             "head_front": method.kept_heads(count, 1 << 20)[0] < 1 << 20}  # fmt: skip
    for name, prunes in first.items():
        if prunes:
            raise ValueError(
                f"{name} (or the list of shares) must leave the first layer whole: nothing is "
                "known of importance before it"
            )
