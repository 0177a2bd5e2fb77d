"""hook_delivery="at_least_once": what a process did not live to tell, the next owner of the run tells."""

import asyncio
import os
import pathlib
import signal
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import ONCE, Item, SimpleStore, computing, context_of, passing, run_python
from tests.kit import Item as Made

from stroma import (
    FailureClass,
    InMemoryStore,
    NodeHooks,
    RunStatus,
    SQLiteStore,
    StoreError,
    StromaRunner,
    Suspend,
    current_node,
    execute_step,
    map_over,
    open_store,
    parallel,
)


class State(BaseModel):
    n: int = 0
    items: list[int] = [1, 2]


Told = tuple[str, str, str, int, bool, Any]


def make(url: str, die_at: tuple[str, str] | None, deliveries: list[Told]) -> tuple[StromaRunner, list[Any]]:
    """A runner and its nodes. ``die_at``: the hook, and the node, in which the process kills itself."""

    def note(event: str, text: Any) -> None:
        node = current_node()
        if die_at == (event, node.node_id) and not node.redelivered:
            os.kill(os.getpid(), signal.SIGKILL)
        deliveries.append((event, node.node_id, node.branch, node.attempt, node.redelivered, text))

    async def success(_run_id: str, _node_id: str, output: dict[str, Any], tokens: int) -> None:
        note("success", (output.get("n"), tokens))

    async def failure(_run_id: str, _node_id: str, exc: Exception, failure_class: FailureClass) -> None:
        note("failure", (str(exc), failure_class))

    runner = StromaRunner.quick(
        store=open_store(url),
        policy_map=ONCE,
        hooks=NodeHooks(on_node_success=success, on_node_failure=failure),
        hook_delivery="at_least_once",
        resume=True,
    )

    @runner.node("flaky", input=State, output=State)
    async def flaky(state: State) -> Any:
        if current_node().attempt == 1:
            raise ConnectionError("gone")
        return {"n": state.n + 1}, 3, 4, "gpt-4o-mini"

    left = runner.node("left", input=State, output=Made)(computing(lambda state: Made(n=state.n + 10)))
    right = runner.node("right", input=State, output=State)(passing())
    item = runner.node("item", input=Item, output=Made)(computing(lambda state: Made(n=state.n * 2)))
    return runner, [flaky, parallel(left, right), map_over("items", item, into="made")]


