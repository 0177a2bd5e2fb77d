"""Hooks: async callbacks that observe a run and can never change it."""

from __future__ import annotations

import asyncio
import contextlib
import dis
import inspect
import logging
from asyncio import current_task
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from time import perf_counter
from types import CoroutineType, FunctionType, MappingProxyType, MethodType, coroutine
from typing import Any, ClassVar, Final

from stroma._showing import scrubbed_error
from stroma.failures import FailureClass
from stroma.trace import ExecutionResult, HookFailure

__all__ = [
    "NO_HOOKS",
    "AnyHooks",
    "Calls",
    "HookError",
    "HookSets",
    "MapProgress",
    "NodeHooks",
    "StepHooks",
    "check_arguments",
    "distinct",
    "flatten",
]

logger = logging.getLogger("stroma")


@dataclass(frozen=True, slots=True)
class MapProgress:
    """How far a map is.

    Attributes:
        done: items that have ended, the failed and the restored ones among them.
        total: how many there are; None as long as nobody knows.
        failed: those that failed while the others go on (``on_item_failure="collect"``).
        restored: those that an earlier process did.
        rate: items per second that this process does, over the last seconds.
        seconds_left: None if it cannot be told.
        elapsed_seconds: since this process began with the map.
        ended: whether this is the last word of this map.
    """

    done: int
    total: int | None
    failed: int
    restored: int
    rate: float
    seconds_left: float | None
    elapsed_seconds: float
    ended: bool


