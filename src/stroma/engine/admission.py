"""Admission of attempts: through max_threads, breakers, shared budgets and limits, in this order.

An attempt passes all of them or none: while it waits for one it holds nothing of the others, and the calls
around it return their reservations. So every call that holds something is running, and no two calls wait for
each other.

Only plain functions and runs with one of these gates come here. Waiting counts neither as time of the node
nor as a retry. Hooks are called when it starts, the trace gets a mark when it ends, and the latency budget of
the run limits it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from pydantic import BaseModel

from stroma.checkpoint.errors import StoreError
from stroma.contracts.node import Node
from stroma.cost.budget import BudgetExceeded, budget_exceeded
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RESERVED, RunningNode, leave
from stroma.engine.outcome import Halt, cancelled, crossed_limit, hold, refuse
from stroma.engine.tasks import Shield, leave_place, raise_if, thread_places
from stroma.failures.classes import FailureClass
from stroma.failures.errors import COOLDOWN, CircuitOpen, Wait, WaitedTooLong
from stroma.failures.failure import Failure
from stroma.failures.policy import policy_for
from stroma.trace.events import TraceMark

if TYPE_CHECKING:  # Loaded by who makes one: most runs have none.
    from stroma.checkpoint.cells import Change
    from stroma.engine.effects import Effect
    from stroma.limits.breaker import Breaker, CircuitState
    from stroma.limits.gate import DueHook, Gate
    from stroma.trace.events import AttemptUsage, MarkKind

# Between looks, where nobody can tell when there is room: at first, at most.
_POLL_SECONDS: Final = 0.02, 0.5
_MARKS: Final[dict[CircuitState, MarkKind]] = {
    "open": "circuit_open",
    "half_open": "circuit_half_open",
    "closed": "circuit_closed",
}
_LOOK_SECONDS: Final = 1.0  # between looks where somebody can: room may come sooner


class _Blocked(NamedTuple):
    """Place where an attempt has to wait.

    Attributes:
        wait: ``ms`` is None if it waits for the end of other calls.
        seconds: until the circuit of a breaker lets a call pass; 0 while a call probes it.
    """

    at: Gate | Breaker | asyncio.Semaphore
    wait: Wait
    seconds: float = 0.0


class Permit:
    """Reservations and the place among the threads that one attempt holds while it is made."""

    def __init__(self, ctx: ReliabilityContext, run: RunningNode, *, needs_thread: bool) -> None:
        self.ctx = ctx
        self.run = run
        self.token = ""
        config, node_id = ctx.config, run.node_id
        #: Gates to pass, in an order that is the same for everybody; and those that were asked.
        self.needed: list[Gate] = [one for one in config.budgets if one.nodes is None or node_id in one.nodes]
        self.gates: list[Gate] = []
        #: The budgets among them that the commit of the attempt settles, and their answers once it has.
        self.charged: list[Gate] = []
        self.answers: dict[Gate, Any] = {}
        #: The permits of the calls around this one.
        self.around: tuple[Permit, ...] = RESERVED.get()
        self.breaker: Breaker | None = config.breaker
        self.key: str | None = None
        #: The new state of the circuit that this attempt has changed, to be announced.
        self.changed: CircuitState | None = None
        self.probe = self.is_empty = self.has_place = False
        self.places = thread_places(ctx.registry, config.max_threads) if needs_thread else None
        #: Seconds of waiting, by place.
        self.waited: dict[Any, float] = {}
        name = config.limit_of(node_id)
        label = None
        if name is not None:
            limit = config.limits[name].named(name)
            self.needed.append(limit)
            label = limit.label
        if self.breaker is not None:
            self.key = self.breaker.key_of((ctx.pipeline, node_id), label)

    # ---- to pass the gates

    async def enter(self, first_at: Gate | None = None) -> _Blocked | Exception | None:
        """Pass all gates, or hold nothing and return where to wait, or why the attempt may not be made.

        ``first_at``: the gate in whose line this attempt is the first. An attempt that waits for the end of
        other calls makes those around it return what they hold.
        """
        answer = await self._try(first_at)
        if isinstance(answer, _Blocked) and answer.wait.ms is None:
            returned = [await permit.give_back() for permit in self.around]
            if any(returned):
                answer = await self._try(first_at)
        return answer

    async def _try(self, first_at: Gate | None) -> _Blocked | Exception | None:
        # Another token for each try: the store may release an earlier one later. Not from random: programs
        # that seed it alike, in several processes, would share their holds.
        self.token = os.urandom(8).hex()
        try:
            answer = await self._pass(first_at)
        except BaseException:
            self.drop()
            raise
        if answer is not None:
            self.drop()
        return answer

    async def _pass(self, first_at: Gate | None) -> _Blocked | Exception | None:
        if self.places is not None and not self.has_place:
            if self.places.locked():
                return _Blocked(self.places, Wait("max_threads", None))
            self.has_place = await self.places.acquire()
        if self.breaker is not None and self.key is not None:
            entry = self.breaker.enter(self.key)
            if entry.wait_seconds is not None:
                ms = int(entry.wait_seconds * 1000) if entry.wait_seconds else None
                return _Blocked(self.breaker, Wait(f"circuit {self.key}", ms), entry.wait_seconds)
            self.probe = entry.probe
            self.changed = entry.changed or self.changed
        for gate in self.needed:
            # No attempt overtakes the waiting ones, except one inside an attempt: they may be waiting for it.
            if first_at is None and not self.around and gate.line.waiting:
                return _Blocked(gate, gate.line.wait_of_last(perf_counter()))
            self.gates.append(gate)
            answer = await gate.ask(self.run.node_id, self.token)
            if isinstance(answer, Wait):
                self.gates.pop()  # It has reserved nothing.
                if first_at is None:
                    gate.line.note(answer, perf_counter())
                return _Blocked(gate, answer)
            if answer is not None:
                return answer
        return None

    async def give_back(self) -> bool:
        """Give back reservations and places; the attempt continues. Return True if there was anything.

        The usage of the attempt is still counted at its end.
        """
        if self.is_empty or not (self.gates or self.probe):
            return False
        self.is_empty = True
        self._drop_probe()
        for gate in self.gates:
            try:
                await gate.give_back(self.token)
            except StoreError as error:  # Its lease ends, or the attempt does.
                self.ctx.run_logger.warning("%s could not take a reservation back: %s", gate.label, error)
        return True

    # ---- as a stroma.checkpoint.sessions.Charge

    def changes(self, tokens: int, cost_pico: int, *, committed: bool) -> list[tuple[str, Change[Any]]]:
        """Return the changes that the commit of the attempt makes; see Charge."""
        node_id = self.run.node_id
        changes: list[tuple[str, Change[Any]]] = []
        self.charged = []
        for gate in self.gates:
            if (address := getattr(gate.store, "address", "")) and address == self.ctx.session.address:
                change = gate.charge(node_id, self.token, (cost_pico, tokens), learns=committed)
                if change is not None:
                    self.charged.append(gate)
                    changes.append((gate.cell, change))
        return changes

    def settled(self, answers: list[Any]) -> None:
        """See Charge."""
        self.answers = dict(zip(self.charged, answers, strict=True))

    # ----

    def drop(self, used: AttemptUsage | None = None) -> None:
        """Give back all reservations without waiting; ``used``: of an attempt that has begun."""
        self._uncharge()
        for gate in reversed(self.gates):
            gate.abandon(self.run.node_id, self.token, used)
        self.gates = []
        self._drop_probe()
        self.leave_place()

    def leave_place(self) -> None:
        """Return the place among the threads."""
        if self.places is not None and self.has_place:
            self.has_place = False
            leave_place(self.places)

    def _drop_probe(self) -> None:
        if self.breaker is not None and self.probe:
            self.breaker.leave(self.key, None, probe=True)
            self.probe = False

    async def leave(self, outcome: Any) -> asyncio.CancelledError | None:
        """Settle what the attempt used, by its outcome. Return a cancellation that came meanwhile.

        ``outcome``: the output, a Failure, or a Halt; None for an attempt that was cancelled. Raises what a
            hook may.
        """
        ctx, run, shield = self.ctx, self.run, Shield()
        failure: Failure | None = (
            outcome if isinstance(outcome, Failure) else getattr(outcome, "failure", None)
        )
        done = isinstance(outcome, BaseModel) or getattr(outcome, "output", None) is not None
        effect: Effect | None = run.effect
        if effect is not None:
            if not isinstance(outcome, Failure) and (effect.error is not None or effect.is_stated):
                # What was stated about a call does not say how the provider has answered it.
                done, failure = False, None
                if effect.error is not None:
                    failure = ctx.diagnose(effect.error, run.node_id, run.attempt)
            effect.error = None
        if failure is not None and not run.raised_itself(failure.exception):
            failure = None  # The execution inside that raised it has reported it.
        due: list[DueHook] = []
        self._uncharge()
        for gate in reversed(self.gates):
            if gate in self.answers:
                ending = _charged(gate, self.token, self.answers[gate])
            else:
                ending = gate.count_call(run.node_id, self.token, run.counted, failure, has_output=done)
            problem = await shield.finish(_collect(ending, due))
            if problem is not None:
                ctx.run_logger.error(
                    "%s could not record what node %r used (%d tokens, %.6g USD): %s",
                    gate.label,
                    run.node_id,
                    run.counted.tokens,
                    run.counted.cost_usd,
                    problem,
                )
        self.gates = []
        if self.breaker is not None:
            await self._judge(self.breaker, failure, done)
        for event in due:
            await _announce(ctx, run, event)
        return shield.cancellation

    def _uncharge(self) -> None:
        self.ctx.session.charges.pop((self.run.position, self.run.branch), None)

    async def _judge(self, breaker: Breaker, failure: Failure | None, done: bool) -> None:
        well = True if done else None if failure is None else breaker.verdict(failure)
        key = self.key
        if well is not None and failure is not None and not done:
            key = breaker.learn((self.ctx.pipeline, self.run.node_id), failure, key)
        if key != self.key:  # The call that was to probe the circuit went elsewhere.
            self._drop_probe()
        changed = breaker.leave(key, well, probe=self.probe)
        self.probe = False
        if changed is not None and key is not None:
            await _announce_circuit(self.ctx, self.run, key, changed)


async def _charged(gate: Gate, token: str, answer: Any) -> Any:
    return gate.finish_charge(token, answer)


async def _collect(ending: Any, due: list[Any]) -> None:
    due.extend(await ending)


#: Makes the attempt itself.
Make: TypeAlias = Callable[[], Awaitable[BaseModel | Failure | Halt]]


async def make_admitted(run: RunningNode, node: Node, make: Make) -> BaseModel | Failure | Halt:
    """Make the attempt of a plain function, or in a run with shared limits, once it is admitted."""
    ctx, contract = run.ctx, None if run.schemas is None else run.schemas[2]
    needs_thread = not node.is_async and (contract is None or contract.place is None)
    if ctx.config.gated:
        return await _make_in_turn(run, make, needs_thread=needs_thread)
    if not needs_thread:
        return await make()
    # Without a permit if a place is free: 40 us less of the 125 of a plain node.
    places = thread_places(ctx.registry, ctx.config.max_threads)
    if places.locked():
        return await _make_in_turn(run, make, needs_thread=True)
    await places.acquire()
    try:
        return await make()
    finally:
        leave_place(places)


async def _make_in_turn(run: RunningNode, make: Make, *, needs_thread: bool) -> BaseModel | Failure | Halt:
    """Make an attempt between its admission and its settlement."""
    ctx = run.ctx
    permit = await ctx.stopping.wait_unless_held(partial(admit, ctx, run, needs_thread=needs_thread))
    if isinstance(permit, Exception):
        return refuse(run, permit)
    # Requests and crossed limits meanwhile hold, as for an attempt that begins now.
    is_held = permit is None or ctx.stopping.holds or ctx.stopping.is_cancelled
    is_limited = ctx.account.limits or ctx.account.uncounted is not None
    exceeded = crossed_limit(ctx, run) if is_limited and not is_held else None
    if permit is not None and (is_held or exceeded is not None):
        permit.drop()
    if ctx.stopping.is_cancelled:
        await asyncio.sleep(0)  # In a run, the cancellation of its task is on its way.
        return cancelled(ctx, run.node_id)
    if permit is None or is_held:
        return await hold(ctx, run.node_id, run.attempt)
    if exceeded is not None:
        return refuse(run, exceeded)
    token = RESERVED.set((*permit.around, permit))
    try:
        outcome = await make()
    except GeneratorExit:
        permit.drop(run.counted)
        raise
    except BaseException:
        permit.leave_place()
        await permit.leave(None)
        raise
    finally:
        permit.leave_place()
        leave(token)
    raise_if(await permit.leave(outcome))
    return outcome


async def admit(ctx: ReliabilityContext, run: RunningNode, *, needs_thread: bool) -> Permit | Exception:
    """Wait for an attempt's turn. Return a permit, or why it may not be made.

    If it is cancelled, or closed, it holds nothing.
    """
    permit, queued = Permit(ctx, run, needs_thread=needs_thread), _Queued(ctx, run)
    try:
        answer = await permit.enter()
        while isinstance(answer, _Blocked):
            answer = await _wait(permit, queued, answer)
        queued.end()
        if permit.changed is not None and permit.key is not None:
            await _announce_circuit(ctx, run, permit.key, permit.changed)
    except BaseException:
        queued.end()
        permit.drop()
        raise
    if answer is None:
        if ctx.config.shared_budgets and ctx.session.address:
            ctx.session.charges[run.position, run.branch] = permit
        return permit
    permit.drop()
    _mark(ctx, run, "refused", str(answer), 0.0)
    return answer


async def _wait(permit: Permit, queued: _Queued, blocked: _Blocked) -> _Blocked | Exception | None:
    """Wait where an attempt is blocked, and try again. Return the same as :meth:`Permit.enter`."""
    if isinstance(blocked.at, asyncio.Semaphore):
        await queued.begin(blocked.wait)
        permit.has_place = await blocked.at.acquire()
        return await permit.enter()
    if blocked.at is permit.breaker:
        return await _wait_at_circuit(permit, queued, blocked)
    begin = perf_counter()
    gate: Any = blocked.at
    gate.line.waiting += 1
    try:
        return await _wait_in_line(permit, queued, gate, blocked.wait)
    finally:
        gate.line.waiting -= 1
        permit.waited[gate] = permit.waited.get(gate, 0.0) + perf_counter() - begin


async def _wait_in_line(
    permit: Permit, queued: _Queued, gate: Gate, wait: Wait
) -> _Blocked | Exception | None:
    """Try again, once earlier attempts have passed, until this gate is not the one to wait at."""
    ctx, run, line = permit.ctx, permit.run, gate.line
    await queued.begin(wait, f"{gate.label}: ")
    begin, pause, at_most = perf_counter(), _POLL_SECONDS[0], gate.max_wait_seconds
    if at_most is not None:
        at_most = max(0.0, at_most - permit.waited.get(gate, 0.0))
    scope = asyncio.timeout(_seconds(ctx, run, at_most))
    try:
        async with scope, nullcontext() if permit.around else line.turn:
            while True:
                line.moved.clear()
                answer = await permit.enter(gate)
                if not isinstance(answer, _Blocked) or answer.at is not gate:
                    line.note(None, perf_counter())
                    return answer
                line.note(answer.wait, perf_counter())
                if answer.wait.reason == COOLDOWN:
                    if (refused := _closed_too_long(ctx, run, gate, answer.wait)) is not None:
                        return refused
                    if wait.reason != COOLDOWN:
                        await queued.begin(answer.wait, f"{gate.label}: ")
                wait = answer.wait
                if wait.ms is None:
                    seconds, pause = random.uniform(0.5, 1) * pause, min(pause * 1.5, _POLL_SECONDS[1])
                else:
                    seconds = min(wait.ms / 1000, _LOOK_SECONDS)
                await _nap(line.moved, seconds)
    except TimeoutError:
        if not scope.expired():
            raise
    late = _late(ctx, run, perf_counter() - begin, at_most)
    if late is None and wait.reason == "in line":  # It was never asked.
        answer = await permit.enter(gate)
        if not isinstance(answer, _Blocked) or answer.at is not gate:
            return answer
        wait = answer.wait
    return late or gate.too_long(wait, run.node_id)


async def _wait_at_circuit(permit: Permit, queued: _Queued, blocked: _Blocked) -> _Blocked | Exception | None:
    ctx, run, breaker, key, seconds = permit.ctx, permit.run, permit.breaker, permit.key, blocked.seconds
    assert breaker is not None
    assert key is not None
    limit, waited = breaker.max_wait_seconds, permit.waited.get(breaker)
    if waited is None:
        if limit is not None and (seconds > limit or limit == 0):
            return CircuitOpen(key, seconds)
        await queued.begin(blocked.wait)
        waited = 0.0
    at_most = _seconds(ctx, run, limit)
    if at_most is not None and waited + seconds > at_most:
        return _late(ctx, run, at_most, limit) or CircuitOpen(key, seconds)
    begin = perf_counter()
    # The end of a probe in flight is unknown.
    await asyncio.sleep(max(seconds, random.uniform(0.5, 1) * 0.1))
    permit.waited[breaker] = waited + perf_counter() - begin
    return await permit.enter()


def _closed_too_long(
    ctx: ReliabilityContext, run: RunningNode, gate: Gate, wait: Wait
) -> WaitedTooLong | None:
    """Return the refusal of an attempt whose policy does not wait for a cooldown; None if it waits."""
    policy = policy_for(FailureClass.RECOVERABLE, ctx.step_policies.get(run.node_id), ctx.policy_map)
    seconds = (wait.ms or 0) / 1000
    if seconds <= policy.max_retry_after_seconds:
        return None
    error = WaitedTooLong(
        f"{gate.label} is closed for another {seconds:.6g} s because the provider asked to wait, and node "
        f"{run.node_id!r} waits "
        f"for at most {policy.max_retry_after_seconds:g} s; resume the run after that, or raise "
        "max_retry_after_seconds"
    )
    error.retry_after = seconds
    return error


# ---------------------------------------------------------------------- time


def _remaining(ctx: ReliabilityContext, run: RunningNode) -> float | None:
    """Return the remaining seconds of the run's latency budget."""
    limit = ctx.budget.max_latency_ms
    if limit is None:
        return None
    used = ctx.cost_tracker.used("latency")
    if run.parent is not None:
        used += run.busy(perf_counter_ns()) / 1e6
    return max(0.0, (limit - used) / 1000)