ALL = [
    ("failure", "flaky", "", ("gone", FailureClass.RECOVERABLE)),
    ("success", "flaky", "", (1, 7)),
    ("success", "item", "0", (2, 0)),
    ("success", "item", "1", (4, 0)),
    ("success", "left", "0", (11, 0)),
    ("success", "map_over(items, item)", "", (1, 0)),
    ("success", "parallel(left, right)", "", (1, 0)),
    ("success", "right", "1", (1, 0)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "die_at", [("failure", "flaky"), ("success", "left"), ("success", "parallel(left, right)"), None]
)
def test_what_a_killed_process_did_not_call(die_at: tuple[str, str] | None, tmp_path: pathlib.Path) -> None:
    """A process is killed between a commit and its hook: the resume tells that event as redelivered."""
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    program = (
        "import asyncio; from tests.engine.test_hook_redelivery import State, make;"
        f"runner, nodes = make({url!r}, {die_at!r}, []);"
        "asyncio.run(runner.run(nodes, State(), run_id='r'))"
    )
    run_python(code=program, status=0 if die_at is None else -signal.SIGKILL)

    events: list[Told] = []

    async def resume() -> None:
        runner, nodes = make(url, None, events)
        async with runner.checkpoint_manager.store:
            result = await runner.run(nodes, State(), run_id="r")
            assert result.status is RunStatus.RESUMED
            assert result.hook_errors == []

    asyncio.run(resume())
    again = [(event, node, text) for event, node, _, _, redelivered, text in events if redelivered]
    if die_at is None:
        assert events == []
        return
    known = [(event, node, text) for event, node, _, text in ALL]
    assert again
    assert set(again) <= set(known)
    assert die_at in [(event, node) for event, node, _ in again]
    assert events[0][4], "what is due is told before anything runs"

    # All of it is delivered now.
    events.clear()
    asyncio.run(resume())
    assert events == []


@pytest.mark.core
async def test_each_event_is_told_once_by_a_process_that_lives(tmp_path: pathlib.Path) -> None:
    """Without a crash no event is told twice, nor is any of them redelivered on a later resume."""
    events: list[Told] = []
    runner, nodes = make(f"sqlite:///{tmp_path / 'runs.db'}", None, events)
    async with runner.checkpoint_manager.store:
        await runner.run(nodes, State(), run_id="r")
        assert sorted((event, node, branch, text) for event, node, branch, _, _, text in events) == ALL
        assert not any(redelivered for *_, redelivered, _ in events)
        await runner.run(nodes, State(), run_id="r")
        assert len(events) == len(ALL)
        # A restart is another execution, to which nothing is owed.
        await runner.run(nodes, State(), run_id="r", if_exists="restart", resume=False)
        assert len(events) == 2 * len(ALL)


async def test_suspended_and_cancelled_attempts_are_owed_too(tmp_path: pathlib.Path) -> None:
    """The ends of attempts that wait, and of those that were cancelled, are marked like all others."""
    store = SQLiteStore(tmp_path / "runs.db")
    waiting = asyncio.Event()
    events: list[Any] = []
    mute = True

    async def suspended(_run_id: str, _node_id: str, reason: str) -> None:
        if mute:
            raise KeyboardInterrupt  # As good as a death: the hook has not ended.
        events.append(("suspended", reason, current_node().redelivered))

    hooks = NodeHooks(on_node_suspended=suspended)
    runner = StromaRunner.quick(store=store, hooks=hooks, hook_delivery="at_least_once")

    @runner.node("ask", input=State, output=State)
    async def ask(state: State) -> State:
        if not mute:
            return state
        raise Suspend("may I?")

    async with store:
        with pytest.raises(KeyboardInterrupt):
            await runner.run([ask], State(), run_id="r")
        mute = False
        await runner.run([ask], State(), run_id="r", resume=True)
        assert events == [("suspended", "may I?", True)]
        assert not waiting.is_set()


async def test_a_store_without_a_journal_cannot_promise_it() -> None:
    """A store of the simple protocol is refused with what to do; in-memory stores end with the process."""
    for store, refused in ((SimpleStore(), True), (InMemoryStore(), False)):
        hooks = NodeHooks(on_node_start=None)
        runner = StromaRunner.quick(store=store, hooks=hooks, hook_delivery="at_least_once")

        async def tell(*_: Any) -> None: ...

        runner = runner.with_hooks(NodeHooks(on_node_success=tell))

        node = runner.node("node", input=State, output=State)(passing())
        if refused:
            with pytest.raises(StoreError, match=r"has no journal.*hook_delivery"):
                await runner.run([node], State())
        else:
            assert (await runner.run([node], State())).status is RunStatus.COMPLETED


async def test_steps_of_plain_code_are_owed_too(tmp_path: pathlib.Path) -> None:
    """In plain code the first step of a resumed run tells what is due, before it gives what was recorded."""
    events: list[Any] = []
    mute = True

    async def success(_run_id: str, node_id: str, output: dict[str, Any], tokens: int) -> None:
        if mute:
            raise KeyboardInterrupt  # As good as a death: the hook has not ended.
        events.append((node_id, output["n"], tokens, current_node().redelivered))

    step = computing(lambda state: ({"n": state.n + 1}, 3, 4, "gpt-4o-mini"))

    async def run(store: SQLiteStore, **config: Any) -> None:
        runner = StromaRunner.quick(
            store=store,
            hooks=NodeHooks(on_node_success=success),
            hook_delivery="at_least_once",
            run_id="r",
            **config,
        )
        ctx = context_of(runner)
        async with ctx:
            result = await execute_step("step", step, State(), ctx)
            assert result.final_state is not None
            events.append("step is done")

    async with SQLiteStore(tmp_path / "runs.db") as store:
        with pytest.raises(KeyboardInterrupt):
            await run(store)
        mute = False
        await run(store, resume=True)
        await run(store, resume=True)
    assert events == [("step", 1, 7, True), "step is done", "step is done"]
