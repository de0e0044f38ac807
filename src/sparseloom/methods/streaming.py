"""StreamingLLM: the first tokens and the newest ones.

Xiao, Tian, Chen, Han, Lewis: Efficient Streaming Language Models with Attention Sinks, ICLR 2024
(arXiv 2309.17453), §3.2, and the authors' `mit-han-lab/streaming-llm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.generation import Generating, Reading, listed
from sparseloom.methods.prompt_run import PromptRun, check_keep, kept_of, newest, real_tokens
from sparseloom.methods.settings import check_at_least, check_choice


@dataclass(frozen=True)
class StreamingLLM(Generating):
    """Each step of generation reads the first `sinks` tokens and the `window` newest.

    Models give much attention to their first tokens, whatever these say; without them a plain
    window fails.  The prompt runs whole.  As in the authors' code the cache holds `sinks + window`
    tokens, and a step reads its own token besides.

    Args:
        sinks: first tokens of each sequence that always stay; 0 is a plain window.
        window: newest cached tokens: a number above 1, or a share of the prompt up to 1.
        positions: `"text"`: tokens keep the positions that they have in the text.  The original
            counts positions within its cache and rotates keys anew at each step, by which texts
            may outgrow the model; `"cache"` asks for that, and is refused: a choice of keys
            cannot express it.
    """

    name: ClassVar[str] = "streaming"

    sinks: int = 4
    window: float = 1020
    positions: Literal["text", "cache"] = "text"

    def __post_init__(self) -> None:
        check_at_least("sinks", self.sinks, 0)
        check_keep("window", self.window)
        check_choice("positions", self.positions, ("text", "cache"))

    def new_run(self, layers: int) -> StreamingRun:
        """Nothing but the length of the prompt is remembered.

        Raises:
            NotImplementedError: positions within the cache.
        """
        del layers
        if self.positions != "text":
            raise NotImplementedError(
                f"positions {self.positions!r} is not supported: keys stay as they are in the "
                "cache, use 'text'"
            )
        return StreamingRun(self)


class StreamingRun(PromptRun):
    """The choice of `StreamingLLM`; the same in all layers and heads."""

    def __init__(self, method: StreamingLLM) -> None:
        self._method = method

    def read(self, inputs: AttentionInputs) -> Reading:
        """Sinks, window, and the new token."""
        prompt = self.begin(inputs)
        real = real_tokens(inputs)
        kept = real & (real.cumsum(-1) <= self._method.sinks)
        kept[:, :-1] |= newest(real[:, :-1], kept_of(self._method.window, prompt))
        kept[:, -1] = real[:, -1]
        if bool((kept == real).all()):
            return Reading()
        return Reading(listed(kept[:, None], None))
