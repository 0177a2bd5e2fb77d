"""Flows on a remote driver: the body runs beside the interpreter, which has workers make its steps.

The rules of a body are those of a local run (:mod:`stroma.runner.flows`). What differs is here: who makes a step, where
records are stored (in the state of the run), and who waits.
"""

# Which keys a request or a reply has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
from bisect import bisect
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from pydantic import BaseModel

from stroma.checkpoint import CheckpointManager, InMemoryStore, StoreError
from stroma.checkpoint.payloads import BlobStore
from stroma.contracts.node import FlowNode, Group, Node
from stroma.contracts.schema import schema_of
from stroma.cost.tracker import CostTracker
from stroma.drivers.remote.children import merged, spans_of
from stroma.drivers.remote.failure_data import decode_failure, encode_failure
from stroma.drivers.remote.flow_records import FlowValues, StateSession
from stroma.drivers.remote.plans import FROZEN, KnownNodes, spec_of
from stroma.drivers.remote.questions import answer_of
from stroma.drivers.remote.state import (
    Continue,
    Driver,
    NodePlace,
    RunState,
    StoppedExecution,
)
from stroma.drivers.remote.wire import (
    ClassName,
    Event,
    NodeSpec,
    Plan,
    Value,
)
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext
from stroma.engine.outcome import Halt, Place
from stroma.engine.restore import output_schema
from stroma.engine.run_logger import RunLogger
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure
from stroma.runner.flows.body import run_flow
from stroma.runner.flows.driver import FlowDriver
from stroma.runner.flows.journal import FlowJournal
from stroma.runner.flows.suspension import OpenWait, Waits

__all__ = ["FlowBodies", "FlowSite", "run_body"]

#: Steps of one flow that workers have at once; a Temporal workflow may have 2,000.
_MAX_LIVE_STEPS: Final = 500
#: Bytes of rows and records beyond the room for states: with both, a payload of Temporal is full.
_MAX_OVERDRAFT: Final = 256 * 1024


class FlowSite(NamedTuple):
    """The pipeline of a flow in the process that runs its body: nodes, config of the worker, store of large states."""

    known: KnownNodes
    config: RunConfig
    payloads: BlobStore | None


class FlowBodies(Protocol):
    """Access of a body to the process that it runs in, and to the time of its run."""

    def site(self, pipeline: str) -> FlowSite:
        """Return what this process has of a pipeline. Raises MissingNode."""
        ...

    def now_ms(self) -> int:
        """Return the time in ms since the epoch, the same one in each replay."""
        ...

    def is_replaying(self) -> bool:
        """Return True while the body repeats what it did before."""
        ...


class Steps(Protocol):
    """The interpreter, as a body sees it."""

    plan: Plan
    state: RunState
    driver: Driver
    tracker: CostTracker
    wake_flow: Callable[[], None] | None
    wake_ms: int | None

    async def execute(self, place: NodePlace, value: Value) -> Value | StoppedExecution: ...


async def run_body(
    steps: Steps, bodies: FlowBodies, place: NodePlace, value: Value
) -> Value | StoppedExecution:
    """Run the body of a flow at a position of the run. Return its output, or its end. Raises Continue."""
    site = bodies.site(steps.plan["pipeline"])
    node = site.known.find(place.spec, place.path)
    assert isinstance(node, FlowNode)
    flow = _RemoteFlow(steps, bodies, site, place)
    steps.wake_flow = flow.wake
    try:
        outcome = await run_flow(flow, node, flow.input_of(node, value), place.position)
    finally:
        steps.wake_flow = None
    output = flow.session.output
    if isinstance(outcome, Halt):
        if outcome.suspended:
            steps.wake_ms = flow.remote_waits.wake_ms
        else:
            steps.state["waiting"].clear()
        return StoppedExecution(
            encode_failure(outcome.failure), output, outcome.partial, outcome.spent, outcome.suspended
        )
    assert output is not None
    steps.state["waiting"].clear()
    return output


