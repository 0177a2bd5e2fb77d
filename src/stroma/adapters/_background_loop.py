"""Steps of sync code: the engine runs on a background event loop, the function in the thread that called it.

So a function meets the thread, the thread-locals and the absence of a running loop that it would meet without
a guard, and async hooks work all the same. Streams use the same way of handing calls back, on whatever loop
the engine runs.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
#: Context variables with the values that they were set to.
Changes: TypeAlias = Sequence[tuple[contextvars.ContextVar[Any], Any]]
_MISSING = object()


def changes_since(base: contextvars.Context) -> Changes:
    """Return what was set in this context, and not in the one that it was copied from."""
    now = contextvars.copy_context()
    return [(var, value) for var, value in now.items() if base.get(var, _MISSING) is not value]


@contextmanager
def applied(changes: Changes) -> Iterator[None]:
    """Apply changes of another context to the code inside."""
    tokens = [(var, value, var.set(value)) for var, value in changes]
    try:
        yield
    finally:
        for var, value, token in reversed(tokens):
            if var.get() is value:  # Else the code inside has set it, and its caller shall see that.
                with suppress(ValueError):  # It is closed in another context.
                    var.reset(token)


class _Loop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="stroma-guard", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()


_shared: _Loop | None = None
_pid = 0
_lock = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """Return the background loop of this process; for calls from its own thread another one: no deadlock."""
    global _shared, _pid, _lock
    # First use, or in a forked child, where nobody runs the parent's loop or frees its lock.
    if _pid != os.getpid():
        _lock = threading.Lock()
        _shared, _pid = None, os.getpid()
    with _lock:
        if _shared is None or not _shared.thread.is_alive():
            _shared = _Loop()
    here = threading.current_thread()
    return _Loop().loop if here.name == "stroma-guard" else _shared.loop


class CallOver(Exception):
    """The attempt of a call has ended, so that nobody takes what the call returns."""


class Turn:
    """One call that the engine asks for. Whoever makes it answers with :meth:`settle`.

    Attributes:
        is_over: the engine was cancelled, by a time limit for instance, and takes no outcome any more.
    """

    __slots__ = ("_changes", "_future", "_is_running", "_loop", "_scope", "is_over")

    def __init__(self, base: contextvars.Context) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[tuple[Any, BaseException | None]] = self._loop.create_future()
        # Spans and the current node, set by the engine and by hooks in a task of their own.
        self._changes = changes_since(base)
        self.is_over = self._is_running = False
        #: Interrupts an async call.
        self._scope: asyncio.Timeout | None = None

    def here(self) -> AbstractContextManager[None]:
        """Apply the context of the engine's task to the code inside."""
        return applied(self._changes)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Apply that context to the call inside. Raises CallOver, before or after it, if it is over."""
        self._is_running = True
        try:
            if self.is_over:
                raise CallOver
            with self.here():
                yield
            if self.is_over:
                raise CallOver
        finally:
            self._is_running = False

    @asynccontextmanager
    async def acalling(self) -> AsyncIterator[None]:
        """Do the same for an async call on the loop of the engine, and interrupt it once it is over."""
        with self.calling():
            async with asyncio.timeout(None) as self._scope:
                yield

    def settle(self, value: Any, error: BaseException | None) -> None:
        """Set the outcome of the call. Safe to call from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._settle, value, error)
        except RuntimeError:
            pass  # The loop was closed; nobody waits any more.

    def _settle(self, value: Any, error: BaseException | None) -> None:
        if not self._future.done():
            self._future.set_result((value, error))  # Not as its exception: StopIteration cannot be one.

    async def outcome(self) -> tuple[Any, BaseException | None]:
        """Return the outcome. An attempt that is over waits for its call, which no other one may overlap."""
        try:
            return await self._future
        except asyncio.CancelledError:
            self.is_over = True
            if self._scope is not None and self._is_running:
                self._scope.reschedule(self._loop.time())
            while self._is_running:
                self._future = self._loop.create_future()
                with suppress(asyncio.CancelledError):
                    await self._future
            raise


def hand_back(
    base: contextvars.Context, post: Callable[[Turn], None]
) -> Callable[[], Coroutine[Any, Any, tuple[Any, BaseException | None]]]:
    """Return a function for the engine that lets the calling thread make the call."""

    async def call() -> tuple[Any, BaseException | None]:
        turn = Turn(base)
        post(turn)
        return await turn.outcome()

    return call


def start_in_background(
    work: Coroutine[Any, Any, Any],
    context: contextvars.Context | None,
    done: Callable[[asyncio.Task[Any]], None],
) -> Callable[[], None]:
    """Run a coroutine in a context on the background loop; return what cancels it. ``done``: called there."""
    loop = _loop()
    tasks: list[asyncio.Task[Any]] = []
    shared = loop is (_shared and _shared.loop)

    def ended(task: asyncio.Task[Any]) -> None:
        if not shared:
            loop.call_soon(loop.stop)
        done(task)

    def start() -> None:
        task = loop.create_task(work, context=context)
        tasks.append(task)
        task.add_done_callback(ended)

    loop.call_soon_threadsafe(start)

    def cancel() -> None:
        loop.call_soon_threadsafe(lambda: tasks[0].cancel())

    return cancel


def run_in_background(work: Coroutine[Any, Any, T], context: contextvars.Context | None) -> T:
    """Run a coroutine in a context on the background loop and return its result, blocking."""
    over = threading.Event()
    ended: list[asyncio.Task[T]] = []

    def done(task: asyncio.Task[T]) -> None:
        ended.append(task)
        over.set()

    start_in_background(work, context, done)
    over.wait()
    return ended[0].result()
