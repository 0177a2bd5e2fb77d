"""Attribution: spans of whoever makes them belong to the run, node, conversation and user around them."""

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry import baggage, context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import set_span_in_context
from pydantic import BaseModel, ValidationError
from tests.fixtures import store_fixture
from tests.kit import Item, passing
from tests.shared_stores import FAMILIES
from tests.telemetry.test_opentelemetry import Seen

from stroma import Pipeline, RunConfig, StromaRunner, current_node, current_run, map_over, parallel
from stroma.adapters import Guard
from stroma.telemetry import AttributionProcessor
from stroma.telemetry.attribution import watch


class State(BaseModel):
    n: int = 0
    items: list[Item] = [Item(n=1), Item(n=2), Item(n=3)]


store = store_fixture(*FAMILIES)


@pytest.fixture
def seen() -> Seen:
    return Seen()


def about(span: ReadableSpan) -> dict[str, Any]:
    attributes = dict(span.attributes or {})
    names = ("stroma.pipeline", "stroma.node.id", "session.id", "gen_ai.conversation.id", "user.id")
    return {name: attributes[name] for name in names if name in attributes}


@pytest.mark.core
async def test_every_span_has_conversation_user_and_tags(seen: Seen) -> None:
    """Spans of the run, of its nodes and of inner libraries carry conversation, user, session and tags."""
    runner = StromaRunner.quick(hooks=seen.hooks(), pipeline="chat", tags=("nightly",))

    @runner.node("ask", input=State, output=State)
    async def ask(state: State) -> State:
        run = current_run()
        assert (run.conversation, run.user) == ("c-1", "u-7")
        with seen.user.start_as_current_span("call"):
            return state

    await runner.run([ask], State(), conversation="c-1", user="u-7")
    ids = {"stroma.pipeline": "chat", "session.id": "c-1", "gen_ai.conversation.id": "c-1", "user.id": "u-7"}
    for span in seen.spans:
        assert about(span).items() >= ids.items(), span.name
        assert dict(span.attributes or {})["stroma.tags"] == ("nightly",)
    assert about(seen.span("call"))["stroma.node.id"] == "ask"


@pytest.mark.core
async def test_all_spans_below_a_node_are_attributed(seen: Seen) -> None:
    """Spans in tasks, groups, threads, generators, children of groups and items belong to their node."""
    runner = StromaRunner.quick(hooks=seen.hooks())

    async def call(name: str) -> None:
        with seen.user.start_as_current_span(name):
            await asyncio.sleep(0)
            with seen.user.start_as_current_span(f"{name}/inner"):
                await asyncio.sleep(0)

    def call_in_thread(name: str) -> None:
        seen.user.start_span(name).end()

    async def generate(name: str) -> AsyncIterator[int]:
        with seen.user.start_as_current_span(name):
            yield 1
            await call(f"{name}/more")

    @runner.node("wide", input=State, output=State)
    async def wide(state: State) -> State:
        await asyncio.gather(*(call(f"wide gather {n}") for n in range(3)))
        async with asyncio.TaskGroup() as group:
            group.create_task(call("wide task"))
        await asyncio.to_thread(call_in_thread, "wide thread")
        thread = threading.Thread(
            target=contextvars.copy_context().run, args=(call_in_thread, "wide own thread")
        )
        thread.start()
        thread.join()
        async for _ in generate("wide generator"):
            pass
        return state

    @runner.node("left", input=State, output=State)
    async def left(state: State) -> State:
        await call("left call")
        return state

    @runner.node("right", input=State, output=State)
    def right(state: State) -> State:
        call_in_thread("right call")
        return state

    @runner.node("each", input=Item, output=Item)
    async def each(item: Item) -> Item:
        await call("each call")
        return item

    async def one(conversation: str) -> None:
        nodes = [wide, parallel(left, right), map_over("items", each, into="items")]
        await runner.run(nodes, State(), conversation=conversation)

    await asyncio.gather(one("first"), one("second"))
    of_others = [
        span
        for span in seen.spans
        if span.instrumentation_scope and span.instrumentation_scope.name == "user"
    ]
    assert len(of_others) == 2 * (6 + 2 + 1 + 1 + 3 + 2 + 1 + 6)
    for span in of_others:
        assert about(span)["stroma.node.id"] == span.name.split()[0]
        assert about(span)["gen_ai.conversation.id"] in ("first", "second")
    for conversation in ("first", "second"):
        traces = {
            span.context.trace_id for span in seen.spans if about(span).get("session.id") == conversation
        }
        assert len(traces) == 1


