"""What the methods that replace attention share: weights by layer, grouped heads, refusals."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from sparseloom.methods.base import Attender, AttentionInputs
from sparseloom.methods.learned import Learned, MethodShape

NEVER = -1e9
"""Score of a pair that may not be attended to; finite, so that an empty row gives no NaN."""


Own = TypeVar("Own", bound="WeightedAttender")


class LayerWeights(nn.Module):
    """One module per layer of a model, and the sizes that they were made for."""

    layers: Sequence[nn.Module]

    def __init__(self, layers: Sequence[nn.Module], sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.layers = cast("Sequence[nn.Module]", nn.ModuleList(layers))
        self.made_for = dict(sizes)


class WeightedAttender(Attender, Learned):
    """An `Attender` with a module per layer in its field `weights`.

    Class attribute: `depends_on`, the sizes of `MethodShape` that the modules depend on.
    """

    depends_on: ClassVar[tuple[str, ...]] = ()
    weights: LayerWeights | None

    @abstractmethod
    def make_layer(self, sizes: Mapping[str, int], generator: torch.Generator) -> nn.Module:
        """Fresh weights of one layer; `sizes` holds what `depends_on` names."""

    @property
    def module(self) -> LayerWeights | None:
        """The weights of all layers."""
        return self.weights

    def initialise(self: Own, shape: MethodShape, *, seed: int = 0) -> Own:
        """With weights drawn anew, each layer by a generator of its own."""
        sizes = {name: int(getattr(shape, name)) for name in ("layers", *self.depends_on)}
        return self._made(sizes, seed)

    def sizes(self) -> dict[str, int | bool]:
        """Layers, and what `depends_on` names."""
        if self.weights is None:
            raise ValueError(f"{self.name} has no weights whose sizes could be asked for")
        return dict(self.weights.made_for)

    def restore(
        self: Own, sizes: Mapping[str, int | bool | str], state: Mapping[str, Tensor]
    ) -> Own:
        """With stored weights."""
        found: dict[str, int] = {}
        for name in ("layers", *self.depends_on):
            text = str(sizes.get(name, "missing"))
            try:
                found[name] = int(text)
            except ValueError:
                raise ValueError(f"{name} of the stored {self.name} is damaged: {text!r}") from None
        method = self._made(found, seed=0)
        assert method.weights is not None
        try:
            method.weights.load_state_dict(dict(state))
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise ValueError(f"weights of the stored {self.name} do not fit: {first}") from None
        method.weights.eval()
        return method

    def layer_module(self, inputs: AttentionInputs) -> nn.Module:
        """The weights of the call's layer.

        Raises:
            ValueError: there are none.
        """
        if self.weights is None:
            raise ValueError(
                f"{self.name} has no weights yet: make them with initialise(method_shape(model)), "
                "sl.adapt or sl.load"
            )
        layers = self.weights.layers
        if inputs.layer >= len(layers):
            raise ValueError(
                f"layer must be below {len(layers)}, the layers that {self.name} has weights for, "
                f"got {inputs.layer}"
            )
        return layers[inputs.layer]

    def _made(self: Own, sizes: dict[str, int], seed: int) -> Own:
        layers = [
            self.make_layer(sizes, torch.Generator().manual_seed(seed * 10_007 + layer))
            for layer in range(sizes["layers"])
        ]
        changes: Any = {"weights": LayerWeights(layers, sizes).eval()}
        me = cast("Any", self)  # every method is a dataclass
        return cast("Own", dataclasses.replace(me, **changes))


class DrawCounter(nn.Module):
    """Counts the training calls of a layer whose randomness is drawn anew now and then."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def advance(self) -> int:
        """Number of this call: training calls from 1 on, the last one's number in evaluation.

        The forward pass that gradient checkpointing repeats keeps the number of the first one.
        """
        if self.training and not in_recomputation():
            self.step += 1
        return int(self.step)


def in_recomputation() -> bool:
    """Whether this forward code runs inside a backward pass, as gradient checkpointing makes it."""
    return torch._C._current_graph_task_id() != -1


def grouped_key(inputs: AttentionInputs) -> Tensor:
    """Keys repeated to the query heads, (batch, heads, kv_len, head_dim)."""
    return inputs.key.repeat_interleave(inputs.query.shape[1] // inputs.key.shape[1], dim=1)


def grouped_value(inputs: AttentionInputs) -> Tensor:
    """Values repeated to the query heads, (batch, heads, kv_len, value_dim).

    Raises:
        ValueError: there are none, as in some recordings.
    """
    if inputs.value is None:
        raise ValueError("inputs.value is missing: the call was recorded without values")
    return inputs.value.repeat_interleave(inputs.query.shape[1] // inputs.value.shape[1], dim=1)


def refuse_causal(name: str, inputs: AttentionInputs, why: str) -> None:
    """Refuse a causal call of a method that has no causal form."""
    if inputs.is_causal:
        raise NotImplementedError(
            f"method: {name} runs in bidirectional models only, because {why}; it can neither "
            "train nor generate in a causal model"
        )


def refuse_cache(name: str, inputs: AttentionInputs, why: str) -> None:
    """Refuse a call whose queries are not all the tokens."""
    q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
    if q_len != kv_len:
        raise NotImplementedError(
            f"past_key_values: {name} needs all tokens at once, because {why}; got {q_len} queries "
            f"for {kv_len} keys (generate with use_cache=False)"
        )


def no_padding(inputs: AttentionInputs, tensor: Tensor) -> Tensor:
    """Rows of padding in a (batch, heads, kv_len, …) tensor set to zero."""
    if inputs.key_padding is None:
        return tensor
    return tensor * inputs.key_padding[:, None, :, None]
