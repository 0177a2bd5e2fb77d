"""The event loop of a flow's body: it runs what is ready, and only delivered events make something ready.

It has no clock, no threads and no I/O of its own. The driver of the flow delivers one event at a time (the
end of a step, an answer, the time) and has the loop run until nothing is ready. So the order of tasks, calls
and cancellations in a body is a function of the order of events. The tasks of the real event loop never see
this one.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import sys
import weakref
from asyncio.events import _get_running_loop, _set_running_loop
from asyncio.tasks import _enter_task, _leave_task
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from contextvars import Context, ContextVar
from functools import partial
from typing import Any, Final, NoReturn

from stroma.checkpoint.flow_notes import LAST_MS

#: Callbacks between two events, after which the body is taken for one that waits in a loop: ``while not x:
#: await sleep(0)``.
_MAX_CALLBACKS: Final = 1_000_000


def refuse(name: str) -> NoReturn:
    """Refuse what a body may not do: it would wait for something that a replay does not have."""
    raise NotImplementedError(
        f"the body of a flow waits for its steps, timers and answers only, and called {name}() of its event "
        "loop; do this in a step"
    )


def refuse_in_body(call: str, instead: str) -> None:
    """Raise NotImplementedError in the body of a flow, where each resume would make this call again."""
    if type(_get_running_loop()) is BodyLoop:
        raise NotImplementedError(
            f"the body of a flow called {call}, which each resume would call again; use {instead}"
        )


def _refusal(name: str) -> Any:
    def method(self: Any, *args: Any, **options: Any) -> NoReturn:
        refuse(name)

    return method


_Refusing: Any = type(
    "_Refusing",
    (asyncio.AbstractEventLoop,),
    {name: _refusal(name) for name in vars(asyncio.AbstractEventLoop) if not name.startswith("_")},
)


#: True where a framework runs plain functions with asyncio.to_thread: they run at once in the body of a flow.
WITHOUT_THREADS: ContextVar[bool] = ContextVar("stroma_without_threads", default=False)


class BodyExecutor(Executor):
    """An executor whose functions run at once in the body of a flow, and in threads anywhere else.

    For a framework that runs plain functions in an executor which the caller may choose. The threads are
    those of the running event loop: a forked process would not have threads of this one.
    """

    def submit(self, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return a future of the running event loop, for its ``run_in_executor()``."""
        return asyncio.get_running_loop().run_in_executor(None, partial(func, *args, **kwargs))


class _BodyTask(asyncio.Task[Any]):
    """A task whose hash is its number: a set of tasks, as in a TaskGroup, has one order on replay."""

    def __init__(self, number: int, *args: Any, **options: Any) -> None:
        self._number = number
        super().__init__(*args, **options)

    def __hash__(self) -> int:
        return self._number