def _seconds(ctx: ReliabilityContext, run: RunningNode, at_most: float | None) -> float | None:
    """Return how many seconds an attempt may wait; None without a limit."""
    bounds = [bound for bound in (_remaining(ctx, run), at_most) if bound is not None]
    return min(bounds, default=None)


def _late(
    ctx: ReliabilityContext, run: RunningNode, waited: float, at_most: float | None
) -> BudgetExceeded | None:
    """Return the error of the latency budget if that has ended the waiting."""
    left, limit = _remaining(ctx, run), ctx.budget.max_latency_ms
    if left is None or limit is None or (at_most is not None and at_most < left):
        return None
    used = limit - left * 1000 + max(waited, left) * 1000
    return budget_exceeded(ctx.budget, "latency", used, run.node_id)


async def _nap(moved: asyncio.Event, seconds: float) -> None:
    """Wait until an attempt has left the gate, for some seconds at most."""
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            await moved.wait()
    except TimeoutError:
        if not scope.expired():
            raise


# ---------------------------------------------------------------------- hooks and marks


def _mark(ctx: ReliabilityContext, run: RunningNode, kind: MarkKind, reason: str, waited_ms: float) -> None:
    place = (run.node_id, run.attempt, run.position, run.branch)
    ctx.trace.marks.append(TraceMark(*place, kind, reason, waited_ms, datetime.now(UTC)))


