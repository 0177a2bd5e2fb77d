"""sentry_hooks in both modes of its SDK, beside other clients, and isolated node by node."""

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import sentry_sdk
from pydantic import BaseModel
from sentry_sdk.integrations.logging import LoggingIntegration
from tests.kit import NEVER, ONCE, Num, failing_with, passing
from tests.receivers.sentry import RecordedSentry

from stroma import Pipeline, StromaRunner, current_node, map_over, parallel
from stroma.telemetry import sentry_hooks

pytest_plugins = ["tests.receivers.fixtures"]

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def tree(sentry: RecordedSentry) -> set[tuple[str, str | None, str | None]]:
    """(name, op, name of the span above) of every span."""
    sentry.client.flush()
    spans = sentry.transport.spans
    names = {span["span_id"]: span["name"] for span in spans}
    return {(span["name"], span["op"], names.get(span["parent_span_id"])) for span in spans}


@pytest.mark.parametrize("mode", ["static", "stream"])
async def test_conversation_user_and_tags(mode: str) -> None:
    """Spans of a run, its nodes and model calls, and its issue, have its conversation, user and tags."""
    with RecordedSentry(trace_lifecycle=mode) as sentry:
        hooks = sentry_hooks(client=sentry.client)
        runner = StromaRunner.quick(hooks=hooks, policy_map=NEVER)
        tagged = StromaRunner.quick(hooks=hooks, policy_map=NEVER, tags=("beta", "eu"))
        both_run = asyncio.Barrier(2)

        @runner.node("ask", input=Num, output=Num)
        async def ask(state: Num) -> Num:
            await both_run.wait()
            if mode == "static":
                with sentry_sdk.start_span(op="gen_ai.chat", name="call"):
                    pass
            else:
                with sentry_sdk.traces.start_span(name="call", attributes={"sentry.op": "gen_ai.chat"}):
                    pass
            raise PermissionError

        await asyncio.gather(
            tagged.run(Pipeline("chat", [ask]), Num(), conversation="thread-17", user="ada"),
            runner.run(Pipeline("plain", [ask]), Num()),
        )
        sentry.client.flush()
        spans, events = sentry.transport.spans, sentry.transport.events
    names = ("gen_ai.conversation.id", "user.id", "stroma.tags")
    of_run = {span["trace_id"]: span["name"] for span in spans if span["name"] in ("chat", "plain")}
    found = {
        (of_run[span["trace_id"]], span["name"]): [(span["data"] or {}).get(name) for name in names]
        for span in spans
    }
    everything = ["thread-17", "ada", ["beta", "eu"]]
    assert found["chat", "chat"] == found["chat", "ask"] == everything
    assert found["chat", "call"][0] == "thread-17"
    for name in ("plain", "ask", "call"):
        assert found["plain", name][0] is found["plain", name][2] is None
    by_pipeline = {event["transaction"]: event for event in events}
    assert by_pipeline["chat"]["user"] == {"id": "ada"}
    about = {"gen_ai.conversation.id": "thread-17", "stroma.tags": "beta,eu"}
    assert by_pipeline["chat"]["tags"].items() >= about.items()
    assert not by_pipeline["plain"].get("user")
    assert not about.keys() & by_pipeline["plain"]["tags"].keys()


