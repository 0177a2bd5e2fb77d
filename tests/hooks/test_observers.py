"""What an observing hook can rely on: where to keep data, when an execution is over, its run."""

import asyncio
import contextvars
from typing import Any

import pytest
from tests.kit import ONCE, Num, cancel_after, context_of, failing_with, noting, passing, same

from stroma import (
    FailureClass,
    FailurePolicy,
    Limit,
    NodeHooks,
    Pipeline,
    ReliabilityContext,
    RunStatus,
    StromaRunner,
    Suspend,
    current_node,
    current_node_or_none,
    current_run,
    execute_step,
    parallel,
)


def quick(**config: Any) -> StromaRunner:
    return StromaRunner.quick(policy_map=ONCE, **config)


@pytest.mark.core
@pytest.mark.parametrize(
    "ending", ["success", "failure", "suspended", "cancelled", "backoff", "refused", "closed"]
)
async def test_at_end_is_called_once_whichever_way_an_execution_ends(ending: str) -> None:
    """at_end() is called when no attempt follows, also after a wait; `attempt` is then the last one made."""
    calls: list[str] = []
    waiting = asyncio.Event()

    async def start(*_: Any) -> None:
        node = current_node()
        if "told" not in node.notes:
            node.notes["told"] = True
            node.at_end(lambda: calls.append("first added"))
            node.at_end(lambda: calls.append(f"attempt {node.attempt}"))

    async def retry(*_: Any) -> None:
        assert calls == []
        if ending == "backoff":
            waiting.set()

    policies = {kind: FailurePolicy(max_retries=1, backoff_seconds=9, jitter=False) for kind in FailureClass}
    limits = {"node": Limit(requests_per_minute=1, max_wait_seconds=0)} if ending == "refused" else {}
    runner = quick(hooks=NodeHooks(on_node_start=start, on_node_retry=retry), limits=limits)

    @runner.node("node", input=Num, output=Num)
    async def node(state: Num) -> Num:
        if ending == "suspended":
            raise Suspend("may I?")
        if ending in ("cancelled", "closed"):
            waiting.set()
            await asyncio.sleep(9)
        if ending == "failure" or current_node().attempt == 1:
            raise ConnectionError("gone")
        return state

    if ending == "backoff":
        runner = runner.with_policy_map(policies)
    if ending in ("cancelled", "backoff"):
        await cancel_after(runner.run([node], Num()), waiting)
    elif ending == "closed":
        run: Any = runner.run([node], Num())
        contextvars.copy_context().run(run.send, None)
        assert waiting.is_set()
        run.close()
    else:
        await runner.run([node], Num())
    last = 2 if ending in ("success", "failure") else 1
    assert calls == [f"attempt {last}", "first added"]


async def test_what_at_end_raises_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A callback that raises is logged and listed, the others are called, and the run completes."""
    calls: list[str] = []

    async def start(*_: Any) -> None:
        node = current_node()
        node.at_end(lambda: calls.append("called"))
        node.at_end(lambda: 1 // 0)

    runner = quick(hooks=NodeHooks(on_node_start=start))

    node = runner.node("node", input=Num, output=Num)(passing())
    result = await runner.run([node], Num())
    assert result.status is RunStatus.COMPLETED
    assert calls == ["called"]
    assert [(e.hook, e.node_id, type(e.exception)) for e in result.hook_errors] == [
        ("at_end", "node", ZeroDivisionError)
    ]
    assert "at_end" in caplog.text


async def test_current_run_is_the_run_of_every_hook_and_node() -> None:
    """current_run() is the run's own context in its hooks and nodes, in nested runs too; elsewhere None."""
    seen: list[tuple[str, ReliabilityContext | None, bool]] = []

    def note(what: str) -> None:
        seen.append((what, current_run(), current_node_or_none() is None))

    def hook(name: str) -> Any:
        async def tell(*_: Any) -> None:
            note(name)

        return tell

    runner = quick(
        hooks=NodeHooks(
            on_run_start=hook("run start"), on_run_end=hook("run end"), on_node_success=hook("success")
        )
    )

    @runner.node("inner", input=Num, output=Num)
    async def inner(state: Num) -> Num:
        note("inner")
        return state

    @runner.node("outer", input=Num, output=Num)
    async def outer(state: Num) -> Num:
        note("outer")
        await runner.run([inner], state, run_id="inner")
        note("outer again")
        return state

    await runner.run(Pipeline("p", [outer]), Num(), run_id="outer")
    ids = [(what, run and run.run_id, none) for what, run, none in seen]
    assert ids == [
        ("run start", "outer", True),
        ("outer", "outer", False),
        ("run start", "inner", True),
        ("inner", "inner", False),
        ("success", "inner", False),
        ("run end", "inner", True),
        ("outer again", "outer", False),
        ("success", "outer", False),
        ("run end", "outer", True),
    ]
    assert len({run for _, run, _ in seen}) == 2
    assert current_run() is None


