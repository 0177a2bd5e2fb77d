"""The state of one run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import perf_counter_ns, time_ns
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar, cast, final

from pydantic import BaseModel

from stroma.checkpoint import CheckpointManager, Committed, Session, StepCall, Waiting
from stroma.checkpoint.entries import OF_FLOW, PriorUsage, RunControl, Tried
from stroma.checkpoint.identity import StepCalls
from stroma.checkpoint.sessions import NULL_SESSION
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import Schema, schema_of
from stroma.cost.budget import CostTracker, Dimension, ExecutionBudget, limits, replace_limits
from stroma.cost.fallback import FallbackPolicy, FallbackView, fallback_due
from stroma.cost.usage import UsageError
from stroma.engine.config import NodeTimeout, RunConfig, limits_ms
from stroma.engine.redaction import Redactor, RunLogger
from stroma.engine.tasks import as_store_error
from stroma.failures.errors import WAITING_FOR_ANSWER, WAITING_FOR_STATEMENT
from stroma.failures.failure import Classifier, Failure, NodeContext, diagnose
from stroma.failures.policy import PolicyMap, RetryBudget
from stroma.hooks.dispatch import NO_HOOKS, Hooks
from stroma.hooks.sets import AnyHooks, NodeHooks, distinct, flatten
from stroma.trace.events import AttemptRow, AttemptUsage
from stroma.trace.result import ExecutionResult, HookFailure, Question, RunStatus, Total
from stroma.trace.trace import ExecutionTrace

Call = Callable[[BaseModel], Awaitable[Any]]


class Interceptor:
    """Interceptor around the parts of a run. Each method changes nothing, unless a subclass does.

    ``run`` is the RunningNode, whose module imports this one.
    """

    def begins(self, ctx: ReliabilityContext) -> NodeHooks | None:
        """Return hooks for a run, or plain code with steps, that begins; they begin first and end last."""
        return None

    def opened(self, ctx: ReliabilityContext, session: Session) -> Session:
        """Return the session of a run that was opened in its store, or one to use in place of it."""
        return session

    async def call(self, run: Any, node: Node | Group, call: Call, state: BaseModel) -> Any:
        """Call a node's function by ``call``, or something in place of it; within its timeout."""
        return await call(state)

    def diagnosed(self, run: Any, failure: Failure) -> Failure:
        """Return the failure of an attempt, or one to use in place of it."""
        return failure

    def ended(self, ctx: ReliabilityContext, result: ExecutionResult) -> None:
        """Inspect the result of a run, or of a step of plain code, before it is returned.

        An exception comes out of ``run()``, or ``execute_step()``.
        """


#: Interceptors of each run that begins; the first one is outermost.
INTERCEPTORS: list[Interceptor] = []


_NO_TOTAL: Final = Total()
_NO_USAGE: Final = PriorUsage()
_NOTHING: Final[Mapping[Any, Any]] = {}
#: Share of a limit at which ``on_budget_warning`` is called.
_WARN_AT: Final = 0.8
T = TypeVar("T")


