"""Data sets and metrics by name.

task = get_task("stdlib").load()
task.score(load_model("stdlib"), limit=64).value       # bits per byte
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sparseloom.errors import unknown_name
from sparseloom.tasks.data import find_data

if TYPE_CHECKING:
    from sparseloom.tasks.base import Score, Task

__all__ = ["Score", "Task", "find_data", "get_task", "task_names"]

_TASKS = {
    "stdlib": ("language_modelling", "StdlibBitsPerByte"),
    "wikitext2": ("language_modelling", "WikiText2"),
    "ptb": ("language_modelling", "PennTreebank"),
    "sts-b": ("stsb", "SemanticSimilarity"),
    "sts-b-pairs": ("stsb_pairs", "PairSimilarity"),
    "sst-2": ("glue", "SST2"),
    "cola": ("glue", "CoLA"),
    "imdb": ("imdb", "MovieReviews"),
    "lra-text": ("lra_text", "LraText"),
    "lra-retrieval": ("lra_retrieval", "LraRetrieval"),
    "lra-image": ("lra_image", "LraImage"),
    "lra-listops": ("lra_listops", "LraListOps"),
    "imdb-sentiment": ("classification", "SentimentClassification"),
    "text": ("language_modelling", "OwnText"),
    "classification": ("classification", "OwnClassification"),
}


def task_names() -> tuple[str, ...]:
    """The names that `get_task` knows."""
    return tuple(_TASKS)


def get_task(name: str) -> Task:
    """The task of that name, its data not yet loaded.

    Raises ValueError naming the tasks there are.
    """
    if name not in _TASKS:
        raise unknown_name("task", name, _TASKS)
    module, kind = _TASKS[name]
    task: Task = getattr(import_module(f"sparseloom.tasks.{module}"), kind)()
    return task


def __getattr__(name: str) -> object:
    # Task and Score need torch; naming the tasks does not.
    if name in {"Score", "Task"}:
        return getattr(import_module("sparseloom.tasks.base"), name)
    raise AttributeError(f"module 'sparseloom.tasks' has no attribute {name!r}")
