"""Every annotation of the package is checked while the tests run: types by beartype, shapes by
jaxtyping.

jaxtyping's import hook decorates each function.  Two of its effects would change what is tested,
so the decorator is wrapped before the hook is installed:

- inside `torch.compile` the plain function runs, because the checker cannot be traced and
  `fullgraph=True` would fail on it;
- the wrapper keeps the globals of the function that it wraps, because `torch.library.custom_op`
  looks up string annotations there.

As PEP 484 has it, an int is accepted where a float is asked for.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype

_checked = jaxtyping.jaxtyped
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    del typechecker

    def decorate(target: Any) -> Any:
        checked = _checked(typechecker=_beartype)(target)
        if not inspect.isfunction(target) or not inspect.isfunction(checked):
            return checked
        compiling = torch.compiler.is_compiling

        def either(*args: Any, **kwargs: Any) -> Any:
            return target(*args, **kwargs) if compiling() else checked(*args, **kwargs)

        at_home = types.FunctionType(
            either.__code__, target.__globals__, target.__name__, None, either.__closure__
        )
        return functools.update_wrapper(at_home, target)

    return decorate


jaxtyping.jaxtyped = _jaxtyped
jaxtyping.install_import_hook("sparseloom", "beartype.beartype")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter. It reads this when it is first imported, which
    # torch's FlexAttention does.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        # Kernels that are interpreted elsewhere run on the card: `-m gpu` means them, too.
        for item in items:
            if "triton" in item.path.parts:
                item.add_marker("gpu")
    reasons: dict[str, str] = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "a study: runs with --slow"
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
