"""Requests about a run that commands make: pause it, take that back, change its budget."""

from __future__ import annotations

import asyncio
from typing import Any

from stroma._utils.text import clean
from stroma.checkpoint.records import RunRecord
from stroma.cli.formatting import id_word
from stroma.cli.output import err
from stroma.cli.stores import Database
from stroma.runner.stored_runs import request

__all__ = ["request_of", "take_back_pause"]


def take_back_pause(database: Database, record: RunRecord) -> bool:
    """Take the pause of a run back, so that a worker continues it. Returns False if it is not paused."""
    if not request_of(database, record.run_id, "unpause"):
        return False
    err.line(
        f"run {clean(record.run_id)} is not paused any more; a worker that serves pipeline "
        f"{clean(record.pipeline, 100)!r} continues it"
    )
    err.line(f"or continue it here: {database.hint('resume', id_word(record.run_id), 'FILE.py:NAME')}")
    return True


def request_of(database: Database, run_id: str, method: str, *arguments: Any) -> bool:
    """Make a request about a run, and wait until its owner has read it. Raises Problem."""

    async def make() -> bool:
        try:
            return await request(database.reader, run_id, method, *arguments)
        finally:
            await database.close()

    with database.explain_errors():
        return asyncio.run(make())
