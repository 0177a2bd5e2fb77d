"""The command line; each command is imported when it is called."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, *, program: str = "stroma") -> int:
    """Run one command and return its exit code (see :class:`stroma.cli.errors.Code`).

    ``program``: the command that the user typed; suggested commands in messages begin with it. STROMA_PROGRAM
    precedes it in a process of its own: `./dev run stroma` in a clone.
    """
    try:
        from stroma.cli.app import start
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        # The command comes with the core, what it needs with an extra.
        sys.stderr.write(
            f"stroma: the command line needs click; install it with: {sys.executable} -m pip install "
            "'stroma-runner[cli]'\n"
        )
        return 3
    except KeyboardInterrupt:
        sys.stderr.write("stroma: stopped\n")
        return 130
    if argv is None:
        program = os.environ.get("STROMA_PROGRAM") or program
    code = start(sys.argv[1:] if argv is None else list(argv), program)
    if argv is None and "temporalio.bridge" in sys.modules:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End the process without the interpreter's own end.

    The Temporal client has threads of its own, which may ask for the interpreter while it ends, and then
    abort the process.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