@dataclass
class NodeHooks:
    """Async callbacks at the boundaries of runs and nodes; each is optional and costs nothing when unset.

    ``on_node_success`` gets the tokens of this attempt, input + output, 0 if the node reported none. Everything
    else about a node (position, attempt, model, cost ...) is at :func:`stroma.current_node` while a hook runs.
    ``on_node_wait`` gets (run id, node id, reason, seconds) when an attempt begins to wait for its turn: at a limit, a
    shared budget or an open circuit; 0 seconds where nobody can tell how long. ``on_circuit_change`` gets (run id, host or
    limit, "open", "half_open" or "closed") in the run that changed it. ``on_budget_warning`` names the limit of a shared
    budget "budget:cost" or "budget:tokens".
    Compose sets with ``a | b`` or a list: starts run first to last, ends last to first. ``on_map_progress`` is told
    how far a map is: at its begin, at its end, and in between at most five times a second.
    """

    on_node_start: Callable[[str, str, dict[str, Any]], Awaitable[None]] | None = None
    on_node_success: Callable[[str, str, dict[str, Any], int], Awaitable[None]] | None = None
    on_node_failure: Callable[[str, str, Exception, FailureClass], Awaitable[None]] | None = None
    on_run_start: Callable[[str, str, dict[str, Any]], Awaitable[None]] | None = None
    on_run_end: Callable[[str, ExecutionResult], Awaitable[None]] | None = None
    on_node_retry: Callable[[str, str, int, float, FailureClass], Awaitable[None]] | None = None
    on_node_skipped: Callable[[str, str, dict[str, Any]], Awaitable[None]] | None = None
    on_node_cancelled: Callable[[str, str], Awaitable[None]] | None = None
    on_node_suspended: Callable[[str, str, str], Awaitable[None]] | None = None
    on_budget_warning: Callable[[str, str, float, float], Awaitable[None]] | None = None
    on_map_progress: Callable[[str, str, MapProgress], Awaitable[None]] | None = None
    on_node_wait: Callable[[str, str, str, float], Awaitable[None]] | None = None
    on_circuit_change: Callable[[str, str, str], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise TypeError for a hook that cannot be called with its event's arguments, where its signature tells."""
        for event, arguments in _ARGUMENTS.items():
            hook = getattr(self, event)
            if hook is not None:
                check_arguments(event, hook, arguments)

    #: Of hooks that make a run wait for who reads what they tell: they are under no time limit.
    _patient: ClassVar[bool] = False

    def __or__(self, other: NodeHooks | Sequence[NodeHooks]) -> HookSets:
        return HookSets((self, *flatten(other)))

    def __ror__(self, other: Sequence[NodeHooks]) -> HookSets:
        return HookSets((*flatten(other), self))


#: What the hooks of each event are called with.
_ARGUMENTS: Final[dict[str, tuple[str, ...]]] = {
    "on_node_start": ("run_id", "node_id", "input_state"),
    "on_node_success": ("run_id", "node_id", "output_state", "tokens_used"),
    "on_node_failure": ("run_id", "node_id", "exception", "failure_class"),
    "on_run_start": ("run_id", "pipeline", "initial_state"),
    "on_run_end": ("run_id", "result"),
    "on_node_retry": ("run_id", "node_id", "attempt", "delay_seconds", "failure_class"),
    "on_node_skipped": ("run_id", "node_id", "output_state"),
    "on_node_cancelled": ("run_id", "node_id"),
    "on_node_suspended": ("run_id", "node_id", "reason"),
    "on_budget_warning": ("run_id", "dimension", "used", "limit"),
    "on_map_progress": ("run_id", "node_id", "progress"),
    "on_node_wait": ("run_id", "node_id", "reason", "seconds"),
    "on_circuit_change": ("run_id", "key", "state"),
}


def check_arguments(name: str, func: Any, arguments: Sequence[str]) -> None:
    """Raise TypeError for a callable that takes other positional arguments than these, where its signature tells."""
    signature = _own_signature(func)
    if signature is None:
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(
            f"{name} is called with ({', '.join(arguments)}), and {func!r} takes {signature}; give it these parameters"
        ) from None


def _own_signature(func: Any) -> inspect.Signature | None:
    """Return the signature that a call goes by; None where that cannot be told.

    What a decorator says of the function that it wraps (``__wrapped__``, ``__signature__``) is not how it is called itself.
    """
    if type(func) not in (FunctionType, MethodType, partial):
        call = getattr(type(func), "__call__", None)  # noqa: B004
        func = MethodType(call, func) if type(call) is FunctionType else None
    plain: Any = func
    while type(plain) is partial:
        plain = plain.func
    plain = getattr(plain, "__func__", plain)
    if type(plain) is not FunctionType or "__signature__" in vars(plain):
        return None
    return inspect.signature(func, follow_wrapped=False)


StepHooks = NodeHooks
#: One set of hooks, or several in order.
AnyHooks = NodeHooks | Sequence[NodeHooks]
EVENTS = tuple(f.name for f in fields(NodeHooks))
_ENDS = frozenset(
    {"on_node_success", "on_node_failure", "on_node_cancelled", "on_node_suspended", "on_run_end"}
)
#: The callables of one event, each with the index of its set, in the order in which they run.
Calls = tuple[tuple[int, Callable[..., Any]], ...]


#: How far the first hook has come: the task's cancellations before, the time, what it returned (_OVER once that is
#: done), what that waits for, and what was raised.
Begun = tuple[int, float, Any, Any, BaseException | None]
_OVER: Final = object()
_NOTHING: Final = object()


class HookSets(tuple[NodeHooks, ...]):
    """Several sets of hooks, in order."""

    __slots__ = ()

    def __or__(self, other: NodeHooks | Sequence[NodeHooks]) -> HookSets:
        return HookSets((*self, *flatten(other)))


def flatten(hooks: NodeHooks | Iterable[NodeHooks] | None) -> tuple[NodeHooks, ...]:
    """Every set of hooks in order. Raises TypeError for anything that is not one."""
    if hooks is None:
        return ()
    if isinstance(hooks, NodeHooks):
        return (hooks,)
    sets: list[NodeHooks] = []
    for item in hooks if hasattr(hooks, "__iter__") else [hooks]:
        if isinstance(item, (list, tuple)):
            sets.extend(flatten(item))
        elif isinstance(item, NodeHooks):
            sets.append(item)
        else:
            raise TypeError(f"{item!r} is not a set of hooks; make one with NodeHooks(...)")
    return tuple(sets)


def distinct(sets: Sequence[NodeHooks]) -> list[NodeHooks]:
    """Return the sets of hooks without exporters that feed what an earlier one feeds: each event is counted once."""
    found: list[NodeHooks] = []
    fed: list[object] = []
    for one in sets:
        destination = getattr(getattr(one, "exporter", None), "destination", None)
        if destination is not None:
            if destination in fed:
                continue
            fed.append(destination)
        found.append(one)
    return found


class HookError(Exception):
    """Hooks raised in a run with ``hook_errors="raise"``; ``result`` is the complete result of that run.

    Where: out of ``run()``, after everything is committed.
    Cause: a hook raised; the first such exception is the ``__cause__``.
    Mend: correct the hook, or leave ``hook_errors`` at "isolate": then it is logged and in ``result.hook_errors``.
    """

    def __init__(self, message: str, result: ExecutionResult) -> None:
        super().__init__(message)
        self.result = result


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
