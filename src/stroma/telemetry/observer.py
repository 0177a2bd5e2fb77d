"""Base of the exporters: hooks with their run and node, whose exceptions never change a run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from time import monotonic, perf_counter, time_ns
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, TypeVar
from urllib.parse import unquote

from stroma._utils.logs import get_logger
from stroma.checkpoint.identity import is_called
from stroma.checkpoint.queue import QueueReading
from stroma.engine import tasks
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import AGENT, CURRENT, AgentRun, RunningNode, current_run
from stroma.failures.classes import FailureClass
from stroma.hooks.sets import NodeHooks
from stroma.trace.events import Outcome
from stroma.trace.result import ExecutionResult, RunStatus

#: Left for closing, however long sending took.
_CLOSING_SECONDS: Final = 0.1
#: True while log_hooks writes, so that an exporter of logs can skip events that its hooks have received.
WRITING: Final[ContextVar[bool]] = ContextVar("stroma_writing", default=False)

#: By the key of an exporter: its record of the run whose code this is. A coroutine that is closed from
#: elsewhere has left its context behind, which this tells.
_HERE: Final[ContextVar[Mapping[int, Any]]] = ContextVar("stroma_here", default=MappingProxyType({}))

T = TypeVar("T")
logger = get_logger("stroma.telemetry")


class AttemptEnd(NamedTuple):
    """End of an attempt."""

    outcome: Outcome
    error: BaseException | None = None
    failure_class: FailureClass | None = None
    output: dict[str, Any] | None = None
    reason: str | None = None
    message: str | None = None  # As the journal has it.

    @property
    def class_name(self) -> str:
        return "" if self.failure_class is None else self.failure_class.value

    @classmethod
    def finally_(cls, result: ExecutionResult) -> AttemptEnd | None:
        """Return the failure that ended a run; None if it completed, is suspended, or was cancelled."""
        failed = result.failure
        if failed is None or result.status not in (RunStatus.FAILED, RunStatus.PARTIAL):
            return None
        return cls(
            "failure", failed.exception, failed.failure_class, reason=failed.reason, message=failed.message
        )


#: The end of a node whose retry does not follow: its last failure was not final.
CUT_SHORT: Final = AttemptEnd("cancelled")


def waits_since(node: RunningNode, key: object) -> None:
    """Record that an attempt begins to wait, or continues to wait for another reason."""
    node.notes.setdefault((key, "waits"), perf_counter())


def waited_seconds(node: RunningNode, key: object) -> float:
    """Return for how long all attempts of a node have waited, when one of them begins; 0 if none has."""
    notes = node._notes
    if not notes:
        return 0.0
    since = notes.pop((key, "waits"), None)
    if since is not None:
        notes[key, "waited"] = notes.get((key, "waited"), 0.0) + perf_counter() - since
    return float(notes.get((key, "waited"), 0.0))


def redelivered_end_ns(node: RunningNode) -> int | None:
    """Return the end of an attempt of a killed process that is reported now, in ns since the epoch, or None.

    Its failure is not final: the node may have been retried since, and the end of the run says what was.
    """
    if not node.redelivered or node.started_ns is None:
        return None
    return node.started_ns + int((node.duration_ms or 0.0) * 1e6)


def is_returned(run: ReliabilityContext) -> bool:
    """Return True if a run only returns a stored result, which was counted when it ran."""
    return run.session.finished is not None


class FlowPart(NamedTuple):
    """A part of a flow: a flow or pipeline inside it, a map, or a run of an agent. It calls no hooks.

    Places of steps tell the first two, and the context of a step its agent.

    Attributes:
        branch: the place of its call; of an agent the place around its first step.
        name: the flow or pipeline, or the node that a map runs; of a call with a key the key; the agent.
        place: tells it from all others of its run, in each process: the branch; for an agent its first step,
            and the number of agents around it.
    """

    branch: str
    name: str
    kind: Literal["flow", "map", "agent"]
    place: str
    #: Of a part that a killed process began: the start of its first step that is restored.
    start_ns: int | None = None

    @property
    def operation(self) -> dict[str, str]:
        """Names of the conventions; {} for a map."""
        operation = {"flow": "invoke_workflow", "agent": "invoke_agent"}.get(self.kind)
        return {"gen_ai.operation.name": operation, "gen_ai.agent.name": self.name} if operation else {}


def place_key(node: RunningNode) -> str:
    """Return a text that tells a node from all others of its run; attempts of a node are one place."""
    key, around = f"{node.position}.{node.branch}:{node.node_id}", node.parent
    while around is not None:
        key += f"<{around.position}.{around.branch}#{around.attempt}"
        around = around.parent
    return key


def span_id_at(trace_id: int | str, root_id: int | str, place: str) -> int:
    """Return the id of the span at a place of a run, by the ids of the run's span.

    A killed process has sent spans whose group, flow, map or agent it could not end. The process that resumes
    the run gives these the same ids.
    """
    return int.from_bytes(blake2b(f"{trace_id}:{root_id}:{place}".encode(), digest_size=8).digest()) or 1


def _is_map(place: str) -> bool:
    return place.rpartition(".")[2].rpartition("/")[2].startswith("*")


def _parts_of(branch: str) -> Iterator[tuple[str | AgentRun, FlowPart]]:
    """Yield the parts of a flow around a step here, the innermost first, by what identifies each."""
    agents = []
    agent = AGENT.get()
    while agent is not None:
        agents.append(agent)
        agent = agent.outer
    for depth, agent in reversed(list(enumerate(reversed(agents)))):
        yield agent, FlowPart(branch.rpartition(".")[0], agent.name, "agent", f"{branch}<{depth}")
    while is_called(outer := branch.rpartition(".")[0]):
        # "{task}/{kind}{name}#{number or key}", and "@{input}" behind it where that is in the identity.
        call = outer.rpartition(".")[2].rpartition("/")[2].partition("@")[0]
        name, _, number = call.partition("#")
        kind: Literal["flow", "map"] = "map" if name.startswith("*") else "flow"
        yield outer, FlowPart(outer, unquote(name.removeprefix("*") or number), kind, outer)
        branch = outer


class Observer:
    """Base of the exporters. Each overrides the events that it needs; no hook is set for the others.

    Methods are called in the task of their run or node, cannot await, and are not called again for nodes that
    were restored from the journal.
    """

    #: The system, in messages and errors.
    name = "telemetry"
    #: The system, in recorded trace contexts.
    system = ""

    def __init__(self) -> None:
        #: Count of exceptions in the exporter, by kind.
        self.errors: Counter[str] = Counter()
        self._has_node_end = self._is_overridden("node_ended")
        #: Key in the notes of nodes whose end is watched.
        self._watched_key = object()

    @property
    def destination(self) -> object:
        """The destination of the data. Of two exporters in one run with the same one, the first is called."""
        return self

    def take_settings_of(self, other: Observer) -> None:
        """Send as much of states and messages as another exporter for the same system does."""
        for name in ("_content", "_own_spans", "_service"):
            if hasattr(other, name):
                setattr(self, name, getattr(other, name))

    def is_connected(self) -> bool:
        """Return True if the data is sent anywhere."""
        return True

    def ignores(self, event: str) -> bool:
        """Return True for a hook that a run which begins now need not call."""
        return False

    # ------------------------------------------------------------------ to override

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        """Handle a run that is open in its store, before its first node."""

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        """Handle the end of a run, whatever its status."""

    def attempt_started(self, node: RunningNode, state: dict[str, Any]) -> None:
        """Handle an attempt before its function is called. Input that violates its contract has no start."""

    def attempt_ended(self, node: RunningNode, ended: AttemptEnd) -> None:
        """Handle an attempt that is in the trace; ``node.usage`` and ``node.duration_ms`` are final."""

    def node_ended(self, node: RunningNode) -> None:
        """Handle a node that gets no further attempt. Not called for a node without an attempt."""

    def part_started(self, run: ReliabilityContext, part: FlowPart, around: Any) -> Any:
        """Return the note for a part of a flow inside the note ``around``; None without spans."""
        return None

    def retrying(
        self, node: RunningNode, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        """Handle a retry, before the wait for attempt number ``attempt``."""

    def skipped(self, node: RunningNode) -> None:
        """Handle a node whose output was restored from the journal."""

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        """Handle the use of 80 % of a limit."""

    def waiting(self, node: RunningNode, reason: str, seconds: float) -> None:
        """Handle an attempt that is queued for a limit; 0 seconds if the time is unknown."""

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        """Handle a circuit of a host or limit that becomes "open", "half_open" or "closed"."""

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        """Handle a limit that a call of the run has closed for some seconds, as its provider asked."""

    def hook_raised(self, run: ReliabilityContext | None, hook: str) -> None:
        """Handle an exception of a hook of any set; ``run`` is None where no run is known."""

    def queue_read(self, pipeline: str, figures: QueueReading | None) -> None:
        """Handle the figures of a queue that a worker of this process has read; None when it stops."""

    def flush(self, timeout_seconds: float) -> bool:
        """Send what is queued, blocking; return True if all of it was sent. Called in a thread."""
        return True

    def close(self) -> None:
        """Close what the exporter opened itself. Called in a thread, after flush()."""

    # ------------------------------------------------------------------ hooks

    def around(self, node: RunningNode) -> Any:
        """Return our note for the nearest group or part of a flow around a node, else for its run.

        Not the current span: the task of a child may have been created inside the span of its sibling. Only a
        step that code calls through a guard (``node.is_called``) is under the span that is current there, if
        that is of the same trace.
        """
        branch, parent = node.branch, node.parent
        while parent is not None:
            note = parent.notes.get(self)
            if note is not None:
                return note
            branch, parent = parent.branch if parent.node_id else branch, parent.parent
        of_run = node.ctx.notes.get(self)
        if of_run is None or not branch:
            return of_run
        return self._parts_around(node.ctx, branch, of_run)

    def lost_root(self, run: ReliabilityContext) -> tuple[str, int] | None:
        """Return the ids of the root that a killed process of a run could not end, and its start in ns.

        The process that resumes the run writes it, so that what both have sent is one tree.
        """
        trace, start_ms = run.first_trace(self.system), run.session.lost_start_ms
        return None if trace is None or start_ms is None else (trace, start_ms * 1_000_000)

    def begin_lost_parts(self, node: RunningNode) -> None:
        """Begin the parts of a flow around a restored step, if a killed process could not end them."""
        of_run = node.ctx.notes.get(self)
        lost, branch = self.lost_root(node.ctx), node.branch
        if of_run is None or not branch or lost is None:
            return
        began_ns, ended_ns = node.ctx.session.lost_times.get((node.position, branch), (lost[1], 0))
        # Of a child of a group, the parts around the group.
        while branch.rpartition(".")[2].isdecimal() and not _is_map(branch.rpartition(".")[0]):
            branch = branch.rpartition(".")[0]
        self._parts_around(node.ctx, branch, of_run, began_ns)
        self._end_parts_around(node.ctx, branch, ended_ns)

    def _parts_around(
        self, run: ReliabilityContext, branch: str, of_run: Any, start_ns: int | None = None
    ) -> Any:
        """Return the note for the innermost part of a flow around a step here; of the run without any.

        A part is begun by its first step.
        """
        parts: dict[str | AgentRun, list[Any]] = run.notes.setdefault((self, "parts"), {})
        known = parts.get(AGENT.get() or branch.rpartition(".")[0])
        if known is not None and known[0] is not None:
            return known[0]
        note = of_run
        for key, part in reversed(list(_parts_of(branch))):
            if key not in parts:
                parts[key] = [self.part_started(run, part._replace(start_ns=start_ns), note), 0]
            note = parts[key][0] or note
        return note

    def ended_parts(self, run: ReliabilityContext) -> list[tuple[Any, int]]:
        """Return the notes for the parts of a flow that ends, innermost first, and the ends of their steps.

        That is in ns since the epoch. A part calls no hook at its end.
        """
        parts = run.notes.pop((self, "parts"), {})
        return [(note, ended_ns) for note, ended_ns in reversed(parts.values()) if note is not None]

    def hooks(self) -> ExporterHooks:
        """Return the set of hooks that calls this exporter, without those of methods that it leaves out."""
        ends = self._is_overridden("attempt_ended") or self._has_node_end
        starts = self._is_overridden("attempt_started") or self._has_node_end
        return ExporterHooks(
            on_node_start=self._node_start if starts else None,
            on_node_success=self._node_success if ends else None,
            on_node_failure=self._node_failure if ends else None,
            on_node_cancelled=self._node_cancelled if ends else None,
            on_node_suspended=self._node_suspended if ends else None,
            on_run_start=self._hook("on_run_start", "run_started", current_run, 2),
            on_run_end=self._hook("on_run_end", "run_ended", current_run, 1),
            on_node_retry=self._hook("on_node_retry", "retrying", CURRENT.get, 2),
            on_node_skipped=self._hook("on_node_skipped", "skipped", CURRENT.get, 3),
            on_budget_warning=self._hook("on_budget_warning", "budget_warning", current_run, 1),
            on_node_wait=self._hook("on_node_wait", "waiting", CURRENT.get, 2),
            on_circuit_change=self._hook("on_circuit_change", "circuit_changed", current_run, 1),
            on_limit_cooldown=self._hook("on_limit_cooldown", "limit_cooled_down", current_run, 1),
            reads_state=False,
            exporter=self,
        )

    def _is_overridden(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Observer, method)

    def _hook(self, event: str, method: str, subject: Callable[[], Any], ids: int) -> Any:
        """Return a hook that calls a method with the current run or node, which ``ids`` arguments name."""
        if not self._is_overridden(method):
            return None
        call = getattr(self, method)

        async def hook(*arguments: Any) -> None:
            self._safely(event, call, subject(), *arguments[ids:])

        return hook

    async def _node_start(self, _run_id: str, _node_id: str, state: dict[str, Any]) -> None:
        node = CURRENT.get()
        if self._has_node_end:
            self._watch_end(node)
        self._safely("on_node_start", self.attempt_started, node, state)

    async def _node_success(self, _run_id: str, _node_id: str, output: dict[str, Any], _tokens: int) -> None:
        self._ended("on_node_success", AttemptEnd("success", output=output))

    async def _node_failure(
        self, _run_id: str, _node_id: str, exc: Exception, failure_class: FailureClass
    ) -> None:
        node = CURRENT.get()
        row = None if node is None else node.ended
        _, message, reason, _ = (
            (None, None, None, None) if row is None or row.failure is None else row.failure
        )
        ended = AttemptEnd("failure", exc, failure_class, reason=reason, message=message)
        self._ended("on_node_failure", ended)

    async def _node_cancelled(self, _run_id: str, _node_id: str) -> None:
        self._ended("on_node_cancelled", AttemptEnd("cancelled"))

    async def _node_suspended(self, _run_id: str, _node_id: str, _reason: str) -> None:
        node = CURRENT.get()
        if node is None or node.ended is not None:  # A question of a flow has no attempt.
            self._ended("on_node_suspended", AttemptEnd("suspended"))

    # ------------------------------------------------------------------ what is current

    def enter(self, record: object) -> Token[Any]:
        """Make a record that of the run here, for exporters with the same key, until :meth:`leave`."""
        return _HERE.set({**_HERE.get(), self._here_key: record})

    def here(self) -> Any:
        """Return the record of the nearest run that an exporter with this key has entered, or None."""
        return _HERE.get().get(self._here_key)

    def leave(self, token: Token[Any]) -> None:
        """Undo :meth:`enter`. Call it only where :meth:`here` is that record."""
        _HERE.reset(token)

    @property
    def _here_key(self) -> int:
        return id(self)

    def _ended(self, event: str, ended: AttemptEnd) -> None:
        node = CURRENT.get()
        # An end without a start: a violated input contract, or a hook call that is redelivered.
        if self._has_node_end:
            self._watch_end(node)
        self._safely(event, self.attempt_ended, node, ended)

    def _count_hook_error(self, run: ReliabilityContext | None, hook: str) -> None:
        if type(self).hook_raised is not Observer.hook_raised:
            self._safely("hook_raised", self.hook_raised, current_run() if run is None else run, hook)

    def _watch_end(self, node: RunningNode | None) -> None:
        if node is not None and self._watched_key not in node.notes:
            node.notes[self._watched_key] = True
            node.at_end(lambda: self._safely("at_end", self._end_node, node))

    def _end_node(self, node: RunningNode) -> None:
        self.node_ended(node)
        self._end_parts_around(node.ctx, node.branch, time_ns())

    def _end_parts_around(self, run: ReliabilityContext, branch: str, ended_ns: int) -> None:
        """Note the end of a step for the parts of a flow around it; the last one is theirs."""
        parts: dict[str | AgentRun, list[Any]] | None = run.notes.get((self, "parts"))
        for key, _ in _parts_of(branch) if parts else ():
            if parts and key in parts:
                parts[key][1] = max(parts[key][1], ended_ns)

    def _safely(self, event: str, call: Callable[..., None], about: Any, *arguments: Any) -> None:
        """Call a method; count its exceptions and log one of each kind: a dead backend always fails."""
        try:
            if about is not None:  # A hook that is called directly has no run.
                call(about, *arguments)
        except Exception as error:
            kind = f"{event}: {type(error).__name__}"
            self.errors[kind] += 1
            if self.errors[kind] == 1:
                run = about if isinstance(about, ReliabilityContext) else getattr(about, "ctx", None)
                logger.exception(
                    "%s: %s raised; the run continues, and further exceptions of this kind are only "
                    "counted (hooks.errors)",
                    self.name,
                    event,
                    exc_info=error if run is None else run.redactor.mask_error(error),
                )


@dataclass
class ExporterHooks(NodeHooks):
    """The hooks of an exporter; compose them with others by ``|``.

    Attributes:
        exporter: the receiver of their calls.
    """

    exporter: Observer = field(kw_only=True, repr=False)

    @property
    def queue_reader(self) -> Callable[[str, QueueReading | None], None] | None:
        """Return the function that takes figures of a worker's queues and never raises; None without one."""
        if type(self.exporter).queue_read is Observer.queue_read:
            return None
        return partial(self.exporter._safely, "queue_read", self.exporter.queue_read)

    def hook_raised(self, run: Any, event: str) -> None:
        """Have the exporter count an exception of a hook of any set. Never raises."""
        self.exporter._count_hook_error(run, event)

    def _hook_of(self, event: str) -> Any:
        """Return the hook of an event that a run which begins now calls, or None."""
        return None if self.exporter.ignores(event) else getattr(self, event)

    @property
    def errors(self) -> Counter[str]:
        """Count of the exceptions of the exporter, by kind; none of them has changed a run."""
        return self.exporter.errors

    async def flush(self, *, timeout_seconds: float = 5.0) -> bool:
        """Send what is queued; return True if all of it was sent in time. Never raises."""
        sent = await self._within(timeout_seconds, lambda: self.exporter.flush(timeout_seconds))
        if sent is None:
            logger.warning("%s: not everything was sent within %g s", self.exporter.name, timeout_seconds)
        return bool(sent)

    async def aclose(self, *, timeout_seconds: float = 5.0) -> bool:
        """Flush, and close what the exporter opened itself (not what was passed to it)."""
        deadline = monotonic() + timeout_seconds
        sent = await self.flush(timeout_seconds=timeout_seconds)
        # Also when the time is used up: closing takes almost none, unless something is wrong.
        closed = await self._within(max(_CLOSING_SECONDS, deadline - monotonic()), self._close)
        return sent and bool(closed)

    def _close(self) -> bool:
        self.exporter.close()
        return True

    async def _within(self, seconds: float, work: Callable[[], bool]) -> bool | None:
        """Return the result of blocking work; None if it took longer."""

        def safely() -> bool:
            done = [False]
            self.exporter._safely("flush", lambda _: done.append(work()), self)
            return done[-1]

        # A daemon thread: one that hangs blocks neither the loop nor the end of the process.
        pending: Awaitable[Any] = tasks.in_thread(safely, ())
        try:
            return bool(await asyncio.wait_for(pending, seconds))
        except TimeoutError:
            return None
