"""The writing connection of a Redis store: one round trip for all queued commits."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from typing import TypeVar

from stroma.checkpoint.durable.operations import CellChange, Commit, apply_changes, fenced_error
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
                    f"other processes keep changing the same run in {link.server.name}; use one process for each run, "
                    "then try again"
                ) from error
        time.sleep(random.uniform(0, pause))
        pause = min(pause * 2, 0.1)


class _RedisUnreachable(Exception):
    """The server does not answer, so the other operations would fail as well."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


class RedisConnection:
    """See :class:`stroma.checkpoint.durable.worker.Connection`."""

    def __init__(self, server: RedisEndpoint, ttl_ms: int | None) -> None:
        self.name = server.name
        self._server = server
        self._ttl_ms = ttl_ms
        self._link: RedisLink | None = None
        #: Identities of the jobs of the batch that are done.
        self._done: set[int] = set()

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> None:
        """Perform commits in one round trip, each a transaction; changes of one cell as one transaction; others one by one.

        The operations are concurrent, so any order of them is correct.
        """
        more()
        self._done.clear()
        try:
            link = self._open()
            if len(batch) == 1 and isinstance(batch[0].operation, Commit):
                self._commit(link, batch)
                return
            commits = [job for job in batch if isinstance(job.operation, Commit)]
            for portion in _portions(commits):
                self._commit(link, portion)
            cells: dict[str, list[Job]] = {}
            for job in batch:
                if isinstance(job.operation, CellChange):
                    cells.setdefault(job.operation.name, []).append(job)
            for changes in cells.values():
                if len(changes) > 1:
                    self._change_cell(link, changes)
            for job in batch:
                if id(job) not in self._done:
                    self._perform(link, job)
        except _RedisUnreachable as error:
            more()  # Queued operations would fail for the same reason, one after another.
            for job in batch:
                if id(job) not in self._done:
                    job.error = self._explain(error.reason)

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

    def _commit(self, link: RedisLink, jobs: list[Job]) -> None:
        sent: list[tuple[Job, Commit]] = []
        commands = []
        for job in jobs:
            assert isinstance(job.operation, Commit)
            commit: Commit = job.operation
            command = commit_command(commit.fence, commit.attempt, commit.step)
            job.error = link.size_error(command)
            if job.error is None:
                sent.append((job, commit))
                commands.append(command)
            else:
                self._done.add(id(job))
        try:
            replies = link.send(commands, atomic=len(commands) > 1) if commands else []
        except Exception as error:
            raise _RedisUnreachable(error) from error
        for (job, commit), reply in zip(sent, replies, strict=True):
            try:
                if isinstance(reply, Exception):
                    raise reply
                if not is_recorded(commit.fence.run, reply, self.name):
                    raise fenced_error(RedisRows(link, None).find(commit.run_id), commit.run_id, commit.fence)
            except Exception as error:
                job.error = self._explain(error)
            self._done.add(id(job))

    def _change_cell(self, link: RedisLink, jobs: list[Job]) -> None:
        """Perform all changes of one cell, or none: then apply() performs them one by one."""
        changes = [job.operation for job in jobs if isinstance(job.operation, CellChange)]
        try:
            answers = perform(link, self._ttl_ms, lambda rows: apply_changes(rows, changes))
        except Exception as error:
            if self._server.is_temporary(error):
                raise _RedisUnreachable(error) from error
            return  # One of them fails: performed one by one, it does not affect the others.
        for job, answer in zip(jobs, answers, strict=True):
            job.value = answer
            self._done.add(id(job))

    def _perform(self, link: RedisLink, job: Job) -> None:
        try:
            job.value = perform(link, self._ttl_ms, job.operation)
        except Exception as error:
            if self._server.is_temporary(error):
                raise _RedisUnreachable(error) from error
            job.error = self._explain(error)
        self._done.add(id(job))

    def _explain(self, error: Exception) -> StoreError:
        explained = self._server.explain(error)
        return copy.copy(explained) if explained is error else explained  # Each task needs its own exception.


def _portions(jobs: list[Job]) -> list[list[Job]]:
    """Return commits in portions of one round trip."""
    portions: list[list[Job]] = []
    size = _MAX_PORTION_BYTES
    for job in jobs:
        assert isinstance(job.operation, Commit)
        step = job.operation.step
        size += 0 if step is None else len(step.output)
        if size >= _MAX_PORTION_BYTES:
            portions.append([])
            size = 0
        portions[-1].append(job)
    return portions
