"""The state of one run."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Self, cast

from pydantic import BaseModel

from stroma.checkpoint import CheckpointManager, Session
from stroma.checkpoint.entries import RunControl
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.node import Node
from stroma.contracts.schema import schema_of
from stroma.cost.budget import ExecutionBudget, replace_limits
from stroma.cost.fallback import FallbackPolicy, FallbackView, fallback_due
from stroma.cost.tracker import CostTracker
from stroma.cost.usage import NO_MODEL, UsageError
from stroma.engine.config import NodeTimeout, RunConfig, limits_ms
from stroma.engine.journal import RunJournal
from stroma.engine.merged_models import spelled_out
from stroma.engine.parts import Account, Handover, PlainSteps, Stopping
from stroma.engine.redaction import Redactor, RunLogger
from stroma.failures.failure import Classifier, Failure, NodeContext, diagnose
from stroma.failures.policy import PolicyMap, RetryBudget
from stroma.hooks.dispatch import NO_HOOKS, Hooks
from stroma.hooks.sets import AnyHooks, distinct, flatten
from stroma.trace.result import ExecutionResult, HookFailure, RunStatus, Total
from stroma.trace.trace import ExecutionTrace

if TYPE_CHECKING:
    from stroma.checkpoint import Session
    from stroma.contracts.node import Group, Node
    from stroma.failures.failure import Failure
    from stroma.hooks.sets import NodeHooks
    from stroma.trace.result import ExecutionResult

Call = Callable[[BaseModel], Awaitable[Any]]


class Interceptor:
    """Interceptor around the parts of a run. Each method changes nothing, unless a subclass does.

    ``ctx`` is the ReliabilityContext and ``run`` the RunningNode; the context imports this module, so it
    cannot name them.
    """

    def begins(self, ctx: Any) -> NodeHooks | None:
        """Return hooks for a run, or plain code with steps, that begins; they begin first and end last."""
        return None

    def opened(self, ctx: Any, session: Session) -> Session:
        """Return the session of a run that was opened in its store, or one to use in place of it."""
        return session

    async def call(self, run: Any, node: Node | Group, call: Call, state: BaseModel) -> Any:
        """Call a node's function by ``call``, or something in place of it; within its timeout."""
        return await call(state)

    def diagnosed(self, run: Any, failure: Failure) -> Failure:
        """Return the failure of an attempt, or one to use in place of it."""
        return failure

    def ended(self, ctx: Any, result: ExecutionResult) -> None:
        """Inspect the result of a run, or of a step of plain code, before it is returned.

        An exception comes out of ``run()``, or ``execute_step()``.
        """


#: Interceptors of each run that begins; the first one is outermost.
INTERCEPTORS: list[Interceptor] = []


_NOTHING: Final = Total()


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
    _plain_steps: PlainSteps | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.account = Account(self.budget)
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

    @property
    def plain_steps(self) -> PlainSteps:
        """The steps of plain code in this run."""
        if self._plain_steps is None:
            self._plain_steps = PlainSteps()
        return self._plain_steps

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
                "outside of its nodes; call it in a node, or with a separate context"
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
        return self.handover.state()

    @property
    def notes(self) -> dict[Any, Any]:
        """Storage of hooks for this run."""
        if self.account.notes is None:
            self.account.notes = {}
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
        self.journal.kept_traces.setdefault(system, traceparent)

    def all_traces(self) -> str | None:
        """Return all trace contexts of the run as one text: recorded ones precede the caller's."""
        if not self.journal.kept_traces:
            return self.journal.traceparent
        traces = _traces_of(self.traceparent) | self.journal.kept_traces
        return ";".join(f"{system}={one}" if system else one for system, one in traces.items())

    def hook_failed(self, hook: str, node_id: str | None, error: BaseException) -> None:
        """Add the exception of a hook to the result, and let the exporters count it."""
        self.account.note_hook_failure(HookFailure(hook, node_id, error))
        self.fire.count_failure(self, hook)

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

    def contract_of(self, node: Node) -> NodeContract[Any, Any] | None:
        """Return the contract of a node: the registry's, else its marker's."""
        return self.registry.find(node.node_id) or node.contract

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

    def note_unpriced(self, node_id: str, place: str, model: str | None) -> UsageError | None:
        """List a model without a price; return the error if a limit needs the price, else warn once.

        ``model``: None for tokens reported without a model. ``place``: the subject of the message.
        """
        account, chosen = self.account, self.config.unknown_model
        name = NO_MODEL if model is None else model
        is_listed = name in account.unpriced
        if not is_listed:
            account.unpriced += (name,)
        is_refused = self.has_limit("cost", node_id) if chosen is None else chosen == "error"
        if not is_refused:
            if not is_listed:
                if model is None:
                    text = "reported tokens without a model: they count as 0 USD; report the model with them"
                else:
                    text = (
                        f"used model {model!r}, which has no known price: it counts as 0 USD; add it to "
                        "KNOWN_MODELS"
                    )
                self.run_logger.warning("%s %s", place, text)
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
            final_state = spelled_out(final_state)
        spent, account = self.cost_tracker, self.account
        failures, tokens, cost_usd = account.hook_failures, spent.total_tokens, spent.total_cost_usd
        total = _NOTHING
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
            hook_errors=[] if failures is None else failures,  # Hooks of the run's end may add to it.
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
    renews_idle_limits = False
    if ctx.step_timeouts:
        renews_idle_limits = any(limits_ms(limit)[1] is not None for limit in ctx.step_timeouts.values())
    if interceptors:
        sets = [own for one in interceptors if (own := one.begins(ctx)) is not None] + sets
    if not sets and not interceptors and not renews_idle_limits:
        return NO_HOOKS
    failures: list[HookFailure] = []
    ctx.account.hook_failures = failures if sets else None
    return Hooks(
        tuple(distinct(sets)),
        run_id=ctx.run_id,
        limit_seconds=None if config.hook_timeout_ms is None else config.hook_timeout_ms / 1000,
        failures=failures,
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
