"""A model whose sequence gets shorter from layer to layer, as a pruning method wants it.

An encoder, or a decoder in a pass without a cache.  Every layer of the model gets a forward of ours
for as long as the model is sparsified.  It runs the attention of the tokens and heads that are
left, asks the method who stays, and runs output projection and feed-forward on those.  A token that
leaves keeps the state in which it entered that layer; after the last layer (before a decoder's
final norm) all states are put back in their places, so that outputs keep their length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from sparseloom.integrations.call import Session
from sparseloom.integrations.counts import LayerCounts
from sparseloom.integrations.decoder_layers import decoder_layers
from sparseloom.integrations.encoder_layers import encoder_layers
from sparseloom.integrations.kept import KeptObserver, kept_of_survivors
from sparseloom.integrations.padding import PaddingReader
from sparseloom.integrations.prunable import Heads, PrunableLayer, Rotary
from sparseloom.integrations.pruned_attention import Measured, attend, attend_by_head
from sparseloom.integrations.pruned_layer import PrunedLayer
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
        rotary: cos and sin of the whole input, in models that have them.
    """

    cascade: Cascade
    length: int
    rotary: Rotary
    stages: list[tuple[Tensor, Tensor, Tensor]]
    seen: list[Survivors]


class Shortening:
    """The layers of one model under one method."""

    def __init__(
        self, model: nn.Module, attentions: list[nn.Module], session: Session, *, is_causal: bool
    ) -> None:
        assert isinstance(session.method, SpAtten)
        self.session, self.method = session, session.method
        layers = decoder_layers if is_causal else encoder_layers
        self.layers = layers(model, attentions)
        self._signatures = [inspect.signature(type(one.module).forward) for one in self.layers]
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

    def _forward(self, index: int, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        layer = self.layers[index]
        given = self._signatures[index].bind(layer.module, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        states = given.get("hidden_states", given.get("x"))  # DistilBERT of 4.x
        mask = given.get("attention_mask", given.get("attn_mask"))
        _refuse(layer.module, given)
        if index == 0:
            self._running = self._begin(states, mask, given.get("position_embeddings"))
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
            run.stages, run.rotary = [], None  # keep no activations alive
        return (states,) if layer.as_tuple else states

    def _begin(self, states: Tensor, mask: Tensor | None, rotary: Rotary) -> Pass:
        batch, length, _ = states.shape
        first = self.layers[0]
        valid = _valid(mask, self.session.read_padding, length, is_causal=first.is_causal)
        if valid is None:
            valid = torch.ones(1, length, dtype=torch.bool, device=states.device)
        cascade = self.method.start(
            len(self.layers), first.heads, valid.expand(batch, -1), is_causal=first.is_causal
        )
        return Pass(cascade, length, rotary, [], [])

    def _layer(self, index: int, layer: PrunableLayer, run: Pass, states: Tensor) -> Tensor:
        cascade = run.cascade
        before = _snapshot(cascade, run.length)
        heads = _agreed(cascade.heads_alive) if layer.slices else None
        prunes = index + 1 < len(self.layers) and cascade.prunes_after(index)
        inputs = _inputs(index, layer, run, layer.enter(states), heads)
        head_tokens = None
        if not prunes:
            call, survivors = attend(inputs, layer.dropout(), measure=False), Survivors(None, None)
        elif self.method.granularity == "head":
            call, head_tokens, stays = attend_by_head(inputs, cascade, heads, layer.dropout())
            survivors = Survivors(stays, cascade.rank(index + 1).heads)
        else:
            call = attend(inputs, layer.dropout(), measure=True)
            assert call.keys is not None
            assert call.heads is not None
            keys = _all_heads(call.keys, heads, layer.heads)
            rows = _all_heads(call.heads, heads, layer.heads)
            survivors = self.method.prune(inputs, keys, rows, cascade)
        out, heads_now = call.out, cascade.heads_alive
        alive = heads_now if heads is None else heads_now[:, heads]
        if not bool(alive.all()):
            out = out.masked_fill(~alive[:, :, None, None], 0.0)
        lengths, places = cascade.valid.sum(1), cascade.positions
        slots = cascade.apply(survivors)
        context = out.transpose(1, 2)  # (B, n, h, D)
        if slots is not None:
            run.stages.append((states, slots, cascade.valid))
            context, states = _take(context, slots), _take(states, slots)
        states = layer.finish(layer.merge(context, heads), states)
        run.seen.append(before)
        self._count(index, inputs, call, run, lengths, heads_now, head_tokens)
        if (observer := self.session.observer) is not None:
            if isinstance(observer, KeptObserver):
                kept = kept_of_survivors(
                    before,
                    measured=prunes,
                    places=places,
                    head_places=heads,
                    head_tokens=None
                    if head_tokens is None
                    else _whole_heads(head_tokens, places, heads, before),
                )
                observer.on_kept(kept)
            observer.on_attention(inputs, None, out)
        return states

    def _count(
        self,
        index: int,
        inputs: AttentionInputs,
        call: Measured,
        run: Pass,
        lengths: Tensor,
        heads: Tensor,
        head_tokens: Tensor | None,
    ) -> None:
        layer, cascade = self.layers[index], run.cascade
        first = run.seen[0].tokens
        assert first is not None
        self.session.counts.setdefault(index, LayerCounts()).add_pruned(
            PrunedLayer(
                width=inputs.hidden_states.shape[-1],  # pyright: ignore[reportOptionalMemberAccess]
                inner=layer.inner,
                matrices=layer.matrices,
                heads=layer.heads,
                kv_heads=layer.kv_heads,
                head_dim=layer.head_dim,
                is_causal=layer.is_causal,
                element_size=inputs.query.element_size(),
                lengths=first.sum(1).tolist(),
                tokens=lengths.tolist(),
                tokens_after=cascade.valid.sum(1).tolist(),
                heads_alive=heads.sum(1).tolist(),
                heads_after=cascade.heads_alive.sum(1).tolist(),
                head_tokens=None if head_tokens is None else head_tokens.sum(2).tolist(),
            ),
            backend=call.backend,
        )


def _inputs(
    index: int, layer: PrunableLayer, run: Pass, entered: Tensor, heads: Heads
) -> AttentionInputs:
    """One layer's attention call, on the tokens and heads that are left."""
    cascade, rotary = run.cascade, run.rotary
    if rotary is not None and run.stages:  # positions are those of the text
        rows = cascade.positions[..., None]
        cos, sin = (
            part.expand(rows.shape[0], -1, -1).gather(1, rows.expand(-1, -1, part.shape[-1]))
            for part in rotary
        )
        rotary = cos, sin
    query, key, value = layer.split(entered, heads, rotary)
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        layer=index,
        is_causal=layer.is_causal,
        scale=layer.scale,
        key_padding=None if bool(cascade.valid.all()) else cascade.valid,
        hidden_states=entered,
        rotary=rotary,
    )


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


def _all_heads(values: Shaped[Tensor, "batch some *rest"], heads: Heads, total: int) -> Tensor:
    """Values of some heads as values of all, 0 for the others."""
    if heads is None:
        return values
    full = values.new_zeros(values.shape[0], total, *values.shape[2:])
    return full.index_copy(1, heads, values)


def _whole_heads(
    head_tokens: Bool[Tensor, "batch some tokens"], places: Tensor, heads: Heads, before: Survivors
) -> Bool[Tensor, "batch heads length"]:
    """The tokens of each head, at their places in the input."""
    assert before.tokens is not None
    assert before.heads is not None
    batch, some, _ = head_tokens.shape
    found = before.tokens[:, None].expand(-1, some, -1) & False
    found = found.scatter(2, places[:, None].expand(batch, some, -1), head_tokens)
    return _all_heads(found, heads, before.heads.shape[1])


def _valid(
    mask: Tensor | None, read: PaddingReader, length: int, *, is_causal: bool
) -> Bool[Tensor, "mask_batch length"] | None:
    """The tokens that are not padding, from a 2-D (DistilBERT of 4.x) or a 4-D mask."""
    if mask is not None and mask.dim() == 2:
        return mask.bool()
    return read(mask, q_len=length, is_causal=is_causal)


def _refuse(module: nn.Module, given: dict[str, Any]) -> None:
    refused = [name for name in _UNSUPPORTED if given.get(name) is not None]
    if refused:
        raise NotImplementedError(
            f"{refused[0]}: where the sequence gets shorter, cascade pruning does not support "
            "cross-attention, caches, or masks over heads"
        )
    if module.training and getattr(module, "gradient_checkpointing", False):
        raise NotImplementedError(
            "gradient_checkpointing: cascade pruning cannot run a layer again by itself; "
            "switch it off with model.gradient_checkpointing_disable()"
        )


def _check_method(method: SpAtten, layers: list[PrunableLayer]) -> None:
    if method.key_bits is not None or method.value_bits is not None:
        raise NotImplementedError(
            "key_bits, value_bits: quantised keys and values are not supported where the sequence "
            "gets shorter"
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
