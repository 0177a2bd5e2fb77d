"""One clock and one order of events for several simulated processes, both drawn from a seed."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from stroma.testing.clock import FakeClock


class Clock(FakeClock):
    """Time that the scheduler moves; the readings of two simulations of one seed are the same."""

    def __init__(self) -> None:
        super().__init__()
        self._start_ns = 1_800_000_000 * 10**9
        self._base = 1000.0

    def milliseconds(self) -> int:
        """Return the wall clock in milliseconds since the epoch."""
        return self._time_ns() // 1_000_000

    def set(self, seconds: float) -> None:
        """Move the clock to so many seconds since its start."""
        self._passed = seconds


class Scheduler:
    """The events of all processes in order of time; what is due at once runs in a drawn order.

    Attributes:
        now: seconds since the start.
        current: the process whose code runs.
    """

    def __init__(self, draw: random.Random, clock: Clock) -> None:
        self.draw = draw
        self.clock = clock
        self.now = 0.0
        self.processes: list[Process] = []
        self.current: Process | None = None
        self._timers: list[tuple[float, int, Process | None, Callable[[], None]]] = []
        self._numbers = 0

    def at(self, when: float, process: Process | None, call: Callable[[], None]) -> None:
        """Call at a time, in a process: not if it is dead then, and after the pause if it is paused."""
        self._numbers += 1
        heapq.heappush(self._timers, (max(when, self.now), self._numbers, process, call))

    def after(self, seconds: float, process: Process | None, call: Callable[[], None]) -> None:
        """Call after a delay; see :meth:`at`."""
        self.at(self.now + seconds, process, call)

    def run(self, until: Callable[[], bool], seconds: float) -> bool:
        """Run until something is so. Return False if the time was over first, or nothing was left to do."""
        end = self.now + seconds
        while not until():
            ready = [process for process in self.processes if process.ready and not process.dead]
            if ready:
                (ready[0] if len(ready) == 1 else self.draw.choice(ready)).turn()
                continue
            if not self._timers or self._timers[0][0] > end:
                return False
            when, _, process, call = heapq.heappop(self._timers)
            if process is not None:
                if process.dead:
                    continue
                if process.paused_until > when:
                    self.at(process.paused_until, process, call)
                    continue
            self.now = when
            self.clock.set(when)
            self.enter(process, call)
        return True

    def enter(self, process: Process | None, call: Callable[[], None]) -> None:
        """Call as a process: its event loop is the running one."""
        before, self.current = self.current, process
        loop = events._get_running_loop()
        events._set_running_loop(process)
        try:
            call()
        finally:
            events._set_running_loop(loop)
            self.current = before


class Process(asyncio.AbstractEventLoop):
    """A simulated process, which is its event loop: it ends by never being run again.

    Attributes:
        pid: in the names of its sessions.
        place: the machine or container that it is on: there, others can tell that it died.
    """

    def __init__(self, scheduler: Scheduler, pid: int, place: int, name: str) -> None:
        self.scheduler = scheduler
        self.pid = pid
        self.place = place
        self.name = name
        self.dead = False
        self.paused_until = 0.0
        self.ready: deque[asyncio.Handle] = deque()
        self.tasks: list[asyncio.Task[Any]] = []
        self.main: asyncio.Task[Any] | None = None
        self.unhandled: list[str] = []
        scheduler.processes.append(self)

    def die(self) -> None:
        """Stop for ever, wherever its code is: none of it runs again."""
        self.dead = True
        self.ready.clear()
        self.scheduler.processes.remove(self)

    def bury(self) -> None:
        """Close what its code was suspended in. The process is dead: nothing of that reaches a store."""
        for task in self.tasks:
            task._log_destroy_pending = False
            if not task.done():
                try:
                    coroutine: Any = task.get_coro()
                    coroutine.close()
                except BaseException:
                    pass
        self.tasks.clear()

    def turn(self) -> None:
        """Run what is ready, and what that makes ready, until there is nothing more."""
        scheduler, ready = self.scheduler, self.ready
        before, scheduler.current = scheduler.current, self
        events._set_running_loop(self)
        try:
            while ready and not self.dead:
                handle = ready.popleft()
                if not handle._cancelled:
                    handle._run()
        finally:
            events._set_running_loop(None)
            scheduler.current = before

    def time(self) -> float:
        return self.scheduler.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self.dead

    def is_closed(self) -> bool:
        return self.dead

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if not self.dead:
            self.ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self,
        delay: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.scheduler.now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)

        def due() -> None:
            if not handle._cancelled:
                self.ready.append(handle)

        self.scheduler.at(when, self, due)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        return None

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, **options)
        self.tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Call after a moment, in this very thread."""
        future = self.create_future()

        def work() -> None:
            try:
                value = func(*args)
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(value)

        self.scheduler.after(self.scheduler.draw.uniform(0.0001, 0.002), self, work)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.dead:
            self.unhandled.append(f"{context.get('message')}: {context.get('exception')!r}")
