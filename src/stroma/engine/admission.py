"""Admission of attempts: through shared budgets, limits and breakers, in this order, and back out of them.

Only runs with one of these come here. Waiting is neither the node's time nor one of its retries. Hooks are called when it
begins, it is a mark of the trace when it ends, and it ends with the run's latency budget.
"""

from __future__ import annotations

import asyncio
import os
import random
from datetime import UTC, datetime
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel

from stroma.cost.budget import BudgetExceeded, budget_exceeded
from stroma.engine.attempt import NodeAttempt
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import RESERVED, leave
from stroma.engine.execution import NodeExecution
from stroma.engine.holds import hold, wait_unless_held
from stroma.engine.outcome import Halt, refuse
from stroma.engine.tasks import Shield
from stroma.failures.classes import FailureClass
from stroma.failures.errors import COOLDOWN, CircuitOpen, Wait, WaitedTooLong
from stroma.failures.failure import Failure
from stroma.failures.policy import policy_for
from stroma.hooks.dispatch import Calls
from stroma.trace.events import TraceMark

if TYPE_CHECKING:  # Loaded by who makes one: most runs have none.
    from stroma.checkpoint.cells import Change
    from stroma.limits.breaker import Breaker, CircuitState
    from stroma.limits.gate import BudgetWarning, Caller, CooldownBegun, Gate
    from stroma.trace.events import AttemptUsage, MarkKind

__all__ = ["Permit", "make_in_turn"]

_POLL_SECONDS: Final = (
    0.02,
    0.5,
)  # between looks, where nobody can tell when there is room: at first, at most
_MARKS: Final[dict[CircuitState, MarkKind]] = {
    "open": "circuit_open",
    "half_open": "circuit_half_open",
    "closed": "circuit_closed",
}
_LOOK_SECONDS: Final = 1.0  # between looks where somebody can: room may come sooner


class Permit:
    """Reservations of one attempt while it is made."""

    __slots__ = ("answers", "breaker", "caller", "charged", "ctx", "gates", "key", "probe", "run", "token")

    def __init__(self, ctx: ReliabilityContext, run: NodeExecution) -> None:
        self.ctx = ctx
        self.run = run
        # Not from random: programs that seed it alike, in several processes, would share their holds.
        self.token = os.urandom(8).hex()
        #: Gates that were asked for admission.
        self.gates: list[Gate] = []
        #: The budgets among them that the commit of the attempt settles, and their answers once it has.
        self.charged: list[Gate] = []
        self.answers: dict[Gate, Any] = {}
        #: None if there are no budgets.
        self.caller = _caller(ctx, run) if ctx.config.shared_budgets else None
        self.breaker: Breaker | None = ctx.config.breaker
        self.key: str | None = None
        self.probe = False

    # ---- as a stroma.checkpoint.protocols.Charge

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
        """Return all reservations where nothing can be awaited; with ``used``, of an attempt that has begun."""
        self._uncharge()
        for gate in reversed(self.gates):
            gate.abandon(self.run.node_id, self.token, used)
        self.gates = []
        if self.breaker is not None and self.probe:
            self.breaker.leave(self.key, None, probe=True)

    async def leave(self, outcome: Any) -> bool:
        """Settle what the attempt used, by its outcome. Return True if the task was cancelled meanwhile.

        ``outcome``: the output, a Failure, or a Halt; None for an attempt that was cancelled. Raises what a hook may.
        """
        ctx, run, shield = self.ctx, self.run, Shield()
        failure: Failure | None = (
            outcome if isinstance(outcome, Failure) else getattr(outcome, "failure", None)
        )
        done = isinstance(outcome, BaseModel) or getattr(outcome, "output", None) is not None
        due: list[BudgetWarning | CooldownBegun] = []
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
                    gate.label, run.node_id, run.counted.tokens, run.counted.cost_usd, problem,
                )  # fmt: skip
        self.gates = []
        if self.breaker is not None:
            await self._judge(self.breaker, failure, done)
        for event in due:
            await _announce(ctx, run, event)
        return shield.is_cancelled

    def _uncharge(self) -> None:
        if self.caller is not None and self.caller.place is not None:
            self.ctx.session.charges.pop((self.run.position, self.run.branch), None)

    async def _judge(self, breaker: Breaker, failure: Failure | None, done: bool) -> None:
        well = True if done else None if failure is None else breaker.verdict(failure)
        key = self.key
        if well is not None and failure is not None and not done:
            key = breaker.learn(self.run.node_id, failure, key)
        if self.probe and key != self.key:  # The call that was to probe the circuit went elsewhere.
            breaker.leave(self.key, None, probe=True)
            self.probe = False
        changed = breaker.leave(key, well, probe=self.probe)
        self.probe = False
        if changed is not None and key is not None:
            await _announce_circuit(self.ctx, self.run, key, changed)


