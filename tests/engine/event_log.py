"""All that a run tells of its attempts, in order, as lines of text: hooks with what is current meanwhile, the
log, the trace, the journal and the result. Times are told as far as two runs have them in common: whether
they are 0.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import re
from collections.abc import Coroutine, Generator
from time import perf_counter_ns, time_ns
from typing import Any

from pydantic import BaseModel
from tests.kit import NEVER, Num, node

from stroma import (
    AsyncInMemoryStore,
    ExecutionBudget,
    ExecutionResult,
    Failure,
    NodeContract,
    NodeHooks,
    StromaRunner,
    current_node_or_none,
    current_run,
)
from stroma.checkpoint.history.bars import in_order
from stroma.hooks import MapProgress

#: Of clocks that are set while a test runs.
_SLACK_NS = 60 * 10**9


class M(BaseModel):
    m: int = 0


def contract(
    node_id: str, input: type[BaseModel] = Num, output: type[BaseModel] = Num
) -> NodeContract[Any, Any]:
    return NodeContract(node_id=node_id, input_schema=input, output_schema=output)


async def same(state: Any) -> Any:
    return state


def counted(calls: list[str], node_id: str, *outcomes: Any, **schemas: Any) -> Any:
    """Gives these, or raises them, the last one from then on."""
    left = list(outcomes)

    async def func(state: Any) -> Any:
        calls.append(node_id)
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return node(node_id, func, **schemas)


async def swallow() -> None:
    """The running task is cancelled, and lives on."""
    asyncio.current_task().cancel()
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        pass


class Between:
    """A session in which some calls are answered by the test."""

    def __init__(self, session: Any, **calls: Any) -> None:
        self.session = session
        self.__dict__.update(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


class Journal(AsyncInMemoryStore):
    """A journal whose sessions are made by a function of the test's. It has warned already."""

    _has_warned = True

    def __init__(self, between: Any = lambda session: session) -> None:
        super().__init__()
        self.between = between

    def open_run(self, request: Any) -> Any:
        return self.between(super().open_run(request))


