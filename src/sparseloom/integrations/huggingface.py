"""`sparsify`: run a Hugging Face model with a method's attention, and give it back unchanged.

One attention function and one mask function are registered with transformers at first use and
selected through the configuration of one model.  Everything else stays on our side: a table from
attention module to what is known of it, filled by forward pre-hooks (hidden states, rotary
embeddings, cache layer), because transformers passes none of these to attention functions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from sparseloom.errors import unknown_name
from sparseloom.integrations import _compat, padding
from sparseloom.integrations.call import (
    SITES,
    WHEN,
    Observer,
    Session,
    Site,
    attention_function,
    capture,
)
from sparseloom.integrations.describe import (
    attention_modules,
    chooses_in_cache,
    config_of,
    describe,
)
from sparseloom.integrations.stats import LayerStats
from sparseloom.kernels.decode import BACKENDS as DECODE_BACKENDS
from sparseloom.kernels.ops import BACKENDS
from sparseloom.methods import SpAtten
from sparseloom.methods.base import Method, Pruner, Selector, Survivors
from sparseloom.methods.generation import Generating

if TYPE_CHECKING:
    from sparseloom.integrations.shortening import Shortening

NAME = "sparseloom"
"""The name of our functions in transformers' registries."""

_IMPLEMENTATION = "_attn_implementation_internal"


def sparsify(
    model: nn.Module,
    method: Method | Sequence[Method],
    *,
    backend: str = "auto",
    when: str = "auto",
    observer: Observer | None = None,
    diagnose: bool = False,
) -> Sparsified:
    """Run a model with sparse attention for as long as the `with` block lasts.

    ```python
    with sl.sparsify(model, sl.Oracle(sparsity=0.9)) as sparse:
        model(**inputs)
        model.generate(**inputs)
        sparse.stats()
    ```

    Supported: encoders and decoder-only models whose attention goes through transformers'
    attention interface (BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral, Qwen …; of transformers
    4.x BERT and RoBERTa too), padding on either side, grouped-query attention, batches, greedy
    and beam search with the dynamic cache, training with attention dropout and with gradient
    checkpointing.  `SpAtten` shortens BERT, RoBERTa and DistilBERT; gradient checkpointing and
    hidden states of all layers are not supported with it.  In decoders it chooses what each step of
    generation reads of the cache; the prompt runs whole, or (`prompt="shorten"`: GPT-2, Llama,
    Mistral, Qwen) a pass without a cache is shortened as in encoders.

    Args:
        model: a Hugging Face model; restored exactly on exit, also after an exception.
        method: what chooses the pairs.  A list may hold one method for now.
        backend: kernel of the sparse calls, as in `sparseloom.attention`, or as in
            `sparseloom.decode_attention` where steps of generation are the sparse calls.  Calls
            that run dense, also those on what is left of a shorter sequence, choose their own.
        when: when to select.  `"auto"` follows the cost rule (`sparseloom.methods.costs`): calls
            that selecting would make slower on this machine run dense, and `stats()` says so.  A
            `backend` that is named, gradients and `diagnose` always select.  `"always"` selects
            in every call in which anything is left out (`Selector.worthwhile`), whatever it
            costs: what quality is measured with, because it does not depend on the machine.
        observer: called after every attention call.
        diagnose: also measure each mask that the method selects against the exact top-k of the
            same size (slow).

    Returns:
        A context manager; `stats()` and `reset()` also work after the block.

    Raises:
        TypeError: not a Hugging Face model, or not a method.
        ValueError: `diagnose` with a method that selects no masks.
        NotImplementedError: the model or the method is of an unsupported kind.  Inside the block:
            static or quantised caches, soft-capped scores, attention sinks, position biases,
            windows of the model itself, attention outputs; nothing of it is ever ignored.
        RuntimeError: on entry, the model (or a part of it) is sparsified already.
    """
    config_of(model)
    if backend not in (names := ("auto", "dense", *BACKENDS)):
        raise unknown_name("backend", backend, names)
    if when not in WHEN:
        raise unknown_name("when", when, WHEN)
    one = _one_method(method)
    if diagnose and not isinstance(one, Selector):
        raise ValueError(
            f"diagnose=True measures the masks that a method selects, and {one.name!r} selects none"
        )
    session = Session(one, backend, observer, diagnose, when)
    return Sparsified(model, session)


