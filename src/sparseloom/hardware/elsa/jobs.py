"""Which keys are candidates: a recorded selection, ELSA's own search, or a share at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from sparseloom.hardware.attention_core import Sampled, Tally, sampled, visible
from sparseloom.hardware.elsa.config import ElsaConfig
from sparseloom.hardware.elsa.numbers import candidates, level_of, similarity
from sparseloom.hardware.elsa.pipeline import Head
from sparseloom.hashing import Hasher, angle_bias, factor_sizes, make_hasher
from sparseloom.trace import AttentionCall, Operator, Selection, Trace


@dataclass
class Candidates:
    """The heads of a trace, one call and sequence at a time.

    Args:
        config: the machine.
        trace, selection: what runs on it.
        tally: told what the candidates rest on.
        seed: of keys that are drawn.
    """

    config: ElsaConfig
    trace: Trace
    selection: Selection
    tally: Tally
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.drawn = False

    def heads(self, call: int, operator: Operator, sequence: int) -> Iterator[Head]:
        """Every head that is alive, in order."""
        made = self.selection.calls[call]
        pairs = visible(self.trace.workload, operator, sequence)
        follows = self.config.search.mode == "approximate" and self.follows
        if follows and made.tokens_alive is not None:
            pairs = pairs & made.tokens_alive[sequence]
        real = np.asarray(pairs.any(axis=0))
        pairs = np.ascontiguousarray(pairs[:, real])
        seen = pairs.sum(axis=1)
        values = None
        if self.config.search.mode == "approximate" and not follows:
            values = sampled(self.trace, call, operator)
        for h in range(operator.heads):
            if follows and made.heads_alive is not None and not made.heads_alive[h]:
                continue
            if self.config.search.mode == "base":
                kept = pairs
            elif follows:
                kept = self._followed(made, operator, sequence, h, real, pairs, seen)
            elif values is not None:
                kept = self._searched(values, sequence, h, real, pairs)
            else:
                kept = self._drawn(pairs, np.ceil(self.config.search.retention * seen))
                self.tally.note(
                    f"{self.config.search.retention:g} of the keys are candidates, drawn at "
                    "random, where the trace holds no queries, keys and values"
                )
            yield Head(kept, seen)

    @property
    def follows(self) -> bool:
        """Whether the selection's keys are the candidates."""
        own = self.selection.method.get("method") == "elsa"
        return own or self.config.search.evidence == "selection"

    def _followed(
        self,
        made: AttentionCall,
        operator: Operator,
        sequence: int,
        head: int,
        real: Bool[np.ndarray, "kv_len"],
        pairs: Bool[np.ndarray, "q_len keys"],
        seen: Int64[np.ndarray, "q_len"],
    ) -> Bool[np.ndarray, "q_len keys"]:
        if made.key_counts is not None:
            self.tally.note("which keys are kept is drawn at random: the trace counts them only")
            return self._drawn(pairs, np.minimum(made.key_counts[sequence, head], seen))
        if made.mask is None:
            return pairs
        mask = made.mask
        offsets, keys = mask.query_keys(
            min(sequence, mask.batch - 1), head * mask.heads // operator.heads
        )
        kept = np.zeros((operator.q_len, operator.kv_len), np.bool_)
        rows = np.repeat(np.arange(operator.q_len), np.diff(offsets))
        kept[rows, keys[offsets[0] : offsets[-1]]] = True
        return kept[:, real] & pairs

    def _searched(
        self,
        values: Sampled,
        sequence: int,
        head: int,
        real: Bool[np.ndarray, "kv_len"],
        pairs: Bool[np.ndarray, "q_len keys"],
    ) -> Bool[np.ndarray, "q_len keys"]:
        search = self.config.search
        query, key, _ = values.head(sequence, head)
        hasher = hasher_of(self.config, query.shape[-1])
        bias = angle_bias(hasher.dim, hasher.bits, form=hasher.form)
        found = similarity(
            query, key[real], pairs, hasher=hasher, bias=bias, numbers=self.config.numbers
        )
        self.tally.note(
            "candidates are those of ELSA's own search in the recorded queries and keys, with a "
            f"threshold per head that keeps {search.retention:g} of its pairs"
        )
        return candidates(found, pairs, level_of(found, pairs, search.retention))

    def _drawn(
        self, pairs: Bool[np.ndarray, "q_len keys"], counts: np.ndarray
    ) -> Bool[np.ndarray, "q_len keys"]:
        self.drawn = True
        lots = np.where(pairs, self.random.random(pairs.shape), 2.0)
        return pairs & (lots.argsort(axis=1).argsort(axis=1) < counts[:, None])


def hasher_of(config: ElsaConfig, head_dim: int) -> Hasher:
    """The machine's hash for vectors of this length: as many bits as Kronecker factors give."""
    bits = int(np.prod(factor_sizes(head_dim)))
    return make_hasher(head_dim, bits, form=config.search.form, seed=config.search.seed)
