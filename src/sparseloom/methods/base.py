"""What a method is: settings that choose, prune or replace attention, and what it gets to see.

A method is a frozen dataclass.  Its settings are the fields that take part in comparison; weights
are fields with `compare=False` and are stored beside the settings.  A method has one or more of
three capabilities, each an abstract class here:

- `Selector.select`: queries, keys, hidden states → `SparseMask`;
- `Pruner.prune`: tokens or heads leave for good, once their attention has been seen;
- `Attender.attend`: the attention computation itself is replaced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.mask import SparseMask
from sparseloom.methods.settings import setting_hints, to_json


class LayerState(ABC):
    """What a method remembers of one layer's earlier tokens, beside the layer's key/value cache.

    The cache layer owns it and calls these operations whenever it does the same to its keys, so
    that both always cover the same tokens.  They change the state in place.
    """

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens remembered."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; a negative number drops that many from the end."""

    @abstractmethod
    def reorder(self, beams: Int64[Tensor, " batch"]) -> None:
        """Batch entry i becomes what entry `beams[i]` was (beam search)."""

    @abstractmethod
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch entry `repeats` times in a row."""

    @abstractmethod
    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these batch entries stay."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of one attention call; enough to count operations."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    hidden_size: int
    is_causal: bool

    @property
    def allowed_pairs(self) -> int:
        """(query, key) pairs of one head that causality allows."""
        if not self.is_causal:
            return self.q_len * self.kv_len
        first = self.kv_len - self.q_len + 1  # keys that the first query sees; may be negative
        low, high = max(first, 0), max(self.kv_len, 0)
        return (low + high) * (high - low + 1) // 2


@dataclass(frozen=True, slots=True)
class Work:
    """What a selector would leave to compute in one attention call, and what choosing it takes.

    Attributes:
        block_size: (queries, keys) of the mask's blocks.
        kept_blocks: entries of the mask, per head of one sequence; an estimate where the choice
            depends on the data.
        width: columns per head of the predictor.
        bits: of its codes.
        compiled: whether the C++ backend knows the rule by which the method chooses.
    """

    block_size: tuple[int, int]
    kept_blocks: int
    width: int
    bits: int
    compiled: bool = True


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AttentionInputs:
    """What a method sees of one attention call, after rotary positions and cache update.

    Attributes:
        query: (batch, heads, q_len, head_dim).
        key, value: (batch, kv_heads, kv_len, head_dim); value may be absent in recordings.
        layer: the layer's number from 0.
        is_causal: query i sees key j if j <= i + kv_len - q_len (aligned bottom right).
        scale: factor of q·k before the softmax.
        key_padding: (batch, kv_len), True = attend; None = all.
        hidden_states: (batch, q_len, hidden_size), the input of the attention module.
        rotary: cos and sin of the q_len new positions, (batch or 1, q_len, rotary_dim) in the
            half-split layout of Llama; None in models without rotary positions.
        past: what the method remembers of the kv_len - q_len earlier tokens; None without a cache.
    """

    query: Float[Tensor, "batch heads q_len head_dim"]
    key: Float[Tensor, "batch kv_heads kv_len head_dim"]
    value: Float[Tensor, "batch kv_heads kv_len value_dim"] | None = None
    layer: int
    is_causal: bool
    scale: float
    key_padding: Bool[Tensor, "batch kv_len"] | None = None
    hidden_states: Float[Tensor, "batch q_len hidden_size"] | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    past: LayerState | None = None

    @property
    def shape(self) -> AttentionShape:
        """The sizes; hidden_size is heads · head_dim where no hidden states were recorded."""
        batch, heads, q_len, head_dim = self.query.shape
        hidden = heads * head_dim if self.hidden_states is None else self.hidden_states.shape[-1]
        kv_heads, kv_len = self.key.shape[1:3]
        return AttentionShape(
            batch, heads, kv_heads, q_len, kv_len, head_dim, hidden, self.is_causal
        )

    @property
    def query_padding(self) -> Bool[Tensor, "batch q_len"] | None:
        """Which queries are real, where queries and keys are the same tokens; else None.

        Only the grouping of queries into blocks uses it: a padded query must not vote.
        """
        if self.key_padding is None or self.query.shape[2] != self.key.shape[2]:
            return None
        return self.key_padding


class Method(ABC):
    """A way to make attention cheaper, with its settings.

    Class attributes: `name`, the tag in files and on the command line; `version`, raised when
    settings change their meaning.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @property
    def capabilities(self) -> frozenset[str]:
        """Which of "select", "prune" and "attend" this method can do."""
        kinds = {"select": Selector, "prune": Pruner, "attend": Attender}
        return frozenset(word for word, kind in kinds.items() if isinstance(self, kind))

    def to_dict(self) -> dict[str, object]:
        """Tag, version and every setting, ready for JSON.  Weights are not part of it."""
        settings = {key: to_json(getattr(self, key)) for key in setting_hints(type(self))}
        return {"method": self.name, "version": self.version, **settings}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Method:
        """The method that `to_dict` described; settings left out take their defaults.

        Raises:
            ValueError: unknown method or setting, a value out of range, a version of the future,
                or another method than the class asked.
        """
        from sparseloom.methods.registry import method_from_dict

        method = method_from_dict(data)
        if not isinstance(method, cls):
            wanted = getattr(cls, "name", cls.__name__)
            raise ValueError(f"method must be {wanted!r}, got {method.name!r}")
        return method

    def __str__(self) -> str:
        from sparseloom.methods.registry import format_method

        return format_method(self)