class Sparsified:
    """A model and the method that runs in it: what `sparsify` returns."""

    def __init__(self, model: nn.Module, session: Session) -> None:
        self.model = model
        self.method = session.method
        self._session = session
        self._undo: ExitStack | None = None
        self._shortening: Shortening | None = None

    def __enter__(self) -> Sparsified:
        modules = attention_modules(self.model)
        if self._shortens(self.method):
            return self._enter_pruning(modules)
        self._refuse_backend(self.method)
        self._session.layers = len(modules)
        legacy = [module for module in modules if _compat.has_bert_layout(module)]
        if not _compat.follows_interface(self.model) and len(legacy) != len(modules):
            raise NotImplementedError(
                f"{type(self.model).__name__} does not follow the attention interface of "
                f"transformers {_compat.VERSION}, so its attention cannot be replaced"
                f"{' (a newer transformers may help)' if _compat.MAJOR < 5 else ''}"
            )
        self._refuse_nesting(modules)
        _compat.register(NAME, attention_function, padding.mask_function)
        with ExitStack() as undo:
            for layer, module in enumerate(modules):
                SITES[module] = Site(self._session, layer)
                undo.callback(SITES.pop, module, None)
                hook = module.register_forward_pre_hook(capture, with_kwargs=True)
                undo.callback(hook.remove)
            for module in legacy:
                undo.callback(_replace_forward(module))
            undo.enter_context(_before_models(self.model, _refuse_outputs))
            if not legacy:
                for config in _configs(self.model):
                    undo.callback(_select(config))
            self._undo = undo.pop_all()
        return self

    def _enter_pruning(self, modules: list[nn.Module]) -> Sparsified:
        """Run a model on what its method leaves of the sequence."""
        from sparseloom.integrations.shortening import Shortening

        is_causal = describe(self.model).is_causal
        if not isinstance(self.method, SpAtten):
            has = "is a decoder" if is_causal else "has none"
            raise NotImplementedError(
                f"method: {self.method.name} prunes {'encoders' if is_causal else 'caches'}, and "
                f"{type(self.model).__name__} {has}"
            )
        self._refuse_nesting(modules)
        self._shortening = Shortening(self.model, modules, self._session, is_causal=is_causal)
        _compat.register(NAME, attention_function, padding.mask_function)
        with ExitStack() as undo:
            for layer, module in enumerate(modules):
                SITES[module] = Site(self._session, layer)
                undo.callback(SITES.pop, module, None)
                undo.callback(self._shortening.attach(layer))
            undo.enter_context(_before_models(self.model, _refuse_outputs))
            undo.enter_context(_before_models(self.model, _refuse_hidden_states))
            if is_causal:
                undo.enter_context(_before_models(self.model, _without_cache))
            if _compat.follows_interface(self.model):  # so that masks are padding alone
                for config in _configs(self.model):
                    undo.callback(_select(config))
            self._undo = undo.pop_all()
        return self

    def _shortens(self, method: Method) -> bool:
        """Whether the sequence itself gets shorter."""
        prunes = isinstance(method, (Pruner, Generating))
        return prunes and not chooses_in_cache(method, describe(self.model))

    def _refuse_backend(self, method: Method) -> None:
        backend = self._session.backend
        if isinstance(method, Generating) and backend not in DECODE_BACKENDS:
            raise NotImplementedError(
                f"backend must be one of {', '.join(map(repr, DECODE_BACKENDS))} for "
                f"{method.name}, whose steps run in decode_attention, got {backend!r}"
            )

    def _refuse_nesting(self, modules: list[nn.Module]) -> None:
        if any(module in SITES for module in modules):
            raise RuntimeError(
                f"model: this {type(self.model).__name__} is sparsified already; leave the outer "
                "block first"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def use(self, method: Method | Sequence[Method]) -> None:
        """Run another method from the next call on, such as the same one at another sparsity.

        Raises:
            NotImplementedError, TypeError: as `sparsify`; also inside the block where either method
                makes the sequence shorter, for which the model's layers are made ready on entry.
        """
        method = _one_method(method)
        if self._undo is not None and method != self.method:
            if self._shortens(self.method) or self._shortens(method):
                raise NotImplementedError(
                    f"method: {method} cannot take the place of {self.method} inside the block, "
                    "because one of them makes the sequence shorter; leave the block first"
                )
            self._refuse_backend(method)
        self.method = self._session.method = method

    def stats(self) -> list[LayerStats]:
        """One row per layer that has run, in order; see `LayerStats` for the keys."""
        name = str(self.method)
        return [counts.row(layer, name) for layer, counts in sorted(self._session.counts.items())]

    def survivors(self) -> list[Survivors]:
        """Of each layer, the tokens and heads in its attention in the last forward pass.

        `tokens` is (batch, input length), `heads` (batch, heads); padding is never alive.

        Raises:
            RuntimeError: the method prunes nothing, or no pass has run.
        """
        last = None if self._shortening is None else self._shortening.last_pass
        if last is None:
            raise RuntimeError(f"{self.method.name}: no forward pass with pruning has run")
        return list(last.seen)

    def reset(self) -> None:
        """Start counting anew."""
        self._session.counts.clear()


def _one_method(method: Method | Sequence[Method]) -> Method:
    methods = [method] if isinstance(method, Method) else list(method)
    for one in methods:
        if not isinstance(one, Method):
            raise TypeError(f"method must be a Method or a list of one, got {type(one).__name__}")
    if len(methods) != 1:
        raise NotImplementedError(
            f"method: {len(methods)} methods cannot be composed yet, give exactly one"
        )
    return methods[0]


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object in the model, each once (they cannot be hashed)."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if hasattr(config, "model_type")}.values())


# Configurations in use, with the number of users: models built from one object share it.
_SELECTED: dict[int, tuple[Any, object, int]] = {}


def _select(config: Any) -> Callable[[], None]:
    """Select our attention in a configuration; returns what takes it back."""
    held, before, users = _SELECTED.get(id(config), (config, None, 0))
    if users == 0:
        before = vars(config).get(_IMPLEMENTATION)
        setattr(config, _IMPLEMENTATION, NAME)
    _SELECTED[id(config)] = (held, before, users + 1)

    def take_back() -> None:
        held, before, users = _SELECTED.pop(id(config))
        if users > 1:
            _SELECTED[id(config)] = (held, before, users - 1)
        else:
            setattr(config, _IMPLEMENTATION, before)

    return take_back


def _replace_forward(module: nn.Module) -> Callable[[], None]:
    """Give one module our forward; returns what takes it back."""
    own = vars(module)
    before = own.get("forward")
    own["forward"] = MethodType(_compat.bert_forward(attention_function), module)

    def take_back() -> None:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before

    return take_back


@contextmanager
def _before_models(model: nn.Module, hook: Callable[..., Any]) -> Generator[None]:
    """Run a hook before the forward of the model and of models inside it."""
    with ExitStack() as undo:
        for module in model.modules():
            if hasattr(module, "_supports_attention_backend"):
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _without_cache(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A pass whose sequence gets shorter fills no cache: nobody gets one who did not ask for it."""
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        raise NotImplementedError(
            "past_key_values: a cache of a prompt that gets shorter would lack the keys that "
            "later steps are to choose from; generate with SpAtten(prompt='whole')"
        )
    return args, {**kwargs, "use_cache": False}


def _refuse_hidden_states(module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    config = getattr(module, "config", None)
    if kwargs.get("output_hidden_states") or getattr(config, "output_hidden_states", False):
        raise NotImplementedError(
            "output_hidden_states: layers of a pruned model see fewer and fewer tokens; see "
            "survivors() of sparsify for which"
        )


def _refuse_outputs(module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    config = getattr(module, "config", None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise NotImplementedError(
            "output_attentions: sparse attention makes no full attention matrix to return; see "
            "the observer argument of sparsify for the kept pairs"
        )
