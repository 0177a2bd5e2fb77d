"""What tests of many subjects share: a small state, nodes, policies that retry without waiting, and runners.

Imports Stroma, pydantic and pytest only: the environments of agent frameworks lack the rest.
"""

import asyncio
import logging
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest
from pydantic import BaseModel, Field

from stroma import (
    CheckpointManager,
    ContractRegistry,
    FailureClass,
    FailurePolicy,
    NodeExecution,
    NodeHooks,
    ReliabilityContext,
    RunConfig,
    StromaRunner,
    current_node,
    stroma_node,
)
from stroma.hooks.sets import EVENTS


class Num(BaseModel):
    n: int = 0


class Text(BaseModel):
    text: str


class Note(BaseModel):
    text: str = ""


class Item(BaseModel):
    n: int


class One(BaseModel):
    a: int = 0


class Two(BaseModel):
    b: int = 0


class Three(BaseModel):
    c: int = 0


class Receipt(BaseModel):
    number: int


class Many(BaseModel):
    items: list[Num]


class Words(BaseModel):
    words: list[str]


class Positive(BaseModel):
    n: int = Field(gt=0)


class Loose(BaseModel):
    anything: Any = None


def words(text: str) -> list[str]:
    """Return the words of a long list, which stands in few lines so."""
    return text.split()


def node(node_id: str, func: Any, input: type[BaseModel] = Num, output: type[BaseModel] = Num) -> Any:
    """Return a function as a node with a contract. Functions of this module are shared, and not marked."""
    if isinstance(func, FunctionType) and func.__module__ == __name__ and func.__closure__ is None:
        func = FunctionType(func.__code__, func.__globals__, func.__name__)
    return stroma_node(node_id, input=input, output=output)(func)


def bare(node_id: str, func: Any) -> Any:
    """Return a function as a node without a contract: marked by hand, as the published attributes have it."""
    func._stroma_node_id, func._stroma_contract = node_id, None
    return func


def here() -> NodeExecution:
    """Return the node that runs here."""
    return current_node()


def retry_policies(max_retries: int) -> dict[FailureClass, FailurePolicy]:
    """Return policies that retry a failure of any class so often, without waiting."""
    return {kind: FailurePolicy(max_retries=max_retries, backoff_seconds=0) for kind in FailureClass}


NEVER, ONCE, TWICE, THRICE = map(retry_policies, range(4))


def quick(**config: Any) -> StromaRunner:
    """Return a runner that retries every failure twice, without waiting, unless ``config`` has policies."""
    return StromaRunner.quick(**{"policy_map": TWICE, **config})


def quick_without_retries(**config: Any) -> StromaRunner:
    """Return a runner that retries nothing, unless ``config`` has policies."""
    return StromaRunner.quick(**{"policy_map": NEVER, **config})


def quick_on(store: Any, **config: Any) -> StromaRunner:
    """Return a runner on a store that retries nothing, unless ``config`` has policies."""
    return StromaRunner.quick(**{"store": store, "policy_map": NEVER, **config})


def context_of(runner: StromaRunner, config: RunConfig | None = None) -> ReliabilityContext:
    """Return a context for steps of plain code, on the store of a runner."""
    return ReliabilityContext.for_run(config or runner.config, runner.registry, runner.checkpoint_manager)


def context_on(store: Any, config: RunConfig | None = None) -> ReliabilityContext:
    """Return a context for steps of plain code, on a store."""
    return ReliabilityContext.for_run(config or RunConfig(), ContractRegistry(), CheckpointManager(store))


async def same(state: BaseModel) -> Any:
    """Return the input: the function of a node."""
    return state


def passing() -> Any:
    """Return a node's function that returns its input, a new function in each call."""

    async def func(state: Any) -> Any:
        return state

    return func


def returning(output: Any) -> Any:
    """Return a node's function that returns this."""

    async def func(state: Any) -> Any:
        return output

    return func


def computing(output: Callable[[Any], Any]) -> Any:
    """Return a node's function that returns what this makes of the state."""

    async def func(state: Any) -> Any:
        return output(state)

    return func


def recording(calls: list[Any], note: Any, output: Callable[[Any], Any]) -> Any:
    """Return a node's function that appends ``note`` to ``calls`` and returns what ``output`` makes."""

    async def func(state: Any) -> Any:
        calls.append(note)
        return output(state)

    return func


def failing_with(error: type[BaseException], *arguments: object) -> Any:
    """Return a node's function, or a hook, that raises such an error, a new one in each attempt."""

    async def func(*_: Any, **__: Any) -> Any:
        raise error(*arguments)

    return func


def open_question(store: Any, run_id: str, **fields: Any) -> str:
    """Return the id of the one open question of a run whose fields have these values."""
    asked = [one for one in store.waiting(run_id) if one.payload is None]
    (found,) = [one for one in asked if all(getattr(one, name) == value for name, value in fields.items())]
    question_id: str = found.id
    return question_id


