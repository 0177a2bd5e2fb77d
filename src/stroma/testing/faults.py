"""FaultPlan: inject faults into the nodes of a run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self

from pydantic import BaseModel

from stroma.contracts.node import Group, Node
from stroma.engine.context import INTERCEPTORS, Call, Interceptor
from stroma.engine.execution import RunningNode

Kind = Literal["fail", "lose", "delay", "malform"]
#: Output of a model that ignores its instructions.
_NONSENSE: Final = "I'm sorry, but I can't help with that."


class Transient(ConnectionError):
    """Injected connection error. RECOVERABLE, like other errors of connections.

    Where: out of a node, inside of a FaultPlan; ``result.failure`` of a run that gave up.
    Cause: the plan makes this attempt fail and names no exception.
    Fix: nothing; check that the run does what it should, or pass another exception to the plan.
    """


class Injected(NamedTuple):
    """A fault that was injected into a run. ``attempt``: 1-based."""

    kind: Kind
    node_id: str
    position: int
    branch: str
    attempt: int


Raised = BaseException | type[BaseException] | Callable[[], BaseException]


@dataclass(slots=True)
class _Fault:
    kind: Kind
    node_id: str
    attempts: frozenset[int] | None
    error: Raised = Transient
    seconds: float = 0.0
    output: Any = _NONSENSE
    met: bool = False

    def is_due(self, run: RunningNode) -> bool:
        return self.node_id == run.node_id and (self.attempts is None or run.attempt in self.attempts)

    def __str__(self) -> str:
        which = (
            "every attempt"
            if self.attempts is None
            else f"attempt {', '.join(map(str, sorted(self.attempts)))}"
        )
        return f"{self.kind} {self.node_id!r} on {which}"


class FaultPlan(Interceptor):
    """Faults for runs and plain steps that start inside of it. The pipeline itself is not changed.

    ```python
    with FaultPlan().fail("draft", TimeoutError("too slow")).malform("check", attempt=2):
        result = await runner.run(pipeline, state)
    ```

    Faults replace a node's function or wrap it; contracts, limits, retries, records and hooks work as usual.
    They reach nodes in groups and maps by their ids, and every item of a map. ``attempt`` is
    1-based: a number, several, or None for all. Plans can be nested.

    At its end the plan raises AssertionError if one of its faults never occurred: an id may be misspelt.

    Attributes:
        seed: seed of :meth:`at_random`; the same seed injects the same faults into the same run.
        injected: the faults that occurred, in order.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self.injected: list[Injected] = []
        self._faults: list[_Fault] = []
        self._chances: list[tuple[float, Sequence[Raised], Collection[str] | None, int]] = []

    # ------------------------------------------------------------------ what goes wrong

    def fail(
        self, node_id: str, error: Raised = Transient, *, attempt: int | Collection[int] | None = 1
    ) -> Self:
        """Raise instead of calling the node. ``error``: an exception, its class, or a function of it."""
        return self._add(_Fault("fail", node_id, _attempt_set(attempt), error))

    def lose(
        self, node_id: str, error: Raised = Transient, *, attempt: int | Collection[int] | None = 1
    ) -> Self:
        """Call the node and raise instead of returning its output, as if the response was lost."""
        return self._add(_Fault("lose", node_id, _attempt_set(attempt), error))

    def delay(self, node_id: str, seconds: float, *, attempt: int | Collection[int] | None = 1) -> Self:
        """Wait before the node is called, within its timeout. Takes no time under a FakeClock."""
        return self._add(_Fault("delay", node_id, _attempt_set(attempt), seconds=seconds))

    def malform(
        self, node_id: str, output: Any = _NONSENSE, *, attempt: int | Collection[int] | None = 1
    ) -> Self:
        """Call the node and replace its output, by default with a text; the usage stays.

        ``output``: the replacement, or a function of the output that returns it.
        """
        return self._add(_Fault("malform", node_id, _attempt_set(attempt), output=output))

    def at_random(
        self,
        probability: float,
        errors: Sequence[Raised] = (Transient,),
        *,
        nodes: Collection[str] | None = None,
        attempts: int = 1,
    ) -> Self:
        """Fail the first ``attempts`` of each node, or of some nodes, with a probability from 0 to 1."""
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be from 0 to 1, got {probability!r}")
        if not errors:
            raise ValueError("errors must not be empty; pass at least one exception")
        self._chances.append((probability, tuple(errors), nodes, attempts))
        return self

    def _add(self, fault: _Fault) -> Self:
        self._faults.append(fault)
        return self

    def forgive(self) -> None:
        """Do not raise at the end for planned faults that never occurred."""
        for fault in self._faults:
            fault.met = True

    def met_faults(self) -> list[int]:
        """Return the numbers of the planned faults that occurred."""
        return [number for number, fault in enumerate(self._faults) if fault.met]

    def note_met(self, numbers: Collection[int]) -> None:
        """Mark faults as occurred in another process."""
        for number in numbers:
            self._faults[number].met = True

    # ------------------------------------------------------------------ around runs

    def __enter__(self) -> Self:
        INTERCEPTORS.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        INTERCEPTORS.remove(self)
        missed = [str(fault) for fault in self._faults if not fault.met]
        if kind is None and missed:
            raise AssertionError(
                f"planned faults never occurred: {'; '.join(missed)}; "
                "check the node ids, and that the run reaches them"
            )

    async def call(self, run: RunningNode, node: Node | Group, call: Call, state: BaseModel) -> Any:
        """Call a node's function; called by the engine in its place."""
        due = [fault for fault in self._faults if fault.is_due(run)]
        for fault in due:
            self._note(fault, run)
            if fault.kind == "delay":
                await asyncio.sleep(fault.seconds)
            elif fault.kind == "fail":
                raise _exception_of(fault.error)
        if type(node) is Node:
            self._leave_to_chance(run)
        output = await call(state)
        for fault in due:
            if fault.kind == "lose":
                raise _exception_of(fault.error)
            if fault.kind == "malform":
                output = _malformed(output, fault.output)
        return output

    def _note(self, fault: _Fault, run: RunningNode) -> None:
        fault.met = True
        self.injected.append(Injected(fault.kind, run.node_id, run.position, run.branch, run.attempt))

    def _leave_to_chance(self, run: RunningNode) -> None:
        for number, (probability, errors, nodes, attempts) in enumerate(self._chances):
            if run.attempt > attempts or (nodes is not None and run.node_id not in nodes):
                continue
            # From the place alone: concurrency does not change the faults.
            place = (self.seed, number, run.node_id, run.position, run.branch, run.attempt)
            dice = random.Random(repr(place))
            if dice.random() < probability:
                self.injected.append(Injected("fail", run.node_id, run.position, run.branch, run.attempt))
                raise _exception_of(dice.choice(errors))


def _attempt_set(attempts: int | Collection[int] | None) -> frozenset[int] | None:
    if attempts is None:
        return None
    numbers = frozenset((attempts,) if isinstance(attempts, int) else attempts)
    if not numbers or min(numbers) < 1:
        raise ValueError(f"attempt must be at least 1, got {attempts!r}")
    return numbers


def _exception_of(error: Raised) -> BaseException:
    result = error if isinstance(error, BaseException) else error()
    return result.with_traceback(None)


def _malformed(returned: Any, output: Any) -> Any:
    result_tuple = returned if isinstance(returned, tuple) else (returned,)
    result = output(result_tuple[0]) if callable(output) else output
    return (result, *result_tuple[1:]) if isinstance(returned, tuple) else result
