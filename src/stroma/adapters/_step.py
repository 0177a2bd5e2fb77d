"""Descriptions of guarded callables, and the state of the guarded calls inside a call."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from stroma.adapters._state_views import View, as_it_is, first_argument
from stroma.checkpoint.identity import StepCalls
from stroma.contracts.contract import NodeContract, Role
from stroma.contracts.copying import replace_records
from stroma.cost.usage import Usage, usage_from
from stroma.engine.execution import CURRENT, RunningNode
from stroma.engine.outcome import Halt
from stroma.failures.failure import causes
from stroma.trace.events import AttemptRow, AttemptUsage, TraceEvent


class Control(NamedTuple):
    """Meaning of an exception, or a result, that a framework uses for control flow.

    The caller gets it unchanged, and there is no further attempt.

    Attributes:
        outcome: "suspended": the step waits for a person; "returned": it ended with ``value``; "passed": it
            failed for good, which mostly ends the run of the framework.
        value: the value that it returned, or the reason of the suspension or failure as text.
    """

    outcome: Literal["suspended", "returned", "passed"]
    value: Any = None


class ErrorAnswer(Exception):
    """Failure of a step whose result says that it failed. Its caller gets the result."""


@dataclass(frozen=True, slots=True)
class GuardedStep:
    """Description of a callable for the guard.

    Attributes:
        contract: used in place of the one that the runner's registry has for the id.
        input_view: returns what contract, hooks and journal see of the arguments.
        output_view: returns what they see of the result.
        messages: returns what a step sends to a model, of its arguments; see stroma.telemetry.messages.
        usage: returns the provider's response in a result, or a :class:`stroma.Usage`; None if nothing was
            used.
        control: returns the meaning of an exception of the framework; None for a failure.
        judge: returns the meaning of a result that is not an output; None for an output.
        collect: returns the result of a stream for the list of its chunks. Without it a stream's result is
            their number, or the list if the step has a contract or reads usage.
        delta: returns the text that a chunk of a stream adds to the answer, for the readers of the run's
            events; None or "" without one.
        can_retry: the step may be called again after a failure.
        role: what traces show the step as, unless its contract says it.
        usage_includes_calls: ``usage`` includes that of the guarded calls inside, which is deducted.
    """

    step_id: str
    contract: NodeContract[Any, Any] | None = None
    input_view: View = first_argument
    output_view: Callable[[Any], Any] = as_it_is
    messages: View | None = None
    usage: Callable[[Any], Any] | None = None
    control: Callable[[BaseException], Control | None] | None = None
    judge: Callable[[Any], Control | None] | None = None
    collect: Callable[[list[Any]], Any] | None = None
    delta: Callable[[Any], str | None] | None = None
    can_retry: bool = True
    usage_includes_calls: bool = True
    role: Role | None = None
    plan: list[Any] = field(default_factory=lambda: [None], repr=False)


#: Makes the call and returns its result, or the exception that it raised.
Invoke: TypeAlias = Callable[[], Awaitable[tuple[Any, BaseException | None]]]
#: The task that entered a call, and its count of cancellations at that time.
CallTask: TypeAlias = tuple[asyncio.Task[Any] | None, int]
Halts: TypeAlias = list[tuple[BaseException, Halt]]


class InnerCalls:
    """State of the guarded calls inside one attempt of a node.

    Attributes:
        is_published: the caller has received a part of the result, so that no further attempt may follow.
        halts: the exceptions that inner calls raised, with the stop that each means.
    """

    __slots__ = ("calls", "halts", "is_published")

    def __init__(self) -> None:
        self.calls: StepCalls | None = None
        self.is_published = False
        self.halts: Halts = []

    @classmethod
    def of(cls, execution: RunningNode) -> InnerCalls:
        """Return the state for the current attempt of an execution."""
        inner: InnerCalls = execution.notes.setdefault(cls, cls())
        if inner.calls is not execution.calls:  # Each attempt has its own calls.
            inner.calls, inner.halts, inner.is_published = execution.calls, [], False
        return inner


def copy_for_retries(state: Any) -> Any:
    """Return a copy of a state whose containers are new, and whose leaves are the same objects."""
    return replace_records(state, copy.copy)


def input_of_attempt(state: Any, original: Any) -> Any:
    """Return the state, or for a further attempt a copy of the original, which the first may have changed."""
    node = CURRENT.get()
    return state if node is None or node.attempt == 1 else copy_for_retries(original)


def mark_published() -> None:
    """Mark the current steps: their caller has received a part of the result, so none is attempted again."""
    execution = CURRENT.get()
    while execution is not None:
        InnerCalls.of(execution).is_published = True
        execution = execution.parent


def find_halt(error: BaseException | None, halts: Halts) -> Halt | None:
    """Return the stop of the guarded call that caused an exception, however often that was wrapped."""
    if not halts:
        return None
    by_id = {id(raised): halt for raised, halt in halts}
    return next((by_id[id(cause)] for cause in causes(error) if id(cause) in by_id), None)


def usages_of(rows: Sequence[AttemptRow | TraceEvent]) -> Iterator[AttemptUsage]:
    """Yield the usages of executions and of those inside of them."""
    for row in rows:
        if row.usage is not None:
            yield row.usage
        if row.children:
            yield from usages_of(row.children)


#: Key of an execution's note: the usage that litellm's steps inside it have counted.
_COUNTED_INSIDE: Final = "usage that litellm has counted"


def note_counted(usage: Usage) -> None:
    """Note on the step around the current one that litellm has counted this call, lest its framework does."""
    node = CURRENT.get()
    if node is not None and node.parent is not None:
        counted = node.parent.notes.setdefault(_COUNTED_INSIDE, [])
        counted.append((usage.input_tokens, usage.output_tokens))


def report_uncounted(node: RunningNode, usage: Usage) -> None:
    """Report a framework's usage of one model call on its step, unless litellm inside has counted it."""
    try:
        node.notes.get(_COUNTED_INSIDE, []).remove((usage.input_tokens, usage.output_tokens))
    except ValueError:
        node.report_usage(usage)