@final
@dataclass(eq=False, slots=True)
class Account:
    """The limits and the findings of one run.

    Attributes:
        limits: the limits of the budget, by dimension.
        uncounted: usage that cannot be counted against a limit: no further call is made.
        unpriced: models without a known price.
        hook_failures: exceptions of hooks; the hooks of the run add to this list.
        suspended: reasons for which nodes of the run are suspended.
        questions: open questions.
        failed_items: items of maps that failed while the others continued.
        notes: storage of hooks.
    """

    limits: tuple[tuple[Dimension, float], ...]
    uncounted: UsageError | None = None
    unpriced: tuple[str, ...] = ()
    hook_failures: list[HookFailure] = field(default_factory=list)
    suspended: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    failed_items: int = 0
    notes: dict[Any, Any] = field(default_factory=dict)
    #: Warnings that were logged: dimensions of the budget, and what is wrong with a node.
    _warned: set[str | tuple[str, str]] = field(default_factory=set)

    def note_suspended(self, reason: str) -> None:
        """Add a reason of the whole run to the result."""
        if reason not in self.suspended:
            self.suspended += (reason,)

    def note_question(self, waiting: Waiting) -> None:
        """Add an open question to the result."""
        if all(one.id != waiting.id for one in self.questions):
            self.suspended += (waiting.reason,)
            self.questions += (waiting.question,)

    def note_open_questions(self, all_waiting: Iterable[Waiting]) -> None:
        """Add the questions without an answer, also those that did not stop the run, to the result."""
        for waiting in all_waiting:
            if waiting.payload is None:
                self.note_question(waiting)

    def describe_suspension(self) -> str | None:
        """Return what a suspended run waits for, as its record has it; None for nothing.

        The text of a question follows what the run waits for, so that it is not taken for another reason.
        """
        others, texts = list(self.suspended), dict[str, None]()
        for one in self.questions:
            if one.reason in others:
                others.remove(one.reason)
                is_effect = one.kind == "effect"
                texts[WAITING_FOR_STATEMENT if is_effect else f"{WAITING_FOR_ANSWER}{one.reason}"] = None
        return "; ".join([*texts, *others]) or None

    def forget_question(self, waiting: Waiting) -> None:
        """Remove a question that was closed from the result."""
        if any(one.id == waiting.id for one in self.questions):
            self.questions = tuple([one for one in self.questions if one.id != waiting.id])
            at = self.suspended.index(waiting.reason)
            self.suspended = self.suspended[:at] + self.suspended[at + 1 :]

    def is_first_warning(self, about: str | tuple[str, str]) -> bool:
        """Return True for the first warning of this kind."""
        is_first = about not in self._warned
        self._warned.add(about)
        return is_first

    def replace_limits(self, budget: ExecutionBudget) -> None:
        """Apply another budget, with separate warnings at 80 % of its limits."""
        self.limits = limits(budget)
        self._warned.difference_update(dimension for dimension, _ in self.limits)

    def due_warnings(self, spent: CostTracker) -> list[tuple[str, float, float]]:
        """Return (dimension, used, limit) of each limit just used to 80 %; each once in a process."""
        return [
            (dimension, used, limit)
            for dimension, limit in self.limits
            if 0 < (used := spent.used(dimension)) >= round(_WARN_AT * limit, 9)
            and self.is_first_warning(dimension)
        ]


