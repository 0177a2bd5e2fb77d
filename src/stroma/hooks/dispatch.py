"""Calls of hooks: each set in order, with time limits, and none of them able to break a run."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
import sys
from asyncio import current_task
from collections.abc import Callable
from time import perf_counter
from types import CoroutineType
from typing import Any, Final, final

from stroma._utils.logs import get_logger
from stroma.hooks.sets import _ENDS, EVENTS, NodeHooks
from stroma.trace.result import ExecutionResult, HookFailure

logger = get_logger()

#: By event, the index of the argument of which each set gets a form of its own. It is passed as a view with
#: ``for_reader()``, new for each set, and ``for_others()``, for all sets that read no state.
_VIEW_AT: Final = {
    "on_run_start": 2,
    "on_run_end": 1,
    "on_node_start": 2,
    "on_node_success": 2,
    "on_node_skipped": 2,
}

#: The callables of one event, each with the index of its set, in the order in which they are called.
Calls = tuple[tuple[int, Callable[..., Any]], ...]

_OVER: Final = object()
_GROUP_EXIT: Final = asyncio.TaskGroup.__aexit__.__code__


class HookNotAsync(TypeError):
    """A hook is not async. ``result`` is the result of the run.

    Where: out of ``run()``, at the first call of the hook.
    Cause: the hook returned something that cannot be awaited.
    Fix: define it with ``async def``. Committed outputs are stored.
    """

    result: ExecutionResult | None = None
    set_index: int = 0  # Sets before this one were called.


class HookTimeout(Exception):
    """A hook took longer than its time limit and was abandoned.

    Where: in ``result.hook_errors`` and the log; with ``hook_errors="raise"`` the cause of a HookError.
    Cause: one call of a hook took longer than ``hook_timeout_ms``.
    Fix: move slow work to a queue or a separate task, or raise ``hook_timeout_ms``.
    """


@final
class Hooks:
    """The hooks of one run by event: None where no set has one.

    Args:
        failures: list to which exceptions of hooks are added. The list and not its owner: a reference to the
            run would be a cycle that only the garbage collector frees.
        mask: returns an exception as the log may show it, without the secrets of the run and of the
            arguments.
        delivers: the store records which end hooks are due; the ends of attempts are prepared also where no
            set has a hook for them.
        takes_events: something looks at what nodes emit, besides the receivers of the sets.
        interceptors: those of tests around the run, see stroma.engine.context.
    """

    # Slots, all of them set: two are read for each node, and an attribute of the class takes five times as
    # long.
    __slots__ = (
        *EVENTS,
        "delivers",
        "failures",
        "interceptors",
        "limits",
        "mask",
        "receivers",
        "run_id",
        "takes_events",
        "unread",
        "watchers",
    )

    on_node_start: Calls | None
    on_node_success: Calls | None
    on_node_failure: Calls | None
    on_run_start: Calls | None
    on_run_end: Calls | None
    on_node_retry: Calls | None
    on_node_skipped: Calls | None
    on_node_cancelled: Calls | None
    on_node_suspended: Calls | None
    on_budget_warning: Calls | None
    on_map_progress: Calls | None
    on_node_wait: Calls | None
    on_circuit_change: Calls | None
    on_limit_cooldown: Calls | None

    def __init__(
        self,
        sets: tuple[NodeHooks, ...],
        *,
        run_id: str,
        limit_seconds: float | None,
        failures: list[HookFailure],
        mask: Callable[[BaseException, Any], BaseException] | None = None,
        delivers: bool = False,
        takes_events: bool = False,
        interceptors: tuple[Any, ...] = (),
    ) -> None:
        self.run_id = run_id
        self.failures = failures
        self.mask = mask
        self.delivers = delivers
        self.interceptors = interceptors
        #: The receivers of what nodes emit.
        self.receivers = tuple([one for one in (each._event_receiver() for each in sets) if one is not None])
        self.takes_events = takes_events or bool(self.receivers)
        #: By set, whether it reads no state.
        self.unread = tuple([not one.reads_state for one in sets])
        #: The sets that count what hooks raise.
        self.watchers = tuple([one for one in sets if type(one).hook_raised is not NodeHooks.hook_raised])
        #: By set, how long one call may take, in seconds; None for ever.
        self.limits = tuple([limit_seconds if one._has_time_limit else None for one in sets])
        by_event: dict[str, Calls] = dict.fromkeys(EVENTS, ())
        for index, hooks in enumerate(sets):
            for event in EVENTS:
                hook = hooks._hook_of(event)
                if hook is not None:
                    # Starts are called first to last, ends last to first.
                    call = ((index, hook),)
                    by_event[event] = call + by_event[event] if event in _ENDS else by_event[event] + call
        for event, calls in by_event.items():
            setattr(self, event, calls or (() if delivers and event in _ENDS else None))

    async def fire(self, event: str, node_id: str | None, *values: Any) -> None:
        """Call the hooks of an event in turn, if there are any; see :class:`Firing`."""
        calls: Calls | None = getattr(self, event)
        if calls:
            firing = Firing(self, event, calls, node_id, values)
            if not firing.advance():
                await firing.finish()

    def report(
        self,
        event: str,
        hook: Callable[..., Any],
        node_id: str | None,
        error: BaseException,
        arguments: Any = (),
    ) -> None:
        """Log what a hook raised, without secrets of its arguments, and add it to the run's failures."""
        try:
            shown = error if self.mask is None else self.mask(error, arguments)
            logger.error(
                "hook %s (%r) raised for node %r of run %r; the run goes on",
                event,
                hook,
                node_id,
                self.run_id,
                exc_info=shown,
                extra={"run_id": self.run_id},
            )
        finally:
            self.failures.append(HookFailure(event, node_id, error))
            self.count_failure(None, event)

    def count_failure(self, run: Any, event: str) -> None:
        """Have the exporters among the sets count an exception of a hook."""
        for one in self.watchers:
            one.hook_raised(run, event)


