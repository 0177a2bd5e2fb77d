"""Spans and counts at the odd ends of an attempt: repeated, closed half-way, behind a slow neighbour."""

from __future__ import annotations

import asyncio
import contextvars
import pathlib
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from pydantic import BaseModel
from tests.kit import computing, failing_with, passing
from tests.telemetry.test_opentelemetry import Item, Seen, State, quick

from stroma import NodeHooks, RunStatus, SQLiteStore, StromaRunner, Suspend, current_node, parallel


def outcome_of(span: Any) -> tuple[Any, Any]:
    return span.attributes["stroma.outcome"], span.attributes.get("stroma.redelivered")


def asking(runner: StromaRunner, outcome: str) -> Any:
    @runner.node("node", input=Item, output=Item)
    async def node(state: Item) -> Any:
        current_node().report_usage(input_tokens=3, output_tokens=4, model="gpt-4o-mini")
        if outcome == "failure":
            raise ValueError("no")
        if outcome == "suspended":
            raise Suspend("may I?")
        return state

    return node


@pytest.mark.core
@pytest.mark.parametrize("outcome", ["success", "failure", "suspended"])
async def test_an_end_that_is_told_again_is_a_span_that_ends(outcome: str, tmp_path: pathlib.Path) -> None:
    """An end hook that a dead process owed is one marked span of the attempt's time, and its tokens count."""

    async def die(*_: Any) -> None:
        raise KeyboardInterrupt  # As good as a death: nobody else is told.

    seen = Seen()
    options: dict[str, Any] = {"retries": 0, "hook_delivery": "at_least_once", "resume": True}
    async with SQLiteStore(tmp_path / "runs.db") as store:
        runner = quick(NodeHooks(**{f"on_node_{outcome}": die}), store=store, **options)
        with pytest.raises(KeyboardInterrupt):
            await runner.run([asking(runner, outcome)], Item(n=1), run_id="r")
        if outcome == "suspended":
            await runner.signal("r", True)
        runner = quick(seen.hooks(), store=store, **options)
        await runner.run([asking(runner, "success")], Item(n=1), run_id="r")
    first = seen.named("stroma.node node")[0]
    assert outcome_of(first) == (outcome, True)
    assert first.end_time <= seen.span("invoke_workflow pipeline").start_time
    assert first.status.status_code is StatusCode.UNSET  # The node has succeeded since.
    attempts = 1 if outcome == "success" else 2
    assert [outcome_of(span) for span in seen.named("stroma.node node")][1:] == [("success", None)] * (
        attempts - 1
    )
    assert seen.total("stroma.node.executions") == attempts
    assert seen.total("stroma.tokens") == 7 * attempts


@pytest.mark.core
@pytest.mark.parametrize("outcome", ["success", "failure", "suspended", "cancelled"])
async def test_a_cancelled_hook_is_not_told_again(outcome: str, tmp_path: pathlib.Path) -> None:
    """A cancellation in a neighbour's end hook: every set was called, so a resume counts no token twice."""
    waits = asyncio.Event()
    seen = Seen()

    async def slow(*_: Any) -> None:
        waits.set()
        await asyncio.sleep(60)

    options: dict[str, Any] = {"retries": 0, "hook_delivery": "at_least_once", "resume": True}
    async with SQLiteStore(tmp_path / "runs.db") as store:
        runner = quick(seen.hooks() | NodeHooks(**{f"on_node_{outcome}": slow}), store=store, **options)

        @runner.node("long", input=Item, output=Item)
        async def long(state: Item) -> Item:
            await asyncio.sleep(60)
            return state

        node = long if outcome == "cancelled" else asking(runner, outcome)
        task = asyncio.create_task(runner.run([node], Item(n=1), run_id="r"))
        if outcome == "cancelled":
            while not store.exists() or not await asyncio.to_thread(store.list_runs):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            task.cancel()
        await waits.wait()
        task.cancel()
        await asyncio.wait([task])
        counted = seen.total("stroma.node.executions"), seen.total("stroma.tokens")
        assert counted == (1, 0 if outcome == "cancelled" else 7)
        if outcome == "suspended":
            await runner.signal("r", True)
        later = Seen()
        runner = quick(later.hooks(), store=store, **options)

        quickly = runner.node(node._stroma_node_id, input=Item, output=Item)(passing())
        await runner.run([quickly], Item(n=1), run_id="r")
    assert later.total("stroma.tokens") == 0
    assert later.total("stroma.node.executions") == (0 if outcome == "success" else 1)