class _RemoteWaits(Waits):
    """Waits of a flow whose timers are the driver's own: only a question suspends the run."""

    max_timer_seconds = float("inf")

    def __init__(self, flow: _RemoteFlow, state: RunState, position: int) -> None:
        super().__init__(flow)
        self._flow = flow
        self._state = state
        self._position = position
        #: The end of the first wait by time, of a suspended flow.
        self.wake_ms: int | None = None
        self._ended_timers: list[tuple[str, asyncio.TimerHandle]] = []

    def add(self, wait: OpenWait) -> OpenWait:
        if wait.question is not None:
            self._state["waiting"][f"{self._position}|{wait.branch}"] = answer_of(wait.question)
        return super().add(wait)

    def remove(self, wait: OpenWait) -> None:
        if wait.question is not None and not self._flow.closing:
            self._state["waiting"].pop(f"{self._position}|{wait.branch}", None)
        timer, wait.timer = wait.timer, None
        if timer is not None:
            if not self._ended_timers:
                # A TaskGroup cancels its tasks in an order that differs from replay to replay.
                self._flow.loop.call_soon(self._cancel_timers)
            self._ended_timers.append((wait.branch, timer))
        super().remove(wait)

    def _cancel_timers(self) -> None:
        for _, timer in sorted(self._ended_timers, key=lambda ended: ended[0]):
            timer.cancel()
        self._ended_timers.clear()

    def poll_seconds(self) -> None:
        """Return None: answers are signals, and nothing is shut down under the body."""

    def stays(self, pending: list[OpenWait], wake_ms: int | None) -> bool:
        if all(wait.question is None and not wait.is_of_step for wait in pending):
            return True
        self.wake_ms = wake_ms
        return super().stays(pending, wake_ms)


class _BodyLogger(RunLogger):
    """Logger of a run that is silent while the body repeats what it did before."""

    def __init__(self, ctx: ReliabilityContext, bodies: FlowBodies) -> None:
        super().__init__(ctx.run_id, ctx.redactor)
        self._bodies = bodies

    def isEnabledFor(self, level: int) -> bool:
        return not self._bodies.is_replaying() and super().isEnabledFor(level)