async def plus(state: Num) -> Any:
    """Add one: the function of a node."""
    return {"n": state.n + 1}


async def give_one(state: Any) -> Any:
    """Return the fields of a ``One``: the function of a node."""
    return {"a": 1}


async def fail(state: BaseModel) -> Any:
    """Fail as a client without a connection does: the function of a node."""
    raise ConnectionError("down")


async def forever(*_: Any) -> Any:
    """Wait until the task is cancelled: also the function of a node, or a hook."""
    await asyncio.Event().wait()


def stuck(begun: asyncio.Event) -> Any:
    """Return a node's function, or a hook, that sets an event, then waits until it is cancelled."""

    async def func(*_: Any) -> Any:
        begun.set()
        await forever()

    return func


async def sleep_forever(*_: Any) -> Any:
    """Sleep for longer than any test takes: the function of a node."""
    await asyncio.sleep(30)


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task, which must end as cancelled."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_after(work: Coroutine[Any, Any, Any], begun: asyncio.Event) -> None:
    """Run something until an event, then cancel it: it must end as cancelled."""
    task = asyncio.create_task(work)
    async with asyncio.timeout(60):
        await begun.wait()
        await cancel(task)


class SimpleStore:
    """A custom store of the simple protocol, without a journal."""

    def __init__(self) -> None:
        self.states: dict[tuple[str, str], Any] = {}

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        self.states[run_id, node_id] = state

    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return self.states.get((run_id, node_id))

    def delete(self, run_id: str) -> None:
        self.states = {key: state for key, state in self.states.items() if key[0] != run_id}


class AsyncSimpleStore(SimpleStore):
    """The same, async."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().save(run_id, node_id, state)

    async def load(self, run_id: str, node_id: str) -> BaseModel | None:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().load(run_id, node_id)

    async def delete(self, run_id: str) -> None:  # type: ignore[override]
        super().delete(run_id)


class Rot:
    """A codec that anybody can undo: a store takes secrets under it, and what is plain in a store shows."""

    def encode(self, data: bytes) -> bytes:
        return bytes(byte ^ 90 for byte in data)

    decode = encode


def noting(seen: list[Any], note: Callable[..., Any]) -> Any:
    """Return a hook that appends what ``note`` makes of its arguments."""

    async def hook(*arguments: Any) -> None:
        seen.append(note(*arguments))

    return hook


def record_hooks(seen: list[str]) -> NodeHooks:
    """Return hooks that append each event to ``seen``, with the id of its node."""

    def recorder(event: str) -> Any:
        async def hook(run_id: str, what: Any, *_: Any) -> None:
            seen.append(f"{event[8:]} {what}" if event.startswith("on_node") else event[3:])

        return hook

    return NodeHooks(**{name: recorder(name) for name in EVENTS if name != "on_budget_warning"})


def record_node_hooks(seen: list[str], name: str = "", **others: Any) -> NodeHooks:
    """Return hooks that append each event of nodes to ``seen``, after ``name``; ``others`` replace hooks."""

    def recorder(event: str) -> Any:
        async def hook(*_: Any) -> None:
            seen.append(f"{name}{event[8:]}")

        return hook

    events = ("on_node_start", "on_node_success", "on_node_failure", "on_node_cancelled")
    return NodeHooks(**{**{event: recorder(event) for event in events}, **others})


@contextmanager
def undone_command() -> Iterator[None]:
    """Undo what a command leaves behind in this process: handlers of signals and of logs, `sys.path`."""
    logger = logging.getLogger("stroma")
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers, paths = logger.handlers[:], sys.path[:]
    try:
        yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        logger.handlers[:] = handlers
        sys.path[:] = paths


def environment(**variables: object) -> dict[str, str]:
    """Return the environment of a process that imports the package from its source, and the tests."""
    root = pathlib.Path(__file__).parents[1]
    path = os.pathsep.join((str(root / "src"), str(root)))
    return {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in variables.items()}}


def start_python(*arguments: object, code: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start Python with these arguments, or with a program before them, whose indentation is removed."""
    command = [sys.executable, *(["-c", textwrap.dedent(code)] if code else []), *map(str, arguments)]
    pipe = subprocess.PIPE
    options = {"env": environment(), **options}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options)


def run_python(*arguments: object, code: str = "", status: int = 0, **options: Any) -> str:
    """Run Python to its end with this status, and return what it printed."""
    return ended(start_python(*arguments, code=code, **options), status, timeout=120)


def ended(process: subprocess.Popen[str], *statuses: int, timeout: float = 60) -> str:
    """Wait for the end of a process, and return what it printed. ``statuses``: expected ones, by default 0.

    That of a process that was killed is -9.
    """
    printed, errors = process.communicate(timeout=timeout)
    assert process.returncode in (statuses or (0,)), errors
    return printed


def read_line(process: subprocess.Popen[str]) -> str:
    """Return the next line that a process prints, without its end."""
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate(timeout=60)[1])
    return line.rstrip("\n")