@final
class Firing:
    """One event on its way through the sets of hooks, in the caller's own task.

    ``values``: the arguments of the hooks. Of a state or a result there is a view, see ``_VIEW_AT``.

    :meth:`advance` calls hooks until one waits, :meth:`finish` awaits that one and calls the rest, and
    :meth:`finish_now` calls the rest where nothing can be awaited. Most hooks never wait and need no
    coroutine around them: 0.5 us a call instead of 1.

    What a hook raises is logged and reported, and changes nothing. A cancellation of the task by a hook is
    taken back. HookNotAsync and a cancellation from outside come out of :meth:`finish` once every hook
    was called, but for an event that is not an end: the sets after a hook that is not async
    are not called then. KeyboardInterrupt and SystemExit come out as well, before those. GeneratorExit comes
    out of :meth:`finish` at once if the coroutine around is being closed.
    """

    __slots__ = (
        "_before",
        "_begin",
        "_calls",
        "_came",
        "_event",
        "_hooks",
        "_index",
        "_node_id",
        "_shared",
        "_stopped",
        "_taken_back",
        "_values",
        "_waiting",
    )

    def __init__(
        self, hooks: Hooks, event: str, calls: Calls, node_id: str | None, values: tuple[Any, ...]
    ) -> None:
        self._hooks = hooks
        self._event = event
        self._calls = calls
        self._node_id = node_id
        self._values = values
        #: The view for the sets that read no state.
        self._shared: Any = None
        #: How many hooks were called.
        self._index = 0
        self._waiting: _Waiting | None = None
        #: What comes out once every hook was called.
        self._stopped: BaseException | None = None
        #: Of the present call: cancellations of the task before it, and its start.
        self._before = 0
        self._begin = 0.0
        #: The last cancellation from outside that reached a hook.
        self._came: asyncio.CancelledError | None = None
        #: A hook has cancelled the task: its next await may raise, although the cancellation was taken back.
        self._taken_back = False

    def advance(self) -> bool:
        """Call hooks until one waits. Return True if all were called and nothing is to be raised."""
        if self._waiting is not None or self._taken_back:
            return False
        task, calls, limits = current_task(), self._calls, self._hooks.limits
        must_absorb = False
        while self._index < len(calls) and not must_absorb:
            set_index, hook = calls[self._index]
            self._index += 1
            self._before = before = 0 if task is None else task.cancelling()
            self._begin = begin = perf_counter()
            try:
                awaitable: Any = hook(*self._arguments(set_index))
                if type(awaitable) is not CoroutineType:
                    if not inspect.isawaitable(awaitable):
                        raise _not_async(self._event, hook, self._node_id, awaitable, set_index)
                    awaitable = _await(awaitable)
                iterator = awaitable.__await__()
                # A default in place of StopIteration, which takes as long as the hook.
                waiting_for = next(iterator, _OVER)
                if waiting_for is not _OVER:
                    self._waiting = _Waiting(self, awaitable, iterator, waiting_for, task)
                    self.take_back(task, before)
                    return False
            except BaseException as error:
                must_absorb = self.take_back(task, before)
                self._handle(error, task)
            else:
                # Asked here as well, since two more calls take 0.15 us of the 4 of a hook.
                limit = limits[set_index]
                if limit is not None and perf_counter() - begin > limit:
                    self._check_time(set_index, hook)
            if task is not None and task.cancelling() > before:
                must_absorb = self.take_back(task, before)
                if not must_absorb:
                    self._stopped = self._stopped or asyncio.CancelledError()
        return self._stopped is None and not must_absorb

    async def finish(self) -> None:
        """Await the hook that waits, call the rest, and raise what is to come out."""
        task = current_task()
        while self._waiting is not None or self._taken_back:
            if self._waiting is not None:
                await self._finish_waiting(task)
            if self._taken_back:
                await self._absorb()
            if task is not None and task.cancelling() > self._before:
                self._stopped = self._stopped or self._came or asyncio.CancelledError()
            self._came = None
            self.advance()
        if self._stopped is not None:
            # Without a reference from here, or the exception and this would be a cycle.
            stopped, self._stopped = self._stopped, None
            try:
                raise stopped
            finally:
                del stopped

    async def _finish_waiting(self, task: asyncio.Task[Any] | None) -> None:
        assert self._waiting is not None
        waiting, self._waiting = self._waiting, None
        self._taken_back = False  # Its own cancellation reaches it at this await.
        set_index, hook = self._calls[self._index - 1]
        limit = self._hooks.limits[set_index]
        try:
            await (waiting if limit is None else _await_in_time(waiting, limit))
        except BaseException as error:
            if isinstance(error, GeneratorExit) and waiting.is_closed:  # So is the coroutine around.
                raise
            self._handle(error, task)
        else:
            self._check_time(set_index, hook)

    async def _absorb(self) -> None:
        """Absorb the CancelledError that Python, up to 3.12, raises at the next await after uncancel()."""
        self._taken_back = False
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError as error:
            if self._before:  # One from before the hook may not have been raised yet.
                self._stopped = self._stopped or error
            self._came = self._came or error

    def take_back(self, task: asyncio.Task[Any] | None, before: int) -> bool:
        """Take back cancellations by the hook itself since it was last resumed. Return True for any."""
        if task is None or task.cancelling() <= before or _is_interrupted_by_signal():
            return False
        while task.cancelling() > before:
            task.uncancel()
        self._taken_back = True
        return True

    def note_cancelled(self, error: BaseException, task: asyncio.Task[Any] | None) -> None:
        """Note a cancellation that reaches a waiting hook, which may swallow or replace it."""
        if isinstance(error, asyncio.CancelledError) and task and task.cancelling() > self._before:
            self._came = error

    def finish_now(self) -> None:
        """Call the rest where nothing can be awaited: each hook gets as far as it comes without waiting."""
        for set_index, hook in self._calls[self._index :]:
            self._index += 1
            try:
                iterator = hook(*self._arguments(set_index)).__await__()
                if next(iterator, _OVER) is _OVER:
                    continue
                iterator.close()
                logger.warning(
                    "hook %s (%r) was cut short: run %r was closed, not cancelled, so that nothing can be "
                    "awaited",
                    self._event,
                    hook,
                    self._hooks.run_id,
                    extra={"run_id": self._hooks.run_id},
                )
            except Exception as error:
                self._report(hook, error)

    def _arguments(self, set_index: int) -> tuple[Any, ...]:
        at, values = _VIEW_AT.get(self._event), self._values
        if at is None:
            return values
        if not self._hooks.unread[set_index]:
            return (*values[:at], values[at].for_reader(), *values[at + 1 :])
        if self._shared is None:
            self._shared = values[at].for_others()
        return (*values[:at], self._shared, *values[at + 1 :])

    def _report(self, hook: Callable[..., Any], error: BaseException) -> None:
        at, values = _VIEW_AT.get(self._event), self._values
        values = values if at is None else (*values[:at], values[at].value, *values[at + 1 :])
        self._hooks.report(self._event, hook, self._node_id, error, values)

    def _handle(self, error: BaseException, task: asyncio.Task[Any] | None) -> None:
        """Report what a hook raised, or put it aside until every hook was called, or raise it at once."""
        if isinstance(error, HookNotAsync):
            if self._event not in _ENDS:
                self._index = len(self._calls)
            self._stopped = self._stopped or error
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            # The other sets are called first: each sees an end for every start, and no end without one.
            if not isinstance(self._stopped, (KeyboardInterrupt, SystemExit)):
                self._stopped = error
        elif not isinstance(error, asyncio.CancelledError) or (
            # A CancelledError of the hook itself: nobody has cancelled this task.
            task is None or task.cancelling() <= self._before
        ):
            self._report(self._calls[self._index - 1][1], error)

    def _check_time(self, set_index: int, hook: Callable[..., Any]) -> None:
        """Warn of a hook that ended late: it never let the event loop interrupt it."""
        limit = self._hooks.limits[set_index]
        if limit is not None and perf_counter() - self._begin > limit:
            logger.warning(
                "hook %s (%r) of node %r blocked the event loop for %.0f ms; await in it, or use a thread",
                self._event,
                hook,
                self._node_id,
                (perf_counter() - self._begin) * 1000,
                extra={"run_id": self._hooks.run_id},
            )


