"""The state of one run."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pydantic import BaseModel

from stroma.checkpoint import (
    CheckpointManager,
    Committed,
    RunBusy,
    RunExists,
    RunRequest,
    Session,
    StoreError,
    Waiting,
)
from stroma.checkpoint.entries import NO_CONTROL, USAGE_NOTE, PriorUsage, RunControl, Tried
from stroma.checkpoint.sessions import NULL_SESSION
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.node import Node
from stroma.contracts.schema import schema_of
from stroma.cost.budget import ExecutionBudget, limits, replace_limits
from stroma.cost.fallback import FallbackPolicy, FallbackView, fallback_due
from stroma.cost.tracker import CostTracker
from stroma.cost.usage import NO_MODEL, UsageError
from stroma.engine.config import RunConfig
from stroma.engine.handover import Handover
from stroma.engine.interceptors import INTERCEPTORS, Interceptor
from stroma.engine.merged_models import spelled_out
from stroma.engine.opening import BY_HAND, RunOpening
from stroma.engine.plain_steps import PlainSteps
from stroma.engine.redaction import Redactor
from stroma.engine.run_hooks import call_run_hooks, call_run_hooks_now
from stroma.engine.run_logger import RunLogger
from stroma.engine.tasks import TICK_SECONDS, Shield, raise_if
from stroma.engine.timeouts import NodeTimeout, limits_ms
from stroma.engine.trace_contexts import join_traces, trace_of, traces_of
from stroma.engine.unread import UnreadState
from stroma.failures.failure import Classifier, Failure, NodeContext, diagnose
from stroma.failures.policy import PolicyMap, RetryBudget
from stroma.hooks.dispatch import NO_HOOKS, HookNotAsync, Hooks
from stroma.hooks.sets import EVENTS, AnyHooks, distinct, flatten
from stroma.trace.result import ExecutionResult, HookFailure, Question, RunStatus
from stroma.trace.trace import ExecutionTrace

if TYPE_CHECKING:
    from stroma.cost.budget import Dimension
    from stroma.engine.emitted import EventReceiver

__all__ = ["BLOCK_NS", "ReliabilityContext"]

#: A node may keep the event loop for less than this.
BLOCK_NS: Final = 1_000_000_000
_WARN_AT = 0.8
_NO_FAILED_MAPS: Mapping[tuple[int, str], int] = {}


_NOTHING: Final = PriorUsage()
#: A shorter time is not seen: the loop has its next tick after it.
_MIN_BLOCK_NS: Final = int(2 * TICK_SECONDS * 1e9)


@dataclass(eq=False, init=False)
class ReliabilityContext:
    """Everything that belongs to one run. Create it with :meth:`for_run`."""

    # Slots, since several of them are read for each node.
    __slots__ = (
        "__weakref__",
        "_notes",
        "_opening",
        "_prior_unrecorded",
        "_warned",
        "apart",
        "attempt_count",
        "budget",
        "caller",
        "cancelled",
        "checkpoint_manager",
        "classifiers",
        "config",
        "context",
        "cost_tracker",
        "delivers",
        "dispatch",
        "done",
        "effects",
        "epoch_ns",
        "event_receivers",
        "failed_items",
        "failed_maps",
        "fire",
        "gated",
        "handover",
        "holds",
        "hook_failures",
        "hooks",
        "interceptors",
        "interrupt",
        "kept_traces",
        "limits",
        "max_block_ns",
        "model_fallbacks",
        "number_event",
        "on_hold",
        "paused",
        "pipeline",
        "plain_steps",
        "policy_map",
        "questions",
        "redactor",
        "registry",
        "restored",
        "retry_budget",
        "run_id",
        "run_logger",
        "session",
        "step_policies",
        "step_timeouts",
        "stops",
        "suspended",
        "takes_events",
        "timed",
        "trace",
        "traceparent",
        "tried",
        "unknown_ends",
        "unpriced",
        "versions",
        "wake_ms",
    )

    run_id: str
    registry: ContractRegistry
    checkpoint_manager: CheckpointManager
    cost_tracker: CostTracker
    retry_budget: RetryBudget
    trace: ExecutionTrace
    budget: ExecutionBudget
    policy_map: PolicyMap
    step_policies: dict[str, PolicyMap]
    classifiers: list[Classifier]
    step_timeouts: dict[str, int | NodeTimeout]
    model_fallbacks: list[FallbackPolicy]
    hooks: AnyHooks
    context: dict[str, Any]
    run_logger: logging.LoggerAdapter[logging.Logger]

    def __init__(
        self,
        run_id: str,
        registry: ContractRegistry,
        checkpoint_manager: CheckpointManager,
        cost_tracker: CostTracker,
        retry_budget: RetryBudget,
        trace: ExecutionTrace,
        budget: ExecutionBudget,
        policy_map: PolicyMap,
        step_policies: dict[str, PolicyMap],
        classifiers: list[Classifier],
        step_timeouts: dict[str, int | NodeTimeout],
        model_fallbacks: list[FallbackPolicy],
        hooks: AnyHooks,
        context: dict[str, Any],
        run_logger: logging.LoggerAdapter[logging.Logger],
        config: RunConfig | None = None,
        pipeline: str = "pipeline",
    ) -> None:
        self.run_id = run_id
        self.registry = registry
        self.checkpoint_manager = checkpoint_manager
        self.cost_tracker = cost_tracker
        self.retry_budget = retry_budget
        self.trace = trace
        self.budget = budget
        self.policy_map = policy_map
        self.step_policies = step_policies
        self.classifiers = classifiers
        self.step_timeouts = step_timeouts
        self.model_fallbacks = model_fallbacks
        self.hooks = hooks
        self.context = context
        self.run_logger = run_logger
        self.config = RunConfig() if config is None else config
        self.pipeline = pipeline
        self._begin_at_nothing()
        self.fire = self._make_hooks()

    def _begin_at_nothing(self) -> None:
        """Set what the engine adds to the fields above."""
        self.session: Session = NULL_SESSION
        self.restored: Mapping[tuple[int, str], Committed] = NULL_SESSION.restored
        #: Attempts of processes that died, until their node runs again.
        self.tried: dict[tuple[int, str], Tried] | None = None
        self._prior_unrecorded = _NOTHING  # Usage of earlier processes that no attempt has.
        self.handover = Handover()
        self.plain_steps = PlainSteps()
        self._opening = RunOpening(self.checkpoint_manager)
        #: See RunRequest.
        self.apart: tuple[tuple[int, str], ...] = ()
        self.dispatch = BY_HAND
        #: The versions of runs that the pipeline can continue, its own first; None for plain code, which has
        #: none.
        self.versions: tuple[str, ...] | None = None
        #: Calls nodes with a place, see stroma.engine.placed_calls; None where they cannot be called.
        self.caller: Any = None
        #: Cancelled from elsewhere: nothing is tried again. And no further node is to begin.
        self.cancelled = self.stops = False
        #: No further attempt is to begin: the run is paused, or is being cancelled. Set in any thread.
        self.holds = self.paused = False
        #: Called in the event loop of the run when it is paused: they end waits.
        self.on_hold: dict[Callable[[], None], None] = {}
        #: Returns the number of the event that the output at a branch is to the body of a flow; None outside
        #: of flows.
        self.number_event: Callable[[str], int] | None = None
        #: When the suspended run is due; see Session.end().
        self.wake_ms: int | None = None
        #: How many items of maps failed while the others went on; and of which committed maps how many did.
        self.failed_items = 0
        self.failed_maps: Mapping[tuple[int, str], int] = _NO_FAILED_MAPS
        #: Ends the run once a shutdown has asked that nothing new is begun; None before.
        self.interrupt: Callable[[], None] | None = None
        #: The W3C trace context of the caller, and those for processes that resume the run, by the system
        #: that made
        #: them: of each system the first one that is recorded. See stroma.engine.trace_contexts.
        self.traceparent: str | None = None
        self.kept_traces: dict[str, str] = {}
        self._notes: dict[Any, Any] | None = None
        self.redactor = Redactor(self.config.redact, self.context, self.trace)
        if isinstance(self.run_logger, RunLogger):
            self.run_logger.redactor = self.redactor
        #: The last calls of effects in this process, by the keys of their notes; see stroma.engine.effects.
        self.effects: dict[str, Any] = {}
        #: Of calls that ended in this process, and of which nobody knows how: by the place of their notes.
        self.unknown_ends: dict[tuple[int, str], Any] = {}
        #: Outputs of a group's children in an earlier attempt of it, for the next one.
        self.done: dict[tuple[int, str], BaseModel] = {}
        self.hook_failures: list[HookFailure] = []
        self.unpriced: list[str] = []
        #: Reasons for which nodes of this run are suspended.
        self.suspended: list[str] = []
        self.questions: tuple[Question, ...] = ()
        self.limits: tuple[tuple[Dimension, float], ...] = limits(self.budget)
        #: Turns perf_counter_ns into nanoseconds since the epoch; a step of the wall clock changes no order
        #: in the run.
        self.epoch_ns = time_ns() - perf_counter_ns()
        self.cost_tracker.per_node = self.trace.figures
        #: Interceptors that tests have put around runs.
        self.interceptors: tuple[Interceptor, ...] = tuple(INTERCEPTORS) if INTERCEPTORS else ()
        #: Some functions run under a time limit, or with an interceptor around them.
        self.timed = (
            bool(self.step_timeouts) or self.budget.max_latency_ms is not None or bool(self.interceptors)
        )
        #: The shortest time in ns for which a node must not keep the event loop: the least time limit, at
        #: most 1 s.
        self.max_block_ns = BLOCK_NS
        #: Something looks at what nodes emit.
        self.takes_events = False
        if self.step_timeouts:
            limits_of_nodes = [limits_ms(limit) for limit in self.step_timeouts.values()]
            self.takes_events = any(idle_ms is not None for _, idle_ms in limits_of_nodes)
            least_ms = min(ms for pair in limits_of_nodes for ms in pair if ms is not None)
            self.max_block_ns = max(_MIN_BLOCK_NS, min(BLOCK_NS, least_ms * 1_000_000))
        #: Warnings that were logged: dimensions of the budget, and what is wrong with a node.
        self._warned: dict[str | tuple[str, str], None] = {}  # A set would take 200 bytes in each run.
        #: The store records which end hooks are due.
        self.delivers = False
        #: Receivers of what nodes emit (stroma.engine.emitted), and the number of attempts whose events have
        #: an id.
        self.event_receivers: tuple[EventReceiver, ...] = ()
        self.attempt_count = 0
        #: Attempts wait for their turn at a shared budget, a limit or a breaker.
        self.gated = self.config.gated

    def _make_hooks(self) -> Hooks:
        """Return the hooks by event: those of interceptors first, then the sets of the config."""
        sets = [one for one in flatten(self.hooks) if any(map(one.__dict__.get, EVENTS))]
        if self.interceptors:
            sets = [
                own for interceptor in self.interceptors if (own := interceptor.begins(self)) is not None
            ] + sets
        if not sets:
            return NO_HOOKS
        if len(sets) > 1:
            sets = distinct(sets)
        self.event_receivers = tuple(
            [receiver for one in sets if (receiver := one._event_receiver()) is not None]
        )
        self.takes_events = self.takes_events or bool(self.event_receivers)
        self.delivers = self.config.hook_delivery == "at_least_once"
        limit = self.config.hook_timeout_ms
        return Hooks(
            tuple(sets),
            run_id=self.run_id,
            limit_seconds=None if limit is None else limit / 1000,
            failures=self.hook_failures,
            mask=self.redactor.mask_error,
            all_ends=self.delivers,
        )

    @classmethod
    def for_run(
        cls, config: RunConfig, registry: ContractRegistry, checkpoint_manager: CheckpointManager
    ) -> Self:
        """Return a context with a fresh tracker, trace and counts; the config's own context dict.

        A generated run id belongs to the first context of its config; each later one has a fresh id.
        """
        run_id = config.take_run_id()
        # By position: so many keywords take a microsecond to sort.
        return cls(
            run_id,
            registry,
            checkpoint_manager,
            CostTracker(),
            RetryBudget(),
            ExecutionTrace(run_id),
            config.budget,
            config.policy_map,
            config.node_policies,
            config.classifiers,
            config.node_timeouts,
            config.model_fallbacks,
            config.hooks,
            config.context,
            RunLogger(run_id),
            config,
            config.pipeline,
        )

    def diagnose(self, error: BaseException, node_id: str, attempt: int, snapshot: Any = ()) -> Failure:
        """Return what an exception means, without the secrets of the run, its context and a state."""
        if self.classifiers:  # The log must not show a secret in what one raises.
            self.redactor.note_attempt(snapshot)
        where = NodeContext(node_id, attempt, self.run_id)
        failure = diagnose(error, where, self.classifiers, self.run_logger)
        return self.redactor.mask_failure(failure, snapshot)

    def warn_once(self, node_id: str, what: str, text: str) -> None:
        """Log a warning once, and not for each attempt and item of a node."""
        if (node_id, what) not in self._warned:
            self._warned[node_id, what] = None
            self.run_logger.warning("%s", text)

    # ------------------------------------------------------------------ the journal

    async def __aenter__(self) -> ReliabilityContext:
        """Own the run until the end of the block of plain code that calls ``execute_step``.

        The journal records the outcome. The hooks of the run are called at its start, the first step, and at
        its end.
        """
        self.plain_steps.has_end = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        steps = self.plain_steps
        status = RunStatus.CANCELLED if self.cancelled else steps.status or RunStatus.COMPLETED
        if kind is not None and status is RunStatus.COMPLETED:
            status = (
                RunStatus.CANCELLED if issubclass(kind, asyncio.CancelledError) else RunStatus.INTERRUPTED
            )
        result = self.build_result(status, self.last_state, steps.failure) if steps.has_begun else None
        if kind is GeneratorExit:
            self.abandon()
            if result is not None:
                self.call_end_hooks_now(result)
            return
        message = "; ".join(self.suspended) if status is RunStatus.SUSPENDED else None
        if error is not None:
            self.redactor.note_run()
            message = self.redactor.error_text(error)
        cancelled = await self.end_and_announce(status, message, result)
        if error is None:
            raise_if(cancelled)

    async def open(
        self,
        initial_state: BaseModel,
        *,
        discard_from: int | None = None,
        accept: Callable[[int, str, Committed], None] | None = None,
        ends: bool = True,
        apart: tuple[tuple[int, str], ...] = (),
        any_input: bool = False,
    ) -> Session:
        """Begin the run in the store, once, as the config says; with ``discard_from``, continue up to there.

        ``ends``: :meth:`end` will be called. ``apart``, ``any_input``: see RunRequest. Raises StoreError
            (RunBusy, PipelineChanged ...).
        """
        if self.session is NULL_SESSION:
            if not self._opening.has_begun:
                request = self._request(initial_state, discard_from, accept, ends, apart)
                session = self._opening.start(request._replace(any_input=any_input) if any_input else request)
                if session is not None:
                    return self._begin(session, carry=discard_from is None)
            session = await self._opening.wait()
            if self.session is NULL_SESSION:
                self._begin(session, carry=discard_from is None)
                if self.config.shared_budgets and session.epoch > 1:
                    await self._settle_earlier(session)
        return self.session

    def _request(
        self,
        initial_state: BaseModel,
        discard_from: int | None,
        accept: Callable[[int, str, Committed], None] | None,
        ends: bool,
        apart: tuple[tuple[int, str], ...],
    ) -> RunRequest:
        config = self.config
        self.apart = apart
        resumed = config.resume or discard_from is not None
        return RunRequest(
            self.run_id,
            self.pipeline,
            initial_state,
            schema_of(type(initial_state)),
            "read" if self.dispatch.reads else "resume" if resumed else config.if_exists,
            discard_from,
            accept,
            config.if_running,
            config.lease_seconds,
            ends,
            self.delivers,
            apart,
            config.retry_failed_items,
            config.tags,
            config.max_recoveries,
            config.force_resume,
            self.dispatch.due_ms,
            claim=self.dispatch.claim,
            version=self.versions[0] if self.versions else "",
            versions=None if config.allow_changes else self.versions,
        )

    async def _settle_earlier(self, session: Session) -> None:
        """Count in the shared budgets what earlier processes spent on this run and, since they died, did not count."""
        from stroma.limits.shared_budget import AttemptPlace, caller_of

        caller = caller_of(session, self.run_id, self.checkpoint_manager.store, AttemptPlace())
        if session.finished is not None and caller.place is not None:
            caller = caller._replace(place=caller.place._replace(epoch=0))  # None of its calls is ours.
        for budget in self.config.budgets:
            try:
                await budget.settle_run(caller)
            except StoreError as error:  # Counted when the lease of a call has expired.
                self.run_logger.warning(
                    "%s: calls of earlier processes are not counted: %s", budget.label, error
                )

    async def end_and_announce(
        self, status: RunStatus, error: str | None, result: ExecutionResult | None
    ) -> asyncio.CancelledError | None:
        """Record in the store how the run ended, and call the hooks. Return the cancellation of the task that came meanwhile.

        Under ``hook_delivery="at_least_once"`` the hooks come first: a process that resumes a run without an
        end calls them again.
        """
        if not self.delivers or result is None:
            cancelled = await self.end(status, error)
            if result is not None:
                await self.call_end_hooks(result)
            return cancelled
        try:
            await self.call_end_hooks(result)
        finally:
            cancelled = await self.end(status, error)
        return cancelled

    async def end(self, status: RunStatus, error: str | None) -> asyncio.CancelledError | None:
        """Record in the store how the run ended, also while it is still being opened there.

        Return the cancellation of the task that came meanwhile. Never raises: the commits are safe, only this
        line is not.
        """
        shield = Shield()
        try:
            session = self.session
            if session is NULL_SESSION and self._opening.has_begun:
                opened = await self._opening.finish(shield)
                if opened is None:
                    return shield.cancellation
                session = opened
            self.note_usage()
            for receiver in self.event_receivers:
                receiver.flush()
            pending = session.end(status.value, error, self.wake_ms)
            if pending is not None:
                problem = await shield.finish(pending)
                if problem is not None:
                    raise problem
        except (RunBusy, RunExists):
            pass  # Another process owns it.
        except Exception:
            self.run_logger.exception("the end of the run could not be recorded")
        return shield.cancellation

    async def give_back(self, result: ExecutionResult | None) -> asyncio.CancelledError | None:
        """Release the run as it stood when it was opened, since this code cannot continue it.

        No hook of its end is called: only exporters end what they began, with a result. Return the
        cancellation of the task that came meanwhile.
        """
        shield = Shield()
        pending = self.session.give_back()
        problem = None if pending is None else await shield.finish(pending)
        if problem is not None:  # Another process has it, or will when the lease expires.
            self.session.abandon()
            self.run_logger.warning("the run could not be given back: %s", problem)
        calls = [call for call in self.fire.on_run_end or () if self.fire.unread[call[0]]]
        if calls and result is not None:
            await call_run_hooks(self, self.fire, "on_run_end", tuple(calls), *self._end_arguments(result))
        return shield.cancellation

    def abandon(self) -> None:
        """Release the run when nothing can be awaited any more. Nothing is recorded."""
        if self.session is NULL_SESSION:
            self._opening.abandon()
        else:
            self.session.abandon()

    @property
    def last_state(self) -> BaseModel | None:
        """Last output that was committed at the top level. Nothing else can change it."""
        return self.handover.state()

    def _begin(self, session: Session, *, carry: bool) -> Session:
        for interceptor in self.interceptors:
            session = interceptor.opened(self, session)
        self.session = session
        self.restored = session.restored
        if session.control is not NO_CONTROL:
            self.accept(session.control)
        if session.tried:
            self.tried = dict(session.tried)
        if self.restored:
            self.failed_maps = {
                at: committed.failed_items
                for at, committed in self.restored.items()
                if committed.step is not None and committed.failed_items
            }
        if session.continued:
            self._prior_unrecorded = PriorUsage.of_no_attempt(session.notes, self.run_id)
        if carry and session.continued:
            # Only a resume that goes on by itself remembers the bill; resume_from starts a new one.
            self.cost_tracker.prior_tokens = session.prior.tokens + self._prior_unrecorded.tokens
            self.cost_tracker.prior_cost_usd = session.prior.cost_usd + self._prior_unrecorded.cost_usd
            self.cost_tracker.prior_latency_ms = session.prior.latency_ms
        return session

    def accept(self, control: RunControl) -> None:
        """Apply requests about the run. Safe to call from any thread: no attempt begins after this has held the run."""
        if control.budget:
            self.budget = replace_limits(self.budget, control.budget)
            self.timed = self.timed or self.budget.max_latency_ms is not None
            self.limits = limits(self.budget)
            for dimension, _ in self.limits:  # Warn at 80 % of the new limit.
                self._warned.pop(dimension, None)
        if control.cancel:  # The run ends by the cancellation of its task, which is on its way.
            self.holds, self.paused = True, False
        elif control.pause:
            self.holds = self.paused = self.stops = True

    def end_waits(self) -> None:
        """End what precedes the next attempts. Called in the event loop of the run, once it is held."""
        for end in list(self.on_hold):
            end()

    def note_usage(self) -> None:
        """Note the usage that no attempt has, so that a resume counts it. The end of the run stores it, or a flush."""
        if rows := self.cost_tracker._added():
            before = self._prior_unrecorded
            tokens = before.tokens + sum(row[1] for row in rows)
            cost_usd = math.fsum([before.cost_usd, *(row[3] for row in rows)])
            self.session.note(USAGE_NOTE, PriorUsage(tokens, cost_usd).as_note())

    def note_suspended(self, reason: str) -> None:
        """Add a reason of the whole run to the result."""
        if reason not in self.suspended:
            self.suspended.append(reason)

    def note_question(self, waiting: Waiting) -> None:
        """Add an open question to the result."""
        if all(one.id != waiting.id for one in self.questions):
            self.suspended.append(waiting.reason)
            self.questions = (*self.questions, waiting.question)

    @property
    def first_traceparent(self) -> str | None:
        """A trace context of the process before in this execution, for links; None in the first one."""
        return next(iter(traces_of(self.session.traceparent).values()), None)

    def first_trace(self, system: str) -> str | None:
        """Return the trace context that one system, such as "otel", had in the process before in this execution."""
        return trace_of(self.session.traceparent, system)

    def outer_trace(self, system: str) -> str | None:
        """Return the trace context that spans of one system belong to; None if that is not known."""
        return trace_of(self.traceparent, system)

    def keep_trace(self, system: str, traceparent: str) -> None:
        """Record the trace context of a system for processes that resume the run, or run parts of it; the first one counts.

        ``system``: "" is every system that records none of its own.
        """
        self.kept_traces.setdefault(system, traceparent)

    def all_traces(self) -> str | None:
        """Return all trace contexts of the run as one text: the caller's, and in their place those that were recorded."""
        if not self.kept_traces:
            return self.traceparent
        return join_traces(traces_of(self.traceparent) | self.kept_traces)

    @property
    def conversation(self) -> str | None:
        """The id of the conversation that the run belongs to, or None."""
        return self.config.conversation or self.session.attribution.get("conversation")

    @property
    def user(self) -> str | None:
        """The id of the user that the run serves, or None."""
        return self.config.user or self.session.attribution.get("user")

    @property
    def session_id(self) -> str:
        """One id for a run, its resumes and forks: the conversation's, else that of the first run."""
        return self.conversation or self.session.attribution.get("session") or self.run_id

    @property
    def execution(self) -> int:
        """1 for the first execution of this run id, 2 after a restart, and so on."""
        return self.session.execution

    def place_of(self, identity: str) -> int:
        """Return the position of a step of plain code: the one it has in the journal, else the next without an entry.

        Raises RuntimeError in a pipeline, whose nodes have the positions.
        """
        if self.handover.is_active:
            raise RuntimeError(
                f"step {identity.partition('#')[0]!r} was called in run {self.run_id!r} of a pipeline, outside of its nodes; "
                "call it in a node, or with a separate context"
            )
        return self.plain_steps.position_of(identity, self.session)

    def contract_of(self, node: Node) -> NodeContract[Any, Any] | None:
        """Return the contract of a node: the registry's, else its marker's."""
        return self.registry.find(node.node_id) or node.contract

    # ------------------------------------------------------------------ money

    def fallback_model(self) -> str | None:
        """Return the furthest fallback that is due, or None."""
        if not self.model_fallbacks:
            return None
        return fallback_due(self.cost_tracker, self.budget, self.model_fallbacks)

    def node_context(self) -> dict[str, Any]:
        """Return the ``ctx`` of a node: the user's own dict or, while a fallback is due, a view of it that names the model."""
        model = self.fallback_model()
        return self.context if model is None else FallbackView(self.context, model)

    def has_limit(self, dimension: Literal["tokens", "cost"], node_id: str) -> bool:
        """Return whether the run's own budget or a shared one limits what a node may take of a dimension."""
        own = self.budget.max_tokens_total if dimension == "tokens" else self.budget.max_cost_usd
        return own is not None or any(one.has_limit(dimension, node_id) for one in self.config.budgets)

    def refuses_unpriced(self, node_id: str) -> bool:
        """Return whether usage without a known price stops the run: a limit in US dollars could not count it."""
        chosen = self.config.unknown_model
        return self.has_limit("cost", node_id) if chosen is None else chosen == "error"

    def note_unpriced(self, node_id: str, place: str, model: str | None) -> UsageError | None:
        """List a model without a known price, and return the error where a limit could not count it, else warn once.

        ``model`` is None for tokens that were reported without a model. ``place`` is the subject of the
        message.
        """
        name = NO_MODEL if model is None else model
        is_listed = name in self.unpriced
        if not is_listed:
            self.unpriced.append(name)
        if not self.refuses_unpriced(node_id):
            if not is_listed:
                if model is None:
                    text = f"{place} reported tokens without a model: they count as 0 USD; report the model with them"
                else:
                    text = f"{place} used model {model!r}, which has no known price: it counts as 0 USD; add it to KNOWN_MODELS"
                self.run_logger.warning("%s", text)
            return None
        if model is None:
            return UsageError(
                f"{place} reported tokens without a model, so they have no price; report "
                "usage_from(response, model=...) or (output, input_tokens, output_tokens, model), or pass "
                'unknown_model="warn" to count them as 0 USD'
            )
        return UsageError(
            f"{place} used model {model!r}, which has no known price; add it to KNOWN_MODELS, or pass "
            'unknown_model="warn" to count it as 0 USD'
        )

    def due_warnings(self) -> list[tuple[str, float, float]]:
        """Return (dimension, used, limit) of each limit that has just been used to 80 %; each once in a run."""
        due: list[tuple[str, float, float]] = []
        for dimension, limit in self.limits:
            if dimension not in self._warned and (used := self.cost_tracker.used(dimension)) >= round(
                _WARN_AT * limit, 9
            ):
                self._warned[dimension] = None
                due.append((dimension, used, limit))
        return due

    # ------------------------------------------------------------------ hooks

    @property
    def notes(self) -> dict[Any, Any]:
        """Storage of hooks for this run."""
        if self._notes is None:
            self._notes = {}
        return self._notes

    async def announce_start(self, initial: BaseModel) -> None:
        """Call the hooks of the run's start, and record in the store which trace it belongs to."""
        calls = self.fire.on_run_start
        if calls is not None:
            schema = schema_of(type(initial))

            def arguments() -> tuple[Any, ...]:
                return self.run_id, self.pipeline, self.redactor.redact_state(schema.state(initial))

            def unread() -> tuple[Any, ...]:
                return self.run_id, self.pipeline, UnreadState(schema, initial, self.redactor)

            await call_run_hooks(self, self.fire, "on_run_start", calls, arguments, unread)
        traceparent = self.all_traces()
        if (
            traceparent is not None
            and self.session.traceparent != traceparent
            and self.session.finished is None
        ):
            noted = self.session.note_traceparent(traceparent)
            if noted is not None and self.session.traceparent is not None:
                # Before a span is exported: where this process dies, the next one completes its trace and no
                # earlier one.
                await asyncio.wait([noted])
        ids = {"conversation": self.config.conversation, "user": self.config.user}
        new = {
            kind: value
            for kind, value in ids.items()
            if value and value != self.session.attribution.get(kind)
        }
        if new and self.session.finished is None:
            self.session.note_attribution(new)

    async def call_end_hooks(self, result: ExecutionResult) -> None:
        """Call the hooks of the run's end. Raises HookNotAsync, unless the run was cancelled."""
        calls = self.fire.on_run_end
        if calls is None:
            return
        try:
            await call_run_hooks(self, self.fire, "on_run_end", calls, *self._end_arguments(result))
        except HookNotAsync as error:
            error.result = result
            if result.status is not RunStatus.CANCELLED:
                raise
            self.run_logger.warning("%s", error)

    def call_end_hooks_now(self, result: ExecutionResult) -> None:
        """Call the hooks of the run's end where nothing can be awaited: its coroutine is being closed."""
        calls = self.fire.on_run_end
        if calls is not None:
            call_run_hooks_now(self, self.fire, "on_run_end", calls, *self._end_arguments(result))

    def _end_arguments(
        self, result: ExecutionResult
    ) -> tuple[Callable[[], tuple[Any, ...]], Callable[[], tuple[Any, ...]]]:
        """Return what makes the arguments of the end: with states, and without."""
        return (
            lambda: (self.run_id, self.redactor.redact_result(result)),
            lambda: (self.run_id, self.redactor.unread_result(result)),
        )

    def hook_failed(self, hook: str, node_id: str | None, error: BaseException) -> None:
        """Add what a hook raised to the result, and have the exporters count it."""
        self.hook_failures.append(HookFailure(hook, node_id, error))
        self.fire.count_failure(self, hook)

    def build_result(
        self, status: RunStatus, final_state: Any, failure: Failure | None = None
    ) -> ExecutionResult:
        """Return the result so far: totals and trace of the whole context."""
        if isinstance(final_state, BaseModel):
            schema_of(type(final_state)).mark_shared(final_state)
            final_state = spelled_out(final_state)
        spent = self.cost_tracker
        return ExecutionResult(
            self.run_id,
            status,
            final_state,
            self.trace,
            spent.total_cost_usd,
            spent.total_tokens,
            failure,
            self.hook_failures,
            self.unpriced,
            self.suspended,
            self.failed_items,
            self.questions,
        )
