"""What is wrong with a trace, in one line."""

from __future__ import annotations

from pydantic import ValidationError


class TraceError(ValueError):
    """A trace that is missing, damaged, of another schema version, or at odds with itself."""


def first_problem(error: ValidationError) -> str:
    """The first problem pydantic found, on one line: `heads: Input should be …, got 'twelve'`."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "the whole"
    message = problem["msg"].replace("\n", " ")
    given = repr(problem.get("input"))
    shown = given if len(given) <= 60 else given[:57] + "..."
    return f"{where}: {message}, got {shown}"
