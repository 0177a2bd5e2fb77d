"""What the guard has to know of a callable, and of the calls that are inside a call."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from stroma.adapters._state_views import View, as_it_is, first_argument
from stroma.checkpoint.identity import StepCalls
from stroma.contracts.contract import NodeContract
from stroma.contracts.copying import replace_records
from stroma.engine.execution import NodeExecution, current_node
from stroma.engine.outcome import Halt
from stroma.trace.events import AttemptRow, TraceEvent

__all__ = [
    "Begun", "Control", "Halts", "Inside", "Invoke", "Step", "as_at_first", "causes", "counted", "halt_behind",
    "handed_on", "kept_for_retries",
]  # fmt: skip


class Control(NamedTuple):
    """What an exception means with which a framework steers: it passes through untouched, and is no failure to retry.

    Attributes:
        outcome: "suspended": the step waits for somebody; "returned": it ended with ``value``; "passed": it ends what is
            under way, as a terminal failure.
        value: what it returned, or in words what it waits for.
    """

    outcome: Literal["suspended", "returned", "passed"]
    value: Any = None


@dataclass(frozen=True, slots=True)
class Step:
    """What the guard has to know of a callable.

    Attributes:
        contract: wins over the one that the runner's registry has for the id.
        given: what contract, hooks and journal see of the arguments.
        made: the same of the result.
        usage: the provider's response in a result, or a :class:`stroma.Usage`; None if it used nothing.
        control: what an exception of the framework means; None for a failure.
        collect: of a stream, the result from the list of its chunks. Without it a stream's result is how many there were,
            unless the step has a contract or reads usage: then it is the list.
        again: whether it may be called again after a failure.
        includes: whether ``usage`` tells what guarded calls inside have used, too, so that they are deducted.
    """

    step_id: str
    contract: NodeContract[Any, Any] | None = None
    given: View = first_argument
    made: Callable[[Any], Any] = as_it_is
    usage: Callable[[Any], Any] | None = None
    control: Callable[[BaseException], Control | None] | None = None
    collect: Callable[[list[Any]], Any] | None = None
    again: bool = True
    includes: bool = True
    plan: list[Any] = field(default_factory=lambda: [None], repr=False)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from or while handling, and what is in it if it is a group."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop(0)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__]
        if isinstance(found, BaseExceptionGroup):
            waiting += found.exceptions


#: Makes the call: what it returned, or what it raised.
Invoke: TypeAlias = Callable[[], Awaitable[tuple[Any, BaseException | None]]]
#: The task in which something was begun, and its count of cancellations then.
Begun: TypeAlias = tuple[asyncio.Task[Any] | None, int]
Halts: TypeAlias = list[tuple[BaseException, Halt]]


class Inside:
    """What is known of the guarded calls inside a node's execution."""

    __slots__ = ("calls", "halts", "handed_on")

    def __init__(self) -> None:
        self.calls: StepCalls | None = None
        self.handed_on = False
        self.halts: Halts = []

    @classmethod
    def of(cls, execution: NodeExecution) -> Inside:
        found: Inside = execution.notes.setdefault(cls, cls())
        if found.calls is not execution.calls:  # Each attempt has calls of its own.
            found.calls, found.halts, found.handed_on = execution.calls, [], False
        return found


def kept_for_retries(state: Any) -> Any:
    """A state as it is now: in containers of its own, which hold the very objects."""
    return replace_records(state, copy.copy)


def as_at_first(state: Any, kept: Any) -> Any:
    """A state itself; for another attempt of the step here, as it was kept before the first, which may have changed it."""
    node = current_node()
    return state if node is None or node.attempt == 1 else kept_for_retries(kept)


def handed_on() -> None:
    """Part of what the steps here will return has reached somebody already: this attempt of theirs is the last."""
    execution = current_node()
    while execution is not None:
        Inside.of(execution).handed_on = True
        execution = execution.parent


def halt_behind(error: BaseException | None, halts: Halts) -> Halt | None:
    """The stop of a guarded call that an exception came from, however often it was wrapped."""
    if not halts:
        return None
    by_id = {id(raised): halt for raised, halt in halts}
    return next((by_id[id(found)] for found in causes(error) if id(found) in by_id), None)


def counted(rows: Sequence[AttemptRow | TraceEvent]) -> tuple[int, int]:
    """Input and output tokens of the executions inside."""
    given = made = 0
    for row in rows:
        usage = row.usage
        children = row.children
        if usage is not None:
            given, made = given + usage.tokens - usage.output_tokens, made + usage.output_tokens
        if children:
            inner = counted(children)
            given, made = given + inner[0], made + inner[1]
    return given, made
