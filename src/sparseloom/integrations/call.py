"""One attention call of a sparsified model, from what transformers passes to the output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sparseloom.integrations import _compat
from sparseloom.integrations.cache import SparseLayer, layer_of
from sparseloom.integrations.counts import LayerCounts
from sparseloom.integrations.diagnose import measure
from sparseloom.integrations.generate import generate_step
from sparseloom.integrations.generation import GenerationLayer, generation_layer
from sparseloom.integrations.kept import KeptObserver
from sparseloom.integrations.padding import PaddingReader
from sparseloom.kernels import attention, choose_backend
from sparseloom.mask import SparseMask
from sparseloom.methods import costs
from sparseloom.methods.attender import in_recomputation
from sparseloom.methods.base import Attender, AttentionInputs, Method, Selector
from sparseloom.methods.generation import Generating

# Arguments of other attention functions that change the result; None and False are harmless.
_UNSUPPORTED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias on the scores",
    "head_mask": "a mask over heads",
    "block_indices": "the model's own sparse attention",
    "indices": "the model's own sparse attention",
    "cu_seq_lens_q": "sequences packed into one row",
    "cache": "a paged cache",
    "output_attentions": "returning attention matrices",
}


WHEN = ("auto", "always")
"""When a method selects: where the cost rule says so, or wherever it leaves anything out."""


@runtime_checkable
class Observer(Protocol):
    """Sees every attention call of a sparsified model."""

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        """`output` is (batch, heads, q_len, head_dim); `mask` is None where the call ran dense.

        Gradient checkpointing calls it again during the backward pass: key what is kept by
        `inputs.layer`, or leave out calls for which `in_recomputation()` holds.
        """
        ...


@dataclass(eq=False)
class Session:
    """What the attention calls of one sparsified model share."""

    method: Method
    backend: str
    observer: Observer | None
    diagnose: bool
    when: str = "auto"
    layers: int = 0
    counts: dict[int, LayerCounts] = field(default_factory=dict)
    read_padding: PaddingReader = field(default_factory=PaddingReader)


@dataclass(eq=False)
class Site:
    """What is known of one attention module while its model is sparsified."""

    session: Session
    layer: int
    hidden_states: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    cache: SparseLayer | None = None


SITES: WeakKeyDictionary[nn.Module, Site] = WeakKeyDictionary()


def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: keeps what its attention function does not get."""
    site = SITES.get(module)
    if site is None:  # a copy of a sparsified model
        return
    if kwargs.get("encoder_hidden_states") is not None:
        raise NotImplementedError("encoder_hidden_states: cross-attention is not supported")
    site.hidden_states = kwargs.get("hidden_states", args[0] if args else None)
    rotary = kwargs.get("position_embeddings")
    site.rotary = rotary if isinstance(rotary, tuple) and len(rotary) == 2 else None
    caches = (value for value in (*args, *kwargs.values()) if isinstance(value, Cache))
    cache = next(caches, None)
    index = getattr(module, "layer_idx", site.layer)
    if cache is None:
        site.cache = None
    elif isinstance(site.session.method, Generating):
        session = site.session
        site.cache = generation_layer(cache, index, session.method, session.layers, site.layer)
        site.cache.reads_planes = session.observer is None
    else:
        site.cache = layer_of(cache, index)


