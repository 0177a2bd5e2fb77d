"""Threads, tasks and cancellation: awaiting work without losing its result."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Final
from weakref import WeakKeyDictionary

from stroma._utils.access import error_text
from stroma.checkpoint import CorruptCheckpoint, PipelineChanged, StoreError
from stroma.hooks.dispatch import HookNotAsync

#: Places by owner, event loop and their number.
_Places = WeakKeyDictionary[Any, WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, asyncio.Semaphore]]]
#: The places outside of all plain nodes, or inside one of them.
_PLACES: ContextVar[_Places] = ContextVar("stroma_thread_places", default=_Places())  # noqa: B039


def thread_places(owner: object, limit: int) -> asyncio.Semaphore:
    """Return the places of a runner's plain nodes in the running event loop. ``owner``: its registry."""
    loops = _PLACES.get().setdefault(owner, WeakKeyDictionary())
    by_limit = loops.setdefault(asyncio.get_running_loop(), {})
    return by_limit.setdefault(limit, asyncio.Semaphore(limit))


def leave_place(places: asyncio.Semaphore) -> None:
    """Return a place, and hand it to the first attempt that waits."""
    with suppress(RuntimeError):  # The loop was closed under it.
        places.release()


#: Message of the cancellation of a task that is given up. It reaches the tasks that the task awaits.
_GIVEN_UP: Final = "given up"
#: Tasks that call an effect, and if they were given up meanwhile.
_in_flight: Final[dict[asyncio.Task[Any], bool]] = {}


def give_up(task: asyncio.Task[Any]) -> None:
    """Cancel a task, or have it cancelled once the attempt of an effect that it makes has its end."""
    if task in _in_flight:
        _in_flight[task] = True
    else:
        task.cancel(_GIVEN_UP)


def begin_flight() -> asyncio.Task[Any] | None:
    """Note that the running task calls an effect. Return it for :func:`end_flight`; None if it did."""
    task = asyncio.current_task()
    if task is None or task in _in_flight:
        return None
    _in_flight[task] = False
    return task


def end_flight(task: asyncio.Task[Any] | None) -> None:
    """Note that the attempt has its end. If the task was given up, its next await raises the cancellation."""
    if task is not None and _in_flight.pop(task):
        task.cancel(_GIVEN_UP)


#: Warning about a function that was abandoned.
CONTINUES: Final = "node %r continues in its thread, which cannot be stopped; max_threads no longer counts it"
#: For how long a cancelled task waits for what must not be lost: longer than our own stores try.
LAST_SECONDS = 60.0


