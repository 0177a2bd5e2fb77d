"""Threads and cancellation: awaiting things without losing what they did."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from stroma.checkpoint import CorruptCheckpoint, PipelineChanged, StoreError
from stroma.hooks.dispatch import HookNotAsync

__all__ = ["LAST_SECONDS", "gather", "in_thread", "passes_through", "refusal", "uninterrupted"]

#: For how long a cancelled task waits for what must not be lost: longer than our own stores try.
LAST_SECONDS = 60.0


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
        elif isinstance(error, StopIteration):  # A future cannot carry it.
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
    """Return whether what a node raised is not its failure but the end of this run or process.

    Every BaseException that is no Exception is, but for a CancelledError while nobody cancels the node's task.
    """
    kind = type(error)  # isinstance would ask the object for its __class__, which may raise.
    if issubclass(kind, Exception):
        # Ours only where the engine itself ran inside the call; out of a function they are those of a nested run.
        return in_group and issubclass(kind, (HookNotAsync, PipelineChanged, CorruptCheckpoint))
    if issubclass(kind, asyncio.CancelledError):
        # One that the node raised itself, while nobody cancels its task, is a failure like any other.
        task = asyncio.current_task()
        return task is None or task.cancelling() > cancelling
    return True


async def uninterrupted(work: Awaitable[Any]) -> tuple[Exception | None, bool]:
    """Await to the very end. Returns what it raised, and whether the running task was cancelled meanwhile: the caller
    raises that afterwards.

    A task that is cancelled does not wait for ever: what has not ended after LAST_SECONDS is given up as a StoreError.
    """
    loop = asyncio.get_running_loop()
    future = _begun(work, loop)
    deadline: float | None = None
    while not future.done():
        left = None if deadline is None else deadline - loop.time()
        if left is not None and left <= 0:
            future.cancel()
            return _given_up(), True
        # What asyncio.wait() does, with less around it: a cancellation ends the waiting, not the work.
        waiter: asyncio.Future[None] = loop.create_future()
        wake = functools.partial(_wake, waiter)
        future.add_done_callback(wake)
        timer = None if left is None else loop.call_later(left, _wake, waiter, future)
        try:
            await waiter
        except asyncio.CancelledError:
            deadline = deadline or loop.time() + LAST_SECONDS
        finally:
            future.remove_done_callback(wake)
            if timer is not None:
                timer.cancel()
    cancelled = deadline is not None
    if future.cancelled():
        return refusal(asyncio.CancelledError()), cancelled
    error = future.exception()
    return None if error is None else refusal(error), cancelled


def _begun(work: Awaitable[Any], loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
    """The work as a future. What need not wait for anything is done now, without a turn of the loop (Python 3.12)."""
    if asyncio.iscoroutine(work) and sys.version_info >= (3, 12):
        return asyncio.Task(work, loop=loop, eager_start=True)
    return asyncio.ensure_future(work, loop=loop)


def _given_up() -> StoreError:
    error = StoreError(
        f"the store has not answered for {LAST_SECONDS:g} s since the run was cancelled; look after the store, then "
        "resume the run: that shows whether its last output is kept"
    )
    error.transient = False
    return error


def _wake(waiter: asyncio.Future[None], _: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def refusal(error: BaseException) -> Exception:
    """What a store raised, as its refusal: a CancelledError or GeneratorExit of its own is nobody else's.

    Raises what tells the process to stop.
    """
    if isinstance(error, Exception):
        return error
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    return StoreError(
        f"the store gave up the operation by itself ({type(error).__name__}); resume the run once the store is well"
    )


async def gather(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Results in order. The first exception cancels and awaits the rest, and comes out as itself.

    Not a TaskGroup: up to Python 3.12 that cancels the task around it to wake it, and so can swallow a cancellation
    from outside that comes at the same moment, or leave its own behind.
    """
    loop = asyncio.get_running_loop()
    failed: list[BaseException] = []
    left, cancelled = len(work), False
    waiter: asyncio.Future[None] = loop.create_future()

    def abort() -> None:
        for task in running:
            task.cancel()

    def ended(task: asyncio.Task[Any]) -> None:
        nonlocal left
        left -= 1
        error = None if task.cancelled() else task.exception()
        if error is not None:
            failed.append(error)
            if len(failed) == 1:
                abort()
        if not left and not waiter.done():
            waiter.set_result(None)

    running = [loop.create_task(item) for item in work]
    for task in running:
        task.add_done_callback(ended)
    while left:
        try:
            await waiter
        except asyncio.CancelledError:
            cancelled = True
            abort()
            waiter = loop.create_future()
    # In the order in which they failed; what tells the process to stop is told first.
    first = next((e for e in failed if not isinstance(e, Exception)), failed[0] if failed else None)
    if cancelled and (first is None or isinstance(first, Exception)):
        raise asyncio.CancelledError
    if first is not None:
        raise first
    return [task.result() for task in running]
