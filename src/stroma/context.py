"""What one run owns, and what a node can know about the place where it runs."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from time import perf_counter_ns, time_ns
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from pydantic import BaseModel

from stroma._signal import SignalView
from stroma._tasks import uninterrupted
from stroma.checkpoint import (
    CheckpointManager,
    Committed,
    Finished,
    PriorUsage,
    RunBusy,
    RunRequest,
    Session,
    StepCall,
    Waiting,
    resolve_schema,
)
from stroma.config import RunConfig
from stroma.contracts import ContractRegistry, ContractViolation, NodeContract
from stroma.cost import CostTracker, ExecutionBudget, FallbackPolicy, fallback_due, limits
from stroma.failures import Classifier, Failure, PolicyMap, RetryBudget, Suspend, is_a, message_of
from stroma.hooks import NO_HOOKS, AnyHooks, Calls, HookNotAsync, Hooks, flatten
from stroma.nodes import Kept, Node
from stroma.schemas import Schema, schema_of
from stroma.trace import (
    DURATION,
    FAILURE,
    NO_USAGE,
    OUTCOME,
    STARTED,
    AttemptUsage,
    ExecutionResult,
    ExecutionTrace,
    HookFailure,
    Outcome,
    Row,
    RunStatus,
    TraceEvent,
    secrets_in,
)
from stroma.usage import Report, UsageError, check_usage, report_of, report_of_figures, shown

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from stroma.cost import Dimension

__all__ = ["NodeExecution", "ReliabilityContext", "RemainingBudget", "current_node", "current_run"]

logger = logging.getLogger("stroma")
logger.addHandler(logging.NullHandler())

AnswerT = TypeVar("AnswerT", bound=BaseModel)
Kind = Literal["node", "group", "item"]
_WARN_AT = 0.8
_ATTACHED_SECONDS = (0.02, 1.0)  # between looks at a run that somebody else is at work on: at first, at most


@dataclass(frozen=True, slots=True)
class RemainingBudget:
    """What is left under each limit, in its unit; None where there is no limit. Never below 0."""

    tokens: int | None
    cost_usd: float | None
    latency_ms: float | None


class NodeExecution:
    """The execution of one node at one position; what :func:`current_node` returns.

    Attributes:
        kind: "node", "group", or "item" (one element of ``map_over``).
        position: where in the run the node stands, 0-based; ``branch`` tells children of groups apart.
        attempt: 1-based.
        last_failure: why the previous attempt failed, or None on the first.
        usage: what this attempt used so far; complete while its end hooks run.
        ctx: the run around it, see :func:`current_run`.
        redelivered: this end event was already sent once, by a process that died.
    """

    # Defaults stand on the class: what an execution never touches is not written either.
    kind: Kind = "node"
    branch: str = ""
    attempt: int = 0
    last_failure: Failure | None = None
    counted: AttemptUsage = NO_USAGE
    redelivered: bool = False
    #: Where the children of a group put their events.
    children: list[Row | TraceEvent] | None = None
    #: The group around it, and its id.
    parent: NodeExecution | None = None
    group: str | None = None
    #: A group's clock, which runs while the function of any node in it does: how many do, since when, ns before that.
    running: int = 0
    running_since: int = 0
    busy_ns: int = 0
    #: Attempts that were granted to mend an output contract, and whether the next one is.
    repairs: int = 0
    repairing: bool = False
    #: Whether rows hold encoded snapshots, which the trace knows how to read.
    compact: bool = False
    #: Which call of its step id this is, outside of any pipeline.
    step: StepCall | None = None
    #: What report_usage() was told and nobody has counted yet.
    reported: list[Report] | None = None
    #: The row of the attempt that has just ended, while its hooks run.
    ended: Row | None = None
    _notes: dict[Any, Any] | None = None
    _at_end: list[Callable[[], None]] | None = None

    def __init__(
        self,
        ctx: ReliabilityContext,
        node_id: str,
        kind: Kind,
        position: int,
        branch: str,
        rows: list[Row | TraceEvent],
    ) -> None:
        self.ctx = ctx
        self.node_id = node_id
        self.position = position
        if branch or kind != "node":
            self.branch = branch
            self.kind = kind
        #: Where the engine puts this execution's events: the trace, or the rows of the group around it.
        self.rows = rows

    def enter(self, now: int) -> None:
        """A function inside this group begins."""
        if self.running == 0:
            self.running_since = now
        self.running += 1
        if self.parent is not None:
            self.parent.enter(now)

    def leave(self, now: int) -> None:
        """A function inside this group has ended."""
        self.running -= 1
        if self.running == 0:
            self.busy_ns += now - self.running_since
        if self.parent is not None:
            self.parent.leave(now)

    def busy(self, now: int) -> int:
        """Nanoseconds for which functions of the outermost group around this execution ran in its present attempt."""
        outer = self
        while outer.parent is not None:
            outer = outer.parent
        return outer.busy_ns + (now - outer.running_since if outer.running else 0)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.node_id!r} of run {self.run_id!r}, position {self.position}, attempt {self.attempt}>"

    @property
    def run_id(self) -> str:
        return self.ctx.run_id

    @property
    def pipeline(self) -> str:
        """The name that metrics and spans are labelled with."""
        return self.ctx.pipeline

    @property
    def outcome(self) -> Outcome | None:
        """What became of the attempt whose end hooks run; None before."""
        return None if self.ended is None else self.ended[OUTCOME]

    @property
    def duration_ms(self) -> float | None:
        """How long the function of that attempt ran, hooks, waits and the store apart; None before its end."""
        return None if self.ended is None else self.ended[DURATION] / 1e6

    @property
    def started_ns(self) -> int | None:
        """When that attempt's function was called, in ns since the epoch; None before its end."""
        return None if self.ended is None else self.ended[STARTED]

    @property
    def reason(self) -> str | None:
        """A stable word for why that attempt failed, such as "rate_limit"; None if it did not, or nobody knows."""
        failed = None if self.ended is None else self.ended[FAILURE]
        return None if failed is None else failed[2]

    @property
    def notes(self) -> dict[Any, Any]:
        """Whatever hooks want to find again later in this execution, in all of its attempts; a span, say."""
        if self._notes is None:
            self._notes = {}
        return self._notes

    def at_end(self, callback: Callable[[], None]) -> None:
        """Have a plain function called once, in this task, when no attempt of this execution will follow.

        That is after the last end hook, or when a wait between two attempts is cut short. The last one added is
        called first. What it raises is logged and changes nothing.
        """
        if self._at_end is None:
            self._at_end = []
        self._at_end.append(callback)

    def close(self) -> None:
        """The execution is over."""
        callbacks, self._at_end = self._at_end or [], None
        for callback in reversed(callbacks):
            try:
                callback()
            except Exception as error:
                self.ctx.run_logger.exception("at_end (%r) raised for node %r", callback, self.node_id)
                self.ctx.hook_failed("at_end", self.node_id, error)

    @property
    def idempotency_key(self) -> str:
        """The same for all attempts at this position of this execution of the run, in every process."""
        ctx = self.ctx
        # Read from its end, it has one meaning whatever the run id holds.
        return f"{ctx.run_id}:{ctx.execution}:{self.position}:{self.branch}"

    @property
    def usage(self) -> AttemptUsage:
        """What this attempt used so far: what was counted, and what was reported since. Its price comes when it ends."""
        if self.reported is None:
            return self.counted
        tokens = sum(given + made for given, made, *_ in self.reported)
        named = [model for _, _, model, _ in self.reported if model is not None]
        return AttemptUsage(
            self.counted.tokens + tokens,
            self.counted.output_tokens + sum(made for _, made, *_ in self.reported),
            self.counted.cost_usd,
            named[-1] if named else self.counted.model,
        )

    @property
    def model(self) -> str | None:
        """The model this attempt reported, else the fallback that is due, else None."""
        return self.usage.model or self.ctx.fallback_model()

    @property
    def remaining_budget(self) -> RemainingBudget:
        """What is left of the run's budget, this attempt's reported usage not yet deducted."""
        left: dict[str, float] = {}
        for dimension, limit in limits(self.ctx.budget):
            left[dimension] = max(0.0, limit - self.ctx.cost_tracker.used(dimension))
        tokens = left.get("tokens")
        return RemainingBudget(None if tokens is None else int(tokens), left.get("cost"), left.get("latency"))

    def report_usage(
        self,
        response: object = None,
        /,
        *,
        input_tokens: int = 0,
        output_tokens: int = 0,
        model: str | None = None,
        cached_input_tokens: int = 0,
        cache_write_tokens: int = 0,
        tier: str | None = None,
    ) -> None:
        """Count tokens of this attempt at once, so that they count even if it fails half-way; calls add up.

        Takes the provider's response, or the last chunk of its stream (see :func:`stroma.usage_from`), or figures, of
        which the tokens of a cache are parts of the input. What the node returns as usage comes on top. Raises
        UsageError for what cannot be counted.
        """
        if response is not None:
            if input_tokens or output_tokens or cached_input_tokens or cache_write_tokens:
                raise UsageError(f"node {self.node_id!r} reported a response and figures; report one of them")
            report = report_of(self.node_id, response, model=model, tier=tier)
            if report is None:
                raise UsageError(
                    f"node {self.node_id!r} reported {shown(response)}; report a provider's response, or input_tokens="
                )
        elif cached_input_tokens or cache_write_tokens or tier is not None:
            report = report_of_figures(
                self.node_id,
                {
                    "input_tokens": input_tokens,
                    "output_tokens": output_tokens,
                    "cached_input_tokens": cached_input_tokens,
                    "cache_write_tokens": cache_write_tokens,
                    "model": model,
                    "tier": tier,
                },
            )
        else:
            check_usage(self.node_id, input_tokens, output_tokens)
            report = (input_tokens, output_tokens, model, None)
        if self.reported is None:
            self.reported = []
        self.reported.append(report)

    @property
    def signal(self) -> Any:
        """The answer that this node waited for (see Suspend), as the model that was asked for; None without one.

        Plain JSON data where the model's module is not imported; :meth:`wait_for` needs no such luck.
        """
        answer = self._answer()
        if answer is None:
            return None
        try:
            model = resolve_schema(answer[1]) if answer[1] else Kept
        except (LookupError, TypeError):
            model = Kept
        state = schema_of(model).decode(answer[0])
        return state.root if isinstance(state, Kept) else state

    def wait_for(self, schema: type[AnswerT], *, reason: str) -> AnswerT:
        """The answer of a person as a ``schema``; without one, or with one that does not fit, raises Suspend."""
        answer = self._answer()
        if answer is None:
            raise Suspend(reason, schema=schema)
        try:
            return cast("AnswerT", schema_of(schema).decode(answer[0]))
        except ValueError as error:
            raise Suspend(
                f"{reason} (the answer does not fit: {error}; give another)", schema=schema
            ) from error

    def _answer(self) -> tuple[bytes, str] | None:
        waiting = self.ctx.session.waiting.get((self.position, self.branch))
        return None if waiting is None or waiting.payload is None else (waiting.payload, waiting.schema_ref)

    def take_reported(self) -> list[Report]:
        """What was reported and not yet counted."""
        reported, self.reported = self.reported or [], None
        return reported


