"""From what transformers calls an attention mask to what attention needs: which keys are padding.

transformers merges causality, padding and everything else into one mask and shares it between
layers.  Here a mask function hands over the padding alone, as (batch, 1, 1, keys); masks made
elsewhere (4-D masks of the user, BERT of 4.x) are taken apart again.  What is neither causality
nor padding is refused, because ignoring it would give wrong answers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from sparseloom.integrations import _compat

# Additive masks use the dtype's minimum, some old ones -10000: below this, a weight is nil.
_MASKED = -1e4


def mask_function(
    *,
    kv_length: int,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **arguments: Any,
) -> Bool[Tensor, "batch 1 1 kv_len"] | None:
    """The mask function registered with transformers: key padding, or None where all keys count.

    Args:
        kv_length, kv_offset: the keys that this mask covers.
        mask_function: the pattern that transformers wants: causal, bidirectional, or more.
        attention_mask: (batch, seen keys), true = attend.
        local_size: width of the model's own sliding window.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether `mask_function` is the plain
            pattern of its kind.
        **arguments: the query span (see `_compat.query_span`) and what is not needed here.

    Raises:
        NotImplementedError: the pattern is more than causality and padding, or the cache static.
    """
    q_length, q_offset = _compat.query_span(arguments)
    kv_offset = int(kv_offset)
    if local_size is not None and q_offset + q_length - kv_offset > local_size:
        raise NotImplementedError(
            f"sliding_window: the model's own window of {local_size} tokens is shorter than the "
            f"{q_offset + q_length} tokens seen, and a window inside the model is not supported"
        )
    windowed = local_size is not None and (allow_is_causal_skip or allow_is_bidirectional_skip)
    if mask_function is not None and not windowed:
        _refuse_other_patterns(mask_function, windowed=local_size is not None)
    if attention_mask is None:
        return None
    end = kv_offset + kv_length
    short = max(0, end - attention_mask.shape[1])
    keep = torch.nn.functional.pad(attention_mask.bool(), (0, short))[:, kv_offset:end]
    return None if bool(keep.all()) else keep[:, None, None, :]


def _refuse_other_patterns(function: Callable[..., Any], *, windowed: bool) -> None:
    """`windowed`: the model has a window, which is known to hold all tokens."""
    from transformers.masking_utils import causal_mask_function

    if windowed and function.__qualname__.startswith("sliding_window_overlay"):
        return
    if function is causal_mask_function or function.__name__ == "bidirectional_mask_function":
        return
    held = _compat.captured(function)
    if "mask_functions" in held and function.__qualname__.startswith("and_masks"):
        for part in held["mask_functions"]:
            _refuse_other_patterns(part, windowed=windowed)
        return
    sequence = held.get("packed_sequence_mask")
    if isinstance(sequence, Tensor):  # 4.x always adds it; with one sequence it changes nothing
        if bool((sequence == sequence[:, :1]).all()):
            return
        raise NotImplementedError(
            "position_ids: several sequences packed into one row are not supported; give each "
            "its own row and mark the padding in attention_mask"
        )
    raise NotImplementedError(
        f"the model's attention pattern ({function.__qualname__}) is more than causality and "
        "padding, which is not supported"
    )


class PaddingReader:
    """Reads key padding out of attention masks; remembers the last one, which layers share."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], tuple[object, ...], Tensor] | None = None

    def __call__(
        self, mask: Shaped[Tensor, "..."] | None, *, q_len: int, is_causal: bool
    ) -> Bool[Tensor, "mask_batch mask_keys"] | None:
        """(batch or 1, keys), true = attend; None where every key counts.

        Raises:
            NotImplementedError: the mask says more than causality and padding.
        """
        if mask is None:
            return None
        # A mask that its owner has written into since is another one.
        version = None if mask.is_inference() else mask._version
        key = (q_len, is_causal, version)
        if self._last is not None and self._last[0]() is mask and self._last[1] == key:
            return self._last[2]
        keep = _key_padding(mask, q_len, is_causal)
        self._last = (weakref.ref(mask), key, keep)
        return keep


def _key_padding(mask: Tensor, q_len: int, is_causal: bool) -> Tensor:
    if mask.dim() != 4:
        raise NotImplementedError(
            "attention_mask must be (batch, keys) or (batch, 1, queries, keys), got shape "
            f"{tuple(mask.shape)}"
        )
    if mask.shape[1] != 1:
        raise NotImplementedError(
            f"attention_mask: one mask per head is not supported, got shape {tuple(mask.shape)}"
        )
    if mask.shape[2] > 1 and mask.stride(2) == 0:
        mask = mask[:, :, :1]  # expanded from one row: nothing but padding
    keep = mask if mask.dtype == torch.bool else _from_additive(mask)
    keep = keep[:, 0]  # (B, 1 or L, S)
    columns = keep.any(dim=1)  # (B, S)
    if keep.shape[1] == 1:
        return columns
    expected = columns[:, None, :]
    if is_causal:
        kv_len = keep.shape[-1]
        rows = torch.arange(kv_len - q_len, kv_len, device=mask.device)
        expected = expected & (torch.arange(kv_len, device=mask.device) <= rows[:, None])
    # Rows that attend to nothing (padded queries) may be written either way.
    real = keep.any(dim=-1, keepdim=True) & expected.any(dim=-1, keepdim=True)
    if bool(((keep != expected) & real).any()):
        raise NotImplementedError(
            "attention_mask: only causality and padding are supported, and this 4-D mask is "
            "something else"
        )
    return columns


def _from_additive(mask: Tensor) -> Tensor:
    keep = mask == 0
    if bool((~keep & (mask > _MASKED)).any()):
        raise NotImplementedError(
            "attention_mask: a mask that adds a position bias to the scores is not supported"
        )
    return keep
