"""Language modelling: the standard library in bits per byte, WikiText-2 and Penn Treebank.

Texts are cut into consecutive windows; every token but the first of the stream is scored once, and
the first tokens of a window see little context.  Nothing slides: a window costs one forward pass.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparseloom.models.base import LoadedModel
from sparseloom.tasks.base import Batch, Progress, Score, Task, evaluating, spread
from sparseloom.tasks.data import find_data, find_file, read_bytes
from sparseloom.tasks.stdlib import StdlibCorpus, load_stdlib, read_manifest
from sparseloom.tasks.stream import TokenStream, encode

_LONGEST_CONTEXT = 2048


class LanguageModelling(Task):
    """Common ground of the tasks that predict the next token of a text.

    `per_item` holds the bits per byte of each window and `weights` its bytes, so that their
    weighted mean is the bits per byte of the text whatever the metric.
    """

    higher_is_better: ClassVar[bool] = False
    scored: str = "held_out"
    """The split that is scored."""
    starts_with_mark: ClassVar[bool] = True
    """Whether the start token is put before the text (else the text brings its own)."""

    def __init__(self, context: int | None = None) -> None:
        """`context`: tokens per window; default: the model's, at most 2048."""
        if context is not None and context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        self.context = context
        self._streams: dict[str, tuple[PreTrainedTokenizerBase | None, TokenStream]] = {}

    @abstractmethod
    def text(self, split: str) -> bytes:
        """The bytes of a split."""

    def stream(self, loaded: LoadedModel, split: str) -> TokenStream:
        """A split as the model's tokens (kept, as encoding a long text takes seconds)."""
        kept = self._streams.get(split)
        if kept is None or kept[0] is not loaded.tokenizer:
            stream = encode(loaded, self.text(split), start=self.starts_with_mark)
            self._streams[split] = kept = (loaded.tokenizer, stream)
        return kept[1]

    def inputs(
        self, model: LoadedModel | PreTrainedModel, *, limit: int | None = None
    ) -> Iterator[Batch]:
        """The windows that `score` reads, one at a time: `input_ids` (1, tokens)."""
        loaded = LoadedModel.of(model)
        stream = self.stream(loaded, self.scored)
        for first, last in stream.windows(self.window_length(loaded), limit):
            yield {"input_ids": stream.read(first, last)[None].to(loaded.model.device)}

    def score_windows(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None,
        progress: Progress | None,
    ) -> tuple[Score, float, int, int]:
        """(bits-per-byte score, nats in all, tokens, words) of the windows that are scored."""
        loaded = LoadedModel.of(model)
        if not loaded.is_causal:
            raise ValueError(
                f"the task {self.name!r} needs a causal language model, but {loaded.name!r} is a "
                f"{loaded.family} encoder"
            )
        stream = self.stream(loaded, self.scored)
        spans = stream.windows(self.window_length(loaded), limit)
        nats = np.empty(len(spans))
        with evaluating(loaded.model) as device:
            for i, (first, last) in enumerate(spans):
                window = stream.read(first, last + 1).to(device)
                nats[i] = negative_log_likelihood(loaded.model, window[None]).item()
                if progress is not None:
                    progress(i + 1, len(spans))
        sizes = np.array([stream.bytes_in(span) for span in spans], dtype=np.float64)
        # A window that ends inside a character can cover no byte; it then weighs nothing.
        bits = nats / np.log(2) / np.maximum(sizes, 1.0)
        value = float(nats.sum() / np.log(2) / sizes.sum())
        tokens = sum(last - first for first, last in spans)
        words = sum(stream.words_in(span) for span in spans)
        return Score(value, bits, sizes), float(nats.sum()), tokens, words

    def window_length(self, loaded: LoadedModel) -> int:
        """Tokens per window for this model."""
        longest = min(loaded.context, _LONGEST_CONTEXT)
        if self.context is None:
            return longest
        if self.context > loaded.context:
            raise ValueError(
                f"context must be at most {loaded.context}, the model's, got {self.context}"
            )
        return self.context

    def batches(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        steps: int,
        batch_size: int,
        context: int | None = None,
        seed: int = 0,
    ) -> Iterator[Batch]:
        """Windows of the training split at random offsets; labels are the inputs, as usual."""
        loaded = LoadedModel.of(model)
        length = context or self.window_length(loaded)
        stream = self.stream(loaded, "train")
        last = len(stream.tokens) - length
        if last < 0:
            raise ValueError(f"context must be at most {last + length}, the text's, got {length}")
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(0, last + 1, (batch_size,), generator=generator)
            inputs = torch.stack([stream.read(s, s + length) for s in starts.tolist()])
            yield {"input_ids": inputs, "labels": inputs.clone()}


