"""Calls of hooks: each set in order, with time limits, and none of them able to break a run."""

from __future__ import annotations

import asyncio
import contextlib
import dis
import inspect
import logging
from asyncio import current_task
from collections.abc import Callable, Coroutine, Generator, Mapping
from functools import partial
from time import perf_counter
from types import CoroutineType, MappingProxyType, coroutine
from typing import Any, Final

from stroma.hooks.sets import _ENDS, EVENTS, NodeHooks
from stroma.trace.redaction import scrubbed_error
from stroma.trace.result import ExecutionResult, HookFailure

__all__ = ["NO_HOOKS", "Calls"]

logger = logging.getLogger("stroma")

#: The callables of one event, each with the index of its set, in the order in which they run.
Calls = tuple[tuple[int, Callable[..., Any]], ...]


#: How far the first hook has come: the task's cancellations before, the time, what it returned (_OVER once that is
#: done), what that waits for, and what was raised.
Begun = tuple[int, float, Any, Any, BaseException | None]
_OVER: Final = object()
_NOTHING: Final = object()


class HookNotAsync(TypeError):
    """A hook is not async. ``result`` is what the run had come to.

    Where: out of ``run()``, at the first call of the hook.
    Cause: the hook returned something that cannot be awaited.
    Mend: define it with ``async def``. What was committed is kept.
    """

    result: ExecutionResult | None = None
    set_index: int = 0  # Sets before this one were called.


class HookTimeout(Exception):
    """A hook took longer than its time limit and was abandoned.

    Where: in ``result.hook_errors`` and the log; with ``hook_errors="raise"`` the cause of a HookError.
    Cause: one call of a hook took longer than ``hook_timeout_ms``.
    Mend: hand slow work to a queue or a task of your own, or raise ``hook_timeout_ms``.
    """