#: Of a run without hooks.
NO_HOOKS = Hooks((), run_id="", limit_seconds=None, failures=[])


def _not_async(event: str, hook: object, node_id: str | None, returned: object, index: int) -> HookNotAsync:
    where = f" of node {node_id!r}" if node_id is not None else ""
    error = HookNotAsync(
        f"hook {event}{where} is not async: {hook!r} returned {type(returned).__name__}, which cannot be "
        "awaited; define it with async def"
    )
    error.set_index = index
    return error


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def _await_in_time(waiting: _Waiting, limit_seconds: float) -> None:
    try:
        async with asyncio.timeout(limit_seconds) as waiting.scope:
            await waiting
    except TimeoutError:
        if not waiting.is_late:
            raise
        raise HookTimeout(
            f"did not end within {limit_seconds * 1000:.0f} ms; make it quicker, or raise hook_timeout_ms"
        ) from None


class Started:
    """A coroutine that waits, from its first wait on, as an awaitable in the caller's own task.

    The first step of a coroutine needs no timer: a hook takes 0.7 us instead of 3.

    A task group in it cancels the task around it to wake it if one of its own has failed. If it does so while
    it awaits its tasks, Python takes that back from 3.13 on; here it is taken back on any.
    """

    def __init__(self, coroutine: Any, waits_for: Any = _OVER, iterator: Any = None) -> None:
        self._coroutine = coroutine
        self._iterator = iterator or coroutine
        #: What the event loop is to wait for first.
        self._waits_for = waits_for
        #: Task groups whose cancellation was taken back.
        self._groups: list[asyncio.TaskGroup] = []

    def __await__(self) -> Started:
        return self

    def __iter__(self) -> Started:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        if self._waits_for is not _OVER:
            waits_for, self._waits_for = self._waits_for, _OVER
            return waits_for
        return self._iterator.send(value)

    def throw(self, error: Any, *_: Any) -> Any:
        self._take_back_groups()
        self._waits_for = _OVER
        return self._iterator.throw(error)

    def _take_back_groups(self) -> None:
        at: Any = self._coroutine if sys.version_info < (3, 13) else None
        while type(at) is CoroutineType:
            if at.cr_code is _GROUP_EXIT and at.cr_frame is not None:
                values = at.cr_frame.f_locals
                group, was_cancelled_before = values["self"], values["et"] is asyncio.CancelledError
                is_own = group._parent_cancel_requested and not was_cancelled_before
                if is_own and group not in self._groups:
                    self._groups.append(group)
                    group._parent_task.uncancel()
            at = at.cr_await

    def close(self) -> None:
        self._iterator.close()


