"""What all exporters share: hooks that know which run and node they are about, and that cannot do any harm."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any, Final, TypeVar

from stroma.cost.budget import BudgetExceeded
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution, current_node, current_run
from stroma.engine.tasks import in_thread
from stroma.failures.classes import FailureClass
from stroma.hooks.sets import NodeHooks
from stroma.trace.events import Outcome
from stroma.trace.result import ExecutionResult, RunStatus

__all__ = [
    "CUT_SHORT",
    "NODE_BUCKETS",
    "WRITING",
    "Ended",
    "ExporterHooks",
    "ModelLabels",
    "Observer",
    "exceeded",
    "is_returned",
    "missing",
    "seconds_elsewhere",
    "sound",
]

#: Seconds: from a quick function to a model that thinks for minutes.
NODE_BUCKETS: Final = tuple(0.01 * 2**n for n in range(16))

#: At least, whatever sending took.
_CLOSING_SECONDS: Final = 0.1
#: True while log_hooks writes: an exporter that listens to logs has been told of that event by its own hooks.
WRITING: Final[ContextVar[bool]] = ContextVar("stroma_writing", default=False)

#: Different models that one exporter labels its metrics with; what comes after them is "other".
_MOST_MODELS: Final = 200
_LONGEST_MODEL: Final = 100  # characters

T = TypeVar("T")
logger = logging.getLogger("stroma.telemetry")


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended."""

    outcome: Outcome
    error: BaseException | None = None
    failure_class: FailureClass | None = None
    output: dict[str, Any] | None = None
    reason: str | None = None

    @property
    def class_name(self) -> str:
        return "" if self.failure_class is None else self.failure_class.value

    @classmethod
    def finally_(cls, result: ExecutionResult) -> Ended | None:
        """The failure that ended a run; None if it completed, waits, or was told to stop."""
        failed = result.failure
        if failed is None or result.status not in (RunStatus.FAILED, RunStatus.PARTIAL):
            return None
        return cls("failure", failed.exception, failed.failure_class, reason=failed.reason)


#: What has become of a node that is about to be tried again, if nothing follows: no failure is final then.
CUT_SHORT: Final = Ended("cancelled")


def is_returned(run: ReliabilityContext) -> bool:
    """Return whether a run is only looked at for its result: whoever ran it has counted it."""
    return run.session.finished is not None


def exceeded(result: ExecutionResult) -> str | None:
    """The dimension of the budget that ended a run, or None."""
    error = None if result.failure is None else result.failure.exception
    return error.dimension if isinstance(error, BudgetExceeded) else None


def seconds_elsewhere(result: ExecutionResult) -> float:
    """For how long a run that began in another process has been under way: since its first attempt."""
    first = next(iter(result.trace), None)
    return 0.0 if first is None else max(0.0, time() - first.timestamp_utc.timestamp())


