"""One execution of a flow: the numbers of its calls, their records, and the results that its body gets."""

from __future__ import annotations

import asyncio
import hashlib
from asyncio import current_task
from sys import exception
from threading import get_ident
from time import perf_counter_ns
from typing import Any, Literal, NoReturn, cast

from pydantic import BaseModel

from stroma.checkpoint.identity import SCOPE, Scope, StepCalls
from stroma.contracts.node import FlowNode, held_by
from stroma.contracts.schema import schema_of
from stroma.engine.attempt import NodeAttempt
from stroma.engine.current import CURRENT
from stroma.engine.execution import NodeExecution
from stroma.engine.merged_models import spelled_out
from stroma.engine.outcome import STOPPED
from stroma.engine.tasks import cancel_all
from stroma.failures.failure import Failure
from stroma.runner.flows.descriptions import describe, describe_difference, shorten
from stroma.runner.flows.driver import FlowDriver
from stroma.runner.flows.endings import CallEnd, EndKey
from stroma.runner.flows.errors import FlowClosed, StepFailed
from stroma.runner.flows.journal import CallRecord, input_key_of
from stroma.runner.flows.order import FlowCall, ResultOrder

__all__ = ["FlowRun", "as_output"]


class FlowRun:
    """One execution of a flow: the numbers of its calls, and their results.

    Attributes:
        branch: of the flow; "" at the top level of the run.
        execution: parent of its steps: it has their clock, and no attempts or hooks.
        records: the recorded results that were not asked for yet, by identity.
        is_sequential: the first task of the body alone makes calls, and neither limits nor records nor an end of the flow nor
            an exception that is being handled concern them. What ends this clears it; :meth:`look_for_siblings` sets it.
    """

    __slots__ = (
        "alive", "arrivals", "attempt", "branch", "calls", "driver", "execution", "gates", "has_ended",
        "is_concurrent", "is_map", "is_optional", "is_plain", "is_sequential", "keys", "known", "lone_ns",
        "main_scope", "main_task", "node", "open", "optional", "order", "outer_error", "path", "position", "prefix",
        "records", "stores_inputs", "tasks", "unfinished",
    )  # fmt: skip

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
        self._take_records(parent)
        self.calls = StepCalls()
        #: By the nodes that were steps before, what a further call of them need not look at.
        self.known: dict[Any, Any] = {}
        self.main_scope: Scope | None = None
        self.main_task: asyncio.Task[Any] | None = None
        #: What is being handled around the event loop; no matter of the body.
        self.outer_error: BaseException | None = None
        self.alive = self.arrivals = 0
        #: Function time of sequential steps that is not in the clock yet, in ns.
        self.lone_ns = 0
        self.keys: set[str] = set()
        #: Calls that were under way when the body ended.
        self.unfinished: set[str] = set()
        #: The calls that are open, and the tasks that make them. Strong references: the event loop has weak ones.
        self.open: dict[str, asyncio.Task[Any]] = {}
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
        needs_more = ctx.timed or ctx.limits or ctx.gated or ctx.tried or self.gates or is_map
        self.is_plain = not (needs_more or driver.replay_only)
        self.has_ended = self.is_sequential = False
        driver.flows.append(self)
        if self.records:
            driver.disturb()
        driver.unreached += sum(self._is_required(identity) for identity in self.records)

    def _take_records(self, parent: FlowRun | None) -> None:
        """Take over what earlier processes recorded, and find out what of it need not come again."""
        driver = self.driver
        recorded = driver.journal.take(self.position, self.branch)
        self.records = recorded.results
        self.optional = {
            one
            for one in recorded.optional
            if one in recorded.results or driver.journal.has_flow(self.position, f"{self.prefix}{one}")
        }
        if len(self.optional) < len(recorded.optional):
            driver.journal.note_optional(self.position, self.branch, self.optional)
        identity = self.branch.rpartition(".")[2]
        #: All in it need not come again, nor come with the same inputs.
        self.is_optional: bool = parent is not None and (parent.is_optional or identity in parent.optional)
        if parent is not None and self.is_optional:
            parent.optional.discard(identity)
            self.optional = set(self.records)
        self.order = ResultOrder(recorded.order, lambda: driver.activity, self._note_order, driver.watch)

    def _is_required(self, identity: str) -> bool:
        return identity not in self.optional

    def begin(self) -> None:
        """Begin the calls of the flow. The running task is its first one, with the scope "", whoever makes the first call."""
        self.main_scope, self.main_task = self.calls.scope(), asyncio.current_task()
        self.look_for_siblings()

    def look_for_siblings(self) -> None:
        """Find out if the calls of the first task have nothing beside them that they must look at."""
        driver = self.driver
        self.is_sequential = not (
            self.is_concurrent
            or self.has_ended
            or self.records
            or self.order.is_recorded_ahead
            or not self.is_plain
            or driver.unreached
            or driver.closing
            or driver.stopping is not None
            or self.main_scope is None
            or self.main_scope in driver.endings.handlers
        )

    async def call_body(self, node: FlowNode, state: BaseModel) -> Any:
        """Call the body, and end the flow when it returns or raises."""
        assert node.body is not None
        scope = SCOPE.get()
        self.outer_error = exception()
        self.begin()
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
        self.has_ended, self.is_sequential = True, False
        self._count_lone()
        driver = self.driver
        if missing := sum(self._is_required(identity) for identity in self.records):
            driver.unreached -= missing
            driver.journal.drop_held(self.position, self.prefix)
        self.records.clear()
        if self.optional:
            driver.journal.note_optional(self.position, self.branch, self.optional)
        if not driver.unreached:
            driver.unreached = 0
            driver.release_held()
        self.unfinished.update(self.open)
        if driver.is_collected:
            return
        this = asyncio.current_task()
        # In the order of their calls: a driver that replays must see them cancelled in the same order.
        tasks = dict.fromkeys(task for task in self.open.values() if task is not this)
        if not tasks:
            return
        if not driver.closing and driver.stopping is None:
            driver.ctx.run_logger.warning(
                "flow %r ended while %d of its calls were under way; they are cancelled: await them",
                self.node.node_id,
                len(tasks),
            )
        await cancel_all(tasks)

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
        task: asyncio.Task[Any] | None = None
        if get_ident() == driver.thread_id:
            task = current_task(driver.loop)
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
        error = exception()
        if error is not None or driver.endings.handlers:
            self._note_handler(error)
        if task is self.main_task and task is not None:
            driver.activity += 1
            if SCOPE.get() is self.main_scope:
                assert self.main_scope is not None
                return self.main_scope
        if task is None:
            raise RuntimeError(
                f"{what} was called in another thread or event loop; call it in that of the flow"
            )
        driver.activity += 1
        scope = self.calls.scope()
        if scope.path:
            self.is_concurrent, self.is_sequential = True, False
            self.tasks.add(task)
            driver.has_siblings = True
        return scope

    def _note_handler(self, error: BaseException | None) -> None:
        error = None if error is self.outer_error else error
        if error is not None:
            self.driver.disturb()
        self.driver.endings.note_handler(self, SCOPE.get(), error, self.driver.activity)

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
                f"key={key!r} is used by two calls of flow {self.node.node_id!r}; use a different key for each"
            )
        self.keys.add(identity)
        return identity

    def number_call(self, method: str, step_id: str, key: str | None, kind: str = "") -> FlowCall:
        """Return a call with its number. Raises what :meth:`begin_call` and :meth:`identify` raise."""
        scope = self.begin_call(method)
        return FlowCall(self.identify(scope, step_id, key, kind), self.driver.activity, not scope.path)

    # ------------------------------------------------------------------ records

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

    async def find_recorded(self, identity: str, input_key: bytes | None) -> CallRecord | None:
        """Return the record of a call, and take it out of the records. Ends the flow if its input has changed."""
        driver = self.driver
        recorded = self.records.pop(identity, None)
        if recorded is None:
            return None
        is_optional = identity in self.optional
        before = input_key_of(recorded)
        if before is not None and input_key is not None and before != input_key:
            if is_optional:  # A map of another size: its items are found one by one.
                return None
            driver.unreached -= 1
            await driver.stop_here(
                driver.changed(
                    f"flow {self.node.node_id!r} made {describe(identity)} with {shorten(before)}, and makes it now with "
                    f"{shorten(input_key)} ({describe_difference(before, input_key)})"
                )
            )
        if recorded.kind == "started":
            if not is_optional:  # Else all inside it is optional too.
                driver.reached()
        elif is_optional:
            self.optional.discard(identity)
            if not self.optional:  # Once, and not each time: noting 3,000 takes 2 ms.
                driver.journal.note_optional(self.position, self.branch, set())
        else:
            driver.reached()
        if recorded.kind == "cancelled":
            await self._await_cancellation(identity, recorded.data["seconds"])
        return recorded

    def identity_for(self, identity: str, input_key: bytes | None) -> str:
        """Return another identity for a call that followed a retried failure, and is made with another input now.

        Its idempotency key differs then: what was done under the other one was done for the other input.
        """
        recorded = self.records.get(identity) if identity in self.optional else None
        before = None if recorded is None else input_key_of(recorded)
        if before is None or input_key is None or before == input_key:
            return identity
        return f"{identity}@{hashlib.sha256(input_key).hexdigest()[:16]}"

    async def _await_cancellation(self, identity: str, seconds: float) -> NoReturn:
        """Wait until the body cancels a call again that it has cancelled before."""
        driver = self.driver
        text = f"flow {self.node.node_id!r} cancelled {describe(identity)}, and does not cancel it now"
        call = (driver.loop.time() + seconds, text)
        driver.to_cancel.append(call)
        driver.watch()
        try:
            await driver.never()
        finally:
            driver.to_cancel.remove(call)

    def note_cancelled(self, identity: str, begin: int, input_key: bytes | None) -> bool:
        """Record that the body has cancelled a call. Return False if it is not the body that did."""
        driver = self.driver
        if (
            self.is_map
            or self.has_ended
            or driver.closing
            or driver.stopping is not None
            or driver.ctx.cancelled
        ):
            return False
        branch = self.prefix + identity
        seconds = (perf_counter_ns() - begin) / 1e9
        driver.journal.note_cancelled(self.position, branch, seconds, input_key, is_held=driver.unreached > 0)
        self.order.withdraw(identity)
        driver.endings.note_thrown(current_task(driver.loop))
        self._note_end("cancelled", identity, len(self.order.delivered))
        return True

    def note_failure(self, identity: str, failure: Failure, input_key: bytes | None) -> None:
        """Record the failure of a call, before the body meets it."""
        driver, branch = self.driver, self.prefix + identity
        driver.journal.note_failure(self.position, branch, failure, input_key)
        key = EndKey(self.position, branch, "failure")
        driver.endings.ended[key] = CallEnd(self, identity, 0, 0, driver.activity)

    def _note_end(self, kind: Literal["failure", "cancelled"], identity: str, index: int) -> None:
        driver, key = self.driver, EndKey(self.position, self.prefix + identity, kind)
        driver.endings.count += 1
        driver.endings.ended[key] = CallEnd(self, identity, index, driver.endings.count, driver.activity)

    # ------------------------------------------------------------------ results

    async def take_turn(self, call: FlowCall, is_recorded: bool) -> int:
        """Wait until the result of a call may be handed to the body, and return its number."""
        order = self.order
        if self.is_map:  # Its result is handed out as one.
            return 0
        # Live and on replay: tasks that the body has begun make their first calls before it gets another result.
        await asyncio.sleep(0)
        if self.alive > 1:
            self.is_concurrent, self.is_sequential = True, False
            self.driver.has_siblings = True
        elif call.in_main and self.is_concurrent and all(task.done() for task in self.tasks):
            self.tasks.clear()
            self.is_concurrent = False
        if not self.is_concurrent and order.is_next(call.identity):
            return order.deliver(call.identity, noted=False)
        if is_recorded:
            return await order.wait(call.identity, 0 if call.in_main else 1, call.number)
        self.arrivals += 1
        return await order.wait(call.identity, 2, self.arrivals)

    def step_failed(
        self, failure: Failure, identity: str, index: int, cause: BaseException | None = None
    ) -> StepFailed:
        path = cause.path if isinstance(cause, StepFailed) else (*self.path, failure.node_id)
        error = StepFailed(failure, path)
        error.place = (self.position, self.branch, identity, index)
        self._note_end("failure", identity, index)
        return error

    def _note_order(self, index: int, identity: str) -> None:
        """Record the call whose result has a number; "" if it has none."""
        self.driver.journal.note_order(self.position, self.branch, index, identity)
        self.order.recorded[index] = identity

    def forget_from(self, index: int, given_up: set[str], retried: set[str]) -> None:
        """Drop the order from a result on. What came after it, and ``given_up``, need not be asked for on a resume.

        ``retried``: what failed at ``index``, and is made again.
        """
        journal, order = self.driver.journal, self.order
        for number in [number for number in order.recorded if number >= index]:
            journal.note_order(self.position, self.branch, number, None)
        optional = self.optional.union(order.delivered[index:], self.unfinished, given_up) - retried
        journal.note_optional(self.position, self.branch, optional)

    def _count_lone(self) -> None:
        """Put the time of functions that ran alone into the clocks of this flow and of those around it."""
        execution: NodeExecution | None = self.execution
        while execution is not None:
            execution.busy_ns += self.lone_ns
            execution = execution.parent
        self.lone_ns = 0


def as_output(model: BaseModel) -> Any:
    """Return an output for the body, which may change it."""
    schema_of(type(model)).mark_shared(model)
    return held_by(spelled_out(model))