def _caller(ctx: ReliabilityContext, run: NodeExecution) -> Caller:
    from stroma.limits.shared_budget import AttemptPlace, caller_of  # Loaded on first use.

    now = perf_counter_ns() + ctx.epoch_ns
    place = AttemptPlace(run.position, run.branch, run.attempt, now)
    caller = caller_of(ctx.session, ctx.run_id, ctx.checkpoint_manager.store, place)
    return caller._replace(around=RESERVED.get())


async def _charged(gate: Gate, token: str, answer: Any) -> Any:
    return gate.finish_charge(token, answer)


async def _collect(ending: Any, due: list[Any]) -> None:
    due.extend(await ending)


async def make_in_turn(attempt: NodeAttempt) -> BaseModel | Failure | Halt:
    """Make an attempt between its admission and the settlement of what it took."""
    run, ctx = attempt.run, attempt.ctx
    permit = await wait_unless_held(ctx, partial(admit, ctx, run))
    if isinstance(permit, Exception):
        return refuse(run, permit)
    if permit is None or ctx.holds:
        if permit is not None:
            permit.drop()
        return await hold(ctx, run.node_id, run.attempt)
    token = RESERVED.set((*RESERVED.get(), permit.token))
    try:
        outcome = await attempt.make()
    except GeneratorExit:
        permit.drop(run.counted)
        raise
    except BaseException:
        await permit.leave(None)
        raise
    finally:
        leave(token)
    if await permit.leave(outcome):
        raise asyncio.CancelledError
    return outcome


async def admit(ctx: ReliabilityContext, run: NodeExecution) -> Permit | Exception:
    """Wait for an attempt's turn. Return a permit, or why it may not be made.

    If it is cancelled, or closed, no reservation is left.
    """
    config, permit = ctx.config, Permit(ctx, run)
    name = config.limit_of(run.node_id)
    limit = None if name is None else config.limits[name].named(name)
    refused: Exception | None = None
    try:
        if permit.breaker is not None:
            permit.key = permit.breaker.key_of(run.node_id, None if limit is None else limit.label)
        for budget in config.budgets:
            if refused is None and (budget.nodes is None or run.node_id in budget.nodes):
                refused = await _pass(ctx, run, permit, budget)
        if refused is None and limit is not None:
            refused = await _pass(ctx, run, permit, limit)
        if refused is None and permit.breaker is not None and permit.key is not None:
            refused = await _pass_circuit(ctx, run, permit, permit.breaker, permit.key)
    except BaseException:
        permit.drop()
        raise
    if refused is None:
        if permit.caller is not None and permit.caller.place is not None and permit.gates:
            ctx.session.charges[run.position, run.branch] = permit
        return permit
    permit.drop()
    mark(ctx, run, "refused", str(refused), 0.0)
    return refused


