"""The driver of flows: runs the body of a flow, and makes its calls or replays them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Sequence
from functools import partial
from time import perf_counter_ns
from typing import Any, Final, Literal, NamedTuple, NoReturn, cast
from urllib.parse import unquote

from pydantic import BaseModel

from stroma._utils.text import one_line
from stroma.checkpoint import PipelineChanged, StepCall, StoreError
from stroma.checkpoint.identity import SCOPE, Scope, StepCalls
from stroma.checkpoint.protocols import OF_FLOW
from stroma.contracts.contract import ContractViolation, as_violation, output_violation
from stroma.contracts.node import FlowNode, Group, Node, held_by
from stroma.contracts.schema import Schema, Snapshot, schema_of
from stroma.cost.budget import BudgetExceeded
from stroma.engine.attempt import NodeAttempt
from stroma.engine.commit import failed_of, record, settle
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT
from stroma.engine.execution import NodeExecution
from stroma.engine.loop import execute_in_turn, plan_of, try_again
from stroma.engine.merged_models import spelled_out
from stroma.engine.outcome import STOPPED, Halt, Place, Stopped
from stroma.engine.restore import restore
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure, NodeContext, diagnose, ends_run
from stroma.hooks.dispatch import HookNotAsync
from stroma.runner.flow_errors import FlowClosed, StepFailed
from stroma.runner.flow_journal import CallRecord, FlowJournal, encode_input, input_key_of, read_failure
from stroma.runner.flow_order import ResultOrder
from stroma.runner.flow_time import OpenWait, Waits
from stroma.trace.events import AttemptRow

__all__ = ["REPLAY_ONLY", "FlowDriver", "FlowRun", "as_output", "run_with_flows"]

#: For how long a replay may go without a call before what is missing counts as a change of the body.
STUCK_SECONDS = 1.0
_TEAR_DOWN_SECONDS: Final = 5.0
_IDLE_TURNS: Final = 12

_CALL: Final = StepCall(OF_FLOW, None)

#: Set while ``check_deterministic`` replays: a call without a record is a change.
REPLAY_ONLY: contextvars.ContextVar[bool] = contextvars.ContextVar("stroma_replay_only", default=False)


async def run_with_flows(
    ctx: ReliabilityContext, nodes: Sequence[Node | Group], value: BaseModel, place: Place
) -> BaseModel | Halt | Stopped:
    """Do the same as ``execute_in_turn`` for a sequence that has flows in it."""
    journal = FlowJournal(ctx)
    first = 0
    while first < len(nodes):
        if first and ctx.stops:
            return STOPPED
        here = place._replace(position=place.position + first)
        node = nodes[first]
        if isinstance(node, FlowNode):
            restored = await restore(ctx, node, value, here) if ctx.restored else None
            outcome = (
                await FlowDriver(ctx, journal).run(node, value, here.position)
                if restored is None
                else restored
            )
            first += 1
        else:
            end = next((at for at in range(first, len(nodes)) if isinstance(nodes[at], FlowNode)), len(nodes))
            outcome = await execute_in_turn(ctx, nodes[first:end], value, here)
            first = end
        if isinstance(outcome, (Halt, Stopped)):
            return outcome
        value = outcome
    return value


class EndKey(NamedTuple):
    """Place of a call in the records of a run."""

    position: int
    branch: str
    kind: Literal["failure", "cancelled"]


class CallEnd(NamedTuple):
    """A call that failed, or that the body cancelled.

    Attributes:
        place: number of results of its flow that were handed out before.
        number: counts those that the body met; 0 if it did not.
        activity: of the driver then.
        inside: failures inside a flow or map which are the cause of its own.
    """

    run: FlowRun
    identity: str
    place: int
    number: int
    activity: int
    inside: tuple[EndKey, ...] = ()


class FlowDriver:
    """Drives one flow of a run, with the flows inside it.

    Attributes:
        activity: number of calls so far.
        busy: calls that are at work: not those that wait for a person, for a time, or for a flow inside.
        unreached: recorded results that the bodies have not asked for yet.
        stopping: the end of the flow, whatever its body does: a crossed budget, a suspension, a changed body.
    """

    def __init__(self, ctx: ReliabilityContext, journal: FlowJournal) -> None:
        self.ctx = ctx
        self.journal = journal
        self.loop = asyncio.get_running_loop()
        self.activity = self.busy = self.unreached = 0
        #: What the loop does in its next turn, a task that has not begun, say. Of other loops than asyncio's nobody knows.
        self.ready = getattr(self.loop, "_ready", (True,))
        self.stopping: Halt | Stopped | BaseException | None = None
        self.closing = self.is_over = False
        self.waits = Waits(self)
        self.flows: list[FlowRun] = []
        self.body: asyncio.Task[Any] | None = None
        self._waker: asyncio.Future[None] | None = None
        self._is_woken = False
        self._held: asyncio.Future[None] | None = None
        self._watching = False
        #: Replayed calls that wait until the body cancels them again, as it did in real time.
        self.to_cancel = 0
        #: Failures and cancellations of calls, which a resume may have to try again.
        self.ended: dict[EndKey, CallEnd] = {}
        self.endings = 0
        self.replay_only = REPLAY_ONLY.get()

    @property
    def flow_id(self) -> str:
        return self.flows[0].node.node_id

    # ------------------------------------------------------------------ the body

    async def run(self, node: FlowNode, value: BaseModel, position: int) -> BaseModel | Halt | Stopped:
        """Run a flow at a position of the run. Return its committed output, or its end."""
        ctx = self.ctx
        contract = ctx.contract_of(node)
        assert contract is not None
        source, target = schema_of(contract.input_schema), schema_of(contract.output_schema)
        try:
            state, snapshot = source.prepare_input(value)
        except BaseException as error:
            if ends_run(error):
                raise
            value = ctx.handover.own(value)
            raw = schema_of(type(value)).state(value)
            return self._halt(as_violation(node.node_id, "input", raw, error, source.model), node.node_id)
        flow = FlowRun(self, None, node, position, "")
        begin = perf_counter_ns()
        outcome = await self._drive(flow, node, state)
        if isinstance(outcome, (Halt, Stopped)):
            ctx.cost_tracker.latency_ns += flow.execution.busy_ns
            return outcome
        return await self.commit(flow, node, target, snapshot, outcome, begin, None)

    async def _drive(self, flow: FlowRun, node: FlowNode, state: BaseModel) -> Any:
        """Run the body in a task of its own. Return what it returned, or a Halt. Raises what must leave the run."""
        context = contextvars.copy_context()
        context.run(CURRENT.set, None)
        self.body = self.loop.create_task(flow.call_body(node, state), context=context)
        self.body.add_done_callback(lambda _: self.wake())
        try:
            await self._watch_over(self.body)
        finally:
            # Whatever ends it: the body has to end before the run does.
            self.closing = True
            self.waits.close()
            await self._tear_down(self.body)
            _retrieve(self.body)
            self.is_over = self.body.done()
        body, stopping = self.body, self.stopping
        self.body = None
        if not body.done():  # It goes on, and can do nothing: each of its calls raises FlowClosed.
            stopping = stopping or asyncio.CancelledError()
        if stopping is not None:
            if isinstance(stopping, BaseException):
                raise stopping
            return stopping
        if body.cancelled():
            error: BaseException | None = asyncio.CancelledError("the body of the flow cancelled itself")
        else:
            error = body.exception()
        if error is None:
            return body.result()
        if not isinstance(error, Exception) and not isinstance(
            error, (asyncio.CancelledError, BaseExceptionGroup)
        ):
            raise error
        self._forget_what_ended(error)
        return self.halt_of(error, node.node_id)

    async def _watch_over(self, body: asyncio.Task[Any]) -> None:
        """Wait until the body has ended or is to end, and suspend it once nothing but waits is open."""
        while not body.done():
            if self.stopping is not None and not self.busy:
                return
            is_waiting = self.stopping is None and self.waits.open and not self.busy
            if is_waiting and await self._is_idle() and await self.waits.settle():
                continue
            if body.done() or self._is_woken or (self.stopping is not None and not self.busy):
                self._is_woken = False
                continue
            self._waker = self.loop.create_future()
            timeout = self.waits.poll_seconds() if self.waits.open and self.stopping is None else None
            await asyncio.wait([self._waker], timeout=timeout)
            self._is_woken = False

    async def _is_idle(self) -> bool:
        """Return True if the body, left to itself, does nothing further."""
        seen, quiet = self.signs(), 0
        while quiet < _IDLE_TURNS:
            await asyncio.sleep(0)
            if self.busy or self.stopping is not None or not self.waits.open or self.has_returned:
                return False
            signs = self.signs()
            if signs != seen or any(flow.order.is_turning for flow in self.flows):
                seen, quiet = signs, 0  # A failure takes a few turns from a task to the TaskGroup around it.
            else:
                quiet += 1
        return True

    @property
    def has_returned(self) -> bool:
        return self.body is not None and self.body.done()

    def signs(self) -> tuple[int, int, int]:
        """Return numbers that change with what the body does."""
        return self.activity, self.endings, len(self.waits.open)

    async def _tear_down(self, body: asyncio.Task[Any]) -> None:
        """Cancel the body, and wait for its end, for a while."""
        if not body.done():
            body.cancel()
        cancelled = False
        deadline = self.loop.time() + _TEAR_DOWN_SECONDS
        while not body.done():
            try:
                await asyncio.wait([body], timeout=max(0.0, deadline - self.loop.time()))
            except asyncio.CancelledError:
                cancelled = True
                continue
            if self.busy:
                deadline = self.loop.time() + _TEAR_DOWN_SECONDS  # A commit is under way.
            elif not body.done() and self.loop.time() >= deadline:
                self.ctx.run_logger.warning(
                    "flow %r does not end although it was cancelled; let CancelledError and FlowClosed out of its body",
                    self.flow_id,
                )
                break
        if cancelled:
            raise asyncio.CancelledError

    def wake(self) -> None:
        """Have the driver look at what is open."""
        self._is_woken = True
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    # ------------------------------------------------------------------ ends

    def stop(self, end: Halt | Stopped | BaseException) -> None:
        """End the flow whatever its body does, once the steps that are at work have ended."""
        if self.stopping is None:
            self.stopping = end
        self.wake()

    async def never(self) -> NoReturn:
        """Wait until the body is cancelled: it must not learn of what ends it."""
        self.wake()
        await self.loop.create_future()
        raise FlowClosed("the flow has ended")

    async def stop_here(self, end: Halt | Stopped | BaseException) -> NoReturn:
        self.stop(end)
        await self.never()

    def changed(self, message: str) -> Halt:
        """Return the end of a flow whose body does not do what it did before."""
        ctx = self.ctx
        error = PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: {message}. A flow may depend only on its input, its steps, and flow.now(), "
            "flow.random() and flow.uuid(); restore the code that recorded this, or start a new run"
        )
        node_id = self.flow_id
        return Halt(Failure(error, FailureClass.TERMINAL, node_id, 1, str(error), "changed"))

    def _halt(self, error: BaseException, node_id: str) -> Halt:
        return Halt(diagnose(error, NodeContext(node_id, 1, self.ctx.run_id), self.ctx.classifiers))

    def halt_of(self, error: BaseException, node_id: str) -> Halt:
        """Return the end of a flow whose body raised."""
        failed = [one for one in _leaves(error) if isinstance(one, StepFailed)]
        if failed:
            first = min(failed, key=lambda one: one.place[3] if one.place is not None else 0)
            return Halt(first.failure)
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        halt = self._halt(error, node_id)
        halt = halt._replace(failure=self.ctx.redactor.mask_failure(halt.failure, ()))
        self.ctx.run_logger.warning(
            "flow %r raised %s: %s", node_id, type(error).__name__, one_line(halt.failure.message)
        )
        return halt

    def _forget_what_ended(self, error: BaseException) -> None:
        """Delete the records of the failures that ended the flow, and of what they cancelled: a resume tries those again."""
        ended = self.ended
        keys = [key for one in _carried(error) if (key := _key_of(one)) is not None]
        # Failures that the body has not met cannot have been caught: those of siblings, and of other items of a map.
        maps = {ended[key].run for key in keys if key in ended and ended[key].run.is_map}
        keys += [
            key for key, end in ended.items() if key.kind == "failure" and (not end.number or end.run in maps)
        ]
        forgotten: set[EndKey] = set()
        while keys:
            key = keys.pop()
            if key not in forgotten:
                forgotten.add(key)
                keys += ended[key].inside if key in ended else ()
        failed = [ended[key] for key in forgotten if key in ended and ended[key].number]
        for key, end in ended.items():
            if key.kind == "cancelled" and (
                end.activity == self.activity  # The body made no call after it.
                or any(one.number < end.number and one.activity == end.activity for one in failed)
            ):
                forgotten.add(key)
        first: dict[FlowRun, int] = {}
        for key in forgotten:
            self.journal.forget(key.kind, key.position, key.branch)
            known = ended.get(key)
            if known is not None and known.number and failed:
                first[known.run] = min(known.place, first.get(known.run, known.place))
        identities = {ended[key].identity for key in forgotten if key in ended}
        for run, index in first.items():
            run.forget_from(index, identities)

    # ------------------------------------------------------------------ the output

    async def commit(
        self,
        flow: FlowRun,
        node: FlowNode,
        schema: Schema,
        snapshot: Snapshot,
        returned: Any,
        begin: int,
        call: StepCall | None,
    ) -> BaseModel | Halt:
        """Validate and commit the output of a flow."""
        ctx, execution = self.ctx, flow.execution
        try:
            if isinstance(returned, BaseModel) and not isinstance(returned, schema.model):
                text = f"flow {node.node_id!r} must return a {schema.model.__name__}, got {type(returned).__name__}"
                raise ContractViolation(
                    node.node_id,
                    "output",
                    {},
                    [{"type": "model_type", "loc": (), "msg": text, "input": None}],
                )
            model, saved = schema.accept_output(returned)
        except BaseException as error:
            if ends_run(error):
                raise
            if not isinstance(error, ContractViolation):
                error = output_violation(node.node_id, returned, error, schema.model)
            return self._halt(error, node.node_id)
        failure = None
        if not flow.branch:
            ctx.cost_tracker.latency_ns += execution.busy_ns
            exceeded: BudgetExceeded | None = (
                ctx.cost_tracker.exceeded(ctx.budget, node.node_id) if ctx.limits else None
            )
            if exceeded is not None:
                failure = self._halt(exceeded, node.node_id).failure
        contract = ctx.contract_of(node)
        assert contract is not None  # A flow has one.
        source = schema_of(contract.input_schema)
        row = AttemptRow(
            node.node_id, 1, begin + ctx.epoch_ns, perf_counter_ns() - begin, snapshot, saved,
            "success" if failure is None else "failure", None if failure is None else failed_of(failure), None,
            flow.position, flow.branch, execution.group, (source, schema, None), None, execution.busy_ns,
        )  # fmt: skip
        again = partial(record, ctx, row, schema, model, call)
        pending = again()
        if pending is not None:
            problem, cancelled = await settle(ctx, row, pending, again)
            if problem is not None:
                stored = Failure(problem, FailureClass.RECOVERABLE, node.node_id, 1, str(problem), "store")
                return Halt(stored, partial=True)
            if cancelled:
                raise asyncio.CancelledError
        if ctx.delivers:
            ctx.session.delivered(row)  # A flow has no hooks of its own.
        if not flow.branch:
            ctx.handover.offer(model, saved, schema)
        return model if failure is None else Halt(failure, output=model, spent=True)

    # ------------------------------------------------------------------ replay

    async def replayed(self) -> None:
        """Wait until everything that is recorded has been replayed: nothing new is called before."""
        while self.unreached:
            if self._held is None or self._held.done():
                self._held = self.loop.create_future()
            self.watch()
            # Shielded: the cancellation of one call does not end the waiting of the others.
            await asyncio.shield(self._held)

    def reached(self) -> None:
        """Count a recorded result that the body has asked for."""
        self.unreached -= 1
        if not self.unreached:
            self.release_held()

    def release_held(self) -> None:
        if self._held is not None and not self._held.done():
            self._held.set_result(None)

    def watch(self) -> None:
        """See that a replay which waits for a recorded call meets it in time."""
        if not self._watching:
            self._watching = True
            self.loop.call_later(STUCK_SECONDS, self._look, self.activity)

    def _look(self, seen: int) -> None:
        self._watching = False
        is_stuck = self.unreached or any(flow.order.is_waiting for flow in self.flows)
        if not is_stuck or self.closing or self.stopping is not None:
            return
        if (
            self.activity != seen
            or self.busy
            or self.to_cancel
            or any(flow.order.is_turning for flow in self.flows)
        ):
            self.watch()
            return
        for flow in self.flows:
            text = None if flow.has_ended else flow.missing() or flow.order.missing()
            if text is not None:
                self.stop(self.changed(f"flow {flow.node.node_id!r} {text}"))
                return


class FlowRun:
    """One execution of a flow: the numbers of its calls, and their results.

    Attributes:
        branch: of the flow; "" at the top level of the run.
        execution: parent of its steps: it has their clock, and no attempts or hooks.
        records: the recorded results that were not asked for yet, by identity.
    """

    execution: NodeExecution

    def __init__(
        self,
        driver: FlowDriver,
        parent: FlowRun | None,
        node: FlowNode,
        position: int,
        branch: str,
        *,
        is_map: bool = False,
    ) -> None:
        ctx = driver.ctx
        self.is_map = is_map
        self.driver = driver
        self.node = node
        self.position = position
        self.branch = branch
        self.prefix = f"{branch}." if branch else ""
        above: NodeExecution | None = None if parent is None else parent.execution
        # Without an id: its steps are at the top level of the run, and of no group.
        self.execution = NodeExecution(ctx, cast("str", None), "group", position, branch, above)
        self.execution.attempt = 1
        self.execution.remembers = False
        self.path: tuple[str, ...] = (*(() if parent is None else parent.path), node.node_id)
        recorded = driver.journal.take(position, branch)
        self.records = recorded.results
        self.optional = {
            one
            for one in recorded.optional
            if one in recorded.results or driver.journal.has_flow(position, f"{self.prefix}{one}")
        }
        if len(self.optional) < len(recorded.optional):
            driver.journal.note_optional(position, branch, self.optional)
        identity = branch.rpartition(".")[2]
        #: All in it need not come again, nor come with the same inputs.
        self.is_optional: bool = parent is not None and (parent.is_optional or identity in parent.optional)
        if parent is not None and self.is_optional:
            parent.optional.discard(identity)
            self.optional = set(self.records)
        self.order = ResultOrder(recorded.order, lambda: driver.activity, self._note_order, driver.watch)
        self.calls = StepCalls()
        #: The nodes that were steps before, and the classes of their inputs; see Flow.step().
        self.known: dict[Any, tuple[Node | Group, str, str]] = {}
        self.state_classes: set[type[BaseModel]] = set()
        self.main_scope: Scope | None = None
        self.main_task: asyncio.Task[Any] | None = None
        self.alive = self.arrivals = 0
        self.keys: set[str] = set()
        #: Steps that were under way when the body ended.
        self.unfinished: set[str] = set()
        #: The calls that are open, and the tasks that make them. Strong references: the event loop has weak ones.
        self.open: dict[object, asyncio.Task[Any]] = {}
        #: Tasks of the body besides its first one, and if any of them may be making calls.
        self.tasks: set[asyncio.Task[Any]] = set()
        self.is_concurrent = False
        limit = node.max_concurrency
        #: Its own bound and those of the flows around it, which hold for what it runs inside too.
        self.gates: tuple[asyncio.Semaphore, ...] = () if parent is None else parent.gates
        if limit is not None:
            self.gates = (asyncio.Semaphore(limit), *self.gates)
        self.stores_inputs = ctx.session.stores_inputs
        self.attempt = NodeAttempt(ctx)
        self.attempt.begin = 0
        #: Its steps need neither limits nor the attempts of earlier processes.
        self.is_plain = not (
            ctx.timed or ctx.limits or ctx.gated or ctx.tried or self.gates or is_map or driver.replay_only
        )
        self.has_ended = False
        driver.flows.append(self)
        driver.unreached += sum(self._is_required(identity) for identity in self.records)

    def _is_required(self, identity: str) -> bool:
        return identity not in self.optional

    async def call_body(self, node: FlowNode, state: BaseModel) -> Any:
        """Call the body. Its first task is the scope "", whoever makes the first call."""
        assert node.body is not None
        scope = SCOPE.get()
        self.main_scope, self.main_task = self.calls.scope(), asyncio.current_task()
        try:
            returned = await node.body(self, state)
            missing = self.missing()
            if missing is not None and self.driver.stopping is None:
                await self.driver.stop_here(self.driver.changed(f"flow {node.node_id!r} {missing}"))
            return returned
        finally:
            await self.end()
            SCOPE.set(scope)

    async def end(self) -> None:
        """End the flow: its calls that are still open are cancelled, and awaited."""
        self.has_ended = True
        driver = self.driver
        driver.unreached -= sum(self._is_required(identity) for identity in self.records)
        self.records.clear()
        if self.optional:
            driver.journal.note_optional(self.position, self.branch, self.optional)
        if not driver.unreached:
            driver.unreached = 0
            driver.release_held()
        self.unfinished.update(one for one in self.open if isinstance(one, str))
        this = asyncio.current_task()
        tasks = {task for task in self.open.values() if task is not this}
        if not tasks:
            return
        if not driver.closing and driver.stopping is None:
            driver.ctx.run_logger.warning(
                "flow %r ended while %d of its calls were under way; they are cancelled: await them",
                self.node.node_id,
                len(tasks),
            )
        for task in tasks:
            task.cancel()
        cancelled = False
        while tasks:
            try:
                ended, tasks = await asyncio.wait(tasks)
                for task in ended:
                    _retrieve(task)
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    def missing(self) -> str | None:
        """Return the text for a recorded call that the body did not make; None if it made all."""
        identity = next((one for one in self.records if self._is_required(one)), None)
        if identity is None:
            return None
        return f"does not make {describe(identity)}, which is recorded"

    # ------------------------------------------------------------------ identities

    def begin_call(self, what: str) -> Scope:
        """Check that a call may be made here, and return the scope of the task that makes it."""
        driver = self.driver
        if driver.is_over:
            raise RuntimeError(
                f"{what} was called after flow {self.node.node_id!r} had ended; call it in the body of the flow"
            )
        if driver.closing or self.has_ended:
            raise FlowClosed(
                f"{what} was called after flow {self.node.node_id!r} had ended, or while it is being stopped"
            )
        current = CURRENT.get()
        if current is not None:
            raise RuntimeError(
                f"{what} was called inside node {current.node_id!r}; return the data, and make the call in the flow"
            )
        loop: asyncio.AbstractEventLoop | None
        try:
            loop = asyncio.get_running_loop()
            task = asyncio.current_task()
        except RuntimeError:
            loop = task = None  # In a thread.
        if task is self.main_task and task is not None:
            driver.activity += 1
            if SCOPE.get() is self.main_scope:
                assert self.main_scope is not None
                return self.main_scope
        if loop is not driver.loop:
            raise RuntimeError(
                f"{what} was called in another thread or event loop; call it in that of the flow"
            )
        driver.activity += 1
        scope = self.calls.scope()
        if scope.path:
            self.is_concurrent = True
            assert task is not None
            self.tasks.add(task)
        return scope

    def refuse(self, identity: str) -> NoReturn:
        """Refuse a call that was made before the flow ended, and is awaited now."""
        if not self.driver.closing and self.driver.stopping is None:
            self.driver.ctx.run_logger.warning(
                "flow %r ended before %s began; it is not made: await it",
                self.node.node_id,
                describe(identity),
            )
        raise FlowClosed(f"{describe(identity)} was awaited after flow {self.node.node_id!r} had ended")

    def identify(self, scope: Scope, step_id: str, key: str | None, kind: str = "") -> str:
        """Return the identity of a call. Raises ValueError for a key that was used before."""
        if key is None:
            return self.calls.next(scope, step_id, kind).text
        identity = self.calls.named(key, kind)
        if identity in self.keys:
            raise ValueError(
                f"key={key!r} is used by two calls of flow {self.node.node_id!r}; each needs a key of its own"
            )
        self.keys.add(identity)
        return identity

    # ------------------------------------------------------------------ steps

    async def step(
        self,
        node: Node | Group,
        state: BaseModel,
        identity: str,
        number: int,
        in_main: bool,
    ) -> Any:
        """Make a step, or replay it, and return its output. Raises StepFailed."""
        driver, task = self.driver, asyncio.current_task()
        assert task is not None
        if driver.closing or self.has_ended:
            self.refuse(identity)
        is_alone = not self.alive and not driver.busy and not self.is_concurrent and driver.stopping is None
        self.alive += 1
        driver.activity += 1
        self.open[identity] = task
        scope = SCOPE.get()
        input_key: bytes | None = None
        recorded: CallRecord | None = None
        begin = 0
        try:
            if self.stores_inputs or self.records:
                input_key = encode_input(driver.ctx, node, state)
            if self.records:
                begin = perf_counter_ns()
                recorded = await self.find_recorded(identity, input_key)
            if recorded is not None:
                outcome = (
                    await self.restore(node, state, identity)
                    if recorded.kind == "output"
                    else Halt(read_failure(recorded.data))
                )
            elif (
                is_alone
                and self.is_plain
                and type(node) is Node
                and not driver.unreached
                and not driver.ctx.stops
            ):
                # What _execute() does, without its coroutines and what most steps do not need: 10 us in place of 18.
                ctx, attempt = driver.ctx, self.attempt
                run = NodeExecution(ctx, node.node_id, "node", self.position, self.prefix + identity)
                plan = plan_of(ctx, run, node, state, None)
                run.step = _CALL if input_key is None else StepCall(OF_FLOW, input_key)
                run.attempt = 1
                CURRENT.set(run)
                driver.busy += 1
                try:
                    result = await attempt.prepare(run, node, plan, state, task.cancelling()).make()
                    busy_ns = attempt.duration
                    if type(result) is Failure:
                        result, more_ns = await try_again(ctx, attempt, node, plan, state, result)
                        busy_ns += more_ns
                finally:
                    driver.busy -= 1
                    if run._at_end is not None:
                        run.close()
                    del run
                    if driver.waits.open or driver.stopping is not None:
                        driver.wake()
                self._count(busy_ns)
                outcome = result
                if driver.stopping is not None:
                    await driver.never()
                if type(outcome) is Halt:
                    await self._settle(outcome, identity, input_key)
                elif (
                    self.alive == 1
                    and not self.is_concurrent
                    and not driver.ready
                    and self.order.is_next(identity)
                ):
                    self.order.delivered.append(identity)
                    if plan[2] is not None:
                        plan[1].mark_shared(outcome)
                        return outcome
                    return as_output(outcome)
            else:
                begin = perf_counter_ns()
                outcome = await self._execute(node, state, identity, input_key, task)
            index = await self.take_turn(identity, recorded is not None, number, in_main)
        except asyncio.CancelledError:
            self.note_cancelled(identity, begin or self.attempt.begin or perf_counter_ns(), input_key)
            raise
        except (HookNotAsync, PipelineChanged, StoreError) as error:  # What leaves a run.
            await driver.stop_here(_end_of(error, node))
        finally:
            self.alive -= 1
            self.open.pop(identity, None)
            CURRENT.set(None)
            if SCOPE.get() is not scope:
                SCOPE.set(scope)
        if type(outcome) is Halt:
            raise self.step_failed(outcome.failure, identity, index) from outcome.failure.exception
        return as_output(outcome)

    def _count(self, busy_ns: int) -> None:
        """Count the time of a function that ran alone, in this flow and those around it."""
        execution: NodeExecution | None = self.execution
        while execution is not None:
            execution.busy_ns += busy_ns
            execution = execution.parent

    async def _execute(
        self,
        node: Node | Group,
        state: BaseModel,
        identity: str,
        input_key: bytes | None,
        task: asyncio.Task[Any],
    ) -> BaseModel | Halt:
        """Make a step that is not recorded. Return its committed output, or the Halt of its failure."""
        driver = self.driver
        await self.before_live(identity)
        branch = self.prefix + identity
        place = Place(
            self.position,
            branch,
            "node",
            self.execution,
            None,
            StepCall(OF_FLOW, input_key),
            task.cancelling(),
            restores=False,
        )
        if not self.gates:
            outcome = await self._make(node, state, place)
        else:
            # What it is recorded with, though the body may change it while the step is queued.
            state = schema_of(type(state)).copy(state)
            async with contextlib.AsyncExitStack() as stack:
                for gate in self.gates:
                    await stack.enter_async_context(gate)
                if driver.stopping is not None or driver.closing:
                    await driver.never()
                outcome = await self._make(node, state, place)
        if driver.stopping is not None:  # A sibling has ended the flow meanwhile: this one is committed.
            await driver.never()
        if type(outcome) is Halt:
            await self._settle(outcome, identity, input_key)
        return outcome

    async def _make(self, node: Node | Group, state: BaseModel, place: Place) -> BaseModel | Halt:
        driver = self.driver
        end: BaseException | None = None
        driver.busy += 1
        try:
            outcome = await execute_in_turn(driver.ctx, (node,), state, place)
            assert not isinstance(outcome, Stopped)  # There is no further node.
            return outcome
        except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # What leaves a run, such as that of a hook that is not async.
            end = error
        finally:
            driver.busy -= 1
            if driver.waits.open or driver.stopping is not None:
                driver.wake()
        assert end is not None
        return await driver.stop_here(_end_of(end, node))

    async def _settle(self, halt: Halt, identity: str, input_key: bytes | None) -> None:
        """Record a failure that the body is to meet; of what it must not meet, the flow ends or waits."""
        driver = self.driver
        if halt.suspended:
            wait = driver.waits.add(OpenWait(self.prefix + identity, halt.failure.message, is_of_step=True))
            try:
                await driver.never()
            finally:
                driver.waits.remove(wait)
        if halt.spent or halt.partial:
            await driver.stop_here(halt)
        self.note_failure(identity, halt.failure, input_key)

    async def before_live(self, identity: str) -> None:
        """Wait until a call that is not recorded may be made."""
        driver = self.driver
        if driver.unreached:
            await driver.replayed()
        if driver.replay_only:
            await driver.stop_here(
                driver.changed(
                    f"flow {self.node.node_id!r} makes {describe(identity)}, which is not recorded"
                )
            )
        if driver.ctx.stops:
            await driver.stop_here(STOPPED)
        if driver.stopping is not None or driver.closing:
            await driver.never()

    async def restore(self, node: Node | Group, state: BaseModel, identity: str) -> BaseModel | Halt:
        driver, branch = self.driver, self.prefix + identity
        place = Place(self.position, branch)
        output: BaseModel | None = None
        # It may load a blob, or call a slow hook: the flow is neither idle nor stuck meanwhile.
        driver.busy += 1
        try:
            output = await restore(driver.ctx, node, state, place)
        except (PipelineChanged, StoreError) as error:
            driver.stop(_end_of(error, node))
        finally:
            driver.busy -= 1
            if driver.waits.open or driver.stopping is not None:
                driver.wake()
        if driver.stopping is not None:
            await driver.never()
        if (
            output is None
        ):  # A group whose schema has changed: it is assembled again, of children that are restored.
            task = asyncio.current_task()
            assert task is not None
            return await self._execute(node, state, identity, encode_input(driver.ctx, node, state), task)
        driver.journal.forget_output(self.position, branch)
        return output

    async def find_recorded(self, identity: str, input_key: bytes | None) -> CallRecord | None:
        """Return the record of a call, and take it out of the records. Ends the flow if its input has changed."""
        driver = self.driver
        recorded = self.records.pop(identity, None)
        if recorded is None:
            return None
        is_optional = identity in self.optional
        before = input_key_of(recorded)
        if before is not None and input_key is not None and before != input_key:
            if is_optional:  # It followed a failure that did not happen this time: it is another call.
                driver.journal.drop(self.position, self.prefix + identity)
                return None
            driver.unreached -= 1
            await driver.stop_here(
                driver.changed(
                    f"flow {self.node.node_id!r} made {describe(identity)} with {_shorten(before)}, and makes it now with "
                    f"{_shorten(input_key)} ({_difference(before, input_key)})"
                )
            )
        if is_optional:
            self.optional.discard(identity)
            if not self.optional:  # Once, and not each time: noting 3,000 takes 2 ms.
                driver.journal.note_optional(self.position, self.branch, set())
        else:
            driver.reached()
        if recorded.kind == "cancelled":
            await self._await_cancellation(identity, recorded.data["seconds"])
        return recorded

    async def _await_cancellation(self, identity: str, seconds: float) -> NoReturn:
        """Wait until the body cancels a call again that it has cancelled before."""
        driver = self.driver
        text = f"flow {self.node.node_id!r} cancelled {describe(identity)}, and does not cancel it now"
        timer = driver.loop.call_later(seconds + STUCK_SECONDS, lambda: driver.stop(driver.changed(text)))
        driver.to_cancel += 1
        try:
            await driver.never()
        finally:
            driver.to_cancel -= 1
            timer.cancel()

    def note_cancelled(self, identity: str, begin: int, input_key: bytes | None) -> None:
        driver = self.driver
        if (
            self.is_map
            or self.has_ended
            or driver.closing
            or driver.stopping is not None
            or driver.ctx.cancelled
        ):
            return
        branch = self.prefix + identity
        driver.journal.note_cancelled(self.position, branch, (perf_counter_ns() - begin) / 1e9, input_key)
        self.order.withdraw(identity)
        self._note_end("cancelled", identity, len(self.order.delivered))

    def note_failure(
        self,
        identity: str,
        failure: Failure,
        input_key: bytes | None,
        cause: BaseException | None = None,
    ) -> None:
        """Record the failure of a call, before the body meets it. ``cause``: what a call inside it raised."""
        driver, branch = self.driver, self.prefix + identity
        carried = () if cause is None else _carried(cause)
        inside = tuple(key for one in carried if (key := _key_of(one)) is not None)
        driver.journal.note_failure(self.position, branch, failure, input_key, inside)
        key = EndKey(self.position, branch, "failure")
        driver.ended[key] = CallEnd(self, identity, 0, 0, driver.activity, inside)

    def _note_end(
        self,
        kind: Literal["failure", "cancelled"],
        identity: str,
        index: int,
        inside: tuple[EndKey, ...] = (),
    ) -> None:
        driver, key = self.driver, EndKey(self.position, self.prefix + identity, kind)
        if key in driver.ended:
            inside = driver.ended[key].inside
        driver.endings += 1
        driver.ended[key] = CallEnd(self, identity, index, driver.endings, driver.activity, inside)

    # ------------------------------------------------------------------ results

    async def take_turn(self, identity: str, is_recorded: bool, number: int, in_main: bool) -> int:
        """Wait until the result of a call may be handed to the body, and return its number."""
        order = self.order
        if self.is_map:  # Its result is handed out as one.
            return 0
        # Live and on replay: tasks that the body has begun make their first calls before it gets another result.
        await asyncio.sleep(0)
        if self.alive > 1:
            self.is_concurrent = True
        elif in_main and self.is_concurrent and all(task.done() for task in self.tasks):
            self.tasks.clear()
            self.is_concurrent = False
        if self.alive == 1 and order.is_next(identity):
            return order.deliver(identity, noted=self.is_concurrent)
        if is_recorded:
            return await order.wait(identity, 0 if in_main else 1, number)
        self.arrivals += 1
        return await order.wait(identity, 2, self.arrivals)

    def step_failed(
        self,
        failure: Failure,
        identity: str,
        index: int,
        cause: BaseException | None = None,
        inside: tuple[EndKey, ...] = (),
    ) -> StepFailed:
        path = cause.path if isinstance(cause, StepFailed) else (*self.path, failure.node_id)
        error = StepFailed(failure, path)
        error.place = (self.position, self.branch, identity, index)
        self._note_end("failure", identity, index, inside)
        return error

    def _note_order(self, index: int, identity: str) -> None:
        """Record the call whose result has a number; "" if it has none."""
        self.driver.journal.note_order(self.position, self.branch, index, identity)
        self.order.recorded[index] = identity

    def forget_from(self, index: int, identities: set[str]) -> None:
        """Drop the order from a result on. What came after it, but for ``identities``, need not be asked for on a resume."""
        journal, order = self.driver.journal, self.order
        for number in [number for number in order.recorded if number >= index]:
            journal.note_order(self.position, self.branch, number, None)
        optional = self.optional.union(order.delivered[index:], self.unfinished) - identities
        journal.note_optional(self.position, self.branch, optional)


# ---------------------------------------------------------------------- helpers


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Look at the exception of a task that ended in a tear-down, so that asyncio does not log it as lost."""
    if task.done() and not task.cancelled():
        task.exception()


