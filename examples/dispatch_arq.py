"""Runs that a task queue dispatches: each task of arq drives one run, and passes it on if there is more to do.

    pip install stroma-runner arq
    redis-server                                             # in another terminal
    arq examples.dispatch_arq.WorkerSettings                 # in a third one
    python examples/dispatch_arq.py letter-1                 # submits a run and enqueues its first task

Only run ids are in the queue. The runs are in the store, so a task that comes twice changes nothing, and one
that is lost loses no work.
"""

import asyncio
import logging
import os
import sys
from datetime import timedelta
from typing import Any

from arq import Retry, create_pool
from arq.connections import ArqRedis, RedisSettings
from pydantic import BaseModel

from stroma import Flow, SQLiteStore, StoreError, StromaRunner
from stroma.runner.drive import Blocked, Busy, Suspended, Yielded

logger = logging.getLogger("dispatch")


class Letter(BaseModel):
    text: str


runner = StromaRunner.quick(store=SQLiteStore(os.environ.get("RUNS", "runs.db")), inline_wait_seconds=0)


@runner.node
async def send(letter: Letter) -> Letter:
    return Letter(text=f"sent: {letter.text}")


@runner.flow
async def remind(flow: Flow, letter: Letter) -> Letter:
    await flow.sleep(0.5)  # A week, say: no task runs meanwhile.
    return await flow.step(send, letter)


async def drive(ctx: dict[str, Any], run_id: str) -> str:
    """Continue a run, and enqueue the next task if there is more to do."""
    queue: ArqRedis = ctx["redis"]
    # arq cancels a task at its time limit and at the end of the process: the next task continues the run.
    try:
        outcome = await runner.drive(run_id, max_seconds=240)
    except StoreError as error:  # arq drops a task that raises anything else.
        raise Retry(defer=10) from error
    if isinstance(outcome, Blocked):
        logger.error("run %s cannot be continued by this code: %s", run_id, outcome.reason)
    if isinstance(outcome, Yielded):
        await queue.enqueue_job("drive", run_id)
    elif isinstance(outcome, Suspended | Busy | Blocked) and outcome.until is not None:
        await queue.enqueue_job("drive", run_id, _defer_until=outcome.until + timedelta(milliseconds=10))
    return type(outcome).__name__


async def submit(queue: ArqRedis, run_id: str, letter: Letter) -> str:
    """Store a run and enqueue its first task. Called again, it changes nothing."""
    handle = await runner.submit(remind, letter, run_id=run_id)
    await queue.enqueue_job("drive", handle.run_id)
    return handle.run_id


async def stop(ctx: dict[str, Any]) -> None:
    """End the runs in progress at their next step boundary; arq repeats their tasks, which it has cancelled."""
    await runner.shutdown(drain_seconds=30)


class WorkerSettings:
    functions = (drive,)
    on_shutdown = stop
    job_timeout = 300  # Longer than max_seconds, and a step on top.
    redis_settings = RedisSettings.from_dsn(os.environ.get("REDIS_URL", "redis://localhost"))


async def main(run_id: str) -> None:
    queue = await create_pool(WorkerSettings.redis_settings)
    print(await submit(queue, run_id, Letter(text="hello")))
    result = await runner.handle(run_id).result(timeout=60)
    print(result.status, result.output)
    await queue.aclose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
