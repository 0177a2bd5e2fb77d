"""A process that has imported what is slow to import, and forks for each mutant: the child imports the broken source afresh.

It runs in a copy of the tree (``python -m tests.mutants.worker``), reads one JSON object a line: ``arguments`` for pytest and
``seconds``, and answers with one: ``code``, which is null after the time limit, and ``output``.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from typing import Any

PRELOADED = (
    "pytest",
    "pytest_asyncio.plugin",
    "pytest_timeout",
    "hypothesis",
    "pydantic",
    "httpx",
    "sqlite3",
)
MEMORY_BYTES = 6 << 30  # A mutant may loop, and fill a list in its loop.


def attempt(arguments: list[str], seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
                import pytest

                code = int(pytest.main(arguments))
                sys.stdout.flush()
            except BaseException:
                code = 70
            os._exit(code)
        until = time.monotonic() + seconds
        ended = 0
        while not ended and time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0 if ended else 0.01)
        try:
            os.killpg(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        if not ended:
            os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
        code = os.waitstatus_to_exitcode(status) if ended else None
        return {"code": code, "output": text[-20_000:]}


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    if "stroma" in sys.modules:
        raise SystemExit("stroma is imported already: every mutant would be tested as the unbroken source")
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(attempt(order["arguments"], order["seconds"])), flush=True)


if __name__ == "__main__":
    main()
