"""One workload and any number of named selections on it: what drives every machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike

import numpy as np
from jaxtyping import Int64, Shaped

from sparseloom.trace import spatten_csv, storage
from sparseloom.trace.errors import TraceError
from sparseloom.trace.schema import AttentionCall, Selection, Workload


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """What one run did, in numpy alone.

    Args:
        workload: the operators in order.
        selections: by name; each has one call per attention operator.
        tensors: sampled values by name, as `calls.3.query` (batch, heads, q_len, head_dim); for
            machines that need values and not only masks.

    Raises:
        TraceError: a selection contradicts the workload.
    """

    workload: Workload
    selections: Mapping[str, Selection] = field(default_factory=dict)
    tensors: Mapping[str, Shaped[np.ndarray, "..."]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        operators = self.workload.attention()
        for name, selection in self.selections.items():
            if name != selection.name:
                raise TraceError(f"selection {selection.name!r} is stored under {name!r}")
            if len(selection.calls) != len(operators):
                raise TraceError(
                    f"selection {name!r} has {len(selection.calls)} calls for "
                    f"{len(operators)} attention operators"
                )
            for i, (call, operator) in enumerate(zip(selection.calls, operators, strict=True)):
                try:
                    call.check(operator)
                except TraceError as error:
                    raise TraceError(f"selection {name!r}, call {i}: {error}") from None

    def selection(self, name: str | None = None) -> Selection:
        """A selection by name; None is the only one there is; "dense" is always there.

        Raises:
            ValueError: no such selection, or None with several to choose from.
        """
        if name is None and len(self.selections) == 1:
            return next(iter(self.selections.values()))
        if name is not None and name in self.selections:
            return self.selections[name]
        if name == "dense" or (name is None and not self.selections):
            calls = (AttentionCall(),) * len(self.workload.attention())
            return Selection("dense", calls, {"method": "dense", "version": 1})
        known = ", ".join(dict.fromkeys([*self.selections, "dense"]))
        given = "a selection must be named" if name is None else f"no selection {name!r}"
        raise ValueError(f"{given}: {self.workload.name} has {known}")

    def kept_pairs(self, selection: str | None = None) -> list[Int64[np.ndarray, "batch heads"]]:
        """Kept pairs of every attention call, per sequence and query head."""
        calls = self.selection(selection).calls
        return [
            call.kept_pairs(operator, self.workload.padding_of(operator))
            for call, operator in zip(calls, self.workload.attention(), strict=True)
        ]

    def allowed_pairs(self) -> list[Int64[np.ndarray, "batch heads"]]:
        """Pairs that causality and padding allow in every attention call."""
        return [self.workload.allowed_pairs(op) for op in self.workload.attention()]

    def density(self, selection: str | None = None) -> float:
        """Kept pairs over allowed pairs, over all calls."""
        allowed = sum(int(pairs.sum()) for pairs in self.allowed_pairs())
        kept = sum(int(pairs.sum()) for pairs in self.kept_pairs(selection))
        return kept / allowed if allowed else 0.0

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write a folder, whole or not at all.

        Raises:
            FileExistsError: `path` exists and `overwrite` is False.
            TraceError: something in the trace cannot be stored.
        """
        storage.save(path, self.workload, self.selections, self.tensors, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Trace:
        """Read a folder that `save` wrote.

        Raises:
            TraceError: one line that names the file and what is wrong with it.
        """
        workload, selections, tensors = storage.load(path)
        try:
            return cls(workload, selections, tensors)
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from None

    @classmethod
    def from_spatten_csv(
        cls, path: str | PathLike[str], *, name: str = "spatten", heads: int | None = None
    ) -> Trace:
        """Read a workload of the SpAtten authors' repository (CSV, plain or gzip).

        The files count kept keys and values; they do not say which ones were kept. Only
        attention is listed.

        Args:
            path: the file.
            name: what to call the selection.
            heads: heads of the model, where head pruning hides some; default the largest seen.

        Raises:
            TraceError: one line that names the file, the line and the column.
        """
        workload, selection = spatten_csv.read(path, name=name, heads=heads)
        return cls(workload, {name: selection})

    def to_spatten_csv(self, path: str | PathLike[str], selection: str | None = None) -> None:
        """Write the generation steps of a selection as the SpAtten authors' files have them.

        Prompts are left out, and steps count from 0. Of which keys and values were kept, their
        number is written; of query heads that share keys, each has its own row. Heads keep their
        numbers. What `from_spatten_csv` reads comes out as it was, byte by byte.

        Args:
            path: the file; gzip where it ends in `.gz`.
            selection: which one; None is the only one there is.

        Raises:
            TraceError: no generation steps, or more than one sequence.
            ValueError: no such selection.
        """
        spatten_csv.write(path, self.workload, self.selection(selection))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Trace)
            and self.workload == other.workload
            and dict(self.selections) == dict(other.selections)
            and self.tensors.keys() == other.tensors.keys()
            and all(np.array_equal(self.tensors[k], other.tensors[k]) for k in self.tensors)
        )

    def __repr__(self) -> str:
        calls = len(self.workload.attention())
        return (
            f"Trace({self.workload.name!r}: {len(self.workload.operators)} operators, {calls} "
            f"attention calls, selections: {', '.join(self.selections) or 'none'})"
        )