class _Waiting(Started):
    """The rest of a hook that waits."""

    def __init__(
        self,
        firing: Firing,
        coroutine: CoroutineType[Any, Any, Any],
        iterator: Any,
        waits_for: Any,
        task: asyncio.Task[Any] | None,
    ) -> None:
        super().__init__(coroutine, waits_for, iterator)
        self._firing = firing
        self._task = task
        self.scope: asyncio.Timeout | None = None
        self.is_closed = False

    @property
    def is_late(self) -> bool:
        """True once its time limit is over."""
        return self.scope is not None and self.scope.expired()

    def send(self, value: Any) -> Any:
        before = self._cancelling()
        try:
            return super().send(value)
        finally:
            self._firing.take_back(self._task, before)

    def throw(self, error: Any, *_: Any) -> Any:
        self._take_back_groups()
        self._firing.note_cancelled(error, self._task)
        before = self._cancelling()
        try:
            waits_for = super().throw(error)
        finally:
            self._firing.take_back(self._task, before)
        if self.is_late:  # Its time is up, and it goes on awaiting.
            with contextlib.suppress(BaseException):
                super().close()
            raise error
        return waits_for

    def close(self) -> None:
        self.is_closed = True
        super().close()

    def _cancelling(self) -> int:
        return 0 if self._task is None else self._task.cancelling()


def _is_interrupted_by_signal() -> bool:
    """Return True once SIGINT has cancelled the main task of asyncio.run(), maybe during a hook."""
    handler = signal.getsignal(signal.SIGINT)
    runner = getattr(getattr(handler, "func", None), "__self__", None)
    return isinstance(runner, asyncio.Runner) and bool(getattr(runner, "_interrupt_count", 0))
