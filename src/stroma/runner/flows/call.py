"""A call of a flow: its work in the real event loop, and its outcome for the body."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Coroutine
from typing import Any, Final, cast

from pydantic import BaseModel

from stroma.checkpoint import Committed, StepCall, Waiting
from stroma.checkpoint.entries import OF_FLOW, SentMessage
from stroma.contracts.node import FlowNode, Group, Node, contract_of_node, held_by
from stroma.contracts.schema import comparable, schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.effects import flight_inside, is_unknown
from stroma.engine.execution import AGENT, RunningNode, running_agent
from stroma.engine.loop import execute_in_turn
from stroma.engine.outcome import Place
from stroma.engine.restore import restore
from stroma.engine.tasks import give_up
from stroma.runner.flows.endings import StepFailed
from stroma.runner.flows.journal import FlowRecords, step_of

_WITHOUT_INPUT: Final = StepCall(OF_FLOW, None)


class FlowScope:
    """A flow inside a run, or a part of one: what all of its calls share."""

    def __init__(
        self, ctx: ReliabilityContext, parent: FlowScope | None, node: FlowNode, position: int, branch: str
    ) -> None:
        self.ctx, self.node, self.position = ctx, node, position
        self.branch = branch  # Of the flow; "" at the top level of a position.
        self.prefix = f"{branch}." if branch else ""
        above: RunningNode | None = None if parent is None else parent.execution
        # Parent of its steps: it has their clock, and no attempts or hooks. It has no id: its steps are at
        # the top level of the run, and of no group.
        self.execution: RunningNode = RunningNode(ctx, cast("str", None), "group", position, branch, above)
        self.execution.attempt = 1
        self.execution.remembers = False
        self.is_over = False  # Its body has returned; it makes no further call.
        #: The flows around it, from the outermost inwards, then its own.
        self.names: tuple[str, ...] = (*(() if parent is None else parent.names), node.node_id)
        #: Its own bound of concurrency, and those of the flows around it.
        self.gates: tuple[asyncio.Semaphore, ...] = () if parent is None else parent.gates
        if node.max_concurrency is not None:
            self.gates = (asyncio.Semaphore(node.max_concurrency), *self.gates)


class FlowCall:
    """One call of a flow, from the await in the body to the delivery of its end."""

    # Class attributes, and no slots: most calls set few of them, which saves 0.8 us of the 10 of a step.
    requested_at = 0  # Number of the last event when the body awaited it.
    input_key: bytes | None = None  # Its input in stored form; None if it is neither stored nor compared.
    source = ""  # The branch of the discarded output that it took.
    takes_outputs = True  # A discarded output of the same node and input is its own.
    future: asyncio.Future[Any] | None = None  # Of the body loop; None once the body has given the call up.
    context: contextvars.Context | None = None  # Of the task that awaits it.
    task: asyncio.Task[Any] | None = None  # Of the real event loop, while the call is at work.
    is_cancelled = False  # The task was cancelled since the body gave the call up.
    settles = False  # Only find out how the call of an effect ended.
    suspended: str | None = None  # Why a step waits for a person.
    end: Any = None  # An output, an answer or a StepFailed,
    outcome: Any = None  # the same once it was delivered.
    question: Waiting | None = None  # What it asks a person.
    wake_ms: int | None = None  # When the wait expires, since the epoch.
    topic: str | None = None  # Of the message that it waits for,
    message: SentMessage | None = None  # and the one that it has taken.

    def __init__(self, scope: FlowScope, identity: str, node: Node | Group, state: BaseModel) -> None:
        self.scope, self.node, self.state = scope, node, state
        self.name(identity)

    def name(self, identity: str) -> None:
        """Set the identity of the call, and the branch of its records in the run."""
        self.identity, self.branch = identity, self.scope.prefix + identity

    def perform(self, cancelling: int = 0) -> Coroutine[Any, Any, Any]:
        """Return the work of the call, for a task of the real event loop."""
        scope = self.scope
        place = Place(
            position=scope.position,
            branch=self.branch,
            parent=scope.execution,
            step=_WITHOUT_INPUT if self.input_key is None else StepCall(OF_FLOW, self.input_key),
            cancelling=cancelling,
            restores=False,
            settles=self.settles,
        )
        if scope.gates:
            return self._behind_gates(place)
        return execute_in_turn(scope.ctx, (self.node,), self.state, place)

    async def _behind_gates(self, place: Place) -> Any:
        async with contextlib.AsyncExitStack() as stack:
            for gate in self.scope.gates:
                await stack.enter_async_context(gate)
            return await execute_in_turn(self.scope.ctx, (self.node,), self.state, place)

    async def restore(self) -> Any:
        """Return the recorded output, for which skip hooks are called; None if it is assembled again."""
        place = Place(self.scope.position, self.source or self.branch)
        with running_agent(None if self.context is None else self.context.get(AGENT)):
            return await restore(self.scope.ctx, self.node, self.state, place)

    def is_other_than(self, output: Committed) -> bool:
        """Return True if a loose output at the call's place belongs to another call.

        It is found by its input, by any call; by this one alone if the input cannot be compared.
        """
        return comparable(step_of(output).input_key) is not None

    def take_output(self, records: FlowRecords) -> str:
        """Return the branch of a loose output that the call takes, in place of its work; "" without one."""
        if not self.takes_outputs:
            return ""
        return records.take_output(self.node.node_id, self.input_key, self.branch)

    def problem_of(self, message: SentMessage) -> str | None:
        """Return why a message does not fit the class that the call waits for; None if it does."""
        raise NotImplementedError

    def is_effect(self) -> bool:
        """Return True for a call of one effect, whose ``reconcile`` can be called without the call."""
        contract = contract_of_node(self.node, self.scope.ctx.registry)
        return contract is not None and contract.effect

    def is_unknown(self) -> bool:
        """Return True if nobody knows how the call of an effect ended."""
        return is_unknown(self.scope.ctx, self.scope.position, self.branch)

    def give_up(self) -> None:
        """Cancel the work that nobody waits for, once no effect inside it is in flight."""
        flight = flight_inside(self.scope.ctx, self.scope.position, self.branch)
        if self.task is not None and flight is not None:
            flight.ended.add_done_callback(lambda _: self.give_up())
        elif self.task is not None:
            self.is_cancelled = True
            give_up(self.task)

    def take(self) -> Any:
        """Return the outcome for the body, which may change it. Raises StepFailed."""
        outcome = self.outcome
        if type(outcome) is StepFailed:
            try:
                raise outcome
            finally:
                del outcome  # Its traceback references this frame.
        node = self.node
        self.scope.ctx.redactor.note_seen(outcome)
        plan = node.plan[0] if type(node) is Node else None
        if plan is not None and type(outcome) is plan[1].model:
            plan[1].mark_shared(outcome)
            return outcome
        schema_of(type(outcome)).mark_shared(outcome)
        return held_by(outcome)