class _RemoteFlow(FlowDriver):
    """Drives one flow whose steps are made by workers."""

    is_remote = True

    def __init__(self, steps: Steps, bodies: FlowBodies, site: FlowSite, place: NodePlace) -> None:
        self._steps = steps
        self._bodies = bodies
        self._site = site
        self.values = FlowValues(site.payloads, steps.state)
        self.session = StateSession(steps.state, self.values, place.position)
        ctx = _context_of(steps, site)
        ctx.run_logger = _BodyLogger(ctx, bodies)
        ctx.session = self.session
        ctx.restored = self.session.restored
        super().__init__(ctx, FlowJournal(ctx, partial(_random_bytes, steps.driver)))
        self.remote_waits = _RemoteWaits(self, steps.state, place.position)
        self.waits = self.remote_waits
        self._specs: dict[int, NodeSpec] = {}
        self._live = asyncio.Semaphore(_MAX_LIVE_STEPS)
        #: Live calls that this process admitted: a fresh history makes at least one.
        self._admitted = 0
        self._ended: asyncio.Future[None] | None = None
        #: Steps that began in this process; and of each row that its steps have, the number of its step, in order.
        self._step_count = 0
        self._numbers: list[int] = []
        self._first_row = len(steps.state["rows"])
        #: When functions ran, without overlaps.
        self._spans: list[list[int]] = []

    def now_ms(self) -> int:
        return self._bodies.now_ms()

    def clock_ms(self) -> float:
        return float(self._bodies.now_ms())

    async def admit(self) -> None:
        """Wait until a call may be made that is not recorded. Raises Continue, out of the flow, for a fresh history."""
        while self._admitted and self._steps.driver.full():
            if not self.busy:
                await self.stop_here(Continue())
            if self._ended is None:
                self._ended = self.loop.create_future()
            await asyncio.shield(self._ended)
        if self._steps.state["room"] < -_MAX_OVERDRAFT:
            await self.stop_here(self._too_long())
        self._admitted += 1

    def _too_long(self) -> Halt:
        text = (
            f"flow {self.flow_id!r} has made more calls than one run can hold; let it end, and begin another run with what "
            "remains, or put parts of it into map_over"
        )
        failure = Failure(StoreError(text), FailureClass.RECOVERABLE, self.flow_id, 1, text, "store")
        return Halt(failure, partial=True)

    async def execute(self, node: Node | Group, state: BaseModel, place: Place) -> BaseModel | Halt:
        try:
            spec = self._spec_of(node)
        except ValueError as error:  # Only one process can run it.
            return Halt(Failure(error, FailureClass.TERMINAL, node.node_id, 1, str(error), "bug"))
        async with self._live:
            try:
                return await self._execute(node, spec, state, place)
            except StoreError as error:
                if error.transient:
                    raise
                failure = Failure(error, FailureClass.RECOVERABLE, node.node_id, 1, str(error), "store")
                return Halt(failure, partial=True)
            finally:
                self.loop.call_soon(self._step_ended)

    def _step_ended(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        self._ended = None

    async def _execute(
        self, node: Node | Group, spec: NodeSpec, state: BaseModel, place: Place
    ) -> BaseModel | Halt:
        input_key = None if place.step is None else place.step.input_key
        value = self._input(node, state, input_key)
        self._step_count += 1
        number, rows = self._step_count, list[Event]()
        at = NodePlace(spec, (), place.position, place.branch, (), rows)
        schema = output_schema(self.ctx, node, state)
        self.session.begin_step(at.key, node, schema, input_key)
        try:
            outcome = await self._steps.execute(at, value)
        finally:
            self._insert(rows, number)
            self._count(rows)
        if isinstance(outcome, StoppedExecution):
            return Halt(
                decode_failure(outcome.failure),
                partial=outcome.partial,
                spent=outcome.spent,
                suspended=outcome.suspended,
            )
        if isinstance(node, Group):
            self.session.forget_inside(at.key)
        return schema.mark_exclusive(schema.decode(self.values.text_of(outcome).encode()))

    def input_of(self, node: FlowNode, value: Value) -> BaseModel:
        """Return the state that a flow begins with. In the sandbox of a workflow, no class is found by its module."""
        contract, text = self.ctx.contract_of(node), self.values.text_of(value)
        assert contract is not None
        if value["cls"] == _class_name(contract.input_schema):
            return schema_of(contract.input_schema).decode(text.encode())
        return self._site.known.decode(text, value["cls"])

    def _spec_of(self, node: Node | Group) -> NodeSpec:
        spec = self._specs.get(id(node))
        if spec is None:
            self._site.known.add(node)
            spec = self._specs[id(node)] = spec_of(node, self._site.known.registry)
        return spec

    def _input(self, node: Node | Group, state: BaseModel, input_key: bytes | None) -> Value:
        contract = None if isinstance(node, Group) else self.ctx.contract_of(node)
        if contract is not None and input_key is not None:
            cls: ClassName = ["in", node.node_id, schema_of(contract.input_schema).fingerprint]
            return self.values.store(input_key.decode(), cls, counts=False)
        text = schema_of(type(state)).encode(state).decode()
        return self.values.store(text, _class_name(type(state)), counts=False)

    def _insert(self, rows: list[Event], number: int) -> None:
        """Put the rows of a step in the trace, after those of steps that began before."""
        at = bisect(self._numbers, number)
        self._numbers[at:at] = [number] * len(rows)
        at += self._first_row
        self._steps.state["rows"][at:at] = rows

    def _count(self, rows: list[Event]) -> None:
        """Add to the latency of the run the time in which functions of these rows ran and no other did."""
        before = sum(end - begin for begin, end in self._spans)
        self._spans = merged(self._spans + spans_of(rows))
        tracker = self._steps.tracker
        tracker.latency_ns += sum(end - begin for begin, end in self._spans) - before
        self._steps.state["spent"]["latency_ms"] = tracker.latency_ns / 1e6


def _class_name(cls: type[BaseModel]) -> ClassName:
    return ["class", f"{cls.__module__}:{cls.__qualname__}"]


def _context_of(steps: Steps, site: FlowSite) -> ReliabilityContext:
    """Return the engine's context for a body: of its run's budget, and of its worker's classifiers. It has no hooks."""
    settings = RunConfig.model_validate(steps.plan["settings"])
    frozen: dict[str, Any] = {name: getattr(settings, name) for name in FROZEN}
    frozen |= {"run_id": steps.plan["run_id"], "hooks": [], "context": {}, "node_policies": {}}
    manager = CheckpointManager(InMemoryStore())
    ctx = ReliabilityContext.for_run(site.config.model_copy(update=frozen), site.known.registry, manager)
    ctx.pipeline = steps.plan["pipeline"]
    ctx.elsewhere = True
    ctx.cost_tracker = steps.tracker
    return ctx


def _random_bytes(driver: Driver, count: int) -> bytes:
    """Return random bytes that are the same in each replay, as hexadecimal digits."""
    return b"".join(b"%02x" % int(driver.draw() * 256) for _ in range(count))
