"""The execution of a node, as its running code sees it, and the run around it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

from pydantic import BaseModel

from stroma.checkpoint import PipelineChanged, StepCall, Waiting, resolve_schema
from stroma.checkpoint.identity import StepCalls, has_input, idempotency_key, mark_of, without_attempts
from stroma.contracts.codec import describe_error
from stroma.contracts.copying import Snapshot
from stroma.contracts.node import held_by, output_class
from stroma.contracts.schema import Schema, schema_of
from stroma.cost.budget import limits
from stroma.cost.usage import Report, Usage, UsageError, check_usage, report_of, report_of_figures, shown
from stroma.failures.errors import Suspend
from stroma.failures.failure import Failure, causes
from stroma.trace.events import NO_USAGE, AttemptRow, AttemptUsage, Outcome, Schemas, TraceEvent
from stroma.trace.plain import jsonable
from stroma.trace.result import HookFailure, Question

if TYPE_CHECKING:
    from stroma.contracts.contract import Role
    from stroma.engine.context import ReliabilityContext

#: The RunningNode around this code, or None.
CURRENT: ContextVar[RunningNode | None] = ContextVar("stroma_current_node", default=None)

#: The RunningNode whose function runs here, and the id of its attempt, in a run whose events have
#: receivers.
ATTEMPT: ContextVar[tuple[RunningNode, str] | None] = ContextVar("stroma_attempt", default=None)

#: The ReliabilityContext around this code, or None.
RUN: ContextVar[ReliabilityContext | None] = ContextVar("stroma_current_run", default=None)

#: The permits of the attempts around this code, see :class:`stroma.engine.admission.Permit`.
RESERVED: ContextVar[tuple[Any, ...]] = ContextVar("stroma_reserved", default=())


class AgentRun:
    """A run of an agent in the body of a flow, whose requests and tools are steps.

    ``outer``: the run of the agent that called it.
    """

    def __init__(self, name: str, outer: AgentRun | None) -> None:
        self.name, self.outer = name, outer


#: The innermost run of an agent around this code, or None.
AGENT: ContextVar[AgentRun | None] = ContextVar("stroma_agent_run", default=None)


@contextlib.contextmanager
def running_agent(agent: AgentRun | str | None) -> Iterator[None]:
    """Have the code inside be part of an agent's run; with a name of a new one."""
    token = AGENT.set(AgentRun(agent, AGENT.get()) if isinstance(agent, str) else agent)
    try:
        yield
    finally:
        leave(token)


def leave(token: Token[Any]) -> None:
    """Restore a variable, such as the current node at the end of its execution. Never raises."""
    try:
        token.var.reset(token)
    except ValueError:
        pass  # A coroutine that was thrown away is closed in another context.


AnswerT = TypeVar("AnswerT", bound=BaseModel)
Kind = Literal["node", "group", "item"]


@dataclass(frozen=True, slots=True)
class RemainingBudget:
    """Remainder of each limit, in its unit; None without a limit. Never below 0."""

    tokens: int | None
    cost_usd: float | None
    latency_ms: float | None