@final
@dataclass(eq=False, slots=True)
class Stopping:
    """Requests to a run in progress: stop, pause, cancel.

    Attributes:
        is_asked: no further node is to begin.
        is_cancelled: cancelled from elsewhere: nothing is retried.
        holds: no further attempt is to begin: the run is paused, or is being cancelled. Set in any thread.
        is_paused: the run is paused.
        interrupt: ends the run once a shutdown has asked that nothing new is begun; None before.
        waits: called in the event loop of the run when it is paused, in order: they end waits.
    """

    is_asked: bool = False
    is_cancelled: bool = False
    holds: bool = False
    is_paused: bool = False
    interrupt: Callable[[], None] | None = None
    waits: dict[Callable[[], None], None] = field(default_factory=dict)

    def end_waits(self) -> None:
        """End the waits before the next attempts. Called in the event loop of the run, once it is held."""
        for end in list(self.waits):
            end()

    async def wait_unless_held(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """Await work that precedes an attempt; a pause cancels the work, and the result is None."""
        if self.holds:
            return None
        if asyncio.current_task() is None:
            return await work()
        loop, scope = asyncio.get_running_loop(), asyncio.timeout(None)

        def end() -> None:
            if not scope.expired():
                scope.reschedule(loop.time())

        self.waits[end] = None
        try:
            async with scope:
                return await work()
        except TimeoutError:
            if not scope.expired():
                raise
            return None
        finally:
            del self.waits[end]


@final
@dataclass(eq=False, slots=True)
class Handover:
    """The last output that was committed at the top level.

    Attributes:
        is_active: outputs go from node to node, and not to plain code between them.
        model: the output itself; None before the first.
        done: outputs of a group's children in an earlier attempt of it, for the next one.
    """

    is_active: bool = False
    model: BaseModel | None = None
    done: dict[tuple[int, str], BaseModel] = field(default_factory=dict)


@final
class PlainSteps:
    """The steps of plain code in one run.

    Attributes:
        calls: the steps that were called, by their identity.
        has_end: the code says when its run ends, with ``async with ctx``.
        at_exit: ends the run there; None before it is opened.
        status: outcome of the last step.
        failure: failure of the last step.
        fenced: the failure of a step because another process owns the run, or has ended it; no other step is
            called.
    """

    calls: StepCalls | None = None
    has_end: bool = False
    at_exit: Callable[..., Awaitable[None]] | None = None
    status: RunStatus | None = None
    failure: Failure | None = None
    fenced: Failure | None = None
    #: Ends when the first step has announced the run.
    _opening: asyncio.Future[None] | None = None
    _next_position: int = 0
    #: Positions at which the journal has an entry.
    _positions: set[int] | None = None

    @property
    def has_begun(self) -> bool:
        """True once the first step has begun to announce the run."""
        return self._opening is not None

    async def begin(self, announce: Callable[[], Awaitable[None]]) -> None:
        """Announce the run, once, at its first step; steps that begin at the same time wait for that."""
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_future()
            try:
                await announce()
            finally:
                self._opening.set_result(None)
        elif not self._opening.done():
            await asyncio.shield(self._opening)

    def position_of(self, identity: str, session: Session) -> int:
        """Return the position of a step: the one it has in the journal, else the next without an entry."""
        position = session.places.get(identity)
        if position is None:
            if self._positions is None:
                self._positions = {at for at, _ in (*session.restored, *session.waiting)}
                self._positions.update(session.places.values())
            while self._next_position in self._positions:
                self._next_position += 1
            position = self._next_position
            self._next_position += 1
        session.note_call(position, identity)
        return position


class Dispatch(NamedTuple):
    """Conditions under which a dispatcher opens a run.

    Attributes:
        due_ms: raise RunExists for a run that is not due at this time, in ms since the epoch. A store that
            fails in the middle of the run leaves it INTERRUPTED.
        max_seconds: end the run at the first step boundary after this time; None: no limit.
        claim: token of the claim of the worker; RunExists if the run has no such claim.
        if_exists: "read" or "continue", see RunRequest; None: that of the config.
    """

    due_ms: int | None = None
    max_seconds: float | None = None
    claim: str | None = None
    if_exists: Literal["read", "continue"] | None = None


#: A person opens the run.
BY_HAND: Final = Dispatch()


class RunJournal:
    """A run in its store, with the settings of the code around it.

    Attributes:
        session: the run in its store; NULL_SESSION before it is opened.
        restored: committed outputs by position and branch. Flows and maps replace it by a dict of their own.
        tried: attempts of processes that died, until their node runs again.
        prior_unrecorded: usage of earlier processes that no attempt has; unrecorded: that of attempts of this
            process which the store refuses.
        failed_maps: of committed maps, how many items failed.
        apart: see RunRequest.
        dispatch: how a dispatcher opens the run.
        versions: the versions of runs that the pipeline can continue, its own first; None for plain code,
            which has none.
        caller: calls nodes with a place, see stroma.engine.placed_calls; None where they cannot be called.
        wake_ms, cause: of the end of the run; see Session.end().
        number_event: returns the number of the event that the output at a branch is to the body of a flow;
            None outside of flows.
        noticed: number of the last event that this body has noticed.
        traceparent: the W3C trace context of the caller.
        kept_traces: trace contexts for processes that resume the run, by system: the first one that each
            system recorded.
        effects: see stroma.engine.effects.effect_calls; None before the first one.
        attempt_count: the attempts whose events have an id.
        opening: the call of a store that takes its time to open the run. ``is_waiting``: it waits between two
            looks at a run of another process; ``is_over``: it need not look again.
        epoch_ns: turns perf_counter_ns into nanoseconds since the epoch: a step of the wall clock changes no
            order in the run.
    """

    def __init__(self) -> None:
        self.epoch_ns = time_ns() - perf_counter_ns()

    # On the class until a run needs them.
    session: Session = NULL_SESSION
    restored: Mapping[tuple[int, str], Committed] = NULL_SESSION.restored
    tried: dict[tuple[int, str], Tried] | None = None
    prior_unrecorded: PriorUsage = _NO_USAGE
    unrecorded: PriorUsage = _NO_USAGE
    failed_maps: Mapping[tuple[int, str], int] = _NOTHING
    apart: tuple[tuple[int, str], ...] = ()
    dispatch: Dispatch = BY_HAND
    versions: tuple[str, ...] | None = None
    caller: Any = None
    effects: Any = None
    wake_ms: int | None = None
    cause: str | None = None
    number_event: Callable[[str], int] | None = None
    noticed: int = 0
    traceparent: str | None = None
    kept_traces: Mapping[str, str] = _NOTHING
    attempt_count: int = 0
    opening: asyncio.Future[Session] | None = None
    is_waiting: bool = False
    is_over: bool = False

    def wake_by(self, wake_ms: int | None) -> None:
        """Make the run due at a time once it is suspended, unless it is due earlier; None: no time."""
        if wake_ms is not None and (self.wake_ms is None or wake_ms < self.wake_ms):
            self.wake_ms = wake_ms

    def note_unrecorded(self, usage: AttemptUsage) -> None:
        """Note the usage of an attempt that the store refuses; the end of the run stores it."""
        before = self.unrecorded
        self.unrecorded = PriorUsage(before.tokens + usage.tokens, before.cost_usd + usage.cost_usd)

    def record(
        self,
        row: AttemptRow,
        schema: Schema | None = None,
        output: BaseModel | None = None,
        step: StepCall | None = None,
        waiting: Waiting | None = None,
    ) -> Awaitable[None] | Exception | None:
        """Start the store call of an attempt. Return the awaitable to settle, if any."""
        try:
            if waiting is not None:
                return self.session.suspend(row, waiting)
            if step is not None and step.number == OF_FLOW and self.number_event is not None:
                # _replace() takes 1 us of the 10 of a step.
                step = StepCall(OF_FLOW - self.number_event(row.branch), step.input_key, step.identity)
            return self.session.record(row, schema, output, step)
        except BaseException as error:
            return as_store_error(error)

    def abandon(self) -> None:
        """Release the run where nothing can be awaited, also once it is opened; records nothing."""
        if self.session is not NULL_SESSION:
            self.session.abandon()
        elif self.opening is not None:
            self.opening.add_done_callback(_abandon)


def _abandon(opened: asyncio.Future[Session]) -> None:
    if not opened.cancelled() and opened.exception() is None:
        opened.result().abandon()


@dataclass(eq=False, slots=True, weakref_slot=True)
class ReliabilityContext:
    """Everything that belongs to one run. Create it with :meth:`for_run`.

    Attributes:
        journal: the run in its store.
        stopping: requests to the run from elsewhere.
        account: its limits, and the other contents of its result besides trace and totals.
        fire: its hooks by event.
        handover: the state on its way from one node to the next.
        redactor: redacts states and messages for hooks and log lines.
    """

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
    context: Any
    run_logger: logging.LoggerAdapter[logging.Logger]
    config: RunConfig = field(default_factory=RunConfig, repr=False)
    pipeline: str = field(default="pipeline", repr=False)
    journal: RunJournal = field(default_factory=RunJournal, init=False, repr=False)
    stopping: Stopping = field(default_factory=Stopping, init=False, repr=False)
    account: Account = field(default=cast("Account", None), init=False, repr=False)
    handover: Handover = field(default_factory=Handover, init=False, repr=False)
    redactor: Redactor = field(default=cast("Redactor", None), init=False, repr=False)
    fire: Hooks = field(default=NO_HOOKS, init=False, repr=False)
    plain_steps: PlainSteps = field(default_factory=PlainSteps, init=False, repr=False)

    def __post_init__(self) -> None:
        self.account = Account(limits(self.budget))
        self.redactor = Redactor(self.config.redact, self.context, self.trace)
        if isinstance(self.run_logger, RunLogger):
            self.run_logger.redactor = self.redactor
        self.cost_tracker.per_node = self.trace.figures
        self.fire = _hooks_of(self)

    @classmethod
    def for_run(
        cls, config: RunConfig, registry: ContractRegistry, checkpoint_manager: CheckpointManager
    ) -> Self:
        """Return a context with a fresh tracker, trace and counts; the config's own context dict.

        A generated run id belongs to the first context of its config; each later one has a fresh id.
        """
        run_id = config.take_run_id()
        return cls(
            run_id=run_id,
            registry=registry,
            checkpoint_manager=checkpoint_manager,
            cost_tracker=CostTracker(),
            retry_budget=RetryBudget(),
            trace=ExecutionTrace(run_id),
            budget=config.budget,
            policy_map=config.policy_map,
            step_policies=config.node_policies,
            classifiers=config.classifiers,
            step_timeouts=config.node_timeouts,
            model_fallbacks=config.model_fallbacks,
            hooks=config.hooks,
            context=config.context,
            run_logger=RunLogger(run_id),
            config=config,
            pipeline=config.pipeline,
        )

    # ------------------------------------------------------------------ plain code

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
        if self.plain_steps.at_exit is not None:
            await self.plain_steps.at_exit(self, kind, error)

    def place_of(self, identity: str) -> int:
        """Return the position of a step of plain code: its own in the journal, else the next free one.

        Raises RuntimeError in a pipeline, whose nodes have the positions.
        """
        if self.handover.is_active:
            raise RuntimeError(
                f"step {identity.partition('#')[0]!r} was called in run {self.run_id!r} of a pipeline, "
                "outside of its nodes; call it in a node, await it there, or use a separate context"
            )
        return self.plain_steps.position_of(identity, self.session)

    # ------------------------------------------------------------------ for hooks and exporters

    @property
    def session(self) -> Session:
        """The run in its store."""
        return self.journal.session

    @property
    def execution(self) -> int:
        """1 for the first execution of this run id, 2 after a restart, and so on."""
        return self.journal.session.execution

    @property
    def last_state(self) -> BaseModel | None:
        """Last output that was committed at the top level. Nothing else can change it."""
        return self.handover.model

    @property
    def notes(self) -> dict[Any, Any]:
        """Storage of hooks for this run."""
        return self.account.notes

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
    def traceparent(self) -> str | None:
        """The W3C trace context of the caller."""
        return self.journal.traceparent

    @property
    def first_traceparent(self) -> str | None:
        """A trace context of the process before in this execution, for links; None in the first one."""
        return next(iter(_traces_of(self.session.traceparent).values()), None)

    def first_trace(self, system: str) -> str | None:
        """Return a system's trace context ("otel") in the process before in this execution."""
        return _trace_of(self.session.traceparent, system)

    def outer_trace(self, system: str) -> str | None:
        """Return the trace context that spans of one system belong to; None if that is not known."""
        return _trace_of(self.traceparent, system)

    def keep_trace(self, system: str, traceparent: str) -> None:
        """Record a system's trace context for processes that continue the run; the first one counts.

        ``system``: "" is every system that records none of its own.
        """
        self.journal.kept_traces = {system: traceparent, **self.journal.kept_traces}

    def all_traces(self) -> str | None:
        """Return all trace contexts of the run as one text: recorded ones precede the caller's."""
        if not self.journal.kept_traces:
            return self.journal.traceparent
        traces = {**_traces_of(self.traceparent), **self.journal.kept_traces}
        return ";".join(f"{system}={one}" if system else one for system, one in traces.items())

    # ------------------------------------------------------------------ for the engine

    def accept(self, control: RunControl) -> None:
        """Apply requests about the run. Thread-safe: after a pause or cancel, no attempt starts."""
        if control.budget:
            self.budget = replace_limits(self.budget, control.budget)
            self.account.replace_limits(self.budget)
        if control.cancel:  # The run ends by the cancellation of its task, which is on its way.
            self.stopping.holds, self.stopping.is_paused = True, False
        elif control.pause:
            self.stopping.holds = self.stopping.is_paused = self.stopping.is_asked = True

    def fallback_model(self) -> str | None:
        """Return the furthest fallback that is due, or None."""
        if not self.model_fallbacks:
            return None
        return fallback_due(self.cost_tracker, self.budget, self.model_fallbacks)

    def node_context(self) -> Any:
        """Return the ``ctx`` of a node: the user's object, or a view of a dict with a due fallback model."""
        model = self.fallback_model()
        is_dict = isinstance(self.context, dict)
        return self.context if model is None or not is_dict else FallbackView(self.context, model)

    def has_limit(self, dimension: Literal["tokens", "cost"], node_id: str) -> bool:
        """Return True if the run's own budget or a shared one limits a node in a dimension."""
        own = self.budget.max_tokens_total if dimension == "tokens" else self.budget.max_cost_usd
        return own is not None or any(one.has_limit(dimension, node_id) for one in self.config.budgets)

    def note_uncounted(self, node_id: str, error: UsageError) -> None:
        """Make no further call after usage that cannot be counted, if a limit depends on it."""
        if self.has_limit("tokens", node_id) or self.has_limit("cost", node_id):
            self.account.uncounted = error

    def diagnose(self, error: BaseException, node_id: str, attempt: int, snapshot: Any = ()) -> Failure:
        """Return the failure of an exception, without the secrets of the run, its context and a state."""
        if self.classifiers:  # The log must not show a secret in what one raises.
            self.redactor.note_attempt(snapshot)
        where = NodeContext(node_id, attempt, self.run_id)
        failure = diagnose(error, where, self.classifiers, self.run_logger)
        return self.redactor.mask_failure(failure, snapshot)

    def warn_once(self, node_id: str, what: str, text: str) -> None:
        """Log a warning once, not for each attempt and item of a node."""
        if self.account.is_first_warning((node_id, what)):
            self.run_logger.warning("%s", text)

    def build_result(
        self, status: RunStatus, final_state: Any, failure: Failure | None = None
    ) -> ExecutionResult:
        """Return the result so far: totals and trace of the whole context."""
        if isinstance(final_state, BaseModel):
            schema_of(type(final_state)).mark_shared(final_state)
        spent, account = self.cost_tracker, self.account
        tokens, cost_usd = spent.total_tokens, spent.total_cost_usd
        total = _NO_TOTAL
        if tokens or cost_usd or spent.prior_tokens or spent.prior_cost_usd:
            total = Total(int(spent.used("tokens")), spent.used("cost"))
        return ExecutionResult(
            run_id=self.run_id,
            status=status,
            final_state=final_state,
            trace=self.trace,
            total_cost_usd=cost_usd,
            total_tokens=tokens,
            failure=failure,
            hook_errors=account.hook_failures,  # Hooks of the run's end may add to it.
            unpriced_models=list(account.unpriced),
            suspended=list(account.suspended),
            failed_items=account.failed_items,
            questions=account.questions,
            total=total,
        )


def _hooks_of(ctx: ReliabilityContext) -> Hooks:
    """Return the hooks of a run by event: those of interceptors first, then the sets of the config."""
    config, interceptors = ctx.config, tuple(INTERCEPTORS)
    sets = [one for one in flatten(ctx.hooks) if not one.is_empty()]
    renews_idle_limits = any(limits_ms(limit)[1] is not None for limit in ctx.step_timeouts.values())
    if interceptors:
        sets = [own for one in interceptors if (own := one.begins(ctx)) is not None] + sets
    if not sets and not interceptors and not renews_idle_limits:
        return NO_HOOKS
    return Hooks(
        tuple(distinct(sets)),
        run_id=ctx.run_id,
        limit_seconds=None if config.hook_timeout_ms is None else config.hook_timeout_ms / 1000,
        failures=ctx.account.hook_failures,
        mask=ctx.redactor.mask_error,
        delivers=bool(sets) and config.hook_delivery == "at_least_once",
        takes_events=renews_idle_limits,
        interceptors=interceptors,
    )


def _traces_of(text: str | None) -> dict[str, str]:
    """Return the trace contexts in a text by system; "" is for every system without a separate one."""
    if text is None:
        return {}
    pairs = [part.rpartition("=") for part in text.split(";")]
    return {system: traceparent for system, _, traceparent in pairs}


def _trace_of(text: str | None, system: str) -> str | None:
    traces = _traces_of(text)
    return traces.get(system, traces.get(""))
