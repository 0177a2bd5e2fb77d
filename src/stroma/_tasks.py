"""Threads and cancellation: awaiting things without losing what they did."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from stroma.checkpoint import CorruptCheckpoint, PipelineChanged, StoreError
from stroma.hooks import HookNotAsync, was_raised

__all__ = ["in_thread", "passes_through", "uninterrupted"]


async def in_thread(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call in a daemon thread of its own: one that is abandoned holds up neither the loop's end nor the process's."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(value)
        elif isinstance(error, (StopIteration, GeneratorExit)):
            # A future cannot carry the one; the other, coming out of an await, would mean that we are being closed.
            done.set_exception(RuntimeError(f"the node raised {type(error).__name__}: {error}"))
        else:
            done.set_exception(error)

    def work() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = (context.run(func, *args), None)
        except BaseException as error:
            outcome = (None, error)
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            pass  # The loop ended; nobody waits for this any more.

    threading.Thread(target=work, name=f"stroma-{getattr(func, '__name__', 'node')}", daemon=True).start()
    return await done


def passes_through(error: BaseException, cancelling: int, *, in_group: bool) -> bool:
    """Whether an exception is not a failure of the node but the end of this run or process."""
    kind = type(error)  # isinstance would ask the object for its __class__, which may raise.
    if issubclass(kind, Exception):
        # Ours only where the engine itself ran inside the call; out of a function they are those of a nested run.
        return in_group and issubclass(kind, (HookNotAsync, PipelineChanged, CorruptCheckpoint))
    if issubclass(kind, asyncio.CancelledError):
        # One that the node raised itself, while nobody cancels its task, is a failure like any other.
        task = asyncio.current_task()
        return task is None or task.cancelling() > cancelling
    if issubclass(kind, GeneratorExit):
        return not was_raised(error)
    return issubclass(kind, (KeyboardInterrupt, SystemExit))


async def uninterrupted(work: Awaitable[Any]) -> bool:
    """Await to the very end; True if the running task was cancelled meanwhile: the caller raises that afterwards."""
    future = asyncio.ensure_future(work)
    cancelled = False
    while not future.done():
        # What asyncio.wait() does, with less around it: a cancellation ends the waiting, not the work.
        waiter: asyncio.Future[None] = future.get_loop().create_future()
        wake = functools.partial(_wake, waiter)
        future.add_done_callback(wake)
        try:
            await waiter
        except asyncio.CancelledError:
            cancelled = True
        finally:
            future.remove_done_callback(wake)
    if future.cancelled():
        raise StoreError("the store gave up the operation by itself; resume the run once the store is well")
    future.result()
    return cancelled


def _wake(waiter: asyncio.Future[None], _: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_result(None)
