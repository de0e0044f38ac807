"""Where errors of a command end: one line on standard error and an exit code, never a traceback.

Exit codes: 0 done, 1 a fault of sparseloom itself, 2 bad input, 130 interrupted.
`SPARSELOOM_DEBUG=1` shows the traceback as well.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from sparseloom.errors import BAD_INPUT, one_line, tracebacks_wanted

# typer carries its own copy of click from some version on; its base is the same class either way.
_UsageError, _ClickException = typer.BadParameter.__mro__[1:3]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: `sys.argv`) and return the exit code."""
    from sparseloom.cli.app import app
    from sparseloom.cli.options import typed

    words = list(sys.argv[1:] if arguments is None else arguments)
    typed.set(words)
    try:
        code = app(args=words, prog_name="sparseloom", standalone_mode=False)
        sys.stdout.flush()
    except typer.Exit as exit_:
        return exit_.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _report("interrupted", 130)
    except BrokenPipeError:
        # The reader went away, as `| head` does: nothing to say, and nothing left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BAD_INPUT as error:
        return _report(one_line(error), 2)
    except Exception as error:  # noqa: BLE001  the boundary
        if isinstance(error, _ClickException):
            return _report(_usage(error), 2)
        hint = "please report it; SPARSELOOM_DEBUG=1 shows where it happened"
        return _report(f"internal: {type(error).__name__}: {one_line(error)} ({hint})", 1)
    return code if isinstance(code, int) else 0


def _usage(error: Exception) -> str:
    message = " ".join(getattr(error, "format_message", error.__str__)().split())
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "sparseloom"
    return f"{message.rstrip('.')} (see `{command} --help`)"


def _report(message: str, code: int) -> int:
    if tracebacks_wanted() and sys.exc_info()[0]:
        traceback.print_exc()
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return code