async def test_notes_are_those_of_one_execution_and_of_one_run() -> None:
    """Notes are kept over the attempts of one execution, apart for each child of a group, and for the run."""
    runner = quick()
    findings: dict[str, list[Any]] = {"a": [], "b": []}

    def make(name: str) -> Any:
        @runner.node(name, input=Num, output=Num)
        async def node(state: Num) -> Num:
            here, run = current_node(), current_run()
            findings[name].append(dict(here.notes))
            here.notes[here.attempt] = name
            run.notes[name] = True
            if here.attempt == 1:
                raise ConnectionError("gone")
            return state

        return node

    seen: list[Any] = []

    async def ended(*_: Any) -> None:
        run = current_run()
        seen.append(run.notes)

    runner = runner.with_hooks(NodeHooks(on_run_end=ended))
    await runner.run([parallel(make("a"), make("b"))], Num())
    assert findings == {"a": [{}, {1: "a"}], "b": [{}, {1: "b"}]}
    assert seen == [{"a": True, "b": True}]


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_trace_context_is_carried_in_and_told_to_a_resumed_run() -> None:
    """run(traceparent=) is what hooks find, unless one sets its own; a resumed run finds the first."""
    seen: list[tuple[str | None, str | None]] = []
    own: list[str] = []

    async def start(*_: Any) -> None:
        run = current_run()
        seen.append((run.traceparent, run.first_traceparent))
        if own:
            run.keep_trace("", own.pop())

    fails = [True]
    runner = StromaRunner.quick(hooks=NodeHooks(on_run_start=start))

    @runner.node("node", input=Num, output=Num)
    async def node(state: Num) -> Num:
        if fails:
            raise ValueError("no")
        return state

    await runner.run([node], Num(), run_id="a", traceparent=PARENT)
    await runner.run([node], Num(), run_id="a", resume=True)
    own.append(PARENT.replace("b7", "c8"))
    await runner.run([node], Num(), run_id="b", traceparent=PARENT)
    await runner.run([node], Num(), run_id="b", resume=True, traceparent=PARENT)
    fails.clear()
    await runner.run([node], Num(), run_id="b")  # A restart is another execution.
    sibling = PARENT.replace("b7", "c8")
    assert seen == [(PARENT, None), (None, PARENT), (PARENT, None), (PARENT, sibling), (None, None)]


@pytest.mark.core
async def test_a_later_version_of_the_trace_context() -> None:
    """Of a version that is not known yet, the fields that are known count."""
    runner = StromaRunner.quick()

    @runner.node("node", input=Num, output=Num)
    async def node(state: Num) -> Num:
        run = current_run()
        assert run.traceparent == f"01{PARENT[2:]}-x"
        return state

    assert (await runner.run([node], Num(), traceparent=f"01{PARENT[2:]}-x")).status is RunStatus.COMPLETED


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "nonsense",
        PARENT[:-3],
        "ff" + PARENT[2:],
        PARENT.upper(),
        "00-" + "0" * 32 + PARENT[35:],
        PARENT + "-x",
        5,
    ],
)
async def test_what_is_no_trace_context_is_ignored(wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A traceparent comes from whoever called us: a broken one is named in the log, and the run goes on."""
    runner = StromaRunner.quick()

    @runner.node("node", input=Num, output=Num)
    async def node(state: Num) -> Num:
        run = current_run()
        assert run.traceparent is None
        return state

    assert (await runner.run([node], Num(), traceparent=wrong)).status is RunStatus.COMPLETED
    assert "not a W3C trace context" in caplog.text


async def test_plain_code_is_a_run_to_its_hooks() -> None:
    """`async with ctx:` around steps tells the run's start, at the first step, and end, however it ends."""
    seen: list[Any] = []

    async def start(run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        seen.append(("start", run_id, pipeline, state))

    async def end(run_id: str, result: Any) -> None:
        failure = result.failure and type(result.failure.exception).__name__
        seen.append(("end", run_id, str(result.status), failure, len(result.trace)))

    node = noting(seen, lambda _run_id, node_id, _: node_id)
    hooks = NodeHooks(on_run_start=start, on_run_end=end, on_node_start=node)
    runner = StromaRunner.quick(hooks=hooks, run_id="r", pipeline="loop")

    good = passing()
    async with context_of(runner) as ctx:
        await asyncio.gather(execute_step("a", good, Num(n=1), ctx), execute_step("b", good, Num(n=2), ctx))
    began = ("start", "r", "loop", {"n": 1})
    assert seen == [began, "a", "b", ("end", "r", "COMPLETED", None, 2)]
    seen.clear()
    async with context_of(runner) as ctx:
        await execute_step("bad", failing_with(ValueError, "no"), Num(n=1), ctx)
    assert seen == [began, "bad", "bad", ("end", "r", "PARTIAL", "ValueError", 2)]
    seen.clear()
    with pytest.raises(KeyError):
        async with context_of(runner) as ctx:
            await execute_step("a", good, Num(n=1), ctx)
            raise KeyError
    assert seen == [began, "a", ("end", "r", "INTERRUPTED", None, 1)]
    seen.clear()
    async with context_of(runner):
        pass  # Nothing was begun.
    assert seen == []


@pytest.mark.core
async def test_plain_code_that_is_closed_tells_its_end() -> None:
    """Code with `async with ctx:` around its steps that is closed, without awaits, tells its hooks."""
    seen: list[Any] = []

    start = noting(seen, lambda *_: "start")
    end = noting(seen, lambda _run_id, result: result.status)
    runner = StromaRunner.quick(hooks=NodeHooks(on_run_start=start, on_run_end=end))

    async def code() -> None:
        async with context_of(runner) as ctx:
            await execute_step("a", same, Num(), ctx)
            await asyncio.sleep(9)

    closed: Any = code()
    contextvars.copy_context().run(closed.send, None)
    closed.close()
    assert seen == ["start", RunStatus.INTERRUPTED]