class NodeExecution:
    """The execution of one node at one position; what :func:`current_node` returns.

    Attributes:
        node_id: id of the node.
        kind: "node", "group", or "item" (one element of ``map_over``).
        position: 0-based place of the node in the run; ``branch`` tells children of groups apart.
        attempt: 1-based.
        last_failure: why the previous attempt failed, or None on the first.
        usage: what this attempt used so far; complete while its end hooks run.
        ctx: the run around it, see :func:`current_run`.
        redelivered: this end event was already sent once, by a process that died.
        question: the question that is asked, in ``on_node_suspended``; None in a call for a group or node
            around it.
    """

    __slots__ = ()

    node_id: str
    kind: Kind
    position: int
    branch: str
    attempt: int
    ctx: ReliabilityContext
    last_failure: Failure | None = None
    redelivered: bool = False
    question: Question | None = None

    @property
    def _own(self) -> RunningNode:
        """The same object, with what only the engine and exporters read."""
        return cast("RunningNode", self)

    def __repr__(self) -> str:
        at = f"position {self.position}, attempt {self.attempt}"
        return f"<{self.kind} {self.node_id!r} of run {self.run_id!r}, {at}>"

    @property
    def run_id(self) -> str:
        return self.ctx.run_id

    @property
    def pipeline(self) -> str:
        """Label of metrics and spans."""
        return self.ctx.pipeline

    @property
    def outcome(self) -> Outcome | None:
        """Outcome of the attempt whose end hooks run; None before."""
        return None if self._own.ended is None else self._own.ended.outcome

    @property
    def duration_ms(self) -> float | None:
        """Duration of the function in that attempt, without hooks, waits and the store; None before its end.

        Of a group: from the first start of a function inside it to the last end of one.
        """
        return None if self._own.ended is None else self._own.ended.duration_ns / 1e6

    @property
    def function_ms(self) -> float | None:
        """Time in which functions ran in that attempt: of a group any inside it; None before its end."""
        return None if self._own.ended is None else self._own.ended.function_ns / 1e6

    @property
    def started_ns(self) -> int | None:
        """Start of that attempt's function, in ns since the epoch; None before its end."""
        return None if self._own.ended is None else self._own.ended.started_ns

    @property
    def reason(self) -> str | None:
        """Stable word for the failure of that attempt, such as "rate_limit"; None if there is none."""
        failed = None if self._own.ended is None else self._own.ended.failure
        return None if failed is None else failed.reason

    @property
    def notes(self) -> dict[Any, Any]:
        """Storage of hooks for this execution and all of its attempts; a span, say."""
        if self._own._notes is None:
            self._own._notes = {}
        return self._own._notes

    def at_end(self, callback: Callable[[], None]) -> None:
        """Register a plain function, to be called once when no attempt of this execution will follow.

        That is after the last end hook, or when a wait between two attempts is cut short. The last one added
        is called first. Its exceptions are logged and change nothing.
        """
        if self._own._at_end is None:
            self._own._at_end = []
        self._own._at_end.append(callback)

    @property
    def idempotency_key(self) -> str:
        """Key that all attempts of this node or call share in this execution of the run, in every process.

        It has 32 digits and letters, so any header, URL and provider takes it. If a node calls an effect, the
        effect's key is the same in all attempts of the node with the same input. Two stores with a run of one
        id have the same keys.
        """
        return self._own.key_of(self.branch) if self._own.effect is None else self._own.effect.key

    @property
    def usage(self) -> AttemptUsage:
        """Usage of this attempt so far: counted, and reported since. Its price comes when it ends."""
        counted, reported = self._own.counted, self._own.reported
        if reported is None:
            return counted
        output_tokens = sum(produced for _, produced, *_ in reported)
        tokens = output_tokens + sum(consumed for consumed, *_ in reported)
        named = [model for _, _, model, _ in reported if model is not None]
        return AttemptUsage(
            counted.tokens + tokens,
            counted.output_tokens + output_tokens,
            counted.cost_usd,
            named[-1] if named else counted.model,
            counted.cached_input_tokens + sum(d.cached_input_tokens for *_, d in reported if d),
            counted.cache_write_tokens + sum(d.cache_write_tokens for *_, d in reported if d),
        )

    @property
    def model(self) -> str | None:
        """Model that this attempt reported, else the fallback that is due, else None."""
        return self.usage.model or self.ctx.fallback_model()

    @property
    def remaining_budget(self) -> RemainingBudget:
        """Rest of the run's budget, without a deduction for the reported usage of this attempt."""
        rest: dict[str, float] = {}
        for dimension, limit in limits(self.ctx.budget):
            rest[dimension] = max(0.0, limit - self.ctx.cost_tracker.used(dimension))
        tokens = rest.get("tokens")
        return RemainingBudget(None if tokens is None else int(tokens), rest.get("cost"), rest.get("latency"))

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

        Takes the provider's response, or the last chunk of its stream (see :func:`stroma.usage_from`), or
        figures, of which the tokens of a cache are parts of the input. Usage that the node returns is added.
        Raises UsageError for usage that cannot be counted, and in end hooks, whose attempt is already
        counted. A response without usage counts as 0 with a warning; under a limit it fails the attempt after
        its output is stored.
        """
        if self._own.ended is not None:
            raise UsageError(
                f"node {self.node_id!r} reported usage after attempt {self.attempt} was counted; report it "
                "in the node's function or in its start hooks"
            )
        if response is not None:
            if input_tokens or output_tokens or cached_input_tokens or cache_write_tokens:
                raise UsageError(f"node {self.node_id!r} reported a response and figures; report one of them")
            self._own.note_response(response)
            try:
                report = report_of(self.node_id, response, model=model, tier=tier)
            except UsageError as error:
                if not error.silent:
                    raise
                # The answer is paid for: the node must be able to return it.
                if not self._own.counts_as_zero(error):
                    self._own.misreported = error
                report = (0, 0, model, None)
            if report is None:
                raise UsageError(
                    f"node {self.node_id!r} reported {shown(response)}; report a provider's response, or "
                    "input_tokens="
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
        if self._own.reported is None:
            self._own.reported = []
        self._own.reported.append(report)

    def emit(self, data: Any, name: str = "delta") -> None:
        """Send an event to the readers of the run: a piece of text, progress, other JSON data or a model.

        Safe to call in any thread of the node's function. Never waits, and never raises: other data is
        dropped with a warning. Events are not recorded, and those of an attempt that has ended are dropped.
        """
        if self.ctx.fire.takes_events:
            self._own.send_event(data, name)

    @property
    def signal(self) -> Any:
        """Answer to the question of this node (see Suspend), as its model; None without one.

        Plain JSON data where the model's module is not imported. Use :meth:`wait_for` to avoid this
        restriction.
        """
        answered = self._own.waiting()
        if answered is None or answered.payload is None:
            return None
        try:
            model = resolve_schema(answered.schema_ref) if answered.schema_ref else output_class(None)
        except (LookupError, TypeError):
            model = output_class(None)
        return held_by(self._read_answer(schema_of(model), answered))

    def wait_for(self, schema: type[AnswerT], *, reason: str) -> AnswerT:
        """Return a person's answer as a ``schema``: a node asks one question, in each of its attempts.

        Raises Suspend without an answer, PipelineChanged if the answer does not fit, NotImplementedError for
        a second question.
        """
        answered = self._own.waiting()
        if answered is None or answered.payload is None:
            raise Suspend(reason, schema=schema)
        if self._own.answered_attempt == self._own.attempt:
            raise NotImplementedError(
                f"node {self.node_id!r} asks a second question, and a node gets the answer to one; ask it in "
                "another node, or with flow.wait_for() in a flow"
            )
        self._own.answered_attempt = self._own.attempt
        return cast("AnswerT", self._read_answer(schema_of(schema), answered))

    def _read_answer(self, schema: Schema, answered: Waiting) -> BaseModel:
        answer = decode_answer(schema, answered)
        self.ctx.redactor.note_secrets(answer)
        return answer


class RunningNode(NodeExecution):
    """An execution as the engine, guards and exporters see it, with the state of its present attempt."""

    # Slots for attributes of every node. Attributes of few nodes are on the class until they are set, and
    # then in the __dict__: reading them there takes ten times as long.
    __slots__ = (
        "__dict__",
        "_at_end",
        "attempt",
        "branch",
        "children",
        "counted",
        "ctx",
        "effect",
        "ended",
        "group",
        "kind",
        "node_id",
        "parent",
        "position",
        "reported",
        "rows",
        "schemas",
        "step",
    )

    #: Clock of a group, which runs while a function inside it runs: the number of running functions, the
    #: start of the period, and ns before it; the start of the first function and the end of the last one.
    running: int = 0
    running_since: int = 0
    busy_ns: int = 0
    first_ns: int = 0
    last_ns: int = 0
    #: The snapshot of its input, for messages of steps that its code calls; only with a ``redact``.
    input_snapshot: Snapshot = ()
    #: The input of a group, which its children may have as well, and the snapshot of it.
    taken: tuple[BaseModel, Snapshot] | None = None
    #: Outputs of its children are stored for another attempt; a map may have too many for that.
    remembers: bool = True
    #: Attempts that were granted to repair an output that broke its contract, and if the next one is.
    repairs: int = 0
    repairing: bool = False
    #: No further attempt may follow a failure, whatever its policy says.
    is_final: bool = False
    #: Fault of a reported response, if it fails the attempt once the output is committed.
    misreported: UsageError | None = None
    #: Its role for the framework that calls it; None for any other node.
    framework_role: Role | None = None
    #: Code calls it through a guard, in the context of the caller: the span that is current there is the one
    #: around it.
    is_called: bool = False
    #: See Place.
    settles: bool = False
    #: Its call at a place, an OpenCall of stroma.engine.placed_calls.
    placed_call: Any = None
    #: Its timer, an IdleTimer of stroma.engine.deadlines, while its function runs under an idle limit.
    idle_timer: Any = None
    #: Id of the present attempt, in a run whose events have receivers.
    attempt_id: str | None = None
    #: Number of an attempt, and the exceptions that executions inside of it ended with.
    raised_inside: tuple[int, list[BaseException]] | None = None
    #: Number of the attempt that got the answer to the question of the node.
    answered_attempt: int = 0
    #: The last response of a provider that was reported, with the attempt that reported it.
    response: tuple[int, Any] = (0, None)
    _notes: dict[Any, Any] | None = None
    _calls: StepCalls | None = None

    def __init__(
        self,
        ctx: ReliabilityContext,
        node_id: str,
        kind: Kind,
        position: int,
        branch: str,
        parent: RunningNode | None = None,
    ) -> None:
        self.ctx = ctx
        self.node_id = node_id
        self.kind = kind
        self.position = position
        self.branch = branch
        #: Where the engine puts the events of this execution: the trace, or the rows of the group around it.
        self.rows: list[AttemptRow | TraceEvent] = (
            ctx.trace.rows if parent is None or parent.children is None else parent.children
        )
        #: The group around it, and its id.
        self.parent = parent
        self.group = None if parent is None else parent.node_id
        self.attempt = 0
        self.counted: AttemptUsage = NO_USAGE
        #: What reads the snapshots in its rows.
        self.schemas: Schemas | None = None
        #: Number of this call of its step id, outside of any pipeline.
        self.step: StepCall | None = None
        #: The row of the attempt that has just ended, while its hooks run.
        self.ended: AttemptRow | None = None
        #: Its calls, an Effect of stroma.engine.effects, once it is known to be one.
        self.effect: Any = None
        #: Where the children of a group put their events.
        self.children: list[AttemptRow | TraceEvent] | None = None
        #: What was reported and is not counted yet.
        self.reported: list[Report] | None = None
        self._at_end: list[Callable[[], None]] | None = None

    @property
    def calls(self) -> StepCalls:
        """Steps that code calls inside of the present attempt."""
        calls = self._calls
        if calls is None or calls.attempt != self.attempt:
            calls = self._calls = StepCalls(self.attempt)
            self.start_children()
        return calls

    def with_outer(self) -> Iterator[RunningNode]:
        """Yield this node and what is around it, the innermost first."""
        around: RunningNode | None = self
        while around is not None:
            yield around
            around = around.parent

    def start_children(self) -> None:
        """Begin an attempt with children: they have rows and a clock of their own."""
        self.children, self.busy_ns, self.running, self.first_ns, self.last_ns = [], 0, 0, 0, 0

    def branch_of(self, identity: str) -> str:
        """Return the branch of a step that is called inside of the present attempt."""
        attempts = [self.attempt]
        above = self.parent
        while above is not None and above.kind == "group":
            attempts.append(above.attempt)
            above = above.parent
        while attempts and attempts[-1] == 1:
            attempts.pop()
        # Another attempt calls its steps again, and does not restore what the one before recorded.
        called = f"{'-'.join(map(str, attempts))}:{identity}" if attempts else identity
        return f"{self.branch}.{called}" if self.branch else called

    def note_raised(self, error: BaseException) -> None:
        """Record the exception that an execution inside of the present attempt ended with."""
        if self.raised_inside is None or self.raised_inside[0] != self.attempt:
            self.raised_inside = self.attempt, []
        self.raised_inside[1].append(error)

    def raised_itself(self, error: BaseException) -> bool:
        """Return False if an execution inside of the present attempt ended with an exception.

        Also if it ended with the cause of the exception, or one that was being handled.
        """
        attempt, inner = self.raised_inside or (0, [])
        known = set(map(id, inner)) if attempt == self.attempt else set()
        return not known or not any(id(cause) in known for cause in causes(error))

    def marked(self, failure: Failure) -> Failure:
        """Return the failure that stops the node, with the mark of its attempt unless it has a child's."""
        row = self.ended
        if row is None or failure.mark is not None:
            return failure
        place = row.position, row.started_ns, row.attempt, row.branch
        return replace(failure, mark=mark_of(self.ctx.session.epoch, *place))

    def enter(self, now: int) -> None:
        """Note that a function inside this group begins."""
        if self.running == 0:
            self.running_since = now
            self.first_ns = self.first_ns or now
        self.running += 1
        if self.parent is not None:
            self.parent.enter(now)

    def leave(self, now: int) -> None:
        """Note that a function inside this group has ended."""
        self.running -= 1
        if self.running == 0:
            self.busy_ns += now - self.running_since
            self.last_ns = now
        if self.parent is not None:
            self.parent.leave(now)

    def busy(self, now: int) -> int:
        """Return for how many ns functions of the outermost group around this ran in its present attempt."""
        outer = self
        while outer.parent is not None:
            outer = outer.parent
        return outer.busy_ns + (now - outer.running_since if outer.running else 0)

    @property
    def role(self) -> Role | None:
        """Role in traces: that of its contract, else of its framework, else None."""
        contract = self.ctx.registry.find(self.node_id) if self.schemas is None else self.schemas[2]
        return getattr(contract, "role", None) or self.framework_role

    @property
    def agent(self) -> str | None:
        """Name of the innermost agent around it, which is itself if it is one; None outside of agents."""
        for node in self.with_outer():
            if node.role == "agent":
                return node.node_id
        around = AGENT.get()
        return None if around is None else around.name

    def close(self) -> None:
        """Call the callbacks of :meth:`at_end`. Never raises."""
        callbacks, self._at_end = self._at_end or [], None
        if self.ended is None and self.last_failure is not None:
            self.attempt = self.last_failure.attempt  # The next one was not made.
        for callback in reversed(callbacks):
            try:
                callback()
            except Exception as error:
                shown = self.ctx.redactor.mask_error(error)
                self.ctx.run_logger.exception(
                    "at_end (%r) raised for node %r", callback, self.node_id, exc_info=shown
                )
                self.ctx.account.hook_failures.append(HookFailure("at_end", self.node_id, error))
                self.ctx.fire.count_failure(self.ctx, "at_end")

    def key_of(self, branch: str) -> str:
        """Return the idempotency key of a branch of this execution."""
        ctx, outermost = self.ctx, self
        while outermost.parent is not None:
            outermost = outermost.parent
        step = outermost.step
        # A step of plain code is identified by its call: its position depends on the records before it.
        at = outermost.position if step is None or step.identity is None else step.identity
        return idempotency_key(ctx.run_id, ctx.execution, at, branch)

    def identify_attempt(self) -> str:
        """Return the id of the present attempt: unique in the run, also over the processes that resume it."""
        if self.attempt_id is None:
            self.ctx.journal.attempt_count += 1
            self.attempt_id = f"{self.ctx.session.epoch}-{self.ctx.journal.attempt_count}"
        return self.attempt_id

    def send_event(self, data: Any, name: str) -> None:
        """Renew idle limits, and hand an event to the receivers of the run as JSON data."""
        ctx, mark = self.ctx, ATTEMPT.get()
        attempt_id = self.attempt_id if mark is None or mark[0] is not self else mark[1]
        if attempt_id is None or attempt_id != self.attempt_id or self.ended is not None:
            return
        for around in self.with_outer():
            if around.idle_timer is not None:
                around.idle_timer.renew()
        if not ctx.fire.receivers:
            return
        try:
            plain = _to_json(data)
            if ctx.redactor.is_on:
                shown = ctx.redactor.redact_state({name: plain})
                plain = _to_json(shown.get(name, shown))
        except Exception as error:
            kind = str(error) if type(error) is _NotJson else type(data).__name__
            ctx.warn_once(
                self.node_id,
                f"emits {kind}",
                f"node {self.node_id!r} emitted data that is not JSON, of type {kind}: it is dropped; "
                "emit JSON data or a pydantic model",
            )
            return
        for receiver in ctx.fire.receivers:
            receiver.emit(self, attempt_id, name, plain)

    def note_response(self, response: object) -> None:
        """Store a response of this attempt for exporters that show answers; figures alone have none."""
        if type(response) is not Usage:
            self.response = self.attempt, response

    def counts_as_zero(self, error: UsageError) -> bool:
        """Return True, with a warning, if usage that a response leaves out is 0: no limit depends on it."""
        ctx = self.ctx
        limited = ctx.has_limit("tokens", self.node_id) or ctx.has_limit("cost", self.node_id)
        if not error.silent or limited or ctx.config.unknown_model == "error":
            return False
        ctx.warn_once(self.node_id, "silent", f"{error}. It counts as 0 tokens")
        return True

    def waiting(self) -> Waiting | None:
        """Return the question of this node, open or answered.

        A step with the same input in another attempt of the nodes around it has the same question.
        """
        waiting, branch = self.ctx.session.waiting, self.branch
        own = waiting.get((self.position, branch))
        if own is None and waiting and has_input(branch):
            same = self.position, without_attempts(branch)
            own = next(
                (one for one in waiting.values() if (one.position, without_attempts(one.branch)) == same),
                None,
            )
        return None if own is None or own.effect is not None else own


