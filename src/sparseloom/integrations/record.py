"""`record`: run a model once and write down every operator and every kept pair."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseloom.integrations.describe import attention_modules, chooses_in_cache, describe
from sparseloom.integrations.huggingface import sparsify
from sparseloom.integrations.kept import Kept, whole
from sparseloom.mask import SparseMask
from sparseloom.methods import Dense, SpAtten, StaticSparse, selection_name
from sparseloom.methods.base import AttentionInputs, Method, Pruner
from sparseloom.models.modes import in_mode
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    Operator,
    PredictorShape,
    Selection,
    Trace,
    Workload,
)
from sparseloom.trace.ranking import with_ranking
from sparseloom.trace.schema import Role

_ACTIVATION = re.compile(r"GELU|SiLU|ReLU|Activation|Tanh|Sigmoid|Mish")


@torch.no_grad()
def record(
    model: nn.Module,
    method: Method,
    inputs: Mapping[str, Any],
    *,
    name: str | None = None,
    tensors: bool = False,
    new_tokens: int = 0,
) -> Trace:
    """Run a model with a method and record the workload and what the method kept.

    The workload lists what ran, in order: the matrix products with their role (queries, keys and
    values; attention output; feed-forward; vocabulary head), the attention of each layer, norms
    and activations, by step.  The selection is named after the method.  Selections of several
    methods on the same inputs share a workload:
    `Trace(a.workload, {**a.selections, **b.selections})`.

    Of a method that prunes, a call says which tokens and heads were left, which keys a step of
    generation read and how many of their values, at which widths, and which rows fetched the low
    bits.  Where the sequence itself gets shorter, the workload is that of the whole sequence,
    from a pass of its own, and what was pruned is in the selection.

    Args:
        model: a model that `sparsify` supports; runs in evaluation mode without gradients.
        method: what chooses the pairs.
        inputs: keyword arguments of the model's forward, as a tokenizer gives them.
        name: what to call the workload; default: the model's family and the input length.
        tensors: also keep query, key and value of every call in fp32, as `calls.3.query`; keys
            and values are those of the whole cache, and 0 where a token or head was pruned.
        new_tokens: tokens to generate greedily after the prompt, one decode step each.

    Raises:
        NotImplementedError, TypeError: as `sparsify`.
        ValueError: `new_tokens` is negative, or the model cannot generate, or the method shortens
            its sequence.
    """
    if new_tokens < 0:
        raise ValueError(f"new_tokens must be 0 or more, got {new_tokens}")
    if new_tokens and not getattr(model, "can_generate", bool)():
        raise ValueError(f"new_tokens must be 0: {type(model).__name__} cannot generate")
    shape = describe(model)
    generates = chooses_in_cache(method, shape)
    whole_run = None
    if isinstance(method, Pruner) and not generates:  # whose sequence gets shorter
        if new_tokens:
            raise ValueError(
                f"new_tokens must be 0: {method} shortens the sequence, and every token would be a "
                "pass of its own"
            )
        whole_run = record(model, Dense(), inputs, name=name).workload
    recorder = _Recorder(model, method, tensors)
    outputs = None
    running = sparsify(model, method, when="always", observer=recorder)
    with in_mode(model, training=False), recorder, running:
        if new_tokens:
            length = {"max_new_tokens": new_tokens + 1, "min_new_tokens": new_tokens + 1}
            model.generate(**inputs, **length, do_sample=False, num_beams=1)  # pyright: ignore[reportCallIssue]
        else:
            outputs = model(**inputs)
    loss = getattr(outputs, "loss", None)
    quality = {} if loss is None else {"metric": "loss", "value": float(loss)}
    length = next(operator.q_len for operator in recorder.operators if operator.is_attention)
    workload = whole_run or Workload(
        model=shape,
        operators=tuple(recorder.operators),
        name=name or f"{shape.family}-{length}",
        paddings=tuple(recorder.paddings),
        source="sparseloom.record",
    )
    calls = tuple(recorder.calls)
    if any(call.tokens_alive is not None for call in calls):
        fades = isinstance(method, SpAtten) and method.decay < 1
        calls = with_ranking(workload, calls, rescales=fades)
    chosen = selection_name(method)
    selection = Selection(chosen, calls, method.to_dict(), quality)
    return Trace(workload, {chosen: selection}, recorder.tensors)


class _Recorder:
    """Forward hooks on the plain operators of a model, and the observer of its attention."""

    def __init__(self, model: nn.Module, method: Method, keep_tensors: bool) -> None:
        self.operators: list[Operator] = []
        self.calls: list[AttentionCall] = []
        self.paddings: list[np.ndarray] = []
        self.tensors: dict[str, np.ndarray] = {}
        self._method = method
        self._keep_tensors = keep_tensors
        self._model = model
        self._layer_of = _layers_by_module(model)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = head if isinstance(head, nn.Module) else None
        self._batch = 1
        self._step = -1
        self._kept: Kept | None = None
        self._products: dict[int, int] = {}  # layer → matrix products since its attention
        self._hooks = ExitStack()

    def __enter__(self) -> _Recorder:
        with ExitStack() as hooks:
            handle = self._model.register_forward_pre_hook(self._next_step, with_kwargs=True)
            hooks.callback(handle.remove)
            for module in self._model.modules():
                note = self._note_of(module)
                if note is not None:
                    hooks.callback(module.register_forward_hook(note).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def on_kept(self, kept: Kept) -> None:
        """What a pruning method left of the call that follows."""
        self._kept = kept

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        """Record one attention call."""
        shape = inputs.shape
        number = len(self.calls)
        self.operators.append(
            Operator(
                kind="attention",
                role="attention",
                layer=inputs.layer,
                step=self._step,
                stage="prefill" if self._step == 0 else "decode",
                batch=shape.batch,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                q_len=shape.q_len,
                kv_len=shape.kv_len,
                head_dim=shape.head_dim,
                value_dim=output.shape[-1],
                is_causal=inputs.is_causal,
                padding=self._padding(inputs.key_padding),
            )
        )
        kept, self._kept = self._kept, None
        if kept is not None:
            self.calls.append(_pruned(kept, inputs.is_causal))
        else:
            self.calls.append(
                AttentionCall(
                    mask=None if mask is None else _arrays(mask, inputs.is_causal),
                    predictor=None if mask is None else _predictor(self._method),
                    regions=None if mask is None else _regions(self._method, inputs),
                )
            )
        self._products[inputs.layer] = 0
        if self._keep_tensors:
            for name in ("query", "key", "value"):
                tensor = getattr(inputs, name)
                if kept is not None:
                    tensor = whole(kept, tensor)
                self.tensors[f"calls.{number}.{name}"] = tensor.float().cpu().numpy().copy()

    def _next_step(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        self._batch = 1 if ids is None else ids.shape[0]
        self._step += 1
        self._products.clear()

    def _note_of(self, module: nn.Module) -> Callable[..., None] | None:
        if isinstance(module, (nn.Linear, Conv1D)):
            return self._note_product
        kind = type(module).__name__
        if next(module.children(), None) is not None:
            return None
        if "Norm" in kind:
            return self._note_norm
        return self._note_activation if _ACTIVATION.search(kind) else None

    def _note_product(self, module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        inner = args[0].shape[-1]
        layer = self._layer_of.get(module)
        role: Role = "other"
        if module is self._head:
            role = "head"
        elif layer is not None:
            done = self._products.get(layer)
            role = "qkv" if done is None else "attention_output" if done == 0 else "ffn"
            if done is not None:
                self._products[layer] = done + 1
        batch, rows = self._tokens(args[0])
        self._add("gemm", role, layer, batch, rows=rows, inner=inner, columns=out.shape[-1])

    def _note_norm(self, module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> None:
        self._note_elements("norm", "norm", module, out)

    def _note_activation(self, module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> None:
        role: Role = "other" if self._layer_of.get(module) is None else "ffn"
        self._note_elements("elementwise", role, module, out)

    def _note_elements(self, kind: Any, role: Role, module: nn.Module, out: Tensor) -> None:
        batch, rows = self._tokens(out)
        columns = out.numel() // (batch * rows)
        self._add(kind, role, self._layer_of.get(module), batch, rows=rows, columns=columns)

    def _tokens(self, states: Tensor) -> tuple[int, int]:
        """(sequences, tokens of each): flattened tokens have no sequences to tell apart."""
        if states.dim() > 2:
            return states.shape[0], states.shape[1]
        tokens = prod(states.shape[:-1])
        return (self._batch, tokens // self._batch) if tokens % self._batch == 0 else (1, tokens)

    def _add(self, kind: Any, role: Role, layer: int | None, batch: int, **sizes: Any) -> None:
        stage = "prefill" if self._step == 0 else "decode"
        step = self._step
        self.operators.append(
            Operator(
                kind=kind, role=role, layer=layer, step=step, stage=stage, batch=batch, **sizes
            )
        )

    def _padding(self, valid: Tensor | None) -> int | None:
        if valid is None:
            return None
        array = valid.cpu().numpy().copy()
        for number, known in enumerate(self.paddings):
            if np.array_equal(known, array):
                return number
        self.paddings.append(array)
        return len(self.paddings) - 1


def _layers_by_module(model: nn.Module) -> dict[nn.Module, int]:
    """The layer that each module belongs to: the numbered block around an attention module."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, int] = {}
    for layer, attention in enumerate(attention_modules(model)):
        parts = names[attention].split(".")
        depth = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
        block = model.get_submodule(".".join(parts[: depth + 1]))
        found.update(dict.fromkeys(block.modules(), layer))
    return found


