"""Sets of hooks that users write, and what their calls report."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any, ClassVar, Final

from stroma.contracts.node import gives_coroutine
from stroma.failures.classes import FailureClass
from stroma.trace.result import ExecutionResult


@dataclass(frozen=True, slots=True)
class MapProgress:
    """Progress of a map.

    Attributes:
        done: items that have ended, including failed and restored ones.
        total: number of items; None while it is not known.
        failed: items that failed while the map continues (``on_item_failure="collect"``).
        restored: items that an earlier process finished.
        rate: items per second of this process.
        seconds_left: None if unknown.
        elapsed_seconds: since this process started with the map.
        ended: True in the last report of this map.
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

    Raises TypeError for a hook that does not take the arguments below. A hook whose result cannot be awaited
    raises HookNotAsync out of ``run()`` at its call.

    Combine sets with ``a | b`` or a list: start hooks run first to last, end hooks last to first. While a
    hook runs, everything else about its node (position, attempt, model, cost ...) is at
    :func:`stroma.current_node`.

    Attributes:
        on_node_start: (run id, node id, state) before each attempt.
        on_node_success: (run id, node id, state, tokens) after the commit. The tokens are those of this
            attempt, input and output; 0 if the node reported none.
        on_node_failure: (run id, node id, exception, failure class) after each failed attempt.
        on_run_start: (run id, pipeline name, initial state) before the first node.
        on_run_end: (run id, result) after the last node.
        on_node_retry: (run id, node id, attempt, delay in seconds, failure class) before the wait for the
            next attempt; ``attempt`` is its number.
        on_node_skipped: (run id, node id, state) for a node whose output was restored.
        on_node_cancelled: (run id, node id) after an attempt that was cancelled.
        on_node_suspended: (run id, node id, reason) once for each question of a node or flow, when it is
            first stored; ``current_node().question`` is the question. Also after an attempt of a group around
            it, without a question.
        on_budget_warning: (run id, limit, used amount, limit amount) once at 80 % of a limit. That of a
            shared budget is named "budget:cost" or "budget:tokens".
        on_map_progress: (run id, node id, progress) at the start and the end of a map, and in between at most
            five times a second.
        on_node_wait: (run id, node id, reason, seconds) when an attempt is queued: at a limit, a shared
            budget or an open circuit; 0 seconds if the time is not known.
        on_circuit_change: (run id, host or limit, state) in the run that changed a circuit to "open",
            "half_open" or "closed".
        on_limit_cooldown: (run id, limit, seconds) in the run whose call closed a limit because its provider
            asked to wait.
        reads_state: False if the hooks need no states. Each state is then an empty dict, that of a result
            None, and the set costs the same for states of any size. Such sets share what they receive.
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
    on_limit_cooldown: Callable[[str, str, float], Awaitable[None]] | None = None
    reads_state: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        for event, hook in self.__dict__.items():
            if hook is not None and event in _ARGUMENTS:
                check_arguments(event, hook, _ARGUMENTS[event])

    def is_empty(self) -> bool:
        """Return True for a set without a hook."""
        return not any(map(self.__dict__.get, EVENTS))

    #: False for hooks that make a run wait for its reader.
    _has_time_limit: ClassVar[bool] = True

    def hook_raised(self, run: Any, event: str) -> None:
        """Handle an exception of a hook of any set; ``run``: the context, or None if unknown."""

    def _event_receiver(self) -> Any:
        """Return the receiver of what nodes emit; None for most sets.

        Its ``emit(node, attempt_id, name, data)`` is called in any thread, its ``flush()`` before the run
        ends. Neither raises nor waits.
        """
        return None

    def _hook_of(self, event: str) -> Any:
        """Return the hook of an event that a run which begins now calls, or None."""
        return getattr(self, event)

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
    "on_limit_cooldown": ("run_id", "limit", "seconds"),
}


def check_arguments(name: str, func: Any, arguments: Sequence[str]) -> None:
    """Raise TypeError for an object whose signature does not take these positional arguments."""
    if not callable(func):
        raise TypeError(f"{name} must be callable, got {func!r}; pass a function of ({', '.join(arguments)})")
    signature = _own_signature(func)
    if signature is None:
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(
            f"{name} is called with ({', '.join(arguments)}), and {func!r} takes {signature}; define it "
            "with these parameters"
        ) from None


def check_plain(name: str, func: Any, arguments: Sequence[str]) -> None:
    """Raise TypeError for anything but a function of these arguments that is not async."""
    check_arguments(name, func, arguments)
    if gives_coroutine(func):
        raise TypeError(f"{name} must not be async, got {func!r}; define it with def")


def _function_of(func: Any) -> FunctionType | None:
    """Return the function beneath partials and methods that a call runs; None if unknown."""
    if type(func) not in (FunctionType, MethodType, partial):
        func = getattr(type(func), "__call__", None)  # noqa: B004
    while type(func) is partial:
        func = func.func
    func = getattr(func, "__func__", func)
    return func if type(func) is FunctionType else None


def _own_signature(func: Any) -> inspect.Signature | None:
    """Return the signature that a call goes by; None if unknown.

    What a decorator says of the function that it wraps (``__wrapped__``, ``__signature__``) is not how it is
    called itself.
    """
    plain = _function_of(func)
    if plain is None or "__signature__" in vars(plain):
        return None
    if type(func) not in (FunctionType, MethodType, partial):
        func = MethodType(plain, func)
    return inspect.signature(func, follow_wrapped=False)


StepHooks = NodeHooks
#: One set of hooks, or several in order.
AnyHooks = NodeHooks | Sequence[NodeHooks]
EVENTS = tuple(_ARGUMENTS)
#: Called last set first, also after a HookNotAsync. ``hook_delivery="at_least_once"`` repeats these only.
_ENDS = frozenset(
    {"on_node_success", "on_node_failure", "on_node_cancelled", "on_node_suspended", "on_run_end"}
)


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
    """Return the sets without exporters to a destination that an earlier one feeds."""
    counted: list[NodeHooks] = []
    fed: list[object] = []
    for one in sets:
        destination = getattr(getattr(one, "exporter", None), "destination", None)
        if destination is not None:
            if destination in fed:
                continue
            fed.append(destination)
        counted.append(one)
    return counted


class HookError(Exception):
    """Hooks raised in a run with ``hook_errors="raise"``; ``result`` is the complete result of that run.

    Where: out of ``run()``, after everything is committed.
    Cause: a hook raised; the first such exception is the ``__cause__``.
    Fix: correct the hook, or leave ``hook_errors`` at "isolate": then it is logged and in
    ``result.hook_errors``.
    """

    def __init__(self, message: str, result: ExecutionResult) -> None:
        super().__init__(message)
        self.result = result
