"""A model together with what is needed to feed it: its tokenizer, or the plain bytes of a text."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

BYTE_VOCABULARY = 256
"""Vocabulary of a byte-level model: token t is byte t, and byte 0 starts a document."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A Hugging Face model in evaluation mode and its tokenizer.

    `tokenizer` is None for a byte-level model, whose tokens are the bytes of UTF-8 text.  `name`
    is what the user asked for: a built-in, a hub name or a folder.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def family(self) -> str:
        """The architecture as Hugging Face names it: `bert`, `gpt2`, `llama`, …"""
        return str(self.model.config.model_type)

    @property
    def is_causal(self) -> bool:
        """Whether the model is a left-to-right language model with a vocabulary head."""
        return bool(self.model.can_generate()) and not self.model.config.is_encoder_decoder

    @property
    def byte_level(self) -> bool:
        """Whether tokens are plain bytes."""
        return self.tokenizer is None

    @property
    def context(self) -> int:
        """The longest input in tokens that the model was made for."""
        return int(self.model.config.max_position_embeddings)

    @property
    def start_token(self) -> int | None:
        """The token that stands before a document, or None where the tokenizer has none."""
        start = 0 if self.tokenizer is None else self.tokenizer.bos_token_id
        assert start is None or isinstance(start, int)
        return start

    @classmethod
    def of(cls, model: LoadedModel | PreTrainedModel) -> LoadedModel:
        """`model` itself, or a bare byte-level model wrapped.

        Raises ValueError for a bare model with another vocabulary: it needs its tokenizer.
        """
        if isinstance(model, LoadedModel):
            return model
        vocabulary = int(model.config.vocab_size)
        if vocabulary != BYTE_VOCABULARY:
            raise ValueError(
                f"model has a vocabulary of {vocabulary} tokens and came without a tokenizer: pass "
                f"LoadedModel(name, model, tokenizer); only {BYTE_VOCABULARY} bytes need none"
            )
        return cls(str(model.config.name_or_path or type(model).__name__), model, None)
