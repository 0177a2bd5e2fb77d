"""What one run owns."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from pydantic import BaseModel

from stroma._utils.text import one_line, typed
from stroma.checkpoint import (
    CheckpointManager,
    Committed,
    RunBusy,
    RunExists,
    RunRequest,
    Session,
    StoreError,
)
from stroma.checkpoint.identity import StepCalls
from stroma.checkpoint.protocols import Tried
from stroma.checkpoint.sessions import NULL_SESSION
from stroma.contracts.contract import ContractRegistry, ContractViolation, NodeContract
from stroma.contracts.copying import Packed
from stroma.contracts.node import Node
from stroma.contracts.schema import schema_of
from stroma.cost.budget import ExecutionBudget, limits
from stroma.cost.fallback import FallbackPolicy, SignalView, fallback_due
from stroma.cost.tracker import CostTracker
from stroma.engine.config import RunConfig, is_shared
from stroma.engine.current import CURRENT, RUN, leave
from stroma.engine.interceptors import PROBES, Probe
from stroma.engine.merged_models import spelled_out
from stroma.engine.tasks import uninterrupted
from stroma.failures.failure import Classifier, Failure, is_a, kind_of, message_of
from stroma.failures.policy import PolicyMap, RetryBudget
from stroma.hooks.dispatch import NO_HOOKS, Calls, HookNotAsync, Hooks
from stroma.hooks.sets import AnyHooks, distinct, flatten
from stroma.trace.events import AttemptRow
from stroma.trace.plain import secrets_in
from stroma.trace.redaction import HIDDEN, forms_of, without_secrets
from stroma.trace.result import ExecutionResult, HookFailure, RunStatus
from stroma.trace.trace import ExecutionTrace

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from stroma.cost.budget import Dimension

__all__ = ["ReliabilityContext"]

logger = logging.getLogger("stroma")
logger.addHandler(logging.NullHandler())

_WARN_AT = 0.8
_ATTACHED_SECONDS = (0.02, 1.0)  # between looks at a run that somebody else is at work on: at first, at most


_PLAIN_LEAVES: Final = frozenset({str, int, float, bool, type(None)})
_MOST_SECRETS: Final = 1000  # that one run remembers
_NO_FAILED_MAPS: Mapping[tuple[int, str], int] = {}


def _is_heard(logger: logging.Logger) -> bool:
    """Whether a record would meet a handler, or a filter, that does anything."""
    found: logging.Logger | None = logger
    while found is not None:
        if found.filters:
            return True
        for handler in found.handlers:
            if type(handler) is not logging.NullHandler:
                return True
        found = found.parent if found.propagate else None
    return False


class _RunLogger(logging.LoggerAdapter[logging.Logger]):
    """Gives every record its ``run_id``, and makes none where nobody would see it: a record takes 15 us."""

    def isEnabledFor(self, level: int) -> bool:
        return self.logger.isEnabledFor(level) and _is_heard(self.logger)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


@dataclass(eq=False, init=False)
class ReliabilityContext:
    """All that one run owns. Make it with :meth:`for_run`."""

    # Slots, since several of them are asked for each node.
    __slots__ = (
        "__weakref__",
        "_beginning",
        "_budget",
        "_classifiers",
        "_gives_up",
        "_hooks",
        "_model_fallbacks",
        "_next_position",
        "_notes",
        "_opening",
        "_policy_map",
        "_taken",
        "_waits",
        "_warned",
        "apart",
        "calls",
        "cancelled",
        "chained",
        "checkpoint_manager",
        "config",
        "context",
        "cost_tracker",
        "delivers",
        "done",
        "elsewhere",
        "ends",
        "epoch_ns",
        "failed_items",
        "failed_maps",
        "fire",
        "gated",
        "hook_failures",
        "interrupt",
        "kept_traceparent",
        "lends",
        "lent",
        "limits",
        "newest",
        "pictured",
        "pipeline",
        "probes",
        "recovers",
        "registry",
        "restored",
        "retry_budget",
        "run_id",
        "run_logger",
        "secrets",
        "session",
        "step_failure",
        "step_policies",
        "step_status",
        "step_timeouts",
        "stops",
        "suspended",
        "timed",
        "trace",
        "traceparent",
        "tried",
        "unpriced",
    )  # fmt: skip

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
        step_timeouts: dict[str, int],
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
        self._budget = budget
        self._policy_map = policy_map
        self.step_policies = step_policies
        self._classifiers = classifiers
        self.step_timeouts = step_timeouts
        self._model_fallbacks = model_fallbacks
        self._hooks = hooks
        self.context = context
        self.run_logger = run_logger
        self.config = RunConfig() if config is None else config
        self.pipeline = pipeline
        self.session: Session = NULL_SESSION
        self.restored: Mapping[tuple[int, str], Committed] = NULL_SESSION.restored
        #: Attempts of processes that died, until their node runs again.
        self.tried: dict[tuple[int, str], Tried] | None = None
        #: The last output that was committed at the top level, and the picture of it that is as good. Whether others have
        #: a part in the values of the model itself: the node that returned them, or the next one. See last_state.
        self.newest: BaseModel | None = None
        self.pictured: Packed | bytes | None = None
        self.lent = False
        #: Whether outputs go from node to node, and to no plain code between them; and may be lent before the next node
        #: takes them.
        self.chained = self.lends = False
        self._opening: asyncio.Future[Session] | None = None
        #: While it attaches to somebody else's run: whether it waits between two looks, and whether it need not go on.
        self._waits = self._gives_up = False
        #: Whether plain code says when its run ends, and what its last step came to.
        self.ends = False
        self.step_status: RunStatus | None = None
        self.step_failure: Failure | None = None
        #: The telling of the hooks that the run of plain code begins.
        self._beginning: asyncio.Future[None] | None = None
        self._next_position = 0
        #: The steps that plain code has called, and the positions at which the journal has something.
        self.calls: StepCalls | None = None
        #: See RunRequest.
        self.apart: tuple[tuple[int, str], ...] = ()
        self._taken: set[int] | None = None
        #: Somebody elsewhere has cancelled the run: nothing is tried again. And whether no further node shall begin.
        self.cancelled = self.stops = False
        #: Whether only a run that was interrupted, or died, is gone on with.
        self.recovers = False
        #: How many items of maps failed while the others went on; and of which committed maps how many did.
        self.failed_items = 0
        self.failed_maps: Mapping[tuple[int, str], int] = _NO_FAILED_MAPS
        #: Whether the run's other parts are in other processes: what begins it, ends it, and makes its other attempts.
        self.elsewhere = False
        #: Ends the run once a shutdown has asked that nothing new is begun; None before.
        self.interrupt: Callable[[], None] | None = None
        #: The W3C trace context that the caller gave, and the one that is kept for those who resume the run: that of
        #: the first hook which puts its own span's here, else the caller's.
        self.traceparent: str | None = None
        self.kept_traceparent: str | None = None
        self._notes: dict[Any, Any] | None = None
        #: The texts of secrets that this run has met, with their forms in messages; the newest last.
        self.secrets: dict[str, set[str]] = {}
        #: What the children of a group committed in an earlier attempt of it, for the next one.
        self.done: dict[tuple[int, str], BaseModel] = {}
        self.hook_failures: list[HookFailure] = []
        self.unpriced: list[str] = []
        #: What nodes of this run wait for.
        self.suspended: list[str] = []
        self.limits: tuple[tuple[Dimension, float], ...] = limits(budget)
        #: Turns perf_counter_ns into nanoseconds since the epoch; a step of the wall clock changes no order in the run.
        self.epoch_ns = time_ns() - perf_counter_ns()
        self.cost_tracker.per_node = self.trace.figures
        #: What tests have put around runs.
        self.probes: tuple[Probe, ...] = tuple(PROBES) if PROBES else ()
        #: Whether any function runs under a time limit, or with a probe around it.
        self.timed = bool(self.step_timeouts) or budget.max_latency_ms is not None or bool(self.probes)
        #: Warnings that were given: dimensions of the budget, and what is wrong with a node.
        self._warned: dict[str | tuple[str, str], None] = {}  # A set would take 200 bytes in each run.
        #: Whether the store is to know which end hooks are due.
        self.delivers = False
        self.fire: Hooks = NO_HOOKS
        #: Whether attempts wait for their turn at a shared budget, a limit or a breaker.
        self.gated = self.config.gated
        sets = [one for one in flatten(hooks) if any(one.__dict__.values())]
        if self.probes:
            sets = [own for probe in self.probes if (own := probe.begins(self)) is not None] + sets
        if sets:
            if len(sets) > 1:
                sets = distinct(sets)
            self.delivers = self.config.hook_delivery == "at_least_once"
            limit = self.config.hook_timeout_ms
            self.fire = Hooks(
                tuple(sets),
                run_id=self.run_id,
                limit_seconds=None if limit is None else limit / 1000,
                failures=self.hook_failures,
                secrets=self.secrets,
                all_ends=self.delivers,
            )

    @classmethod
    def for_run(
        cls, config: RunConfig, registry: ContractRegistry, checkpoint_manager: CheckpointManager
    ) -> ReliabilityContext:
        """A context with a fresh tracker, trace and counts; the config's own context dict."""
        run_id = str(config.run_id)
        # By position: so many keywords take a microsecond to sort.
        return cls(
            run_id, registry, checkpoint_manager, CostTracker(), RetryBudget(), ExecutionTrace(run_id),
            config.held("budget"), config.held("policy_map"), config.node_policies, config.held("classifiers"),
            config.node_timeouts, config.held("model_fallbacks"), config.held("hooks"), config.context,
            _RunLogger(logger, {"run_id": run_id}), config, config.pipeline,
        )  # fmt: skip

    def warn_once(self, node_id: str, what: str, text: str) -> None:
        """Log a warning that a node would give for each of its attempts and items."""
        if (node_id, what) not in self._warned:
            self._warned[node_id, what] = None
            self.run_logger.warning("%s", text)

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
        status = RunStatus.CANCELLED if self.cancelled else self.step_status or RunStatus.COMPLETED
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
        result = None if self._beginning is None else self.build_result(status, self.last_state, failure)
        cancelled = await self.end_and_tell(
            status, None if error is None else typed(kind_of(error), message_of(error)), result
        )
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
        apart: tuple[tuple[int, str], ...] = (),
    ) -> Session:
        """Begin the run in the store, once, as the config says; with ``discard_from``, continue up to there.

        ``ends``: whether :meth:`end` will be called. ``apart``: see RunRequest. Raises StoreError (RunBusy, PipelineChanged ...).
        """
        if self.session is NULL_SESSION:
            if self._opening is None:
                config = self.config
                self.apart = apart
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
                    apart,
                    config.retry_failed_items,
                    config.tags,
                    config.max_recoveries,
                    config.force_resume,
                    self.recovers,
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
            if self.session is NULL_SESSION:
                self._begin(session, carry=discard_from is None)
                if self.config.shared_budgets and session.epoch > 1:
                    await self._settle_earlier(session)
        return self.session

    async def _settle_earlier(self, session: Session) -> None:
        """Count what earlier processes spent on this run in its shared budgets, where they did not live to."""
        from stroma.limits.shared_budget import caller_of

        caller = caller_of(session, self.run_id, self.checkpoint_manager.store, -1, "", 0, 0)
        if session.finished is not None and caller.place is not None:
            caller = caller._replace(place=caller.place._replace(epoch=0))  # None of its calls is ours.
        for budget in self.config.budgets:
            try:
                await budget.settle_run(caller)
            except StoreError as error:  # It is looked into again when the lease of a call has ended.
                self.run_logger.warning(
                    "%s: calls of earlier processes are not counted: %s", budget.label, error
                )

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

    async def end_and_tell(
        self, status: RunStatus, error: str | None, result: ExecutionResult | None
    ) -> bool:
        """Note in the store how the run ended, and tell the hooks. Returns whether the task was cancelled meanwhile.

        Under ``hook_delivery="at_least_once"`` the hooks come first: whoever finds the run without its end tells them again.
        """
        if not self.delivers or result is None:
            cancelled = await self.end(status, error)
            if result is not None:
                await self.tell_end(result)
            return cancelled
        try:
            await self.tell_end(result)
        finally:
            cancelled = await self.end(status, error)
        return cancelled

    async def end(self, status: RunStatus, error: str | None) -> bool:
        """Note in the store how the run ended, also while it is still being opened there.

        Returns whether the task was cancelled meanwhile. Never raises: the commits are safe, only this line is not.
        """
        cancelled = False
        try:
            session = self.session
            if session is NULL_SESSION and self._opening is not None:
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
        except (RunBusy, RunExists):
            pass  # It never became ours.
        except Exception:
            self.run_logger.exception("the end of the run could not be recorded")
        return cancelled

    @property
    def last_state(self) -> BaseModel | None:
        """The last output that was committed at the top level. Nobody else can change it."""
        if self.lent:
            assert self.newest is not None
            assert self.pictured is not None
            # The same object, since drivers know the state by it.
            restored = schema_of(type(self.newest)).restore(self.pictured)
            object.__setattr__(self.newest, "__dict__", restored.__dict__)
        self.pictured, self.lent = None, False  # Whoever reads it may change it.
        return self.newest

    @last_state.setter
    def last_state(self, state: BaseModel) -> None:
        self.newest, self.pictured, self.lent = state, None, False

    def settled(self, state: BaseModel) -> BaseModel:
        """A state that a driver has, with values that nobody else has a part in."""
        return cast("BaseModel", self.last_state) if state is self.newest else state

    def chain(self) -> None:
        """Note that outputs go from node to node."""
        self.chained = True
        # A store that keeps the picture of an output does not read the output; the hooks of its end do.
        self.lends = getattr(self.session, "reads_rows", False) and self.fire.on_node_success is None

    def _begin(self, session: Session, *, carry: bool) -> Session:
        for probe in self.probes:
            session = probe.opened(self, session)
        self.session = session
        self.restored = session.restored
        if session.tried:
            self.tried = dict(session.tried)
        if self.restored:
            self.failed_maps = {
                at: kept.failed_items
                for at, kept in self.restored.items()
                if kept.step is not None and kept.failed_items
            }
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

    def place_of(self, identity: str) -> int:
        """The position of a step of plain code: the one it has in the journal, else the next at which there is nothing.

        Raises RuntimeError in a pipeline, whose nodes have the positions.
        """
        if self.chained:
            raise RuntimeError(
                f"step {identity.partition('#')[0]!r} was called in run {self.run_id!r} of a pipeline, outside of its nodes; "
                "call it in a node, or with a context of its own"
            )
        position = self.session.places.get(identity)
        if position is None:
            if self._taken is None:
                self._taken = {at for at, _ in (*self.restored, *self.session.waiting)}
                self._taken.update(self.session.places.values())
            while self._next_position in self._taken:
                self._next_position += 1
            position = self._next_position
            self._next_position += 1
        self.session.note_call(position, identity)
        return position

    def contract_of(self, node: Node) -> NodeContract[Any, Any] | None:
        """The contract a node runs under: the registry's, else its marker's."""
        return self.registry.find(node.node_id) or node.contract

    # ------------------------------------------------------------------ money

    def fallback_model(self) -> str | None:
        """The furthest fallback that is due, or None."""
        if not self._model_fallbacks:
            return None
        return fallback_due(self.cost_tracker, self.budget, self._model_fallbacks)

    def node_context(self) -> dict[str, Any]:
        """What a node gets as ``ctx``: the user's own dict, or, while a fallback is due, a view of it that names it."""
        model = self.fallback_model()
        return self.context if model is None else SignalView(self.context, model)

    def has_limit(self, dimension: Literal["tokens", "cost"], node_id: str) -> bool:
        """Return whether the run's own budget or a shared one limits what a node may take of a dimension."""
        own = self.budget.max_tokens_total if dimension == "tokens" else self.budget.max_cost_usd
        return own is not None or any(one.has_limit(dimension, node_id) for one in self.config.budgets)

    def refuses_unpriced(self, node_id: str) -> bool:
        """Return whether usage without a known price stops the run: a limit in US dollars could not count it."""
        chosen = self.config.unknown_model
        return self.has_limit("cost", node_id) if chosen is None else chosen == "error"

    def due_warnings(self) -> list[tuple[str, float, float]]:
        """(dimension, used, limit) of each limit that has just been used to 80 %; each once in a run."""
        due: list[tuple[str, float, float]] = []
        for dimension, limit in self.limits:
            if dimension not in self._warned and (used := self.cost_tracker.used(dimension)) >= round(
                _WARN_AT * limit, 9
            ):
                self._warned[dimension] = None
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
        run, node = RUN.set(self), CURRENT.set(None)
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
                RUN.reset(run)
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

    def note_secrets(self, state: Any) -> None:
        """Remember the secrets in a state, to keep them out of messages: the newest thousand."""
        if type(state) is tuple and _PLAIN_LEAVES.issuperset(map(type, state)):
            return  # A flat state without secrets, as most are: a failed attempt takes a tenth less.
        try:
            found = list(islice(secrets_in(state), _MOST_SECRETS))
        except Exception:
            return  # A class of the user's that cannot be looked into; it is shown as such, too.
        if not found:
            return
        known = self.secrets
        for secret in found:
            forms = known.pop(secret) if secret in known else forms_of(secret)
            known[secret] = forms  # As the newest.
        while len(known) > _MOST_SECRETS:
            del known[next(iter(known))]

    def masked(self, text: str) -> str:
        """Return a text without the secrets that this run has met."""
        return without_secrets(text, self.secrets)

    def scrubbed(self, failure: Failure, picture: Any) -> Failure:
        """Return a failure whose message has none of the secrets of the run's context and the attempt's input."""
        if type(picture) is not Packed and type(picture) is not bytes:  # Those hold plain data.
            self.note_secrets(picture)
        if self.context:
            self.note_secrets(self.context)
        message = failure.message
        error = failure.exception
        if is_a(error, ContractViolation) and isinstance(error.schema, type):
            from stroma.contracts.masking import Secrets

            # A validator of the user's may quote what came for a field that is declared as a secret.
            try:
                message = Secrets(error.schema, [error.raw]).scrub(message)
            except Exception:
                pass  # What came cannot be looked into.
        message = self.masked(message)
        return failure if message == failure.message else replace(failure, message=message)

    def said(self, failure: Failure, row: AttemptRow) -> str:
        """Return the message of a failed attempt as a log line shows it: ``Type: message``, in one line."""
        message = failure.message
        if self.config.redact is not None:
            try:
                message = self.trace.said(message, row, self.config.redact)
            except Exception:  # A class of the user's that cannot be shown.
                message = HIDDEN
        return one_line(typed(kind_of(failure.exception), message))

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
            final_state = spelled_out(final_state)
        spent = self.cost_tracker
        return ExecutionResult(
            self.run_id, status, final_state, self.trace, spent.total_cost_usd, spent.total_tokens, failure,
            self.hook_failures, self.unpriced, self.suspended, self.failed_items,
        )  # fmt: skip


class _Shared:
    """What a context has of its config: a default that nobody has asked for yet becomes the config's own first."""

    def __init__(self, field: str) -> None:
        self._field, self._slot = field, f"_{field}"

    def __get__(self, ctx: ReliabilityContext | None, kind: type[ReliabilityContext]) -> Any:
        if ctx is None:
            return self
        value = getattr(ctx, self._slot)
        if is_shared(self._field, value):
            value = getattr(ctx.config, self._field)
            setattr(ctx, self._slot, value)
        return value

    def __set__(self, ctx: ReliabilityContext, value: Any) -> None:
        setattr(ctx, self._slot, value)


for _field in ("budget", "policy_map", "hooks", "classifiers", "model_fallbacks"):
    setattr(ReliabilityContext, _field, _Shared(_field))
