"""The writing connection of a Redis store: one round trip for all queued commits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from stroma.checkpoint.durable.batches import ServerConnection, Unreachable
from stroma.checkpoint.durable.operations import Commit, fence_error, perform_all
from stroma.checkpoint.durable.rows import Rows
from stroma.checkpoint.durable.worker import Job
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.redis.rows import RedisRows, RunChanged, commit_command, is_recorded
from stroma.checkpoint.redis.server import RedisEndpoint, RedisLink

__all__ = ["RedisConnection", "perform"]

T = TypeVar("T")

#: Bytes of outputs in one round trip, so that the reply arrives within the timeout of the socket.
_MAX_PORTION_BYTES = 16 * 1024 * 1024


def perform(link: RedisLink, ttl_ms: int | None, operation: Callable[[Rows], T]) -> T:
    """Perform an operation as one transaction. Repeats it if another process was faster.

    Raises what the operation raises, StoreError, or the driver's error.
    """
    deadline, pause = time.monotonic() + link.server.patience_seconds, 0.001
    while True:
        try:
            rows = RedisRows(link, ttl_ms)
            value = operation(rows)
            rows.flush()
            return value
        except RunChanged as error:
            if time.monotonic() > deadline:
                raise StoreError(
                    f"other processes keep changing the same run in {link.server.name}; use one process "
                    "for each run, then try again"
                ) from error
        time.sleep(random.uniform(0, pause))
        pause = min(pause * 2, 0.1)


class RedisConnection(ServerConnection):
    """See :class:`stroma.checkpoint.durable.worker.Connection`."""

    can_roll_back = False

    def __init__(self, server: RedisEndpoint, ttl_ms: int | None) -> None:
        super().__init__(server.name, server.explain)
        self._server = server
        self._ttl_ms = ttl_ms
        self._link: RedisLink | None = None

    def handle(self) -> object:
        return self._link

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _open(self) -> RedisLink:
        if self._link is None:
            self._link = self._server.link()
        return self._link

    def _commit_all(self, jobs: list[tuple[Job, Commit]]) -> None:
        """Perform commits, each a transaction. One that the fence refuses fails at once."""
        link = self._open()
        for portion in _portions(jobs):
            commands = [commit_command(one.fence, one.attempt, one.step) for _, one in portion]
            try:
                replies = link.send(commands, atomic=len(commands) > 1)
            except Exception as error:
                raise Unreachable(error) from error
            for (job, commit), reply in zip(portion, replies, strict=True):
                try:
                    if isinstance(reply, Exception):
                        raise reply
                    if not is_recorded(commit.fence.run, reply, self.name):
                        raise fence_error(RedisRows(link, None), commit.fence, commit.run_id)
                except Exception as error:
                    self._settle(job, error=error)
                else:
                    self._settle(job)

    def _transact(self, operations: list[Any]) -> list[Any]:
        try:
            return perform(self._open(), self._ttl_ms, partial(perform_all, operations))
        except Exception as error:
            if self._server.is_temporary(error):
                raise Unreachable(error) from error
            raise


def _portions(jobs: list[tuple[Job, Commit]]) -> list[list[tuple[Job, Commit]]]:
    """Return commits in portions of one round trip."""
    portions: list[list[tuple[Job, Commit]]] = []
    size = _MAX_PORTION_BYTES
    for job, commit in jobs:
        size += 0 if commit.step is None else len(commit.step.output)
        if size >= _MAX_PORTION_BYTES:
            portions.append([])
            size = 0
        portions[-1].append((job, commit))
    return portions