async def in_thread(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call in a separate daemon thread: an abandoned one delays neither the loop nor the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(value)
        elif isinstance(error, StopIteration):  # A future cannot carry it.
            done.set_exception(RuntimeError(f"the node raised {error_text(error)}"))
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
            pass  # The loop has ended, and nothing waits for this.

    threading.Thread(target=work, name=f"stroma-{getattr(func, '__name__', 'node')}", daemon=True).start()
    return await done


async def call_in_thread(
    func: Callable[..., Any], args: tuple[Any, ...], abandoned: Callable[[], None]
) -> Any:
    """Call in a thread; if it returns an awaitable, await that in this task.

    ``abandoned`` is called if the caller is cancelled while the thread runs: a thread cannot be stopped.
    """
    is_running = True

    def call() -> Any:
        nonlocal is_running
        _PLACES.set(_Places())  # Plain nodes in it must not wait for the place that it takes.
        try:
            return func(*args)
        finally:
            is_running = False

    try:
        returned = await in_thread(call, ())
    except asyncio.CancelledError:
        if is_running:
            abandoned()
        raise
    return await returned if isinstance(returned, Awaitable) else returned


def passes_through(error: BaseException, cancelling: int, *, in_group: bool) -> bool:
    """Return True if the exception must propagate instead of being recorded as a failure of the node.

    Every BaseException that is not an Exception must, except a CancelledError while the task of the node is
    not being cancelled.
    """
    kind = type(error)  # isinstance would ask the object for its __class__, which may raise.
    if issubclass(kind, Exception):
        # Ours only if the engine itself ran inside the call; from a function they belong to a nested run.
        return in_group and issubclass(kind, (HookNotAsync, PipelineChanged, CorruptCheckpoint))
    if issubclass(kind, asyncio.CancelledError):
        # If the node raised it itself, without a cancellation of its task, it is a failure like any other.
        task = asyncio.current_task()
        return task is None or task.cancelling() > cancelling
    return True


def is_closed(error: BaseException) -> bool:
    """Return True if the coroutine that has caught an exception is being closed: it can await nothing.

    Then Python has closed what it awaits, and raised a new GeneratorExit in its own frame. One that a node
    raises has passed the frame of the node.
    """
    trace = error.__traceback__
    return issubclass(type(error), GeneratorExit) and (trace is None or trace.tb_next is None)


class Shield:
    """Awaits work to its end although the task is cancelled; the caller raises the cancellation afterwards.

    Attributes:
        cancellation: the first exception by which the task was cancelled meanwhile; None if it was not. Code
            around the run recognises it by its arguments, so this exception itself must be raised.
    """

    cancellation: asyncio.CancelledError | None = None

    async def finish(self, work: Awaitable[Any]) -> Exception | None:
        """Await to the end, and return the exception of the work.

        A cancelled task waits for LAST_SECONDS at most: then the work is cancelled, and a StoreError
        returned.
        """
        loop = asyncio.get_running_loop()
        future = _as_future(work, loop)
        deadline: float | None = None
        while not future.done():
            remaining = None if deadline is None else deadline - loop.time()
            if remaining is not None and remaining <= 0:
                future.cancel()
                return _timed_out()
            try:
                await asyncio.wait([future], timeout=remaining)  # A cancellation does not end the work.
            except asyncio.CancelledError as came:
                # Without its traceback: that references this frame.
                self.cancellation = self.cancellation or came.with_traceback(None)
                deadline = deadline or loop.time() + LAST_SECONDS
        if future.cancelled():
            return as_store_error(asyncio.CancelledError())
        error = future.exception()
        return None if error is None else as_store_error(error)


def _as_future(work: Awaitable[Any], loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
    """Return the work as a future. From Python 3.12 on, work that never waits is done at once."""
    if asyncio.iscoroutine(work) and sys.version_info >= (3, 12):
        return asyncio.Task(work, loop=loop, eager_start=True)
    return asyncio.ensure_future(work, loop=loop)


def _timed_out() -> StoreError:
    error = StoreError(
        f"the store has not answered for {LAST_SECONDS:g} s since the run was cancelled; look after the "
        "store, then resume the run: that shows whether its last output is stored"
    )
    error.transient = False
    return error


def as_store_error(error: BaseException) -> Exception:
    """Return a store's exception as an Exception: its CancelledError or GeneratorExit is a StoreError.

    Raises KeyboardInterrupt and SystemExit.
    """
    if isinstance(error, Exception):
        return error
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    return StoreError(
        f"the store cancelled the operation ({type(error).__name__}); resume the run when the store is "
        "available"
    )


class LoopTicks:
    """Counts ticks of an event loop while attempts begin.

    A timer, and not a callback of the next turn: that would cost each step of a flow a turn of the loop.
    """

    __slots__ = ("count", "is_due", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self.count = 0
        #: The next tick is coming.
        self.is_due = False

    def start(self) -> None:
        """Change the count after TICK_SECONDS, or as soon as the loop is free again."""
        if self.loop is not None:
            # An empty context: that of the caller would keep the run alive until the timer.
            self.loop.call_later(TICK_SECONDS, self._tick, context=contextvars.Context())
            self.is_due = True

    def _tick(self) -> None:
        self.count += 1
        self.is_due = False


TICK_SECONDS: Final = 0.02
_local: Final = threading.local()


def loop_ticks() -> LoopTicks:
    """Return the ticks of the running event loop."""
    ticks: LoopTicks | None = getattr(_local, "ticks", None)
    # Not get_running_loop(), which takes 0.7 us on Python 3.11: a thread runs one loop at a time.
    if ticks is not None and ticks.loop is not None and ticks.loop.is_running():
        return ticks
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return LoopTicks(None)
    ticks = _local.ticks = LoopTicks(loop)
    return ticks


class TaskPool:
    """Tasks: the first exception cancels the others and is raised by :meth:`join`.

    Not a TaskGroup: up to Python 3.12 that cancels the task around it to wake it, and so can swallow a
    cancellation from outside that comes at the same moment, or leave its own behind.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        #: A dict, for its order: they are cancelled in the order in which they began, and so the same way
        #: each time.
        self._running: dict[asyncio.Task[Any], None] = {}
        self._errors: list[BaseException] = []
        self._was_aborted = self._lost_a_task = False
        self._has_room: asyncio.Future[None] | None = None
        self._is_idle: asyncio.Future[None] | None = None

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Start a task, whether or not there is room."""
        self.add(asyncio.create_task(work))

    def add(self, task: asyncio.Task[Any]) -> None:
        """Add a task that has just been created."""
        self._running[task] = None
        task.add_done_callback(self._finish)

    async def wait_for_room(self) -> None:
        """Wait until another task may start. Called by a task of the pool, which does not count."""
        while self._limit is not None and len(self._running) > self._limit:
            self._has_room = asyncio.get_running_loop().create_future()
            await self._has_room

    async def join(self) -> None:
        """Await all tasks. A cancellation of the caller cancels them, and is raised when they have ended.

        If the caller is given up, so are they (see :func:`stroma.engine.tasks.give_up`).
        """
        cancelled: asyncio.CancelledError | None = None
        while self._running:
            self._is_idle = asyncio.get_running_loop().create_future()
            try:
                await self._is_idle
            except asyncio.CancelledError as came:
                cancelled = cancelled or came.with_traceback(None)
                self._abort(give_up if came.args == (_GIVEN_UP,) else asyncio.Task.cancel)
        # The first that was raised, but a KeyboardInterrupt or SystemExit before any Exception.
        error = next(
            (e for e in self._errors if not isinstance(e, Exception)),
            self._errors[0] if self._errors else None,
        )
        if (cancelled or self._lost_a_task) and (error is None or isinstance(error, Exception)):
            error = cancelled or asyncio.CancelledError()
        if error is not None:
            try:
                raise error
            finally:  # The traceback references this frame: each failure would be a reference cycle.
                self._errors.clear()
                del error, cancelled

    def _abort(self, cancel: Callable[[asyncio.Task[Any]], object]) -> None:
        self._was_aborted = True
        for task in self._running:
            cancel(task)

    def _finish(self, task: asyncio.Task[Any]) -> None:
        self._running.pop(task, None)
        error = None
        if task.cancelled():
            self._lost_a_task = self._lost_a_task or not self._was_aborted
        else:
            error = task.exception()
        if error is not None:
            self._errors.append(error)
            if len(self._errors) == 1:
                self._abort(give_up if isinstance(error, Exception) else asyncio.Task.cancel)
        for waiter in (self._has_room, None if self._running else self._is_idle):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks in order and await their ends; then raise a cancellation that came meanwhile."""
    pending = set(tasks)
    for task in tasks:
        task.cancel()
    cancelled: asyncio.CancelledError | None = None
    while pending:
        try:
            ended, pending = await asyncio.wait(pending)
            for task in ended:
                if not task.cancelled():
                    task.exception()  # Otherwise asyncio logs it.
        except asyncio.CancelledError as came:
            cancelled = cancelled or came
    raise_if(cancelled)


def raise_if(cancelled: asyncio.CancelledError | None) -> None:
    """Raise the cancellation that came while something was awaited to its end, if there was one."""
    if cancelled is not None:
        try:
            raise cancelled
        finally:  # Or the exception and this frame would be a cycle.
            del cancelled


def has_running_loop() -> bool:
    """Return True if an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def gather(work: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Return the results in order. The first exception cancels the rest, then is raised."""
    pool = TaskPool()
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    for task in tasks:
        pool.add(task)
    await pool.join()
    return [task.result() for task in tasks]