class Selector(Method):
    """A method that chooses which pairs are computed."""

    needs_hidden_states: ClassVar[bool] = False
    owns_cache_state: ClassVar[bool] = False

    @abstractmethod
    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The kept pairs of one attention call.

        A method that owns cache state appends the call's tokens to `inputs.past` here, so this is
        called once per attention call where there is a cache.
        """

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether selecting leaves anything out; where it does not, the call runs dense."""
        return q_len > 0 and kv_len > 0

    def work(self, shape: AttentionShape) -> Work | None:
        """What a call of this shape would cost, for the cost rule (`sparseloom.methods.costs`).

        None: the rule has no say, and the method always selects.  So it is with methods that
        are gauges rather than savings, such as the oracle.
        """
        del shape
        return None

    def prediction_macs(self, shape: AttentionShape) -> int:
        """Multiply-accumulates spent on choosing, whatever their width; 0 for fixed patterns."""
        del shape
        return 0

    def new_state(self, layer: int) -> LayerState | None:
        """Empty cache state for `layer`, where the method owns such state."""
        del layer
        return None

    def remember(self, inputs: AttentionInputs) -> None:
        """Append the call's tokens to `inputs.past` without selecting.

        For calls that run dense (see `worthwhile`) while a cache grows.
        """
        del inputs


class Calibrated(Method):
    """A method with settings that are read off attention calls of sample text, without training."""

    @property
    @abstractmethod
    def needs_calibration(self) -> bool:
        """Whether the method cannot run before `calibrate`."""

    @abstractmethod
    def is_calibrated_from(self, method: Method) -> bool:
        """Whether this is what `calibrate` makes of `method` on some calls."""

    @abstractmethod
    def calibrate(self, calls: Iterable[AttentionInputs]) -> Calibrated:
        """A copy whose settings fit `calls`: calls of every layer of the dense model, no cache.

        Raises:
            ValueError: a layer is not among the calls.
        """


class Survivors(NamedTuple):
    """What stays after pruning; None = everything.  True = stays."""

    tokens: Bool[Tensor, "batch kv_len"] | None
    heads: Bool[Tensor, "batch heads"] | None


class Pruner(Method):
    """A method after which tokens or heads are gone for later layers (SpAtten, cache eviction)."""

    @abstractmethod
    def prune(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"],
        head_importance: Float[Tensor, "batch heads"],
        state: Any = None,
    ) -> Survivors:
        """Which tokens and heads later layers still see, from this layer's attention.

        Args:
            inputs: the attention call that has just run.
            key_importance: column sums of the attention probabilities, over real queries only.
            head_importance: Σ|out| of each head, over real queries only.
            state: what the method remembers of the earlier layers of this pass, if it does; it
                is brought up to date.
        """


class Attender(Method):
    """A method that computes attention in another way (Linformer, Performer, static regions).

    One that selects too may replace some calls only; the others run with the mask it selects.
    """

    def replaces(self, inputs: AttentionInputs) -> bool:
        """Whether this call runs through `attend`."""
        del inputs
        return True

    def call_macs(self, inputs: AttentionInputs) -> int:
        """Multiply-accumulates of this call; `macs` where layers do not differ."""
        return self.macs(inputs.shape)

    @abstractmethod
    def attend(
        self, inputs: AttentionInputs, *, dropout_p: float = 0.0
    ) -> Float[Tensor, "batch heads q_len value_dim"]:
        """The attention output; `inputs.value` is present.

        Args:
            inputs: the call.
            dropout_p: the model's attention dropout, 0 outside of training.

        Raises:
            NotImplementedError: a causal call or a cache that the method has no form for.
        """

    @abstractmethod
    def macs(self, shape: AttentionShape) -> int:
        """Multiply-accumulates of the matrix products of one call, over batch and query heads."""