class Observer:
    """Base of the exporters. Each overrides what it wants to see; hooks exist for nothing else.

    All of it is called in the task of the run or node that it is about, none of it awaits, and none of it is called
    again for nodes that were restored from the journal.
    """

    #: The system, in messages and errors.
    name = "telemetry"

    def __init__(self) -> None:
        #: What went wrong in here, by kind. It has changed nothing else.
        self.errors: Counter[str] = Counter()

    @property
    def destination(self) -> object:
        """What it feeds. Of two exporters in one run that feed the same, only the first one is called."""
        return self

    def take_settings_of(self, other: Observer) -> None:
        """Send as much of states and messages as another exporter for the same system does."""
        for name in ("_content", "_own_spans", "_service"):
            if hasattr(other, name):
                setattr(self, name, getattr(other, name))

    def is_connected(self) -> bool:
        """Return whether what it is called with goes anywhere."""
        return True

    # ------------------------------------------------------------------ to override

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        """The run is open in its store, nothing has run yet."""

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        """Whichever way it ended."""

    def attempt_started(self, node: NodeExecution, state: dict[str, Any]) -> None:
        """The function is about to be called. Input that breaks its contract is an end without a start."""

    def attempt_ended(self, node: NodeExecution, ended: Ended) -> None:
        """The attempt is in the trace; ``node.usage`` and ``node.duration_ms`` are final."""

    def node_ended(self, node: NodeExecution) -> None:
        """No attempt follows. Not called if there was none."""

    def retrying(
        self, node: NodeExecution, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        """Attempt number ``attempt`` follows."""

    def skipped(self, node: NodeExecution) -> None:
        """The output was restored from the journal."""

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        """80 % of a limit are used."""

    def waiting(self, node: NodeExecution, reason: str, seconds: float) -> None:
        """An attempt begins to wait for its turn; 0 seconds where nobody can tell how long."""

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        """The circuit of a provider's host, or of a limit, has become "open", "half_open" or "closed"."""

    def flush(self, timeout_seconds: float) -> bool:
        """Send what is queued, blocking; whether all of it was sent. Called in a thread."""
        return True

    def close(self) -> None:
        """Give up what was opened in here. Called in a thread, after flush()."""

    # ------------------------------------------------------------------ hooks

    def around(self, node: NodeExecution) -> Any:
        """What this exporter has noted for the nearest group around a node, else for its run; None without either.

        Not whatever is current: the task of a child was made where its neighbour's span may have been.
        """
        parent = node.parent
        while parent is not None:
            found = parent.notes.get(self)
            if found is not None:
                return found
            parent = parent.parent
        return node.ctx.notes.get(self)

    def hooks(self) -> ExporterHooks:
        """The set of hooks that feeds this exporter."""

        async def on_run_start(_run_id: str, _pipeline: str, state: dict[str, Any]) -> None:
            self._safely("on_run_start", self.run_started, current_run(), state)

        async def on_run_end(_run_id: str, result: ExecutionResult) -> None:
            self._safely("on_run_end", self.run_ended, current_run(), result)

        async def on_node_start(_run_id: str, _node_id: str, state: dict[str, Any]) -> None:
            node = current_node()
            self._watch_end(node)
            self._safely("on_node_start", self.attempt_started, node, state)

        async def on_node_success(_run_id: str, _node_id: str, output: dict[str, Any], _tokens: int) -> None:
            self._ended("on_node_success", Ended("success", output=output))

        async def on_node_failure(
            _run_id: str, _node_id: str, exc: Exception, failure_class: FailureClass
        ) -> None:
            node = current_node()
            reason = None if node is None else node.reason
            self._ended("on_node_failure", Ended("failure", exc, failure_class, reason=reason))

        async def on_node_cancelled(_run_id: str, _node_id: str) -> None:
            self._ended("on_node_cancelled", Ended("cancelled"))

        async def on_node_suspended(_run_id: str, _node_id: str, _reason: str) -> None:
            self._ended("on_node_suspended", Ended("suspended"))

        async def on_node_retry(
            _run_id: str, _node_id: str, attempt: int, delay: float, failure_class: FailureClass
        ) -> None:
            self._safely("on_node_retry", self.retrying, current_node(), attempt, delay, failure_class)

        async def on_node_skipped(_run_id: str, _node_id: str, _output: dict[str, Any]) -> None:
            self._safely("on_node_skipped", self.skipped, current_node())

        async def on_budget_warning(_run_id: str, dimension: str, used: float, limit: float) -> None:
            self._safely("on_budget_warning", self.budget_warning, current_run(), dimension, used, limit)

        async def on_node_wait(_run_id: str, _node_id: str, reason: str, seconds: float) -> None:
            self._safely("on_node_wait", self.waiting, current_node(), reason, seconds)

        async def on_circuit_change(_run_id: str, key: str, state: str) -> None:
            self._safely("on_circuit_change", self.circuit_changed, current_run(), key, state)

        def wanted(hook: T, *methods: str) -> T | None:
            # What is not overridden costs nothing.
            return hook if any(getattr(type(self), m) is not getattr(Observer, m) for m in methods) else None

        return ExporterHooks(
            on_node_start=wanted(on_node_start, "attempt_started", "node_ended"),
            on_node_success=wanted(on_node_success, "attempt_ended", "node_ended"),
            on_node_failure=wanted(on_node_failure, "attempt_ended", "node_ended"),
            on_run_start=wanted(on_run_start, "run_started"),
            on_run_end=wanted(on_run_end, "run_ended"),
            on_node_retry=wanted(on_node_retry, "retrying"),
            on_node_skipped=wanted(on_node_skipped, "skipped"),
            on_node_cancelled=wanted(on_node_cancelled, "attempt_ended", "node_ended"),
            on_node_suspended=wanted(on_node_suspended, "attempt_ended", "node_ended"),
            on_budget_warning=wanted(on_budget_warning, "budget_warning"),
            on_node_wait=wanted(on_node_wait, "waiting"),
            on_circuit_change=wanted(on_circuit_change, "circuit_changed"),
            exporter=self,
        )

    def _ended(self, event: str, ended: Ended) -> None:
        node = current_node()
        # Not every end had a start here: a contract that broke, an end that is told again.
        self._watch_end(node)
        self._safely(event, self.attempt_ended, node, ended)

    def _watch_end(self, node: NodeExecution | None) -> None:
        if node is not None and (self, "watched") not in node.notes:
            if type(self).node_ended is Observer.node_ended:
                return
            node.notes[self, "watched"] = True
            node.at_end(lambda: self._safely("at_end", self.node_ended, node))

    def _safely(self, event: str, call: Callable[..., None], about: Any, *arguments: Any) -> None:
        """Call; count what it raises, and log that once per kind: a system that is down is down for every event."""
        try:
            if about is not None:  # A hook that is called by hand is about no run.
                call(about, *arguments)
        except Exception as error:
            kind = f"{event}: {type(error).__name__}"
            self.errors[kind] += 1
            if self.errors[kind] == 1:
                logger.exception(
                    "%s: %s raised; the run goes on, and what follows of this kind is only counted (hooks.errors)",
                    self.name,
                    event,
                )


@dataclass
class ExporterHooks(NodeHooks):
    """The hooks of an exporter; compose them with others by ``|``.

    Attributes:
        exporter: what is behind them.
    """

    exporter: Observer = field(kw_only=True, repr=False)

    @property
    def errors(self) -> Counter[str]:
        """How often the exporter raised, by kind; none of it has changed anything of a run."""
        return self.exporter.errors

    async def flush(self, *, timeout_seconds: float = 5.0) -> bool:
        """Send what is queued; whether all of it was sent within the limit. Never raises."""
        sent = await self._within(timeout_seconds, lambda: self.exporter.flush(timeout_seconds))
        if sent is None:
            logger.warning("%s: not everything was sent within %g s", self.exporter.name, timeout_seconds)
        return bool(sent)

    async def aclose(self, *, timeout_seconds: float = 5.0) -> bool:
        """The same, and give up what the exporter has opened by itself (not what it was handed)."""
        deadline = monotonic() + timeout_seconds
        sent = await self.flush(timeout_seconds=timeout_seconds)
        # Also if the time is used up: closing takes none, but where something is wrong.
        closed = await self._within(max(_CLOSING_SECONDS, deadline - monotonic()), self._close)
        return sent and bool(closed)

    def _close(self) -> bool:
        self.exporter.close()
        return True

    async def _within(self, seconds: float, work: Callable[[], bool]) -> bool | None:
        """What work came to; None if it took longer."""

        def safely() -> bool:
            done = [False]
            self.exporter._safely("flush", lambda _: done.append(work()), self)
            return done[-1]

        # A daemon thread of ours: one that hangs keeps neither the loop nor the process.
        pending: Awaitable[Any] = in_thread(safely, ())
        try:
            return bool(await asyncio.wait_for(pending, seconds))
        except TimeoutError:
            return None


class ModelLabels:
    """Names of models as labels of metrics: a provider's answers cannot make series without end."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, model: str | None) -> str:
        """Return the label for a model: its name, or "other" once there have been 200 names."""
        name = sound(model or "")[:_LONGEST_MODEL]
        if name not in self._seen:
            if len(self._seen) >= _MOST_MODELS:
                return "other"
            self._seen.add(name)
        return name


def sound(text: str) -> str:
    """A text that UTF-8 can say: one lone surrogate in a label costs an exporter the label, or the whole page."""
    return text.encode("utf-8", "backslashreplace").decode()


def missing(needed: str, factory: str, extra: str) -> ImportError:
    """What to raise where an SDK is not installed."""
    return ImportError(f"{needed} is required for {factory}; install it with: pip install 'stroma[{extra}]'")