async def test_a_span_follows_its_parent_and_not_its_task(seen: Seen) -> None:
    """A span with a parent of another run belongs to that run; one outside of all runs is left alone."""
    runner = StromaRunner.quick(hooks=seen.hooks())
    contexts: list[Any] = []

    @runner.node("first", input=State, output=State)
    async def first(state: State) -> State:
        contexts.append(context.get_current())
        return state

    @runner.node("second", input=State, output=State)
    async def second(state: State) -> State:
        seen.user.start_span("late", context=contexts[0]).end()
        return state

    await runner.run([first], State(), user="a")
    await runner.run([second], State(), user="b")
    seen.user.start_span("outside").end()
    assert about(seen.span("late")).items() >= {"user.id": "a", "stroma.node.id": "first"}.items()
    assert about(seen.span("outside")) == {}


@pytest.mark.parametrize("way", ["with", "async with"])
def test_spans_between_a_guarded_run_and_its_steps_are_in_its_trace(seen: Seen, way: str) -> None:
    """Spans inside ``with guard.run()`` and outside any step are in the trace of the run and attributed."""
    guard = Guard(StromaRunner.quick(hooks=seen.hooks()))

    @guard.step("model")
    def model() -> str:
        return "answer"

    def framework() -> None:
        with seen.user.start_as_current_span("framework"):
            model()

    async def main() -> None:
        async with guard.run(conversation="c-1"):
            await asyncio.to_thread(framework)

    if way == "with":
        with guard.run(conversation="c-1"):
            framework()
    else:
        asyncio.run(main())
    assert len({span.context.trace_id for span in seen.spans}) == 1
    assert seen.span("framework").parent == seen.span("invoke_workflow pipeline").context
    assert about(seen.span("framework"))["gen_ai.conversation.id"] == "c-1"
    seen.user.start_span("outside").end()
    assert seen.span("outside").parent is None


async def test_a_call_under_a_span_of_a_framework_belongs_to_the_node_that_makes_it(seen: Seen) -> None:
    """A span is of its task's node if that is inside its parent's: frameworks choose their own parents."""
    guard = Guard(StromaRunner.quick(hooks=seen.hooks(inference="auto")))
    around: list[Any] = []

    def call(name: str) -> None:
        with seen.user.start_as_current_span(name, context=set_span_in_context(around[-1])) as span:
            span.set_attribute("gen_ai.usage.input_tokens", 5)

    @guard.step("model")
    async def model() -> Any:
        call("call")
        current_node().report_usage(input_tokens=5)

    @guard.step("agent")
    async def agent() -> None:
        with seen.user.start_as_current_span("turn") as span:
            around.append(span)
            await model()

    async with guard.run():
        with seen.user.start_as_current_span("chain") as span:
            around.append(span)
            await model()
            await agent()
    found = [about(span).get("stroma.node.id") for span in seen.named("call")]
    assert found == ["model", "model"]
    assert about(seen.span("turn"))["stroma.node.id"] == "agent"
    assert "stroma.node.id" not in about(seen.span("chain"))
    # They report the usage of their node, so that no span of a call is made for it.
    assert not [span.name for span in seen.spans if span.name.startswith("chat")]


def test_a_provider_is_watched_when_a_run_begins_beside_another() -> None:
    """Of two runs that begin in two threads, neither goes on before the provider has the processor."""
    is_adding, may_add, is_watched = threading.Event(), threading.Event(), threading.Event()

    class SlowProvider(TracerProvider):
        def add_span_processor(self, span_processor: SpanProcessor) -> None:
            is_adding.set()
            may_add.wait(10)
            super().add_span_processor(span_processor)

    provider = SlowProvider()

    def second() -> None:
        watch(provider)
        is_watched.set()

    threads = [threading.Thread(target=watch, args=(provider,)), threading.Thread(target=second)]
    threads[0].start()
    assert is_adding.wait(10)
    threads[1].start()
    assert not is_watched.wait(0.05)
    may_add.set()
    for thread in threads:
        thread.join(10)
    assert is_watched.is_set()