class _Queued:
    """The wait of an attempt for its turn, for hooks and the trace."""

    def __init__(self, ctx: ReliabilityContext, run: RunningNode) -> None:
        self._ctx = ctx
        self._run = run
        self._reason = ""
        self._begin = 0.0

    async def begin(self, wait: Wait, prefix: str = "") -> None:
        """Begin to wait, or continue for another reason."""
        ctx, run, reason = self._ctx, self._run, prefix + wait.reason
        if reason == self._reason:
            return
        self.end()
        self._reason = reason
        self._begin = perf_counter()
        seconds = 0.0 if wait.ms is None else wait.ms / 1000
        ctx.run_logger.info("node %r is queued: %s", run.node_id, reason)
        await ctx.fire.fire("on_node_wait", run.node_id, ctx.run_id, run.node_id, reason, seconds)

    def end(self) -> None:
        if self._reason:
            self._reason, reason = "", self._reason
            _mark(self._ctx, self._run, "wait", reason, (perf_counter() - self._begin) * 1000)


async def _announce(ctx: ReliabilityContext, run: RunningNode, due: DueHook) -> None:
    node_id: str | None = None
    if due.hook == "on_limit_cooldown":
        node_id, (name, seconds) = run.node_id, due.arguments
        label = f"limit {name!r}"
        _mark(ctx, run, "cooldown", label, 0.0)
        ctx.run_logger.warning("%s is closed for %.3g s because the provider asked to wait", label, seconds)
    await ctx.fire.fire(due.hook, node_id, ctx.run_id, *due.arguments)


async def _announce_circuit(ctx: ReliabilityContext, run: RunningNode, key: str, state: CircuitState) -> None:
    _mark(ctx, run, _MARKS[state], key, 0.0)
    ctx.run_logger.warning("the circuit of %s is %s", key, state.replace("_", "-"))
    await ctx.fire.fire("on_circuit_change", run.node_id, ctx.run_id, key, state)
