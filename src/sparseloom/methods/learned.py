"""Methods with weights of their own, and those that learn to predict the model's scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sparseloom.methods.base import AttentionInputs, Method, Selector

Weights = TypeVar("Weights", bound=nn.Module)
Sizes = Mapping[str, int | bool | str]
"""Sizes of stored weights by name, as numbers or as their text."""


@dataclass(frozen=True, slots=True)
class MethodShape:
    """Sizes of a model that weights of a method are made for; `max_length` in tokens."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    rotary: bool
    is_causal: bool


class Learned(Method):
    """A method with weights: a torch module in a field with `compare=False`.

    The settings go into `to_dict`; `sizes` and the module's `state_dict` are stored beside them.
    """

    @property
    @abstractmethod
    def module(self) -> nn.Module | None:
        """The weights; None until `initialise` or `restore`."""

    @abstractmethod
    def initialise(self, shape: MethodShape, *, seed: int = 0) -> Learned:
        """A copy with fresh weights for a model of this shape."""

    @abstractmethod
    def sizes(self) -> dict[str, int | bool]:
        """What `restore` needs to build the same module.

        Raises:
            ValueError: there are no weights yet.
        """

    @abstractmethod
    def restore(
        self, sizes: Mapping[str, int | bool | str], state: Mapping[str, Tensor]
    ) -> Learned:
        """A copy with stored weights; `sizes` are numbers or their text.

        Raises:
            ValueError: a size is missing or damaged, or the weights do not fit.
        """


def read_sizes(
    sizes: Sizes, numbers: Sequence[str], flags: Sequence[str] = (), *, kind: str = "predictor"
) -> dict[str, Any]:
    """The named sizes of stored weights, as ints and bools.

    Raises:
        ValueError: one is missing or no number.
    """
    found: dict[str, Any] = {}
    for name in (*numbers, *flags):
        text = str(sizes.get(name, "missing"))
        try:
            found[name] = {"True": True, "False": False}[text] if name in flags else int(text)
        except (KeyError, ValueError):
            raise ValueError(f"{name} of the stored {kind} is damaged: {text!r}") from None
    return found


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], *, kind: str = "predictor"
) -> None:
    """Stored weights into a module.

    Raises:
        ValueError: they do not fit.
    """
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"weights of the stored {kind} do not fit: {first}") from None


def layer_weights(
    layers: Sequence[Weights] | nn.ModuleList | None, layer: int, owner: str
) -> Weights:
    """The weights of one layer.

    Raises:
        ValueError: there are none, or not so many layers.
    """
    if layers is None:
        raise ValueError(
            f"{owner} has no trained predictor: run sl.adapt(model, method, batches) first or "
            "load one"
        )
    if layer >= len(layers):
        raise ValueError(
            f"layer must be below {len(layers)}, the layers of the predictor, got {layer}"
        )
    return cast("Weights", layers[layer])


class Comparison(NamedTuple):
    """What a predictor says beside what it should say; softmax over the last axis of both."""

    target: Float[Tensor, "batch heads rows keys"]
    predicted: Float[Tensor, "batch heads rows keys"]
    allowed: Bool[Tensor, "#batch 1 #rows keys"]


class Predicting(Selector, Learned):
    """A selector whose weights learn what the model's attention scores will be."""

    losses: ClassVar[tuple[str, ...]] = ("kl", "mse")
    """Losses that suit what `compare` gives; the first is the default."""

    @abstractmethod
    def predicted(
        self, inputs: AttentionInputs, rows: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "batch heads rows kv_len"]:
        """Differentiable predicted scores of some query rows, in units of q·k·scale."""

    def compare(
        self, inputs: AttentionInputs, rows: Int64[Tensor, " rows"], *, detach: bool
    ) -> Comparison:
        """Predicted against true scores of the query rows `rows`, for the losses of training.

        Args:
            inputs: an attention call without a cache.
            rows: query rows, ascending.
            detach: keep gradients out of the model.
        """
        inputs = in_float(inputs, detach=detach)
        true = true_scores(inputs, rows)
        return Comparison(true, self.predicted(inputs, rows), allowed_rows(inputs, rows))


def in_float(inputs: AttentionInputs, *, detach: bool) -> AttentionInputs:
    """The call with queries, keys and hidden states in fp32, cut off from the model if asked.

    Raises:
        ValueError: there are no hidden states.
    """
    if inputs.hidden_states is None:
        raise ValueError(
            f"hidden states of layer {inputs.layer} are missing: the model's attention "
            "module does not receive them, so no predictor can be trained"
        )
    parts = [part.float() for part in (inputs.query, inputs.key, inputs.hidden_states)]
    query, key, hidden = (part.detach() for part in parts) if detach else parts
    return AttentionInputs(
        query=query,
        key=key,
        layer=inputs.layer,
        is_causal=inputs.is_causal,
        scale=inputs.scale,
        key_padding=inputs.key_padding,
        hidden_states=hidden,
        rotary=inputs.rotary,
    )


def true_scores(
    inputs: AttentionInputs, rows: Int64[Tensor, " rows"]
) -> Float[Tensor, "batch heads rows kv_len"]:
    """q·k·scale of some query rows, with gradients."""
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    key = inputs.key.repeat_interleave(groups, dim=1)
    return inputs.query[:, :, rows] @ key.transpose(-1, -2) * inputs.scale


def allowed_rows(
    inputs: AttentionInputs, rows: Int64[Tensor, " rows"]
) -> Bool[Tensor, "#batch 1 rows kv_len"]:
    """Which keys some query rows may see, by causality and padding."""
    q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
    columns = torch.arange(kv_len, device=rows.device)
    allowed = torch.ones(1, 1, len(rows), kv_len, dtype=torch.bool, device=rows.device)
    if inputs.is_causal:
        allowed = allowed & (columns <= (rows + kv_len - q_len)[:, None])
    if inputs.key_padding is not None:
        allowed = allowed & inputs.key_padding[:, None, None, :]
    return allowed