async def mark_attempt(run: RunningNode, awaitable: Awaitable[Any]) -> Any:
    """Await a function with the id of its attempt in its context, so that code after it emits nothing."""
    token = ATTEMPT.set((run, run.identify_attempt()))
    try:
        return await awaitable
    finally:
        leave(token)
        del run, token  # This frame is in the traceback of what is raised: as in NodeAttempt.make().


class _NotJson(TypeError):
    """The name of a type that JSON has no form for."""


def _to_json(data: Any) -> Any:
    """Return a copy of data as JSON has it. Raises an exception for data that JSON cannot hold."""
    return data if type(data) is str else json.loads(_ENCODER.encode(data))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return jsonable(schema_of(type(value)).state(value))
    raise _NotJson(type(value).__name__)


_ENCODER: Final = json.JSONEncoder(allow_nan=False, default=_plain)


def decode_answer(schema: Schema, answered: Waiting) -> BaseModel:
    """Return an accepted answer as a model. Raises PipelineChanged if it no longer fits; it stays."""
    assert answered.payload is not None
    try:
        return schema.decode(answered.payload)
    except ValueError as error:
        why, cause = describe_error(error)
        raise PipelineChanged(
            f"the accepted answer to question {answered.id!r} of {answered.node_id!r} is not a "
            f"{schema.model.__name__}: {why}; restore a class that accepts it"
        ) from cause


def current_node() -> NodeExecution:
    """Return the execution of the node around this code. Raises RuntimeError outside of nodes."""
    node = CURRENT.get()
    if node is None:
        raise RuntimeError(
            "no node is running here; call current_node() in a node's function or in a hook of a node, and "
            "current_node_or_none() in code that also runs elsewhere"
        )
    return node


def current_node_or_none() -> NodeExecution | None:
    """Return the execution of the node around this code, or None: for code that also runs elsewhere."""
    return CURRENT.get()


def current_run() -> ReliabilityContext | None:
    """Return the run around this code: inside a node's function and in all hooks, elsewhere None."""
    node = CURRENT.get()
    return RUN.get() if node is None else node.ctx
