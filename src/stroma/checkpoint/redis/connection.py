"""The connection that a Redis store writes with: one round trip for all commits that wait."""

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

_LARGEST = (
    16 * 1024 * 1024
)  # bytes of output that are sent at once: a reply must come within the socket's timeout


def perform(link: RedisLink, ttl_ms: int | None, operation: Callable[[Rows], T]) -> T:
    """Do an operation as one transaction; again, if another process was faster.

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
                    f"other processes keep changing the same in {link.server.name}; see that one alone is at work on a run, "
                    "then try again"
                ) from error
        time.sleep(random.uniform(0, pause))
        pause = min(pause * 2, 0.1)


class _RedisUnreachable(Exception):
    """The server does not answer, so there is no use in trying the other operations."""

    def __init__(self, why: Exception) -> None:
        super().__init__(why)
        self.why = why


class RedisConnection:
    """See :class:`stroma.checkpoint.durable.worker.Connection`."""

    def __init__(self, server: RedisEndpoint, ttl_ms: int | None) -> None:
        self.name = server.name
        self._server = server
        self._ttl_ms = ttl_ms
        self._link: RedisLink | None = None
        #: The jobs of the batch that are done, by identity.
        self._done: set[int] = set()

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> None:
        """Commits together in one round trip, each a transaction of its own; changes of one cell as one transaction;
        everything else one by one.

        They all wait at the same time: nobody can tell in which order they were done.
        """
        more()
        self._done.clear()
        try:
            link = self._open()
            if len(batch) == 1 and isinstance(batch[0].operation, Commit):
                self._commit(link, batch)
                return
            commits = [job for job in batch if isinstance(job.operation, Commit)]
            for some in _portions(commits):
                self._commit(link, some)
            cells: dict[str, list[Job]] = {}
            for job in batch:
                if isinstance(job.operation, CellChange):
                    cells.setdefault(job.operation.name, []).append(job)
            for changes in cells.values():
                if len(changes) > 1:
                    self._one_cell(link, changes)
            for job in batch:
                if id(job) not in self._done:
                    self._do(link, job)
        except _RedisUnreachable as gone:
            more()  # They would fail for the same reason, one after another.
            for job in batch:
                if id(job) not in self._done:
                    job.error = self._explain(gone.why)

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
            job.error = link.refused(command)
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
                    raise fenced_error(RedisRows(link, None).find(commit.run_id), commit.run_id)
            except Exception as error:
                job.error = self._explain(error)
            self._done.add(id(job))

    def _one_cell(self, link: RedisLink, jobs: list[Job]) -> None:
        """Changes of one cell, all or none of them; those that are not done by this are left."""
        changes = [job.operation for job in jobs if isinstance(job.operation, CellChange)]
        try:
            told = perform(link, self._ttl_ms, lambda rows: apply_changes(rows, changes))
        except Exception as error:
            if self._server.passes(error):
                raise _RedisUnreachable(error) from error
            return  # One of them is at fault: alone, it spoils no other.
        for job, value in zip(jobs, told, strict=True):
            job.value = value
            self._done.add(id(job))

    def _do(self, link: RedisLink, job: Job) -> None:
        try:
            job.value = perform(link, self._ttl_ms, job.operation)
        except Exception as error:
            if self._server.passes(error):
                raise _RedisUnreachable(error) from error
            job.error = self._explain(error)
        self._done.add(id(job))

    def _explain(self, error: Exception) -> StoreError:
        told = self._server.explain(error)
        return copy.copy(told) if told is error else told  # Each task raises one of its own.


def _portions(jobs: list[Job]) -> list[list[Job]]:
    """Commits in portions that are sent at once."""
    portions: list[list[Job]] = []
    size = _LARGEST
    for job in jobs:
        assert isinstance(job.operation, Commit)
        step = job.operation.step
        size += 0 if step is None else len(step.output)
        if size >= _LARGEST:
            portions.append([])
            size = 0
        portions[-1].append(job)
    return portions