@pytest.mark.core
@pytest.mark.parametrize("mode", ["static", "stream"])
async def test_spans_of_a_run_in_both_modes(mode: str) -> None:
    """A run, its groups and its nodes are spans, as transactions and as streamed spans."""
    with RecordedSentry(trace_lifecycle=mode) as sentry:
        runner = StromaRunner.quick(hooks=sentry_hooks(client=sentry.client), policy_map=ONCE)

        @runner.node("a", input=Num, output=Num)
        async def a(state: Num) -> Num:
            if current_node().attempt == 1:
                raise ConnectionError
            return state

        bad = runner.node("bad", input=Num, output=Num)(failing_with(PermissionError))

        @runner.node("b", input=Num, output=Num)
        async def b(state: Num) -> Num:
            await asyncio.sleep(0)
            return state

        group = parallel(b, b)
        await runner.run(Pipeline("letters", [a, group, bad]), Num(), traceparent=TRACEPARENT)
        assert tree(sentry) == {
            ("letters", "gen_ai.invoke_agent", None),
            ("a", "function", "letters"),
            (group.node_id, "function", "letters"),
            ("b", "function", group.node_id),
            ("bad", "function", "letters"),
        }
        spans = sentry.transport.spans
        assert {span["trace_id"] for span in spans} == {TRACEPARENT.split("-")[1]}
        run, failed, fine = (sentry.transport.span(name) for name in ("letters", "bad", "a"))
        assert run["parent_span_id"] == "b7ad6b7169203331"
        assert run["data"]["gen_ai.agent.name"] == "letters"
        assert run["data"]["stroma.status"] == "PARTIAL"
        assert fine["status"] == "ok"
        assert failed["status"] == ("error" if mode == "stream" else "internal_error")
        assert run["status"] == ("error" if mode == "stream" else "unavailable")
        (event,) = sentry.transport.events
        assert event["contexts"]["trace"]["span_id"] == failed["span_id"]
        assert event["contexts"]["trace"]["trace_id"] == failed["trace_id"]


async def test_runs_of_streamed_spans_are_traces_of_their_own() -> None:
    """Without a span around it each run begins a trace; inside an application's span it is part."""
    with RecordedSentry(trace_lifecycle="stream") as sentry, sentry_sdk.new_scope() as scope:
        scope.set_client(sentry.client)
        runner = StromaRunner.quick(hooks=sentry_hooks(client=sentry.client))

        a = runner.node("a", input=Num, output=Num)(passing())
        for _ in range(2):
            await runner.run([a], Num())
        with sentry_sdk.traces.start_span(name="GET /"):
            await runner.run([a], Num())
        sentry.client.flush()
        runs = [span for span in sentry.transport.spans if span["name"] == "pipeline"]
        assert len({run["trace_id"] for run in runs}) == 3
        assert runs[2]["parent_span_id"] == sentry.transport.span("GET /")["span_id"]


@pytest.mark.core
async def test_two_clients_each_have_the_issue_and_the_spans() -> None:
    """Sets of hooks for two clients do not take each other's run for their parent, in nested runs either."""
    with RecordedSentry() as one, RecordedSentry() as two:
        sets = [sentry_hooks(client=sentry.client) for sentry in (one, two)]
        runner = StromaRunner.quick(hooks=sets, policy_map=NEVER)
        bad = runner.node("bad", input=Num, output=Num)(failing_with(PermissionError))

        @runner.node("outer", input=Num, output=Num)
        async def outer(state: Num) -> Num:
            result = await runner.run(Pipeline("inner", [bad]), state)
            result.raise_for_status()
            return state

        await runner.run(Pipeline("all", [outer]), Num())
        for sentry in (one, two):
            assert [event["fingerprint"][1:3] for event in sentry.transport.events] == [["inner", "bad"]]
            assert tree(sentry) == {
                ("all", "gen_ai.invoke_agent", None),
                ("outer", "function", "all"),
                ("inner", "gen_ai.invoke_agent", "outer"),
                ("bad", "function", "inner"),
            }
        assert [dict(each.errors) for each in sets] == [{}, {}]