CURRENT: ContextVar[NodeExecution | None] = ContextVar("stroma_current_node", default=None)


def current_node() -> NodeExecution | None:
    """The node execution around this code: inside a node's function and its hooks, elsewhere None."""
    return CURRENT.get()


_RUN: ContextVar[ReliabilityContext | None] = ContextVar("stroma_current_run", default=None)


def current_run() -> ReliabilityContext | None:
    """The run around this code: inside a node's function and in all hooks, elsewhere None."""
    node = CURRENT.get()
    return _RUN.get() if node is None else node.ctx


def leave(token: Token[NodeExecution | None]) -> None:
    """The end of a node's execution: :func:`current_node` is what it was before."""
    try:
        CURRENT.reset(token)
    except ValueError:
        pass  # A coroutine that was thrown away is closed in somebody else's context.


class _NoSession:
    """Stands in until the run was opened in its store."""

    execution = 1
    continued = False
    finished: Finished | None = None
    restored: Mapping[tuple[int, str], Committed] = {}
    prior = PriorUsage()
    waiting: Mapping[tuple[int, str], Waiting] = {}
    traceparent: str | None = None
    undelivered: Sequence[Row] = ()
    on_cancel: Callable[[], None] | None = None

    def delivered(self, row: Row) -> None:
        return None

    def note_traceparent(self, traceparent: str) -> None:
        return None

    def record(
        self, row: Row, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        return None

    def suspend(self, row: Row, waiting: Waiting) -> Awaitable[None] | None:
        return None

    def end(self, status: str, error: str | None) -> Awaitable[None] | None:
        return None

    def abandon(self) -> None:
        return None


_NO_SESSION = _NoSession()


class _RunLogger(logging.LoggerAdapter[logging.Logger]):
    """Gives every record its ``run_id``."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


class _Untouched:
    """What most runs never change. It stands here once: what is not written for each run costs none of them anything,
    and up to 30 attributes share the table of their names with those of the other runs."""

    session: Session = _NO_SESSION
    restored: Mapping[tuple[int, str], Committed] = MappingProxyType({})
    #: The last output that was committed at the top level.
    last_state: BaseModel | None = None
    _opening: asyncio.Future[Session] | None = None
    #: While it attaches to somebody else's run: whether it waits between two looks, and whether it need not go on.
    _waits: bool = False
    _gives_up: bool = False
    #: Whether plain code says when its run ends, and what its last step came to.
    ends: bool = False
    step_status: RunStatus | None = None
    step_failure: Failure | None = None
    #: The telling of the hooks that the run of plain code begins.
    _beginning: asyncio.Future[None] | None = None
    _next_position: int = 0
    #: How often each step id was called by plain code, and where the journal has those calls.
    _calls: Counter[str] | None = None
    _recorded: dict[tuple[str, int], int] | None = None
    fire: Hooks = NO_HOOKS
    #: Whether the store is to know which end hooks are due.
    delivers: bool = False
    #: Somebody elsewhere has cancelled the run: nothing is tried again.
    cancelled: bool = False
    #: The W3C trace context that the caller gave, and the one that is kept for those who resume the run: that of the
    #: first hook which puts its own span's here, else the caller's.
    traceparent: str | None = None
    kept_traceparent: str | None = None
    _notes: dict[Any, Any] | None = None
    #: The texts of secrets in states that somebody outside may be shown.
    secrets: set[str] | None = None


@dataclass(eq=False)
class ReliabilityContext(_Untouched):
    """All that one run owns. Make it with :meth:`for_run`."""

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
    step_timeouts: dict[str, int]
    model_fallbacks: list[FallbackPolicy]
    hooks: AnyHooks
    context: dict[str, Any]
    run_logger: logging.LoggerAdapter[logging.Logger]
    config: RunConfig = field(default_factory=RunConfig)
    pipeline: str = "pipeline"

    def __post_init__(self) -> None:
        #: What the children of a group committed in an earlier attempt of it, for the next one.
        self.done: dict[tuple[int, str], BaseModel] = {}
        self.hook_failures: list[HookFailure] = []
        self.unpriced: list[str] = []
        #: What nodes of this run wait for.
        self.suspended: list[str] = []
        self.limits: list[tuple[Dimension, float]] = limits(self.budget)
        #: Turns perf_counter_ns into nanoseconds since the epoch; a step of the wall clock changes no order in the run.
        self.epoch_ns = time_ns() - perf_counter_ns()
        self.cost_tracker.per_node = self.trace.figures
        #: Whether any function runs under a time limit.
        self.timed = bool(self.step_timeouts) or self.budget.max_latency_ms is not None
        self._warned: set[str] = set()
        sets = [hooks for hooks in flatten(self.hooks) if any(vars(hooks).values())]
        if sets:
            if self.config.hook_delivery == "at_least_once":
                self.delivers = True
            limit = self.config.hook_timeout_ms
            self.fire = Hooks(
                tuple(sets),
                run_id=self.run_id,
                limit_seconds=None if limit is None else limit / 1000,
                on_error=self.hook_failed,
                all_ends=self.delivers,
            )

    @classmethod
    def for_run(
        cls, config: RunConfig, registry: ContractRegistry, checkpoint_manager: CheckpointManager
    ) -> ReliabilityContext:
        """A context with a fresh tracker, trace and counts; the config's own context dict."""
        run_id = str(config.run_id)
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
            run_logger=_RunLogger(logger, {"run_id": run_id}),
            config=config,
            pipeline=config.pipeline,
        )

    # ------------------------------------------------------------------ the journal

    async def __aenter__(self) -> ReliabilityContext:
        """Around plain code with ``execute_step``: the run is nobody else's until it ends, and the journal says how.

        The hooks of the run are told of its start, at the first step, and of its end.
        """
        self.ends = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        status = self.step_status or RunStatus.COMPLETED
        failure = self.step_failure
        if kind is not None and status is RunStatus.COMPLETED:
            status = (
                RunStatus.CANCELLED if issubclass(kind, asyncio.CancelledError) else RunStatus.INTERRUPTED
            )
        if kind is GeneratorExit:  # The code around is being closed: nothing may be awaited any more.
            self.session.abandon()
            if self._beginning is not None:
                await self.tell_end(self.build_result(status, self.last_state, failure), now=True)
            return
        cancelled = await self.end(status, None if error is None else message_of(error))
        if self._beginning is not None:
            await self.tell_end(self.build_result(status, self.last_state, failure))
        if cancelled and error is None:
            raise asyncio.CancelledError

    async def begin(self, tell: Callable[[], Awaitable[None]]) -> None:
        """Await what the first step of plain code has to tell; steps beside it wait for that."""
        if self._beginning is None:
            self._beginning = asyncio.get_running_loop().create_future()
            try:
                await tell()
            finally:
                self._beginning.set_result(None)
        elif not self._beginning.done():
            await asyncio.shield(self._beginning)

    async def open(
        self,
        initial_state: BaseModel,
        *,
        discard_from: int | None = None,
        accept: Callable[[int, str, Committed], None] | None = None,
        ends: bool = True,
    ) -> Session:
        """Begin the run in the store, once, as the config says; with ``discard_from``, continue up to there.

        ``ends``: whether :meth:`end` will be called. Raises StoreError (RunBusy, PipelineChanged ...).
        """
        if self.session is _NO_SESSION:
            if self._opening is None:
                config = self.config
                resumed = config.resume or discard_from is not None
                request = RunRequest(
                    self.run_id,
                    self.pipeline,
                    initial_state,
                    schema_of(type(initial_state)),
                    "resume" if resumed else config.if_exists,
                    discard_from,
                    accept,
                    config.if_running,
                    config.lease_seconds,
                    ends,
                    self.delivers,
                )
                opened: Session | Awaitable[Session]
                if config.if_running == "attach":
                    opened = self._attach(request)
                else:
                    opened = self.checkpoint_manager.open_run(request)
                if not inspect.isawaitable(opened):
                    return self._begin(opened, carry=discard_from is None)
                self._opening = asyncio.ensure_future(opened)
            try:
                # Steps that begin side by side wait for the same opening, and one that is cancelled spoils it for none.
                session = await asyncio.shield(self._opening)
            except Exception:
                self._opening = None
                raise
            if self.session is _NO_SESSION:
                self._begin(session, carry=discard_from is None)
        return self.session

    async def _attach(self, request: RunRequest) -> Session:
        """Open the run once nobody else is at work on it, for what they have made of it."""
        delay = _ATTACHED_SECONDS[0]
        while True:
            try:
                opened = self.checkpoint_manager.open_run(request)
                return await opened if inspect.isawaitable(opened) else opened
            except RunBusy as busy:
                # What others make of it is no use to who wants to make it anew.
                if not busy.same_input or self._gives_up or request.discard_from is not None:
                    raise
            request = request._replace(if_exists="attach")
            self._waits = True
            await asyncio.sleep(delay)
            self._waits = False
            delay = min(delay * 1.5, _ATTACHED_SECONDS[1])

    async def end(self, status: RunStatus, error: str | None) -> bool:
        """Note in the store how the run ended, also while it is still being opened there.

        Returns whether the task was cancelled meanwhile. Never raises: the commits are safe, only this line is not.
        """
        cancelled = False
        try:
            session = self.session
            if session is _NO_SESSION and self._opening is not None:
                self._gives_up = True
                if self._waits:  # For somebody else's run.
                    self._opening.cancel()
                    return False
                problem, cancelled = await uninterrupted(self._opening)
                if problem is not None:
                    raise problem
                session = self._opening.result()
            pending = session.end(status.value, error)
            if pending is not None:
                problem, late = await uninterrupted(pending)
                cancelled |= late
                if problem is not None:
                    raise problem
        except RunBusy:
            pass  # It never became ours.
        except Exception:
            self.run_logger.exception("the end of the run could not be recorded")
        return cancelled

    def _begin(self, session: Session, *, carry: bool) -> Session:
        self.session = session
        self.restored = session.restored
        if carry and session.continued:
            # Only a resume that goes on by itself remembers the bill; resume_from starts a new one.
            self.cost_tracker.prior_tokens = session.prior.tokens
            self.cost_tracker.prior_cost_usd = session.prior.cost_usd
            self.cost_tracker.prior_latency_ms = session.prior.latency_ms
        return session

    @property
    def first_traceparent(self) -> str | None:
        """The trace context of the process that began this execution, for links; None in that process itself."""
        return self.session.traceparent

    @property
    def execution(self) -> int:
        """1 for the first execution of this run id, 2 after a restart, and so on."""
        return self.session.execution

    def next_step(self, step_id: str) -> tuple[int, int]:
        """The position of the next step of plain code, and which call of its id it is (both 0-based).

        A call that is in the journal has the position it had; the others take the free ones in order.
        """
        if self._recorded is None:
            self._recorded = {
                (kept.node_id, kept.step.number): position
                for (position, branch), kept in self.restored.items()
                if kept.step is not None and not branch
            }
        if self._calls is None:
            self._calls = Counter()
        number = self._calls[step_id]
        self._calls[step_id] += 1
        position = self._recorded.get((step_id, number))
        return self.free_position() if position is None else position, number

    def free_position(self) -> int:
        """The next position of plain code that nothing has, and nothing is recorded at."""
        while (self._next_position, "") in self.restored:
            self._next_position += 1
        self._next_position += 1
        return self._next_position - 1

    def contract_of(self, node: Node) -> NodeContract[Any, Any] | None:
        """The contract a node runs under: the registry's, else its marker's."""
        return self.registry.find(node.node_id) or node.contract

    # ------------------------------------------------------------------ money

    def fallback_model(self) -> str | None:
        """The furthest fallback that is due, or None."""
        if not self.model_fallbacks:
            return None
        return fallback_due(self.cost_tracker, self.budget, self.model_fallbacks)

    def node_context(self) -> dict[str, Any]:
        """What a node gets as ``ctx``: the user's own dict, or, while a fallback is due, a view of it that names it."""
        model = self.fallback_model()
        return self.context if model is None else SignalView(self.context, model)

    def due_warnings(self) -> list[tuple[str, float, float]]:
        """(dimension, used, limit) of each limit that has just been used to 80 %; each once in a run."""
        due: list[tuple[str, float, float]] = []
        for dimension, limit in self.limits:
            if dimension not in self._warned and (used := self.cost_tracker.used(dimension)) >= round(
                _WARN_AT * limit, 9
            ):
                self._warned.add(dimension)
                due.append((dimension, used, limit))
        return due

    # ------------------------------------------------------------------ what others see

    @property
    def notes(self) -> dict[Any, Any]:
        """Whatever hooks want to find again later in this run."""
        if self._notes is None:
            self._notes = {}
        return self._notes

    async def tell_start(self, initial: BaseModel) -> None:
        """Tell the hooks that the run begins, and note in the store which trace it belongs to."""
        if self.fire.on_run_start is not None:
            await self.tell(
                "on_run_start",
                self.fire.on_run_start,
                lambda: (self.run_id, self.pipeline, self.shown(schema_of(type(initial)).state(initial))),
            )
        kept = self.kept_traceparent or self.traceparent
        if kept is not None and self.session.traceparent is None and self.session.finished is None:
            self.session.note_traceparent(kept)

    async def tell_end(self, result: ExecutionResult, *, now: bool = False) -> None:
        """Tell the hooks what the run came to. Raises HookNotAsync, unless a cancellation is on its way out.

        ``now``: where nothing can be awaited any more.
        """
        calls = self.fire.on_run_end
        if calls is None:
            return
        try:
            await self.tell("on_run_end", calls, lambda: (self.run_id, self.shown_result(result)), now=now)
        except HookNotAsync as error:
            error.result = result
            if result.status is not RunStatus.CANCELLED:
                raise
            self.run_logger.warning("%s", error)

    async def tell(
        self, event: str, calls: Calls, arguments: Callable[[], tuple[Any, ...]], *, now: bool = False
    ) -> None:
        """Fire a hook of the run itself, which is :func:`current_run` meanwhile, and no node is current.

        ``now``: where nothing can be awaited any more.
        """
        run, node = _RUN.set(self), CURRENT.set(None)
        try:
            if now:
                self.fire.fire_now(event, calls, None, arguments)
            else:
                await self.fire.fire(event, calls, None, arguments)
        except GeneratorExit:
            # Closed half-way: the sets that are left are told all the same.
            if not now and event == "on_run_end":
                await self.tell(event, self.fire.untold, arguments, now=True)
            raise
        finally:
            leave(node)
            try:
                _RUN.reset(run)
            except ValueError:
                pass  # As in leave().

    def shown(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state as hooks may see it: redacted, if the config says how."""
        redact = self.config.redact
        if redact is None:
            return state
        # What redact takes out of a state may stand in a message all the same.
        self.note_secrets(state)
        try:
            shown = redact(state)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            return {"redacted": f"redact raised {type(error).__name__}"}
        return (
            shown
            if isinstance(shown, dict)
            else {"redacted": f"redact returned {type(shown).__name__}, not a dict"}
        )

    def note_secrets(self, state: Mapping[str, Any]) -> None:
        """Remember the secrets in a state, for those who keep them out of messages."""
        try:
            found = set(secrets_in(state))
        except Exception:
            return  # A class of the user's that cannot be looked into; it is shown as such, too.
        if found:
            self.secrets = found if self.secrets is None else self.secrets | found

    def shown_error(self, error: BaseException) -> BaseException:
        """A failure as hooks may see it: a violation carries the state that broke the contract."""
        if self.config.redact is None or not is_a(error, ContractViolation):
            return error
        try:
            errors = [
                {k: v for k, v in e.items() if k != "input"} if isinstance(e, dict) else e
                for e in error.errors
            ]
            shown = ContractViolation(error.node_id, error.direction, self.shown(error.raw), errors)
            # Who sees both of them, in one hook and another, can tell that they are one.
            shown.__dict__["_stroma_identity"] = error.__dict__.setdefault("_stroma_identity", object())
            return shown
        except Exception:  # A node made it, and left out what belongs to it.
            return ContractViolation("", "output", {"redacted": f"a {type(error).__name__}"}, [])

    def shown_result(self, result: ExecutionResult) -> ExecutionResult:
        """A result as one set of hooks may do with it what it likes; redacted, if the config says how."""
        state, trace, failure = result.final_state, result.trace.copy(), result.failure
        if isinstance(state, BaseModel):
            schema = schema_of(type(state))
            state = schema.copy(state)
            if self.config.redact is not None:
                # What is shown need not satisfy the schema.
                seen = self.shown(schema.state(state))
                state = schema.made_of({"root": seen.get("root", seen)} if schema.root else seen)
        if self.config.redact is not None:
            for event in trace.walk():
                event.input_state = self.shown(event.input_state)
                if event.output_state is not None:
                    event.output_state = self.shown(event.output_state)
            if failure is not None:
                failure = replace(failure, exception=self.shown_error(failure.exception))
        return replace(
            result,
            final_state=state,
            trace=trace,
            failure=failure,
            hook_errors=list(result.hook_errors),
            unpriced_models=list(result.unpriced_models),
            suspended=list(result.suspended),
        )

    def hook_failed(self, hook: str, node_id: str | None, error: BaseException) -> None:
        self.hook_failures.append(HookFailure(hook, node_id, error))

    def build_result(
        self, status: RunStatus, final_state: Any, failure: Failure | None = None
    ) -> ExecutionResult:
        """The result as things stand: totals and trace of the whole context so far."""
        if isinstance(final_state, BaseModel):
            schema_of(type(final_state)).release(final_state)
        return ExecutionResult(
            run_id=self.run_id,
            status=status,
            final_state=final_state,
            trace=self.trace,
            total_cost_usd=self.cost_tracker.total_cost_usd,
            total_tokens=self.cost_tracker.total_tokens,
            failure=failure,
            hook_errors=self.hook_failures,
            unpriced_models=self.unpriced,
            suspended=self.suspended,
        )