async def _pass(ctx: ReliabilityContext, run: NodeExecution, permit: Permit, gate: Gate) -> Exception | None:
    line, token = gate.line, permit.token
    permit.gates.append(gate)
    # No attempt overtakes those that wait. But one inside an attempt does: they may wait for that one.
    is_inside = gate.kind == "budget" and permit.caller is not None and permit.caller.around
    if line.waiting and not is_inside:
        wait = line.wait_of_last(perf_counter())
    else:
        first = await gate.ask(run.node_id, token, permit.caller)
        if not isinstance(first, Wait):
            return first
        line.note(first, perf_counter())
        wait = first
    line.waiting += 1
    queued = _Queued(ctx, run, f"{gate.label}: ")
    try:
        await queued.begin(wait)
        return await _in_line(queued, gate, wait, permit)
    finally:
        queued.end()
        line.waiting -= 1


async def _in_line(queued: _Queued, gate: Gate, wait: Wait, permit: Permit) -> Exception | None:
    """Ask, once earlier attempts have passed, until the gate admits the call or refuses it."""
    ctx, run, token = permit.ctx, permit.run, permit.token
    line, pause, begin = gate.line, _POLL_SECONDS[0], perf_counter()
    scope = asyncio.timeout(_seconds(ctx, run, gate.max_wait_seconds))
    try:
        async with scope, line.turn:
            while True:
                line.moved.clear()
                answer = await gate.ask(run.node_id, token, permit.caller)
                line.note(answer, perf_counter())
                if not isinstance(answer, Wait):
                    return answer
                if answer.reason == COOLDOWN:
                    if (refused := _closed_too_long(ctx, run, gate, answer)) is not None:
                        return refused
                    if wait.reason != COOLDOWN:
                        await queued.begin(answer)
                wait = answer
                if wait.ms is None:
                    seconds, pause = random.uniform(0.5, 1) * pause, min(pause * 1.5, _POLL_SECONDS[1])
                else:
                    seconds = min(wait.ms / 1000, _LOOK_SECONDS)
                await _nap(line.moved, seconds)
    except TimeoutError:
        if not scope.expired():
            raise
        waited = perf_counter() - begin
        return _late(ctx, run, waited, gate.max_wait_seconds) or await _too_long(gate, wait, run, permit)


def _closed_too_long(
    ctx: ReliabilityContext, run: NodeExecution, gate: Gate, wait: Wait
) -> WaitedTooLong | None:
    """Return the refusal of an attempt whose policy does not wait for the end of a cooldown; None if it waits."""
    policy = policy_for(FailureClass.RECOVERABLE, ctx.step_policies.get(run.node_id), ctx.policy_map)
    seconds = (wait.ms or 0) / 1000
    if seconds <= policy.max_retry_after_seconds:
        return None
    error = WaitedTooLong(
        f"{gate.label} is closed for another {seconds:.6g} s because the provider asked to wait, and node {run.node_id!r} waits "
        f"for at most {policy.max_retry_after_seconds:g} s; resume the run after that, or raise max_retry_after_seconds"
    )
    error.retry_after = seconds
    return error


async def _too_long(gate: Gate, wait: Wait, run: NodeExecution, permit: Permit) -> Exception | None:
    """Return the refusal of an attempt that waited too long. The gate is asked once if it never was."""
    if wait.reason == "in line":
        answer = await gate.ask(run.node_id, permit.token, permit.caller)
        if not isinstance(answer, Wait):
            return answer
        wait = answer
    return gate.too_long(wait, run.node_id)


async def _pass_circuit(
    ctx: ReliabilityContext, run: NodeExecution, permit: Permit, breaker: Breaker, key: str
) -> Exception | None:
    entry = breaker.enter(key)
    if entry.wait_seconds is not None:
        begin = perf_counter()
        reason = f"circuit {key}"
        limit = breaker.max_wait_seconds
        if limit is not None and (entry.wait_seconds > limit or limit == 0):
            return CircuitOpen(key, entry.wait_seconds)
        queued = _Queued(ctx, run)
        try:
            await queued.begin(Wait(reason, int(entry.wait_seconds * 1000)))
            at_most = _seconds(ctx, run, limit)
            while entry.wait_seconds is not None:
                waited = perf_counter() - begin
                if at_most is not None and waited + entry.wait_seconds > at_most:
                    return _late(ctx, run, at_most, limit) or CircuitOpen(key, entry.wait_seconds)
                # The end of a probe in flight is unknown.
                await asyncio.sleep(max(entry.wait_seconds, random.uniform(0.5, 1) * 0.1))
                entry = breaker.enter(key)
                if entry.wait_seconds == 0.0 and at_most is not None and perf_counter() - begin > at_most:
                    return _late(ctx, run, at_most, limit) or CircuitOpen(key, 0.0)
        finally:
            queued.end()
    permit.probe = entry.probe
    if entry.changed is not None:
        await _announce_circuit(ctx, run, key, entry.changed)
    return None


