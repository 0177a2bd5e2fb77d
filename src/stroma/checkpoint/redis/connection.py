"""The writing connection of a Redis store: one round trip for all queued commits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from stroma.checkpoint.durable.batches import ServerConnection, Unreachable
from stroma.checkpoint.durable.operations import Commit, fenced_error
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
            sent: list[tuple[Job, Commit, tuple[Any, ...]]] = []
            for job, commit in portion:
                command = commit_command(commit.fence, commit.attempt, commit.step)
                if (problem := link.size_error(command)) is not None:
                    self._settle(job, error=problem)
                else:
                    sent.append((job, commit, command))
            try:
                replies = link.send([command for *_, command in sent], atomic=len(sent) > 1) if sent else []
            except Exception as error:
                raise Unreachable(error) from error
            for (job, commit, _), reply in zip(sent, replies, strict=True):
                try:
                    if isinstance(reply, Exception):
                        raise reply
                    if not is_recorded(commit.fence.run, reply, self.name):
                        run = RedisRows(link, None).find(commit.run_id)
                        raise fenced_error(run, commit.run_id, commit.fence)
                except Exception as error:
                    self._settle(job, error=error)
                else:
                    self._settle(job)

    def _transact(self, operation: Callable[[Rows], Any]) -> Any:
        try:
            return perform(self._open(), self._ttl_ms, operation)
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
