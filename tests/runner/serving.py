"""A worker in this process, for tests of what it continues."""

from __future__ import annotations

import asyncio
from typing import Any

from stroma import Pipeline, StromaRunner
from stroma.runner.worker import WorkerHealth


class Serving:
    """A worker in this process, and the outcomes of its runs by id."""

    def __init__(self, runner: StromaRunner, *pipelines: Pipeline, **options: Any) -> None:
        self.runner = runner
        self.outcomes: dict[str, list[Any]] = {}
        self._news = asyncio.Event()
        self.health = WorkerHealth()
        settings = {"poll_seconds": 0.02, "health": self.health, "on_result": self._note, **options}
        self.task = asyncio.ensure_future(runner.serve(*pipelines, **settings))

    def _note(self, run_id: str, outcome: Any) -> None:
        self.outcomes.setdefault(run_id, []).append(outcome)
        self._news.set()

    async def until(self, count: int) -> None:
        """Wait for the outcomes of so many runs."""
        while len(self.outcomes) < count:
            self._news.clear()
            assert not self.task.done(), self.task
            await asyncio.wait(
                [self.task, asyncio.ensure_future(self._news.wait())], return_when=asyncio.FIRST_COMPLETED
            )

    async def __aenter__(self) -> Serving:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.task.done():
            await self.runner.shutdown()
        await self.task

    def statuses(self, run_id: str) -> list[str]:
        return [str(one.status) for one in self.outcomes[run_id]]
