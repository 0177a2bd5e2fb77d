"""What the tests of all frameworks share: what must be shown of each, a guard that retries at once, and hooks
that write down what they see."""

import asyncio
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from stroma import FailureClass, FailurePolicy, NodeHooks, RunStatus, SQLiteStore, StromaRunner, current_node
from stroma.adapters import Guard
from stroma.trace import ExecutionResult

F = TypeVar("F")

#: What each framework's tests show with its real release; tests/adapters/test_releases.py sees that
#: none is missing.
LINES = {
    "same answer": "the framework's own program gives the same answer with and without the guard",
    "sync and async": "called either way, where the framework can be",
    "violations": "a contract violation on input and on output is caught at its node",
    "retries": "a transient failure is retried and then succeeds, a terminal one is not retried",
    "budget": "the budget stops the run, and the spend is right to the token",
    "failed attempts": "what failed attempts have used counts",
    "hooks": "hooks fire in order with the right parents",
    "control flow": "what the framework steers with passes through untouched",
    "streams": "a stream is not retried after its first part",
    "unknown": "a contract for a node or tool that is not there raises",
    "journal": "a call of the framework is a run in the journal, with its nodes",
    "killed": "killed inside of a step, a resume calls what was finished inside it again and gives the same "
    "answer",
}
#: Tokens that pay() reports.
PAID = 5


def holds(*lines: str) -> Callable[[F], F]:
    """Say which of the lines a test holds, or all tests of a class."""
    assert set(lines) <= LINES.keys(), lines
    return lambda test: test


def pay() -> None:
    """Use some tokens in the step here: what it does next may fail."""
    current_node().report_usage(input_tokens=PAID)


def result_of(guard: Guard) -> ExecutionResult:
    """What the last run of a guard came to."""
    return guard.last.result


def lines_of(guard: Guard) -> list[str]:
    """Return the trace of the last run of a guard as lines."""
    return tree(result_of(guard))


AT_ONCE = {
    FailureClass.RECOVERABLE: FailurePolicy(max_retries=2, backoff_seconds=0),
    FailureClass.AMBIGUOUS: FailurePolicy(max_retries=1, backoff_seconds=0),
}


class Seen:
    """Every hook that fired, as "event node < parent"; a run's as "event STATUS"."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.results: list[ExecutionResult] = []
        self.hooks = NodeHooks(
            on_run_start=self._run("run start"),
            on_run_end=self._run("run end"),
            on_node_start=self._node("start"),
            on_node_success=self._node("success"),
            on_node_failure=self._node("failure"),
            on_node_retry=self._node("retry"),
            on_node_suspended=self._node("suspended"),
            on_node_cancelled=self._node("cancelled"),
        )

    def _run(self, event: str) -> Any:
        async def hook(_run_id: str, what: Any, *_: Any) -> None:
            if isinstance(what, ExecutionResult):
                self.results.append(what)
            self.lines.append(f"{event} {what.status}" if isinstance(what, ExecutionResult) else event)

        return hook

    def _node(self, event: str) -> Any:
        async def hook(*_: Any) -> None:
            node = current_node()
            names, outer = [node.node_id], node.parent
            while outer is not None:
                names.append(outer.node_id)
                outer = outer.parent
            self.lines.append(f"{event} {' < '.join(names)}")

        return hook


def spent(seen: Seen, _: Guard) -> tuple[int, int]:
    """Return how many runs ended, all of them as completed, and their tokens."""
    assert {result.status for result in seen.results} == {RunStatus.COMPLETED}
    return len(seen.results), sum(result.total_tokens for result in seen.results)


def guard_of(seen: Seen | None = None, **config: Any) -> Guard:
    if seen is not None:
        config["hooks"] = seen.hooks
    return Guard(StromaRunner.quick(**{"policy_map": AT_ONCE, **config}))


def emitted_by(call: Callable[[], Any]) -> list[tuple[str, Any]]:
    """Return what a node emits that calls a program in a thread: names and data."""
    runner = StromaRunner.quick()

    @runner.node("outer", input=Nothing, output=Nothing)
    async def outer(state: Nothing) -> Nothing:
        await asyncio.to_thread(call)
        return state

    async def main() -> list[tuple[str, Any]]:
        async with runner.stream([outer], Nothing()) as stream:
            return [
                (str(event.name), event.data)
                async for event in stream
                if event.kind == "node_event" and event.node_id == "outer"
            ]

    return asyncio.run(main())


class Nothing(BaseModel):
    """The state of a node that needs none."""


def tree(result: ExecutionResult) -> list[str]:
    """The trace as lines, children indented: "node outcome tokens"."""

    def lines(events: Any, depth: int) -> list[str]:
        findings = []
        for event in events:
            tokens = f" {event.usage.tokens}" if event.usage.tokens else ""
            findings.append("  " * depth + f"{event.node_id} {event.outcome}{tokens}")
            findings += lines(event.children, depth + 1)
        return findings

    return lines(result.trace, 0)


def killed_and_resumed(test: type[Any], folder: Path) -> str:
    """What ``nested()`` of a test class returns in a process that continues one killed inside of it."""
    return in_two_lives(live, folder, "dies", test.__module__, test.__name__)


_DETACHED = """
from stroma.adapters import Guard
from stroma.adapters._patches import _patches
{imports}
assert not _patches, "an import changes the framework"
first, second = Guard(), Guard()
for guard in (first, second):
    {attach}