class BodyLoop(_Refusing):  # type: ignore[misc]  # mypy does not know a class that is made at run time.
    """An event loop for tasks that wait for each other, for calls of their flow and for its time."""

    def __init__(self, outer: asyncio.AbstractEventLoop, read_time: Callable[[], float]) -> None:
        self.outer = outer  # The real event loop.
        self._read_time = read_time
        self._ready: deque[Any] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timer_count = self._task_count = 0
        #: Async generators that have begun, and those that nothing references any more, in their order.
        self._generators = weakref.WeakValueDictionary[int, AsyncGenerator[Any, Any]]()
        self._left: list[AsyncGenerator[Any, Any]] = []
        self._generator_count = 0
        self._outer_hooks = sys.get_asyncgen_hooks()
        self._hooks: tuple[Any, Any] = self._note_generator, self._keep_generator
        self.tasks: dict[asyncio.Task[Any], None] = {}  # That have not ended, in their order.
        self.is_halted = False  # While it is True, nothing runs.

    def __repr__(self) -> str:
        return "<event loop of a flow's body>"

    # ------------------------------------------------------------------ for the driver

    def run_ready(self, task: asyncio.Task[Any] | None) -> None:
        """Run callbacks until none is ready. Called in ``task`` of the outer loop.

        Raises KeyboardInterrupt and SystemExit of the body, and RuntimeError for a body that does not wait.
        """
        outer, ready = self.outer, self._ready
        # Documented for loops and tasks of other libraries. From Python 3.14 on a thread has one current
        # task, of any loop.
        if task is not None:
            _leave_task(outer, task)
        _set_running_loop(self)
        # Generators that the body begins are closed by the body.
        sys.set_asyncgen_hooks(*self._hooks)
        try:
            for _ in range(_MAX_CALLBACKS):
                if not ready or self.is_halted:
                    return
                handle = ready.popleft()
                if not handle._cancelled:
                    try:
                        handle._context.run(handle._callback, *handle._args)
                    except (KeyboardInterrupt, SystemExit):
                        raise
                    except BaseException as error:
                        details = {"message": f"exception in {handle!r}", "exception": error}
                        self.call_exception_handler(details | {"handle": handle})
        finally:
            sys.set_asyncgen_hooks(*self._outer_hooks)
            _set_running_loop(outer)
            if task is not None:
                _enter_task(outer, task)
        raise RuntimeError(
            "the body of the flow does not wait for a step, a timer or an answer; "
            "replace its polling loop by an asyncio.Event"
        )

    @property
    def next_time(self) -> float | None:
        """Return the end of the next timer, in seconds on the clock of the body; None without timers."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def end_timers(self, now_ms: int) -> None:
        """Make ready what is due at a time, in ms on the clock of the body."""
        while (due := self.next_time) is not None and due * 1000 <= now_ms:
            self._ready.append(heapq.heappop(self._timers)[2])

    def close_generators(self) -> bool:
        """Have the async generators of the body closed, in their order. Return False if there are none."""
        generators = [*self._left, *(one for one in self._generators.values() if one not in self._left)]
        self._left, self._generators = [], weakref.WeakValueDictionary()
        if generators:
            self.tasks[self.create_task(_close_all(generators))] = None
        return bool(generators)

    def discard(self) -> None:
        """Forget everything, tasks that do not end without asyncio's message that they were destroyed."""
        for task in self.tasks:
            setattr(task, "_log_destroy_pending", False)  # noqa: B010  # asyncio has no public name for it.
        self.tasks.clear()
        self._ready.clear()
        self._timers.clear()
        # Cycles: without them a run and its trace are freed at once.
        self._hooks, self._read_time = (None, None), float

    def _note_generator(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._generator_count += 1
        self._generators[self._generator_count] = generator

    def _keep_generator(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._left.append(generator)  # Closed at the end of the flow: garbage collection is not an event.

    # ------------------------------------------------------------------ for tasks, futures, locks, timeouts

    def get_debug(self) -> bool:
        return False

    def time(self) -> float:
        return self._read_time()

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        if _get_running_loop() is not self:
            refuse("call_soon_threadsafe")
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        if math.isnan(when):
            raise ValueError("a timer must have a time, got nan")
        when = min(LAST_MS / 1000, when)  # No store and no datetime has a later time.
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: it is left out when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def run_in_executor(self, executor: Any, func: Callable[..., object], *args: Any) -> asyncio.Future[Any]:
        if not (isinstance(executor, BodyExecutor) or (executor is None and WITHOUT_THREADS.get())):
            refuse("run_in_executor")
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def create_task(
        self, coro: Any, *, name: str | None = None, context: Context | None = None, **options: Any
    ) -> asyncio.Task[Any]:
        # An eager start would run it before the task that creates it goes on, as a replay does: no matter.
        options.pop("eager_start", None)
        number = self._task_count = self._task_count + 1
        task = _BodyTask(number, coro, loop=self, name=name or f"Task-{number}", context=context)
        self.tasks[task] = None
        task.add_done_callback(lambda ended: self.tasks.pop(ended, None))
        return task

    def get_task_factory(self) -> None:
        return None

    def get_exception_handler(self) -> Any:
        return self.outer.get_exception_handler()

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.outer.default_exception_handler(context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.outer.call_exception_handler(context)


async def _close_all(generators: list[AsyncGenerator[Any, Any]]) -> None:
    for generator in generators:
        await generator.aclose()