class Diary(logging.Handler):
    """Notes what a run tells. A context manager: the log is heard inside it."""

    def __init__(self, variation: dict[str, Any] | None = None) -> None:
        """``variation``: what the runs are configured with beside what the test says."""
        super().__init__(logging.INFO)
        self.variation = variation or {}
        self.lines: list[str] = []
        self._seen: list[str] | None = None
        self.store: Any = Journal()
        #: Set by what is to be cancelled or thrown away, once it has begun.
        self.started = asyncio.Event()
        self._begin, self._begin_wall = perf_counter_ns(), time_ns()

    def __enter__(self) -> Diary:
        logger = logging.getLogger("stroma")
        self._level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("stroma")
        logger.removeHandler(self)
        logger.setLevel(self._level)

    def emit(self, record: logging.LogRecord) -> None:
        assert record.run_id == "r", "each line says of which run it is"
        self.lines.append(f"log {record.levelname}: {_short(record.getMessage())}")

    def hooks(self, label: str = "", **own: Any) -> NodeHooks:
        """A set that notes every event; ``own``: what is called, by the event, once it is noted."""
        names = [field.name for field in dataclasses.fields(NodeHooks)]
        return NodeHooks(**{name: self._hook(name[3:], label, own.get(name[3:])) for name in names})

    def _hook(self, event: str, label: str, own: Any) -> Any:
        async def hook(run_id: str, *arguments: Any) -> None:
            assert run_id == "r"
            report = " ".join(_told(argument) for argument in arguments)
            self.lines.append(f"{label}{event} {report}{self._place()}")
            if event == "run_end":
                self._seen = self._events(arguments[0].trace)
                self.lines += self._seen
            if own is not None:
                await own(run_id, *arguments)

        return hook

    def _place(self) -> str:
        run, here = current_run(), current_node_or_none()
        assert run.run_id == "r"
        if here is None:
            return f" latency {_ran(run.cost_tracker.used('latency'))}"
        assert here.ctx is run
        parts = [f" @ {here.kind} {here.node_id} {_at(here.position, here.branch)} #{here.attempt}"]
        if here.last_failure is not None:
            parts.append(f" after {_failed(here.last_failure)}")
        if here.outcome is not None:
            assert here.duration_ms is not None
            assert here.started_ns is not None
            self._check(here.started_ns, here.duration_ms * 1e6)
            parts.append(f" {here.outcome} {here.reason} {_ran(here.duration_ms)}")
        if here.usage.tokens:
            parts.append(f" {here.usage.tokens} tokens")
        return "".join(parts)

    def _check(self, started_ns: int, duration_ns: float) -> None:
        assert self._begin_wall - _SLACK_NS <= started_ns <= time_ns() + _SLACK_NS, "it began in the test"
        assert 0 <= duration_ns <= perf_counter_ns() - self._begin, "it is not longer than the test"

    def result(self, result: ExecutionResult) -> None:
        """What a run came to, and its trace if that is not what the hook of its end was shown."""
        events = self._events(result.trace)
        if events != self._seen:
            self.lines += events
        failure = result.failure
        report = (
            f"result {result.status} {result.final_state!r} {result.total_tokens} tokens "
            f"{result.total_cost_usd:g} USD"
        )
        if failure is not None:
            report += f" {type(failure.exception).__name__} {_failed(failure)} {failure.retry_after_seconds}"
            report += f" of {failure.node_id} #{failure.attempt}"
        for name in ("hook_errors", "unpriced_models", "failed_items", "suspended"):
            if getattr(result, name):
                report += f" {name} {getattr(result, name)}"
        self.lines.append(report)

    def _events(self, events: Any, depth: str = "event") -> list[str]:
        findings = []
        for event in events:
            assert event.run_id == "r"
            self._check(int(event.timestamp_utc.timestamp() * 1e9), event.duration_ms * 1e6)
            report = f"{depth} {event.node_id} {_at(event.position, event.branch)} #{event.attempt}"
            report += f" {event.outcome} {event.input_state} -> {event.output_state}"
            if event.failure is not None or event.failure_message is not None:
                report += f" {event.failure} {_short(str(event.failure_message))} ({event.reason})"
            if event.usage.tokens or event.usage.cost_usd:
                report += f" {event.usage.tokens} tokens {event.usage.cost_usd:g} USD"
            findings += [report, *self._events(event.children, f"  {depth}")]
        return findings

    def journal(self) -> None:
        """What the store has of the run."""
        record = self.store.get_run("r")
        self.lines.append(f"journal {record.status}")
        for entry in in_order(self.store.attempts("r")):
            self._check(entry.started_ns, entry.duration_ms * 1e6)
            report = f"row {entry.node_id} {_at(entry.position, entry.branch)} #{entry.attempt}"
            report += f" {entry.outcome} {_ran(entry.duration_ms)} {(entry.output or b'-').decode()}"
            if entry.failure_class is not None:
                report += f" {entry.failure_class} {_short(str(entry.message))} ({entry.reason})"
            elif entry.message is not None:
                report += f" {_short(entry.message)}"
            if entry.tokens or entry.cost_usd:
                report += f" {entry.tokens} tokens {entry.cost_usd:g} USD"
            self.lines.append(report)

    def config(self, **config: Any) -> dict[str, Any]:
        """A run "r" that is watched in every way; ``config`` wins over the variation."""
        inputs = {"run_id": "r", "policy_map": NEVER, "hooks": self.hooks(), **self.variation, **config}
        for name, value in self.variation.items():
            if isinstance(value, dict):
                inputs[name] = {**value, **config.get(name, {})}
            elif isinstance(value, ExecutionBudget):
                own: ExecutionBudget = config.get(name, ExecutionBudget())
                inputs[name] = value.model_copy(update=own.model_dump(exclude_none=True))
        return inputs

    def runner(self, **config: Any) -> StromaRunner:
        runner = StromaRunner.quick(store=self.store, **self.config(**config))
        # The settings name nodes that not every scenario has.
        runner.registry.step_ids |= {"a", "b", "each", "other"}
        return runner

    async def run(self, nodes: list[Any], state: Any, **config: Any) -> None:
        """Run nodes, and note what comes of it; what comes out of ``run()`` as an exception, too."""
        try:
            self.result(await self.runner(**config).run(nodes, state))
        except AssertionError:
            raise
        except BaseException as error:
            self.lines.append(f"raised {_told(error)}")
        self.journal()

    async def cut(self, nodes: list[Any], state: Any, **config: Any) -> None:
        """Run nodes, and cancel that once it has begun."""
        task = asyncio.create_task(self.run(nodes, state, **config))
        await self.started.wait()
        task.cancel()
        await task

    async def throw_away(self, nodes: list[Any], state: Any, **config: Any) -> None:
        """Run nodes until that has begun, and throw it away there, as a loop does that ends."""
        before = asyncio.all_tasks()
        await ThrownAway(self.runner(**config).run(nodes, state), self.started)
        for task in asyncio.all_tasks() - before:  # Of a store, whose work nobody has closed.
            task.cancel()
        self.journal()


class ThrownAway:
    """Awaited, it does what a coroutine does until an event is set, and closes it in another context."""

    def __init__(self, work: Coroutine[Any, Any, Any], started: asyncio.Event) -> None:
        self._work = work
        self._begun = started

    def __await__(self) -> Generator[Any, None, None]:
        context, task = contextvars.copy_context(), asyncio.current_task()
        assert task is not None
        watch = asyncio.create_task(self._wake(task))
        try:
            while True:
                yield context.run(self._work.send, None)
        except asyncio.CancelledError:
            assert watch.done(), "nobody else cancels it"
            task.uncancel()
        self._work.close()

    async def _wake(self, task: asyncio.Task[Any]) -> None:
        await self._begun.wait()
        task.cancel()


def _at(position: int, branch: str) -> str:
    return f"{position}[{branch}]" if branch else str(position)


def _ran(duration: float) -> str:
    return "ran" if duration > 0 else str(duration)


def _failed(failure: Failure) -> str:
    return f"{failure.failure_class} {_short(failure.message)} ({failure.reason})"


def _told(value: Any) -> str:
    if isinstance(value, ExecutionResult):
        return str(value.status)
    if isinstance(value, MapProgress):
        return f"{value.done} of {value.total}{' ended' if value.ended else ''}"
    if isinstance(value, BaseException):
        return f"{type(value).__name__}({_short(str(value))})"
    return str(value)


def _short(text: str) -> str:
    """The first line, without where in memory a thing is."""
    return re.sub(r" at 0x[0-9a-f]+", "", text.partition("\n")[0])