class Hooks:
    """The hooks of one run, sorted by event: None where no set has one."""

    # Slots, and all of them set: two are asked for each node, and what stands on the class takes five times as long.
    __slots__ = (*EVENTS, "_failures", "_limit", "_patient", "_run_id", "_secrets", "untold")

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

    def __init__(
        self,
        sets: tuple[NodeHooks, ...],
        *,
        run_id: str,
        limit_seconds: float | None,
        failures: list[HookFailure],
        secrets: Mapping[str, set[str]] = MappingProxyType({}),
        all_ends: bool = False,
    ) -> None:
        """``failures`` gets what hooks raise; ``secrets`` are masked in the log of that; ``all_ends``: fire the ends of attempts also where no set wants to know."""
        self._run_id = run_id
        self._limit = limit_seconds
        # The list, and not whose it is: without a circle between them, no run with hooks waits for the collector.
        self._failures = failures
        self._secrets = secrets
        self._patient = frozenset([index for index, hooks in enumerate(sets) if hooks._patient])
        #: Of an end whose telling was closed half-way, the calls that are left; for who gets that GeneratorExit.
        self.untold: Calls = ()
        found: dict[str, Calls] = dict.fromkeys(EVENTS, ())
        for index, hooks in enumerate(sets):
            for event in EVENTS:
                hook = getattr(hooks, event)
                if hook is not None:
                    # The sets that were told first of what begins are told last of what ends.
                    one = ((index, hook),)
                    found[event] = one + found[event] if event in _ENDS else found[event] + one
        for event, calls in found.items():
            setattr(self, event, calls or (() if all_ends and event in _ENDS else None))

    def fire_soon(
        self,
        event: str,
        calls: Calls,
        node_id: str | None,
        make: Callable[..., tuple[Any, ...]],
        *about: Any,
    ) -> Coroutine[Any, Any, None] | None:
        """:meth:`fire`, as far as it comes without waiting: what is left to await, or None. Raises nothing itself.

        A single hook that never waits, which most are, needs no coroutine around it; nor a closure, so what ``make`` makes
        the arguments of comes beside it.
        """
        if len(calls) != 1:
            return self.fire(event, calls, node_id, partial(make, *about))
        task = current_task()
        before, begin = task.cancelling() if task else 0, perf_counter()
        awaitable: Any = None
        waiting_for: Any = None
        try:
            awaitable = calls[0][1](*make(*about))
            if type(awaitable) is CoroutineType:
                # Without the exception that send() would make of a hook's end: that takes as long as the hook.
                waiting_for = next(awaitable.__await__(), _OVER)
                if waiting_for is _OVER:
                    if (self._limit is None or perf_counter() - begin <= self._limit) and (
                        task is None or task.cancelling() <= before
                    ):
                        return None
                    awaitable = _OVER
            begun: Begun = before, begin, awaitable, waiting_for, None
        except BaseException as error:
            begun = before, begin, None, None, error
        return self.fire(event, calls, node_id, partial(make, *about), begun)

    async def fire(
        self,
        event: str,
        calls: Calls,
        node_id: str | None,
        arguments: Callable[[], tuple[Any, ...]],
        begun: Begun | None = None,
    ) -> None:
        """Await each hook in turn, in the caller's own task. ``arguments`` makes fresh ones for each set.

        What a hook raises is logged and reported, and changes nothing. HookNotAsync and the cancellation of the
        running task come out once every hook was called, but for a start: the sets after one that is not async
        never see it. KeyboardInterrupt and SystemExit come out then, too, and before those. ``begun``: how far
        :meth:`fire_soon` came with the first hook.
        """
        task = current_task()
        stopped: BaseException | None = None
        for number, (index, hook) in enumerate(calls):
            before = task.cancelling() if task else 0
            begin = perf_counter()
            patient = self._patient and index in self._patient
            try:
                if begun is None:
                    awaitable, waiting_for = hook(*arguments()), _NOTHING
                else:
                    before, begin, awaitable, waiting_for, raised = begun
                    begun = None
                    if raised is not None:
                        raise raised
                if type(awaitable) is CoroutineType:
                    # Most hooks never wait: they are over with their first step, and need no timer and nobody to await.
                    if waiting_for is _NOTHING:
                        waiting_for = next(awaitable.__await__(), _OVER)
                    if waiting_for is not _OVER:
                        await _bounded(awaitable.__await__(), waiting_for, None if patient else self._limit)
                elif awaitable is _OVER:
                    pass
                elif inspect.isawaitable(awaitable):
                    await _awaited(awaitable, None if patient else self._limit)
                else:
                    raise _not_async(event, hook, node_id, awaitable, index)
                if not patient and self._limit is not None and perf_counter() - begin > self._limit:
                    # It was not interrupted, so it never gave the event loop a chance to.
                    logger.warning(
                        "hook %s (%r) of node %r blocked the event loop for %.0f ms; await in it, or use a thread",
                        event, hook, node_id, (perf_counter() - begin) * 1000, extra={"run_id": self._run_id},
                    )  # fmt: skip
            except HookNotAsync as error:
                if event not in _ENDS:
                    raise
                stopped = stopped or error
            except asyncio.CancelledError as error:
                if (
                    task is None or task.cancelling() <= before
                ):  # Its own stray one: nobody cancelled this task.
                    self._report(event, hook, node_id, error)
            except (KeyboardInterrupt, SystemExit) as error:
                # The other sets are told first: each sees an end for every start, and no end without one.
                if not isinstance(stopped, (KeyboardInterrupt, SystemExit)):
                    stopped = error
            except GeneratorExit as error:
                if not was_raised(error):
                    if event in _ENDS:
                        self.untold = calls[number + 1 :]
                    raise
                self._report(event, hook, node_id, error)
            except BaseException as error:
                self._report(event, hook, node_id, error)
            if task is not None and task.cancelling() > before:
                # Whatever the hook made of it: a cancellation is not its to swallow or to replace.
                stopped = stopped or asyncio.CancelledError()
        if stopped is not None:
            raise stopped

    def fire_now(
        self, event: str, calls: Calls, node_id: str | None, arguments: Callable[[], tuple[Any, ...]]
    ) -> None:
        """Call each hook where nothing can be awaited any more: it gets as far as it comes without waiting."""
        for _, hook in calls:
            try:
                step = hook(*arguments()).__await__()
                try:
                    next(step)
                except StopIteration:
                    continue
                step.close()
                logger.warning(
                    "hook %s (%r) was cut short: run %r was closed, not cancelled, so that nothing can be awaited",
                    event, hook, self._run_id, extra={"run_id": self._run_id},
                )  # fmt: skip
            except Exception as error:
                self._report(event, hook, node_id, error)

    def _report(
        self, event: str, hook: Callable[..., Any], node_id: str | None, error: BaseException
    ) -> None:
        try:
            logger.error(
                "hook %s (%r) raised for node %r of run %r; the run goes on", event, hook, node_id, self._run_id,
                exc_info=scrubbed_error(error, self._secrets), extra={"run_id": self._run_id},
            )  # fmt: skip
        finally:
            self._failures.append(HookFailure(event, node_id, error))