def attention_function(
    module: nn.Module,
    query: Float[Tensor, "batch heads q_len head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len value_dim"],
    attention_mask: Shaped[Tensor, "..."] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch q_len heads value_dim"], None]:
    """The attention function registered with transformers.

    Runs the method of the model that the module belongs to.  A module of no sparsified model
    (another model with the same configuration object) runs dense.

    Raises:
        NotImplementedError: an argument asks for something that would be left out.
    """
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(f"{name}: sparse attention does not support {what}")
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window:
        raise NotImplementedError(
            f"sliding_window: the model's own window of {window} tokens is shorter than the "
            f"{key.shape[2]} tokens seen, and a window inside the model is not supported"
        )
    causal = _compat.is_causal(module, kwargs.get("is_causal"))
    scale = _compat.scale_of(module, query.shape[-1], scaling)
    site = SITES.get(module)
    read = PaddingReader() if site is None else site.session.read_padding
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    valid = read(attention_mask, q_len=q_len, is_causal=causal)
    if site is not None and site.cache is not None:
        valid = site.cache.remember(valid, batch=batch, new=q_len, total=kv_len)
    if valid is not None:
        if valid.shape[1] != kv_len:
            raise ValueError(
                f"attention_mask covers {valid.shape[1]} tokens, but there are {kv_len} keys"
            )
        valid = valid.expand(batch, -1)
    past = None
    if site is not None and site.cache is not None:
        past = site.cache.claim(site.session.method, site.layer, new=q_len, total=kv_len)
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        layer=0 if site is None else site.layer,
        is_causal=causal,
        key_padding=valid,
        scale=scale,
        hidden_states=None if site is None else site.hidden_states,
        rotary=None if site is None else site.rotary,
        past=past,
    )
    if site is None:
        out, _ = _compute(inputs, None, dropout, "auto")
    elif isinstance(layer := site.cache, GenerationLayer):
        session = site.session
        site.hidden_states = site.rotary = site.cache = None
        out, kept = generate_step(
            layer,
            inputs,
            session.counts.setdefault(inputs.layer, LayerCounts()),
            backend=session.backend,
            dropout_p=dropout,
            observed=session.observer is not None,
        )
        if session.observer is not None and kept is not None:
            if isinstance(session.observer, KeptObserver):
                session.observer.on_kept(kept)
            session.observer.on_attention(inputs, kept.mask, out)
    else:
        site.hidden_states = site.rotary = site.cache = None  # keep no activations alive
        out = _run(site.session, inputs, dropout)
    return out.transpose(1, 2).contiguous(), None


def _run(session: Session, inputs: AttentionInputs, dropout: float) -> Tensor:
    """Choose, compute, count and show one attention call."""
    method, mask, prediction_macs = session.method, None, 0
    if isinstance(method, Selector):
        selects = _selects(session, method, inputs)
        with torch.no_grad():  # a mask is a constant of the model's loss
            if selects:
                mask = method.select(inputs)
                prediction_macs = method.prediction_macs(inputs.shape)
            else:
                method.remember(inputs)
    backend = "auto" if mask is None else session.backend
    macs = None
    if isinstance(method, Attender) and method.replaces(inputs):
        out, name = method.attend(inputs, dropout_p=dropout), method.name
        macs = method.call_macs(inputs)
    else:
        out, name = _compute(inputs, mask, dropout, backend)
    if not in_recomputation():
        quality = None
        if session.diagnose and mask is not None:
            quality = measure(inputs, mask, method)
        session.counts.setdefault(inputs.layer, LayerCounts()).add(
            inputs,
            mask,
            backend=name,
            prediction_macs=prediction_macs,
            replaced_macs=macs,
            quality=quality,
        )
    if session.observer is not None:
        session.observer.on_attention(inputs, mask, out)
    return out


def _selects(session: Session, method: Selector, inputs: AttentionInputs) -> bool:
    if not method.worthwhile(inputs.query.shape[2], inputs.key.shape[2]):
        return False
    free = session.when == "auto" and session.backend == "auto" and not session.diagnose
    return not free or costs.pays(method, inputs)


def _compute(
    inputs: AttentionInputs, mask: SparseMask | None, dropout: float, backend: str
) -> tuple[Tensor, str]:
    """The attention output (B, H, L, Dv) and the backend that made it."""
    assert inputs.value is not None
    tensors = (inputs.query, inputs.key, inputs.value, mask)
    options: Any = {
        "is_causal": inputs.is_causal,
        "key_padding": inputs.key_padding,
        "scale": inputs.scale,
        "dropout_p": dropout,
        "enable_gqa": inputs.query.shape[1] != inputs.key.shape[1],
    }
    if backend == "auto":
        backend = choose_backend(*tensors, **options)
    return cast("Tensor", attention(*tensors, **options, backend=backend)), backend