def _end_of(error: BaseException, node: Node | Group) -> Halt | BaseException:
    """Return the end of a flow by an exception that its body must not meet."""
    if isinstance(error, PipelineChanged):
        return Halt(Failure(error, FailureClass.TERMINAL, node.node_id, 1, str(error), "changed"))
    return error


def as_output(model: BaseModel) -> Any:
    """Return an output for the body, which may change it."""
    schema_of(type(model)).mark_shared(model)
    return held_by(spelled_out(model))


def _key_of(error: BaseException) -> EndKey | None:
    """Return where a failure is recorded; None if it is none of a step."""
    if not isinstance(error, StepFailed) or error.place is None:
        return None
    position, flow, identity, _ = error.place
    return EndKey(position, f"{flow}.{identity}" if flow else identity, "failure")


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [error]


def _carried(error: BaseException) -> list[BaseException]:
    """Return an exception with all that it carries: members, causes and contexts."""
    errors: list[BaseException] = []
    seen: set[int] = set()
    stack: list[BaseException | None] = [error]
    while stack:
        one = stack.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        errors.append(one)
        stack += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            stack += one.exceptions
    return errors


_WORDS: Final = {"!sleep": "flow.sleep", "!wait": "flow.wait_for", "!now": "flow.now"}


def describe(identity: str) -> str:
    """Return a call as people read it: ``call 2 of step 'judge' in branch 1``."""
    path, _, text = identity.rpartition("/")
    name, _, number = text.rpartition("#")
    where = f" in branch {path.lstrip('-')}" if path else ""
    if name in ("", "!", "*"):
        return f"the call with key={unquote(number)!r}{where}"
    if name in _WORDS:
        return f"call {int(number) + 1} of {_WORDS[name]}{where}"
    kind = "map over" if name.startswith("*") else "step"
    return f"call {int(number) + 1} of {kind} {unquote(name.lstrip('*'))!r}{where}"


def _shorten(encoded: bytes) -> str:
    text = encoded.decode(errors="replace")
    return text if len(text) <= 200 else f"{text[:196]} ..."


def _difference(before: bytes, now: bytes) -> str:
    import json

    try:
        one, two = json.loads(before), json.loads(now)
        names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    except (ValueError, AttributeError):
        return "another value"
    return f"other values of {', '.join(map(repr, names))}"