class StdlibBitsPerByte(LanguageModelling):
    """Bits per byte on the held-out files of this Python's standard library.

    On a Python whose held-out files differ from the manifest's, a note says so and scores must not
    be set beside published ones.
    """

    name: ClassVar[str] = "stdlib"
    metric: ClassVar[str] = "bits_per_byte"
    # The corpus has byte 0 before every file already.
    starts_with_mark: ClassVar[bool] = False

    def load(self, data: Path | None = None) -> StdlibBitsPerByte:
        """Read the corpus of the running Python; `data` is not needed."""
        load_stdlib()
        return self

    @property
    def corpus(self) -> StdlibCorpus:
        """Both halves of the corpus."""
        return load_stdlib()

    def text(self, split: str) -> bytes:
        """The "train" or "held_out" half."""
        if split not in {"train", "held_out"}:
            raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
        return self.corpus.train if split == "train" else self.corpus.held_out

    def windows(
        self,
        split: Literal["train", "held_out"] = "held_out",
        *,
        context: int = _LONGEST_CONTEXT,
        limit: int | None = None,
    ) -> Int[Tensor, "windows context_plus_1"]:
        """Whole consecutive windows of bytes, each with the byte after it (targets shifted by one).

        The ones that `score` uses with the same `limit`; all of them without.
        """
        raw = np.frombuffer(self.text(split), dtype=np.uint8)
        starts = range(0, len(raw) - context, context)
        if not starts:
            raise ValueError(f"context must be below {len(raw)}, the corpus, got {context}")
        chosen = [starts[i] for i in spread(len(starts), limit)]
        stacked = np.stack([raw[start : start + context + 1] for start in chosen])
        return torch.from_numpy(stacked.astype(np.int64))

    def score(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Bits per byte of the held-out half; `per_item` is that of each window."""
        score, *_ = self.score_windows(model, limit=limit, progress=progress)
        return Score(score.value, score.per_item, score.weights, self.notes())

    def notes(self) -> tuple[str, ...]:
        """What must be said beside every score on this corpus."""
        if self.corpus.comparable:
            return ()
        running = ".".join(map(str, sys.version_info[:3]))
        reference = read_manifest()["python"]
        return (f"not comparable: Python {running} (reference: Python {reference})",)


class WordLevelPerplexity(LanguageModelling):
    """Perplexity per word of a word-level corpus, for any causal model.

    The corpora are sequences of words between spaces, rare ones written `<unk>`.  A word-level
    model's perplexity is exp(nats / words), where each line end is a word too (`<eos>`); the same
    quotient is taken here for every model, with the nats summed over whatever tokens the model
    has.  So scores of different tokenizers can be compared.  `extra` also holds
    `token_perplexity`, exp(nats / tokens), which only models of one tokenizer share, and
    `bits_per_byte`.  Byte-level models read the text as UTF-8.
    """

    metric: ClassVar[str] = "perplexity"
    files: ClassVar[dict[str, tuple[str, ...]]]

    def __init__(
        self, context: int | None = None, split: Literal["valid", "test"] = "valid"
    ) -> None:
        """`split`: the part that is scored."""
        super().__init__(context)
        self.scored = split
        self._folder: Path | None = None

    def load(self, data: Path | None = None) -> WordLevelPerplexity:
        """Find the corpus; its files are read when they are needed."""
        self._folder = find_data(self.name, data, files=self.files[self.scored])
        return self

    def text(self, split: str) -> bytes:
        """The bytes of "train", "valid" or "test"."""
        if self._folder is None:
            self.load()
        assert self._folder is not None
        if split != self.scored and find_file(self._folder, *self.files[split]) is None:
            raise FileNotFoundError(
                f"{self._folder} holds no {split} split of {self.name!r}: "
                f"expected {' or '.join(self.files[split])}, plain or .gz"
            )
        return read_bytes(self._folder, *self.files[split])

    def score(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Perplexity per word; `per_item` is the bits per byte of each window."""
        score, nats, tokens, words = self.score_windows(model, limit=limit, progress=progress)
        value, per_token = float(np.exp(nats / words)), float(np.exp(nats / tokens))
        extra = {"token_perplexity": per_token, "bits_per_byte": score.value}
        notes = (
            f"per word and line end ({words} of them)",
            f"per token {per_token:.4g}",
            f"bits per byte {score.value:.4f}",
        )
        return Score(value, score.per_item, score.weights, notes, extra)


class WikiText2(WordLevelPerplexity):
    """WikiText-2 (Merity et al. 2016), validation split: 217,646 words with `<eos>`."""

    name: ClassVar[str] = "wikitext2"
    files: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("train.txt", "wiki.train.tokens"),
        "valid": ("valid.txt", "wiki.valid.tokens"),
        "test": ("test.txt", "wiki.test.tokens"),
    }


class PennTreebank(WordLevelPerplexity):
    """Penn Treebank in Mikolov's form, validation split: 73,760 words with `<eos>`."""

    name: ClassVar[str] = "ptb"
    files: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("ptb.train.txt",),
        "valid": ("ptb.valid.txt",),
        "test": ("ptb.test.txt",),
    }


class OwnText(LanguageModelling):
    """A text of one's own: `train.txt` and `valid.txt` (or `test.txt`) in the folder `--data`.

    The score is the bits per byte of the validation text, `per_item` that of each window.
    """

    name: ClassVar[str] = "text"
    metric: ClassVar[str] = "bits_per_byte"
    _held_out = ("valid.txt", "test.txt")

    def __init__(self, context: int | None = None) -> None:
        super().__init__(context)
        self._folder: Path | None = None

    def load(self, data: Path | None = None) -> OwnText:
        """Find the held-out text; files are read when they are needed."""
        self._folder = find_data("text", data, files=self._held_out)
        return self

    def text(self, split: str) -> bytes:
        """The bytes of "train" or "held_out"."""
        if self._folder is None:
            self.load()
        assert self._folder is not None
        return read_bytes(self._folder, *(("train.txt",) if split == "train" else self._held_out))

    def score(
        self,
        model: LoadedModel | PreTrainedModel,
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Bits per byte of the held-out text."""
        return self.score_windows(model, limit=limit, progress=progress)[0]


def negative_log_likelihood(
    model: PreTrainedModel, windows: Int[Tensor, "windows tokens"]
) -> Float[Tensor, " windows"]:
    """−Σ ln p of every token of each window but its first, in nats (float64)."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    logits = model(input_ids=inputs, use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    return nats.double().view(targets.shape).sum(1)