@pytest.mark.core
async def test_what_a_node_tags_is_its_own(sentry: RecordedSentry) -> None:
    """sentry_sdk.set_tag() in a node stays out of siblings and later nodes; breadcrumbs do not."""
    runner = StromaRunner.quick(hooks=sentry_hooks(client=sentry.client), policy_map=NEVER)

    @runner.node("a", input=Num, output=Num)
    async def a(state: Num) -> Num:
        sentry_sdk.set_tag("who", "a")
        await asyncio.sleep(0.01)
        sentry_sdk.add_breadcrumb(message="a was here")
        sentry_sdk.capture_message("from a")
        return state

    @runner.node("b", input=Num, output=Num)
    async def b(state: Num) -> Num:
        sentry_sdk.set_tag("who", "b")
        await asyncio.sleep(0)
        sentry_sdk.capture_message("from b")
        return state

    @runner.node("c", input=Num, output=Num)
    async def c(state: Num) -> Num:
        sentry_sdk.capture_message("from c")
        sentry_sdk.set_tag("who", "c")
        raise PermissionError

    await runner.run([parallel(a, b), c], Num())
    events = {event.get("message"): event for event in sentry.transport.events}
    assert {message: event["tags"].get("who") for message, event in events.items()} == {
        "from a": "a",
        "from b": "b",
        "from c": None,
        None: "c",  # The issue of the run: with what the node that failed has tagged.
    }
    assert {event["tags"]["stroma.pipeline"] for event in events.values()} == {"pipeline"}
    assert [crumb["message"] for crumb in events["from c"]["breadcrumbs"]["values"]] == ["a was here"]


@pytest.mark.core
@pytest.mark.parametrize("how", ["await", "task", "gather"])
async def test_an_exception_raised_further_makes_no_second_issue(how: str, sentry: RecordedSentry) -> None:
    """An integration's capture of result.raise_for_status() is the same failure in whichever task."""
    runner = StromaRunner.quick(hooks=sentry_hooks(client=sentry.client))
    a = runner.node("a", input=Num, output=Num)(failing_with(PermissionError, "a customer's text"))
    begin: dict[str, Callable[[Coroutine[Any, Any, Any]], Any]] = {
        "await": lambda run: run,
        "task": asyncio.create_task,
        "gather": asyncio.gather,
    }
    with sentry_sdk.new_scope() as scope:
        scope.set_client(sentry.client)
        result = await begin[how](runner.run([a], Num()))
        result = result[0] if isinstance(result, list) else result
        try:
            result.raise_for_status()
        except PermissionError as error:
            sentry_sdk.capture_exception(error)
        (event,) = sentry.transport.events
        assert event["exception"]["values"][-1]["value"] == "AMBIGUOUS"
        sentry_sdk.capture_exception(PermissionError("another"))
        assert len(sentry.transport.events) == 2


@pytest.mark.core
async def test_scopes_of_collected_items_are_released(sentry: RecordedSentry) -> None:
    """A map that collects failures keeps no scope of an item that failed."""

    class Item(BaseModel):
        value: int

    class Many(BaseModel):
        items: list[int] = list(range(100))
        out: list[dict[str, Any]] = []

    runner = StromaRunner.quick(hooks=sentry_hooks(client=sentry.client))
    alive: list[int] = []
    item = runner.node("item", input=Item, output=Item)(failing_with(LookupError))

    @runner.node("look", input=Many, output=Many)
    async def look(state: Many) -> Many:
        gc.collect()
        alive.append(sum(isinstance(one, sentry_sdk.Scope) for one in gc.get_objects()))
        return state

    mapped: Any = map_over("items", item, into="out", on_item_failure="collect", max_concurrency=5)
    await runner.run([look, mapped, look], Many())
    before, after = alive
    assert after <= before + 5
    assert sentry.transport.events == []


@pytest.mark.core
async def test_the_engines_lines_are_no_sentry_logs() -> None:
    """With enable_logs=True the engine's lines, with texts of exceptions, do not leave; others do."""
    integrations = [LoggingIntegration(level=logging.INFO, event_level=None, sentry_logs_level=logging.INFO)]
    with (
        RecordedSentry(enable_logs=True, integrations=integrations) as sentry,
        sentry_sdk.new_scope() as scope,
    ):
        scope.set_client(sentry.client)
        runner = StromaRunner.quick(hooks=sentry_hooks(client=sentry.client), policy_map=NEVER)

        @runner.node("a", input=Num, output=Num)
        async def a(state: Num) -> Num:
            logging.getLogger("letters").warning("of the application")
            raise ValueError("IBAN DE89 of a customer")

        await runner.run([a], Num())
        sentry.client.flush()
        items = [item for payload in sentry.transport._payloads("log") for item in payload["items"]]
        assert [item["body"] for item in items] == ["of the application"]