def _arrays(mask: SparseMask, is_causal: bool) -> MaskArrays:
    return MaskArrays(
        mask.indices.cpu().numpy().copy(),
        mask.offsets.cpu().numpy().copy(),
        mask.block_size,
        mask.q_len,
        mask.kv_len,
        is_causal,
    )


def _pruned(kept: Kept, is_causal: bool) -> AttentionCall:
    """The call of a method that prunes; heads that some sequence has left are alive."""
    high, low = kept.key_bits or (0, 0)
    progressive = kept.threshold is not None
    heads = None if kept.heads is None else kept.heads.any(0)
    return AttentionCall(
        mask=None if kept.mask is None else _arrays(kept.mask, is_causal),
        value_counts=_plain(kept.value_counts),
        key_bits=(high if progressive else high + low) or None,
        value_bits=kept.value_bits,
        lsb_bits=low if progressive else None,
        lsb_threshold=kept.threshold,
        lsb_refetch=_plain(kept.low_rows),
        tokens_alive=_plain(kept.tokens),
        heads_alive=None if heads is None or bool(heads.all()) else _plain(heads),
        accumulates_importance=kept.measured,
    )


def _plain(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.cpu().numpy().copy()


def _regions(method: Method, inputs: AttentionInputs) -> Any:
    """The words of static regions, where all tokens are there at once."""
    q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
    return method.encoded(inputs) if isinstance(method, StaticSparse) and q_len == kv_len else None


def _predictor(method: Method) -> PredictorShape | None:
    predictor = getattr(method, "predictor", None)
    if predictor is None:
        return None
    return PredictorShape(head_dim=predictor.width, bits=predictor.bits)
