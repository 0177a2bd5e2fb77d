"""FakeClock: a clock whose waits take no time."""

from __future__ import annotations

import asyncio
import functools
import math
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from stroma.checkpoint.durable import worker as _worker
from stroma.checkpoint.memory import rows as _memory_rows
from stroma.checkpoint.sqlite import connection as _sqlite_rows
from stroma.engine import loop as _engine
from stroma.engine import metering as _usage
from stroma.engine import tasks
from stroma.failures import providers as classifiers
from stroma.limits import breaker, reservations
from stroma.runner import map as _map  # noqa: F401, loaded to be patched
from stroma.runner.flows import body  # noqa: F401

#: Rooms whose modules read the clock of the process as `from time import ...`.
_ROOMS: Final = ("stroma.adapters.", "stroma.engine.", "stroma.hooks.", "stroma.runner.")
#: Tolerance for sums of the same seconds in another order.
_ROUNDING: Final = 1e-6


class FakeClock:
    """Clock that stands still while code runs, and jumps over each wait when nothing else can run.

    A context manager, for code with and without an event loop; ``stroma_clock`` is the fixture. Inside of it,
    all event loops of the process and Stroma itself use it: ``asyncio.sleep`` and ``asyncio.timeout`` of any
    code, waits between attempts, Retry-After (dates, too), time limits of nodes and hooks, latency budgets,
    durations in the trace, limits, breakers, and budgets that runs share in memory or SQLite. Waits end in
    the order in which they are due, across runs.

    Work outside of the event loop takes real time. While a thread of Stroma or of ``asyncio.to_thread``, or a
    store, is working, the clock advances like a real one. While sockets are open it jumps over waits between
    attempts only. Leases use the clock of their store, and code that calls ``time.time()`` the real one.

    Attributes:
        waits: seconds of each wait between two attempts, in the order in which they began.

    Raises RuntimeError if another one is active, or the event loop is not one of asyncio's own.
    """

    _active: ClassVar[FakeClock | None] = None

    def __init__(self, *, start: datetime | None = None) -> None:
        self._start_ns = time.time_ns() if start is None else int(start.timestamp() * 1_000_000) * 1000
        self._base = time.monotonic()
        self._passed = 0.0
        self._ticks = 0
        self._lock = threading.RLock()
        self._loops: dict[asyncio.AbstractEventLoop, _Idle] = {}
        self._patched: list[tuple[Any, str, Any]] = []
        #: When waits between attempts end.
        self._due: list[float] = []
        #: Number of operations running outside of event loops.
        self._outside = 0
        self.waits: list[float] = []

    # ------------------------------------------------------------------ for tests

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was created."""
        return self._passed

    def now(self) -> datetime:
        """Return the current time of the clock, in UTC."""
        return datetime.fromtimestamp(self._start_ns / 1e9, UTC) + timedelta(seconds=self._passed)

    def advance(self, seconds: float) -> None:
        """Move the clock forward. Raises ValueError for a negative duration."""
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {seconds!r}")
        self._pass(seconds)
        for loop in list(self._loops):
            try:
                loop.call_soon_threadsafe(_nothing)  # It may be waiting for something else.
            except RuntimeError:
                pass  # It is closed.

    # ------------------------------------------------------------------ readings

    def _pass(self, seconds: float) -> None:
        with self._lock:
            self._passed += seconds
            for loop, idle in list(self._loops.items()):
                self._set_resolution(loop, idle)

    def _set_resolution(self, loop: asyncio.AbstractEventLoop, idle: _Idle) -> None:
        # A timer is due before `time + resolution`, which after 194 days is `time` itself: it would never be.
        loop.__dict__["_clock_resolution"] = max(idle.resolution, math.ulp(self._monotonic()))

    def _monotonic(self) -> float:
        return self._base + self._passed

    def _ns(self) -> int:
        # No two readings are equal: stores distinguish attempts by their start.
        with self._lock:
            self._ticks += 1
            return int(self._monotonic() * 1e9) + self._ticks

    def _time_ns(self) -> int:
        # A run reads both clocks and distinguishes them.
        return self._start_ns + int(self._passed * 1e9) + self._ticks

    # ------------------------------------------------------------------ putting it in place

    def __enter__(self) -> Self:
        if FakeClock._active is not None:
            raise RuntimeError("a FakeClock is active already; use that one")
        FakeClock._active = self
        try:
            self._put_in_place()
            try:
                running = asyncio.get_running_loop()
            except RuntimeError:
                pass
            else:
                self._take(running)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, value in reversed(self._patched):
            setattr(owner, name, value)
        self._patched.clear()
        for loop in list(self._loops):
            self._give_back(loop)
        FakeClock._active = None

    def _put_in_place(self) -> None:
        shim = _Time(self)
        for module in (_memory_rows, classifiers, breaker, reservations):
            self._patch(module, "time", shim)
        self._patch(_sqlite_rows, "_now_ms", lambda: self._time_ns() // 1_000_000)
        clocks: dict[str, Any] = {
            "monotonic": self._monotonic,
            "perf_counter": self._monotonic,
            "perf_counter_ns": self._ns,
            "time_ns": self._time_ns,
        }
        for module in [module for name, module in sys.modules.items() if name.startswith(_ROOMS)]:
            for name, reading in clocks.items():
                if vars(module).get(name) is getattr(time, name):
                    self._patch(module, name, reading)
        self._patch(_engine, "sleep", self._sleep)
        for module in (tasks, _usage):
            self._patch(module, "in_thread", self._watched(module.in_thread))
        submit = _worker.Worker.submit
        self._patch(_worker.Worker, "submit", lambda worker, work: self._watch(submit(worker, work)))
        run_forever = asyncio.BaseEventLoop.run_forever

        @functools.wraps(run_forever)
        def run(loop: asyncio.BaseEventLoop) -> None:
            self._take(loop)
            run_forever(loop)

        self._patch(asyncio.BaseEventLoop, "run_forever", run)

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop in self._loops:
            return
        for known in [known for known in self._loops if known.is_closed()]:
            del self._loops[known]
        selector = getattr(loop, "_selector", None)
        if selector is None or not hasattr(loop, "_run_once"):
            raise RuntimeError(
                "FakeClock works with asyncio's own event loops, not with "
                f"{type(loop).__module__}.{type(loop).__name__}; run this test on asyncio.SelectorEventLoop"
            )
        attributes = loop.__dict__
        idle = _Idle(self, selector, loop.run_in_executor, attributes["_clock_resolution"])
        self._loops[loop] = idle
        self._set_resolution(loop, idle)
        attributes["_selector"] = idle
        attributes["time"] = self._monotonic
        attributes["run_in_executor"] = lambda *work: self._watch(idle.run_in_executor(*work))
        # It waits for threads, and from Python 3.12 on gives up after 300 s.
        attributes["shutdown_default_executor"] = self._watched(loop.shutdown_default_executor)

    def _give_back(self, loop: asyncio.AbstractEventLoop) -> None:
        idle = self._loops.pop(loop)
        attributes = loop.__dict__
        if attributes.get("_selector") is idle:
            attributes["_selector"] = idle.selector
        attributes["_clock_resolution"] = idle.resolution
        attributes.pop("time", None)
        attributes.pop("run_in_executor", None)
        attributes.pop("shutdown_default_executor", None)
        for timer in getattr(loop, "_scheduled", ()):
            # Shift pending timers back by the time that passed on this clock only.
            timer._when -= self._monotonic() - time.monotonic()

    # ------------------------------------------------------------------ waiting

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        due = self._monotonic() + seconds
        self._due.append(due)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._due.remove(due)

    def _watched(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def watched(*args: Any) -> Any:
            self._busy(1)
            try:
                return await call(*args)
            finally:
                self._busy(-1)

        return watched

    def _watch(self, future: asyncio.Future[Any]) -> asyncio.Future[Any]:
        self._busy(1)
        future.add_done_callback(lambda _: self._busy(-1))
        return future

    def _busy(self, change: int) -> None:
        with self._lock:
            self._outside += change


class _Idle:
    """Selector of an event loop that advances the clock instead of waiting."""

    def __init__(
        self, clock: FakeClock, selector: Any, run_in_executor: Callable[..., Any], resolution: float
    ) -> None:
        self.clock = clock
        self.selector = selector
        self.run_in_executor = run_in_executor
        self.resolution = resolution

    def __getattr__(self, name: str) -> Any:
        return getattr(self.selector, name)

    def select(self, timeout: float | None = None) -> Any:
        events = self.selector.select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if timeout is None:
            return self.selector.select(None)
        clock = self.clock
        if not clock._outside and (not self._has_sockets() or self._waits_for_an_attempt(timeout)):
            clock._pass(timeout)
            return events
        begin = time.monotonic()
        events = self.selector.select(timeout)
        clock._pass(time.monotonic() - begin)
        return events

    def _has_sockets(self) -> bool:
        """Return True if events can arrive from outside of the process."""
        known: Any = getattr(self.selector, "get_map", dict)()
        return known is not None and len(known) > 1

    def _waits_for_an_attempt(self, timeout: float) -> bool:
        due = min(self.clock._due, default=None)
        return due is not None and due <= self.clock._monotonic() + timeout + _ROUNDING


class _Time:
    """Replacement for the module ``time`` that reads the clock."""

    def __init__(self, clock: FakeClock) -> None:
        self.monotonic = clock._monotonic
        self.time_ns = clock._time_ns
        self.time: Callable[[], float] = lambda: clock._time_ns() / 1e9

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules["time"], name)


def _nothing() -> None:
    return None