# ---------------------------------------------------------------------- time


def _remaining(ctx: ReliabilityContext, run: NodeExecution) -> float | None:
    """Return the remaining seconds of the run's latency budget."""
    limit = ctx.budget.max_latency_ms
    if limit is None:
        return None
    used = ctx.cost_tracker.used("latency")
    if run.parent is not None:
        used += run.busy(perf_counter_ns()) / 1e6
    return max(0.0, (limit - used) / 1000)


def _seconds(ctx: ReliabilityContext, run: NodeExecution, at_most: float | None) -> float | None:
    """Return for how many seconds an attempt may wait; None for ever."""
    bounds = [bound for bound in (_remaining(ctx, run), at_most) if bound is not None]
    return min(bounds, default=None)


def _late(
    ctx: ReliabilityContext, run: NodeExecution, waited: float, at_most: float | None
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


def mark(ctx: ReliabilityContext, run: NodeExecution, kind: MarkKind, reason: str, waited_ms: float) -> None:
    place = (run.node_id, run.attempt, run.position, run.branch)
    ctx.trace.marks.append(TraceMark(*place, kind, reason, waited_ms, datetime.now(UTC)))


class _Queued:
    """The wait of an attempt for its turn, for hooks and the trace."""

    def __init__(self, ctx: ReliabilityContext, run: NodeExecution, prefix: str = "") -> None:
        self._ctx = ctx
        self._run = run
        self._prefix = prefix
        self._reason = ""
        self._begin = 0.0

    async def begin(self, wait: Wait) -> None:
        """Begin to wait, or go on to wait for another reason."""
        self.end()
        ctx, run = self._ctx, self._run
        self._reason = reason = self._prefix + wait.reason
        self._begin = perf_counter()
        seconds = 0.0 if wait.ms is None else wait.ms / 1000
        ctx.run_logger.info("node %r is queued: %s", run.node_id, reason)
        calls = ctx.fire.on_node_wait
        if calls is not None:
            await ctx.fire.fire(
                "on_node_wait", calls, run.node_id, lambda: (ctx.run_id, run.node_id, reason, seconds)
            )

    def end(self) -> None:
        if self._reason:
            mark(self._ctx, self._run, "wait", self._reason, (perf_counter() - self._begin) * 1000)


async def _announce(
    ctx: ReliabilityContext, run: NodeExecution, event: BudgetWarning | CooldownBegun
) -> None:
    node_id: str | None = None
    if event.hook == "on_limit_cooldown":
        node_id, label, seconds = run.node_id, f"limit {event[0]!r}", float(event[1])
        mark(ctx, run, "cooldown", label, 0.0)
        ctx.run_logger.warning("%s is closed for %.3g s because the provider asked to wait", label, seconds)
    calls: Calls | None = getattr(ctx.fire, event.hook)
    if calls is not None:
        await ctx.fire.fire(event.hook, calls, node_id, lambda: (ctx.run_id, *event))


async def _announce_circuit(
    ctx: ReliabilityContext, run: NodeExecution, key: str, state: CircuitState
) -> None:
    mark(ctx, run, _MARKS[state], key, 0.0)
    ctx.run_logger.warning("the circuit of %s is %s", key, state.replace("_", "-"))
    calls = ctx.fire.on_circuit_change
    if calls is not None:
        await ctx.fire.fire("on_circuit_change", calls, run.node_id, lambda: (ctx.run_id, key, state))