patched = dict(_patches)
first.detach()
assert _patches == patched, "another guard needs them"
second.detach()
second.detach()
for (owner, name), patch in patched.items():
    assert getattr(owner, name) is not patch.replacement
    print(name)
assert not _patches
"""


def changed_until_detached(imports: str, attach: str) -> list[str]:
    """Return the functions of a framework that attaching ``guard`` changes until the last one is
    detached."""
    program = _DETACHED.format(imports=imports, attach=attach)
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def fifty_at_once(one: Callable[[int], Any]) -> list[Any]:
    """Return the results of fifty coroutines that run at once, in an event loop of their own."""

    async def main() -> list[Any]:
        return await asyncio.gather(*map(one, range(50)))

    return asyncio.run(main())


def is_killed(live: Callable[..., Any], *arguments: Any, **env: str) -> bool:
    """Call a function of a module in its own process. Return True if that was killed, False if it ended."""
    program = f"import sys; from {live.__module__} import {live.__name__}; {live.__name__}(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **env},
    )
    assert done.returncode in (-signal.SIGKILL, 0), (arguments, done.returncode, done.stderr)
    return done.returncode != 0


def in_two_lives(live: Callable[..., Any], folder: Path, dies: str, *arguments: str) -> str:
    """Call a function in a process that is killed in its first life, for which it gets ``dies``; return what
    :func:`answer` notes in its second."""
    assert is_killed(live, *arguments, folder, dies)
    assert not is_killed(live, *arguments, folder, "")
    return (folder / "answer").read_text("utf-8")


def check_killed(
    live: Callable[..., Any], folder: Path, dies_before: str, expected: tuple[Any, Sequence[str], int]
) -> None:
    """Kill a program before one of its calls, and continue it in another process, in the same run.

    ``expected``: its answer, its calls, and the tokens of the run.
    """
    result, calls, tokens = expected
    assert in_two_lives(live, folder, dies_before) == str(result)
    assert [line.partition("|")[0] for line in Ledger(folder).calls] == list(calls)
    with SQLiteStore(folder / "r.db") as store:
        (run,) = store.list_runs()
        assert (run.status, run.tokens) == ("RESUMED", tokens)


def answer(folder: str | Path, value: Any) -> None:
    """Note what a program comes to, not on stdout, where threads of CrewAI print to its end."""
    Path(folder, "answer").write_text(str(value), "utf-8")


def die() -> None:
    """End the process here and now."""
    os.kill(os.getpid(), signal.SIGKILL)


def live(module: str, test: str, folder: str, life: str) -> None:
    """One of the processes of :func:`killed_and_resumed`."""
    database = str(Path(folder, "runs.db"))
    guard = guard_of(store=database, run_id="killed", resume=True, lease_seconds=0.2)
    program = getattr(importlib.import_module(module), test)()
    answer(folder, program.nested(guard, die if life else lambda: None))


class Ledger:
    """What calls have cost, in a file that outlives the process: a line each."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder, "paid")

    def pay(self, what: str) -> None:
        """Note a call, and use some tokens in the step here."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{what}\n")
        pay()

    @property
    def calls(self) -> list[str]:
        return self.path.read_text("utf-8").splitlines()