async def test_a_provider_of_ones_own(seen: Seen) -> None:
    """AttributionProcessor does the same for a provider that our hooks do not send to."""
    other = TracerProvider()
    other.add_span_processor(AttributionProcessor())
    runner = StromaRunner.quick(hooks=seen.hooks())

    @runner.node("ask", input=State, output=State)
    async def ask(state: State) -> State:
        with other.get_tracer("other").start_as_current_span("call") as span:
            assert about(span)["stroma.node.id"] == "ask"
        return state

    await runner.run([ask], State())


async def test_a_resume_and_a_fork_belong_where_the_run_belongs(seen: Seen, store: Any) -> None:
    """A resume and a fork have the run's conversation, user and session, and link to its last trace."""
    runner = StromaRunner.quick(hooks=seen.hooks(), store=store)
    waits = [True]

    first = runner.node("first", input=State, output=State)(passing())

    @runner.node("second", input=State, output=State)
    async def second(state: State) -> State:
        if waits:
            raise ValueError
        return state

    pipeline = Pipeline("talk", [first, second])
    await runner.run(pipeline, State(), run_id="r", user="u-7")
    waits.clear()
    await runner.resume(pipeline, "r")
    await runner.fork("r", pipeline, at="second", new_run_id="f")
    await runner.fork("f", pipeline, at="second", new_run_id="g", conversation="c-2")
    runs = seen.named("invoke_workflow talk")
    assert [about(span)["session.id"] for span in runs] == ["r", "r", "r", "c-2"]
    assert {about(span)["user.id"] for span in runs} == {"u-7"}
    before = [[], *([span.context.trace_id] for span in runs[:-1])]
    assert [[link.context.trace_id for link in span.links] for span in runs] == before


async def test_a_new_execution_is_attributed_anew(seen: Seen, store: Any) -> None:
    """A run id that begins again has the conversation of its own call, not that of the execution before."""
    runner = StromaRunner.quick(hooks=seen.hooks(), store=store)

    ask = runner.node("ask", input=State, output=State)(passing())
    await runner.run([ask], State(), run_id="r", conversation="c-1")
    await runner.run([ask], State(), run_id="r")
    assert [about(span).get("gen_ai.conversation.id") for span in seen.named("invoke_workflow pipeline")] == [
        "c-1",
        None,
    ]


async def test_baggage_on_request(seen: Seen) -> None:
    """With baggage=True the ids of run, session and user go to other services, else nothing."""
    carried: list[dict[str, object]] = []
    for options in ({}, {"baggage": True}):
        runner = StromaRunner.quick(hooks=seen.hooks(**options))

        @runner.node("ask", input=State, output=State)
        async def ask(state: State) -> State:
            carried.append(dict(baggage.get_all()))
            return state

        await runner.run([ask], State(), run_id="r", conversation="c-1", user="u-7")
    assert carried == [{}, {"stroma.run.id": "r", "session.id": "c-1", "user.id": "u-7"}]
    assert not baggage.get_all()


async def test_guarded_runs_are_attributed(seen: Seen) -> None:
    """A guard's run takes conversation and user; tools are tools and agents agents, in each other too."""
    guard = Guard(StromaRunner.quick(hooks=seen.hooks()))

    @guard.step("search", role="tool")
    async def search(text: str) -> str:
        seen.user.start_span("call").end()
        return text

    @guard.step("librarian", role="agent")
    async def librarian() -> str:
        return await ask("more words")

    @guard.step("ask", role="tool")
    async def ask(text: str) -> str:
        return text

    async with guard.run(conversation="c-1", user="u-7"):
        await search("words")
        await librarian()
    assert about(seen.span("call")).items() >= {"user.id": "u-7", "gen_ai.conversation.id": "c-1"}.items()
    kinds = {span.name: dict(span.attributes or {}).get("openinference.span.kind") for span in seen.spans}
    assert (kinds["execute_tool search"], kinds["execute_tool ask"]) == ("TOOL", "TOOL")
    assert kinds["invoke_agent librarian"] == "AGENT"
    for wrong in ({"user": ""}, {"conversation": "x" * 201}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            guard.run(**wrong)


@pytest.mark.core
def test_illegal_ids_are_refused() -> None:
    """An empty, overlong or non-text id of a conversation or user is refused where it is given."""
    for wrong in ({"user": ""}, {"conversation": "x" * 201}, {"user": 7}):
        with pytest.raises(ValidationError):
            RunConfig(**wrong)
