"""`load_model`: from a name to a model that is ready to be scored."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from sparseloom.models.base import BYTE_VOCABULARY, LoadedModel
from sparseloom.models.classes import own_class

BUILT_IN = ("stdlib", "minilm")
"""Names that `load_model` knows without a folder or a network."""

Head = Literal["auto", "causal", "encoder", "classifier"]


def load_model(
    name: str | Path,
    *,
    head: Head = "auto",
    classes: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load a built-in model, a Hugging Face folder or hub name, or a llama2.c folder.

    `head` says what stands on top: "causal" a language-model head, "encoder" nothing, "classifier"
    a sequence classifier (with fresh weights for `classes`, or for two, where the model has none),
    "auto" what the configuration names.  `dtype` defaults to float32.  A byte-level model (256
    tokens, no tokenizer files beside it) gets tokenizer None.  The model is returned in evaluation
    mode.

    Raises ValueError when there is no such model, and ImportError naming the extra to install when
    the model lies in an optional package.
    """
    dtype = torch.float32 if dtype is None else dtype
    if name == "stdlib":
        from sparseloom.models.builtin import load_stdlib_lm

        if head not in ("auto", "causal"):
            raise ValueError(f"head of the built-in model 'stdlib' must be 'causal', got {head!r}")
        return load_stdlib_lm(dtype)
    if name == "minilm":
        from sparseloom.models.minilm import load_minilm

        if head == "causal":
            raise ValueError("head of 'minilm' must be 'encoder' or 'classifier', got 'causal'")
        return load_minilm(dtype, head="encoder" if head == "auto" else head, classes=classes)
    folder = Path(name)
    if folder.is_dir():
        from sparseloom.models.llama2c import find_checkpoint, load_llama2c

        if not (folder / "config.json").exists() and find_checkpoint(folder) is not None:
            return load_llama2c(folder, dtype=dtype)
    return from_huggingface(str(name), head=head, dtype=dtype, classes=classes)


def from_huggingface(
    source: str,
    *,
    head: Head,
    dtype: torch.dtype,
    name: str | None = None,
    classes: Sequence[str] = (),
) -> LoadedModel:
    """Model and tokenizer of a Hugging Face folder or hub name, with errors in one sentence."""
    own = own_class(Path(source))
    if own is not None:
        return LoadedModel(name or source, own.from_pretrained(source, dtype=dtype).eval(), None)
    local = Path(source).is_dir() or not _on_hub(source)
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(source, local_files_only=local)
        except (OSError, ValueError) as error:
            raise ValueError(_not_found(source)) from error
        kind = _model_class(config, head)
        if kind is AutoModelForSequenceClassification and not _is_classifier(config) and classes:
            config.id2label = dict(enumerate(classes))
            config.label2id = {label: number for number, label in enumerate(classes)}
        try:
            model: PreTrainedModel = kind.from_pretrained(
                source, config=config, dtype=dtype, local_files_only=local
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model {source!r} could not be loaded: {_first_line(error)}"
            ) from error
        tokenizer = None
        if getattr(config, "vocab_size", None) != BYTE_VOCABULARY or _has_tokenizer(source):
            try:
                tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
            except (OSError, ValueError, ImportError, TypeError) as error:
                raise ValueError(
                    f"model {source!r} has no usable tokenizer beside it: {_first_line(error)}"
                ) from error
    return LoadedModel(name or source, model.eval(), tokenizer)


def _model_class(config: PretrainedConfig, head: Head) -> Any:
    """The factory of transformers that puts the head on top."""
    if head == "auto":
        architectures = config.architectures or []
        if any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
            head = "causal"
        elif _is_classifier(config):
            head = "classifier"
    by_head = {"causal": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}
    return by_head.get(head, AutoModel)


def _is_classifier(config: PretrainedConfig) -> bool:
    return any(a.endswith("ForSequenceClassification") for a in config.architectures or [])


def _has_tokenizer(source: str) -> bool:
    folder = Path(source)
    return any((folder / f).exists() for f in ("tokenizer.json", "tokenizer_config.json"))


def _on_hub(source: str) -> bool:
    """Whether the hub answers for `source`; False when it cannot be asked (the cache may have it).

    One quick question: transformers itself retries for half a minute when there is no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(source, timeout=10)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"model {source!r} is not a built-in ({', '.join(BUILT_IN)}), not a folder, and not on "
            "the Hugging Face hub"
        ) from error
    except Exception:  # noqa: BLE001 — the HTTP library, and so its errors, depend on the version
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _not_found(source: str) -> str:
    if Path(source).is_dir():
        return f"model folder {source!r} has no usable config.json and no llama2.c checkpoint"
    return (
        f"model {source!r} is not a built-in ({', '.join(BUILT_IN)}), not a folder, not in the "
        "local Hugging Face cache, and the hub could not be reached"
    )


@contextmanager
def _quiet() -> Generator[None]:
    """Loading bars and key reports of transformers off, and as they were afterwards."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