@pytest.mark.core
class TestClosed:
    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
    @pytest.mark.parametrize(
        "event",
        [
            "on_run_start",
            "on_node_start",
            "on_node_success",
            "on_node_failure",
            "on_node_retry",
            "on_node_suspended",
            "on_run_end",
        ],
    )
    async def test_in_a_neighbours_hook(self, event: str, caplog: pytest.LogCaptureFixture) -> None:
        """G9: closed while a neighbour's hook awaits, a coroutine ends each span and gauge."""
        seen = Seen()

        async def slow(*_: Any) -> None:
            await asyncio.sleep(60)

        neighbour, own = NodeHooks(**{event: slow}), seen.hooks(attempts="spans")
        starts = event in ("on_run_start", "on_node_start", "on_node_retry")
        runner = quick(neighbour | own if starts else own | neighbour, retries=1)

        @runner.node("node", input=State, output=State)
        async def node(state: State) -> Any:
            if event in ("on_node_failure", "on_node_retry"):
                raise ValueError("no")
            if event == "on_node_suspended":
                raise Suspend("may I?")
            return state, 3, 4, "gpt-4o-mini"

        run: Any = runner.run([node], State())
        contextvars.copy_context().run(run.send, None)
        with seen.user.start_as_current_span("mine") as mine:
            run.close()
            assert trace.get_current_span() is mine
        assert not any(seen.points("stroma.runs.active").values())
        assert sum(own.errors.values()) == 0
        assert "Failed to detach" not in caplog.text
        assert seen.total("stroma.node.executions") == (0 if event == "on_run_start" else 1)
        assert seen.total("stroma.tokens") == (7 if event in ("on_node_success", "on_run_end") else 0)
        names = {span.name for span in seen.spans}
        assert ({"invoke_workflow pipeline", "stroma.node node"} <= names) == (event != "on_run_start")

    async def test_between_two_of_their_lines(self, caplog: pytest.LogCaptureFixture) -> None:
        """A run that is closed from elsewhere resets no foreign context: the SDK has no complaint."""
        seen = Seen()
        runner = quick(seen.hooks(attempts="spans"))

        @runner.node("node", input=State, output=State)
        async def node(state: State) -> State:
            await asyncio.sleep(60)
            return state

        run: Any = runner.run([node], State())
        contextvars.copy_context().run(run.send, None)
        run.close()
        assert "Failed to detach" not in caplog.text
        assert len(seen.spans) == 3


@pytest.mark.core
async def test_a_contract_that_cannot_be_read() -> None:
    """A node whose contract is not fully defined has a span that ends, under its group."""

    class Half(BaseModel):
        x: Missing  # noqa: F821

    seen = Seen()
    runner = quick(seen.hooks(), retries=0)
    half = runner.node("half", input=Half, output=Half)(failing_with(AssertionError))

    whole = runner.node("whole", input=State, output=State)(passing())
    result = await runner.run([half], State())
    assert result.status is RunStatus.FAILED
    expected = [("invoke_workflow pipeline", None), ("stroma.node half", "invoke_workflow pipeline")]
    assert seen.tree() == expected
    await runner.run([parallel(whole, half)], State())
    assert seen.total("stroma.node.executions") == len(seen.spans) - 2


async def test_at_end_after_a_restored_node() -> None:
    """What a hook of a restored node leaves with at_end() is called."""
    seen: list[str] = []

    async def skipped(*_: Any) -> None:
        current_node().at_end(lambda: seen.append("called"))

    runner = quick(NodeHooks(on_node_skipped=skipped))

    node = runner.node("node", input=Item, output=Item)(passing())
    await runner.run([node], Item(n=1), run_id="r")
    await runner.run([node], Item(n=1), run_id="r", resume=True)
    assert seen == ["called"]


@pytest.mark.core
async def test_a_model_that_no_protocol_can_say() -> None:
    """A lone surrogate in the name of a model costs the metrics no label: it is written out."""
    seen = Seen()
    runner = quick(seen.hooks())
    node = runner.node("node", input=State, output=State)(computing(lambda state: (state, 1, "model \udcff")))
    await runner.run([node], State())
    models = {dict(labels)["stroma.model"] for labels in seen.points("stroma.tokens")}
    assert models == {"model \\udcff"}
