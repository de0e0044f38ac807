"""What methods that keep a part of the prompt share: its length, and budgets in terms of it."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.generation import Run, real_tokens


class PromptRun(Run):
    """A run that knows each sequence's prompt: what the cache held at the first step.

    Attributes:
        prompt_end: tokens of the cache at the first step, padding included; 0 before it.
        prompt_tokens: (batch,), those of them that are not padding; None before the first step.
    """

    needs_importance: ClassVar[bool] = False

    prompt_end: int = 0
    prompt_tokens: Int64[Tensor, " batch"] | None = None

    def prompt(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"] | None,
        head_importance: Float[Tensor, "batch heads"] | None,
    ) -> None:
        """Count the tokens."""
        del key_importance, head_importance
        if inputs.layer == 0:
            self.length = inputs.key.shape[2]

    def begin(self, inputs: AttentionInputs) -> Int64[Tensor, " batch"]:
        """First thing in `read`; returns `prompt_tokens`."""
        if inputs.layer == 0:
            self.length = inputs.key.shape[2]
        if self.prompt_tokens is None:
            self.prompt_end = inputs.key.shape[2] - 1
            self.prompt_tokens = real_tokens(inputs)[:, :-1].sum(-1)
        return self.prompt_tokens

    def crop(self, length: int) -> None:
        """Where it cuts into the prompt, what is left is the beginning of another one."""
        self.length = min(self.length, length)
        if length < self.prompt_end:
            self.prompt_end, self.prompt_tokens = 0, None

    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Prompts follow their sequences."""
        if self.prompt_tokens is not None:
            self.prompt_tokens = self.prompt_tokens.index_select(0, indices)


def newest(
    real: Bool[Tensor, "*rows keys"], counts: Int64[Tensor, "*#rows"]
) -> Bool[Tensor, "*rows keys"]:
    """The last `counts` of each row that are real."""
    order = real.cumsum(-1)
    return real & (order > order[..., -1:] - counts[..., None])


def check_keep(name: str, keep: float) -> None:
    """Refuse anything but a share, or a number of tokens above 1."""
    if not (0 <= keep <= 1 or (keep > 1 and float(keep).is_integer())):
        raise ValueError(f"{name} must be a share in [0, 1] or a whole number above 1, got {keep}")


def kept_of(keep: float, tokens: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
    """Tokens that a setting means: a share of `tokens`, rounded down, or above 1 a number."""
    if keep > 1:
        return torch.full_like(tokens, int(keep))
    # The small term undoes representation error, as in 0.29 · 100 = 28.999….
    return (tokens.double() * keep + 1e-9).floor().long()