def own_usage(step: GuardedStep, response: Any, execution: RunningNode) -> Any:
    """Return the usage in a response of a step that the calls inside have not counted, or None."""
    if response is None or not step.usage_includes_calls:
        return response
    inside = list(usages_of(execution.children or ()))
    if not inside:
        return response
    used = response if isinstance(response, Usage) else usage_from(response)
    input_tokens = max(0, used.input_tokens - sum(one.input_tokens for one in inside))
    output_tokens = max(0, used.output_tokens - sum(one.output_tokens for one in inside))
    cached = min(input_tokens, max(0, used.cached_input_tokens - sum(u.cached_input_tokens for u in inside)))
    written = max(0, used.cache_write_tokens - sum(one.cache_write_tokens for one in inside))
    written = min(input_tokens - cached, written)
    cost = used.cost_usd
    if cost is not None:
        cost = max(0.0, cost - sum(one.cost_usd for one in inside))
    if not (input_tokens or output_tokens or cost):
        return None
    return replace(
        used,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_input_tokens=cached,
        cache_write_tokens=written,
        cache_write_1h_tokens=min(written, used.cache_write_1h_tokens),
        cost_usd=cost,
    )


#: Keys of an execution's notes: how many texts the models directly inside it have emitted, and the node of
#: another run that the execution's run is part of.
_STREAMED_INSIDE: Final = "texts that models inside have emitted"
_AROUND: Final = "node of another run around this one"


def note_around(node: RunningNode, around: RunningNode) -> None:
    """Note on the outermost step of a run the node of another run that called it: it emits the same text."""
    node.notes[_AROUND] = around


def streams_inside(node: RunningNode) -> int:
    """Return how many texts of streamed answers models directly inside a node have emitted."""
    count: int = node.notes.get(_STREAMED_INSIDE, 0)
    return count


def emit_delta(node: RunningNode, text: str | None) -> None:
    """Emit text of a streamed answer on a model's step, unless a model inside it emits the same answer."""
    if not text or (node.framework_role != "agent" and streams_inside(node)):
        return
    if node.parent is not None:
        node.parent.notes[_STREAMED_INSIDE] = streams_inside(node.parent) + 1
    emit_text(node, text)


def emit_text(node: RunningNode, text: str) -> None:
    """Emit text on a node, and on the nodes of other runs that its run is part of."""
    node.emit(text)
    while node.parent is not None:
        node = node.parent
    around = node.notes.get(_AROUND)
    if around is not None:
        emit_text(around, text)


def current_task() -> CallTask:
    """Return the running task, and how many cancellations of it are on their way."""
    task = asyncio.current_task()
    return task, 0 if task is None else task.cancelling()


def is_cancelled(entry: CallTask) -> bool:
    """Return True if the running task is being cancelled, since the call entered it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > (entry[1] if task is entry[0] else 0)


def close_stream(source: Any) -> None:
    """Close what a generator function returned, if it can be closed."""
    if hasattr(source, "close"):
        source.close()


async def aclose_stream(source: Any) -> None:
    """Close what an async generator function returned, if it can be closed."""
    if hasattr(source, "aclose"):
        await source.aclose()


class Undeclared(TypeError):
    """A plain function returned an awaitable, whose work would not be guarded."""


def stops_caller(step: GuardedStep, error: BaseException) -> bool:
    """Return True for a BaseException that stops the caller and is not control flow of the framework."""
    if isinstance(error, (Exception, asyncio.CancelledError)):
        return False
    return step.control is None or step.control(error) is None


def not_awaitable(step: GuardedStep, value: Any) -> Any:
    """Return the value of a plain function. Raises Undeclared for an awaitable, which is closed."""
    if isinstance(value, Awaitable):
        close = getattr(value, "close", None)
        if close is not None:
            close()
        raise Undeclared(
            f"step {step.step_id!r} looks like a plain function and returned a {type(value).__name__}; "
            "define it with `async def`, or mark it with inspect.markcoroutinefunction"
        )
    return value