def was_raised(error: BaseException) -> bool:
    """Whether a ``raise`` statement made this exception; a coroutine that is closed finds one in its ``await``."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


#: Of a run that nobody watches.
NO_HOOKS = Hooks((), run_id="", limit_seconds=None, failures=[])


def _not_async(event: str, hook: object, node_id: str | None, returned: object, index: int) -> HookNotAsync:
    where = f" of node {node_id!r}" if node_id is not None else ""
    error = HookNotAsync(
        f"hook {event}{where} is not async: {hook!r} returned {type(returned).__name__}, which cannot be awaited; "
        "define it with async def"
    )
    error.set_index = index
    return error


async def _awaited(awaitable: Any, limit: float | None) -> None:
    """Await any awaitable in the current task; a timer is armed only if it suspends at all."""
    # A generator-based coroutine is awaitable without having __await__.
    iterator = awaitable if inspect.isgenerator(awaitable) else awaitable.__await__()
    try:
        waiting_for = next(iterator)
    except StopIteration:
        return
    await _bounded(iterator, waiting_for, limit)


@coroutine
def _bounded(
    iterator: Generator[Any, Any, Any], waiting_for: Any, limit: float | None
) -> Generator[Any, Any, None]:
    """Go on with what has suspended, for as long as the limit says."""
    if limit is None:
        yield from _rest(iterator, waiting_for)
        return
    timeout = asyncio.timeout(limit)
    yield from timeout.__aenter__().__await__()
    try:
        yield from _rest(iterator, waiting_for, timeout)
    except BaseException as error:
        try:
            yield from timeout.__aexit__(type(error), error, error.__traceback__).__await__()
        except TimeoutError:
            raise HookTimeout(
                f"did not end within {limit * 1000:.0f} ms; make it quicker, or raise hook_timeout_ms"
            ) from None
        raise
    yield from timeout.__aexit__(None, None, None).__await__()


def _rest(
    iterator: Generator[Any, Any, Any], waiting_for: Any, timeout: asyncio.Timeout | None = None
) -> Generator[Any, Any, None]:
    """Go on with an awaitable that has already yielded once: ``yield from`` would lose that first value."""
    try:
        while True:
            try:
                sent = yield waiting_for
            except GeneratorExit:
                iterator.close()
                raise
            except BaseException as error:
                if not hasattr(iterator, "throw"):
                    raise
                waiting_for = iterator.throw(error)
                if timeout is not None and timeout.expired():
                    # Its time is up, and it goes on awaiting.
                    with contextlib.suppress(BaseException):
                        iterator.close()
                    raise
            else:
                # What __await__ gives need not be a generator; an event loop sends nothing but None anyway.
                waiting_for = next(iterator) if sent is None else iterator.send(sent)
    except StopIteration:
        return
