"""The wire formats: schemas of the published packages, the rule of texts, and what leaves the process."""

import asyncio
import copy
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from ag_ui.core import Event
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter
from tests.kit import Note as Reply
from tests.wire.scenes import REQUEST, SCENES, Scene, chunks_of, mapped, random_scene

from stroma import (
    CheckpointNotFound,
    FailureClass,
    FailurePolicy,
    Flow,
    InMemoryStore,
    StreamEvent,
    StromaRunner,
    current_node,
)
from stroma.wire import SSE_HEADERS, VERCEL_HEADERS, ag_ui, sse, vercel

AT_ONCE = {
    FailureClass.RECOVERABLE: FailurePolicy(max_retries=2, backoff_seconds=0),
    FailureClass.AMBIGUOUS: FailurePolicy(max_retries=2, backoff_seconds=0),
}
_EVENT: TypeAdapter[Any] = TypeAdapter(Event)


def texts_of(protocol: str, chunks: list[dict[str, Any]]) -> list[str]:
    """Return the texts that a page shows at the end of a stream, as the clients in test_clients.py do."""
    messages: dict[str, str] = {}
    hidden: set[str] = set()
    for chunk in chunks:
        match chunk["type"]:
            case "TEXT_MESSAGE_CONTENT":
                messages[chunk["messageId"]] += chunk["delta"]
            case "TEXT_MESSAGE_START":
                messages[chunk["messageId"]] = ""
            case "MESSAGES_SNAPSHOT":
                messages = {
                    one["id"]: one["content"] for one in chunk["messages"] if one["role"] == "assistant"
                }
            case "text-start":
                messages[chunk["id"]] = ""
            case "text-delta":
                messages[chunk["id"]] += chunk["delta"]
            case "data-discarded":
                hidden.add(chunk["id"])
    return [text for id, text in messages.items() if id not in hidden]


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
@pytest.mark.parametrize("protocol", ["ag_ui", "vercel"])
async def test_only_texts_of_successful_attempts_remain(protocol: str, scene: Scene) -> None:
    """A failed, dead, superseded or cut text is discarded, and nothing follows the end."""
    chunks = await chunks_of(protocol, scene)
    assert texts_of(protocol, chunks) == scene.texts
    assert [chunk["type"] for chunk in chunks if chunk["type"] in _LAST] == [chunks[-1]["type"]]


_LAST = ("RUN_FINISHED", "RUN_ERROR", "finish", "abort")


@given(st.integers(0, 2**32))
async def test_each_call_shows_the_text_of_its_output(seed: int) -> None:
    """However attempts of calls at once fail, die, lose events and are restored."""
    scene = random_scene(seed)
    for protocol in ("ag_ui", "vercel"):
        assert sorted(texts_of(protocol, await chunks_of(protocol, scene))) == scene.texts


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
async def test_every_event_is_one_of_ag_ui(scene: Scene) -> None:
    """The models of the package ag-ui-protocol take each event, and write the same."""
    for chunk in await chunks_of("ag_ui", scene):
        event = _EVENT.validate_python(chunk)
        assert json.loads(event.model_dump_json(by_alias=True)) == chunk


async def test_ids_are_those_of_the_request_or_of_the_run() -> None:
    """AG-UI's first and last events have the ids that the client sent; without a request those of the run."""
    ends = [
        chunk for chunk in await chunks_of("ag_ui", SCENES["streamed"]) if chunk["type"].startswith("RUN")
    ]
    assert {(one["threadId"], one["runId"]) for one in ends} == {("thread", "request")}
    scene = Scene(SCENES["retried"].story, [], request=None)
    chunks = await chunks_of("ag_ui", scene)
    assert (chunks[0]["threadId"], chunks[0]["runId"]) == ("r1", "r1")
    discarded = [chunk["value"]["messageId"] for chunk in chunks if chunk.get("name") == "stroma.discarded"]
    assert discarded == [chunk["messageId"] for chunk in chunks if chunk["type"] == "TEXT_MESSAGE_START"][:1]
    assert "MESSAGES_SNAPSHOT" not in {
        chunk["type"] for chunk in chunks
    }  # It would remove what it does not know.


@pytest.mark.parametrize("protocol", ["ag_ui", "vercel"])
async def test_outputs_are_there_and_inputs_are_not(protocol: str) -> None:
    """A page gets the truth of each node, and what nodes emit, by its name; no node's input."""
    chunks = json.dumps(await chunks_of(protocol, SCENES["other events"]))
    assert '"output": {"text": "x"}' in chunks
    assert '{"n": 1}' in chunks
    assert "secret" not in chunks


async def test_parts_of_the_items_of_a_map_do_not_stay_in_the_message() -> None:
    """A message of the Vercel AI SDK has a part for each node, not for each of a map's ten thousand items."""
    chunks = await chunks_of("vercel", SCENES["two at once"])
    assert all(chunk["transient"] for chunk in chunks if chunk["type"] == "data-node")
    chunks = await chunks_of("vercel", SCENES["streamed"])
    assert {chunk["id"] for chunk in chunks if chunk["type"] == "data-node" and "transient" not in chunk} == {
        "119:"
    }


async def test_a_stream_of_server_sent_events() -> None:
    """Chunks are data; that of the Vercel AI SDK ends with its mark; events of a run have ids."""
    vercel = [part async for part in sse(mapped("vercel", SCENES["streamed"]))]
    assert vercel[0] == 'data: {"type": "start", "messageId": "r1"}\n\n'
    assert vercel[-1] == "data: [DONE]\n\n"
    assert VERCEL_HEADERS == {**SSE_HEADERS, "x-vercel-ai-ui-message-stream": "v1"}
    assert (SSE_HEADERS["cache-control"], SSE_HEADERS["x-accel-buffering"]) == ("no-store", "no")
    ag_ui = [part async for part in sse(mapped("ag_ui", SCENES["streamed"]))]
    assert json.loads(ag_ui[-1].removeprefix("data: "))["type"] == "RUN_FINISHED"

    async def events() -> Any:
        yield SCENES["streamed"].events[0]

    assert [part async for part in sse(events())] == [SCENES["streamed"].events[0].to_sse()]


async def test_a_silent_stream_has_comments_and_loses_nothing() -> None:
    """A comment comes for each period without a message, so that no proxy closes the connection."""
    (first, second, *_) = SCENES["streamed"].events
    go_on = asyncio.Event()

    async def events() -> AsyncIterator[StreamEvent]:
        async with asyncio.timeout(60):  # Of one task, over the yields.
            yield first
            await go_on.wait()
            yield second

    messages = sse(events(), ping_seconds=0.001)
    received = [await anext(messages) for _ in range(4)]
    assert received == [first.to_sse(), *[": ping\n\n"] * 3]
    go_on.set()
    rest = [message async for message in messages if message != ": ping\n\n"]
    assert rest == [second.to_sse()]


async def test_a_reader_who_leaves_ends_the_iterator() -> None:
    """Leaving in the silence cancels what is read; nothing is read before the reader asks for it."""
    first = SCENES["streamed"].events[0]
    steps: list[str] = []

    async def events() -> AsyncIterator[StreamEvent]:
        try:
            yield first
            steps.append("asked again")
            await asyncio.Event().wait()
        finally:
            steps.append("ended")

    messages = sse(events(), ping_seconds=0.001)
    while await anext(messages) == ": ping\n\n":
        pass
    await asyncio.sleep(0)
    assert steps == []
    assert await anext(messages) == ": ping\n\n"
    assert isinstance(messages, AsyncGenerator)
    await messages.aclose()
    assert steps == ["asked again", "ended"]


async def test_the_stream_of_a_deleted_run_ends() -> None:
    """The browser connects again, and the endpoint answers with a status; other errors are raised."""

    async def failing(error: Exception) -> AsyncIterator[StreamEvent]:
        yield SCENES["streamed"].events[0]
        raise error

    assert len([message async for message in sse(failing(CheckpointNotFound("gone")))]) == 1
    with pytest.raises(ValueError, match="other"):
        _ = [message async for message in sse(failing(ValueError("other")))]


async def test_the_rest_of_a_run_is_not_read_after_its_end() -> None:
    """A page's request ends with the run, or once it waits for an answer: then another request continues."""
    story = copy.deepcopy(SCENES["asks"].story).add("run_end", details={"status": "COMPLETED"})
    chunks = await chunks_of("ag_ui", Scene(story, []))
    assert chunks[-1]["outcome"]["type"] == "interrupt"
    assert REQUEST["messages"] == [{"id": "u1", "role": "user", "content": "Hello?"}]


class Approval(BaseModel):
    ok: bool


@pytest.mark.parametrize("protocol", ["ag_ui", "vercel"])
async def test_a_run_that_retries_and_asks(protocol: str) -> None:
    """In a real run a failed attempt's half sentence is discarded; an open question has its id and schema."""
    store = InMemoryStore()
    runner = StromaRunner.quick(store=store, run_id="r1", policy_map=AT_ONCE)

    @runner.node("write", input=Reply, output=Reply)
    async def write(state: Reply) -> Reply:
        node = current_node()
        node.emit("Hel")
        if node.attempt == 1:
            raise TimeoutError("lost")
        node.emit("lo")
        return Reply(text="Hello")

    @runner.flow("chat", input=Reply, output=Reply)
    async def chat(flow: Flow, state: Reply) -> Reply:
        reply = await flow.step(write, state)
        await flow.wait_for(Approval, reason="Send it?")
        return reply

    async def read(resume: bool) -> list[dict[str, Any]]:
        async with runner.stream(chat, Reply(), resume=resume) as stream:
            mapper = ag_ui(stream, REQUEST) if protocol == "ag_ui" else vercel(stream)
            return [chunk async for chunk in mapper]

    chunks = await read(resume=False)
    assert texts_of(protocol, chunks) == ["Hello"]
    if protocol == "ag_ui":
        (question,) = chunks[-1]["outcome"]["interrupts"]
        assert question["message"] == "Send it?"
        assert question["responseSchema"]["required"] == ["ok"]
    else:
        (part,) = [chunk for chunk in chunks if chunk["type"] == "data-question"]
        question = part["data"]
        assert (question["reason"], question["schema"]["required"]) == ("Send it?", ["ok"])
    await runner.signal("r1", Approval(ok=True), question=question["id"])
    chunks = await read(resume=True)
    if protocol == "ag_ui":
        assert (chunks[-1]["outcome"], chunks[-1]["result"]) == ({"type": "success"}, {"text": "Hello"})
    else:
        assert chunks[-1]["finishReason"] == "stop"


@pytest.mark.parametrize("protocol", ["ag_ui", "vercel"])
async def test_a_run_that_another_process_executes(protocol: str) -> None:
    """Followed from the store, texts are the same; a suspension ends the stream with its cursor."""
    store = InMemoryStore()
    runner = StromaRunner.quick(store=store, events="store")

    @runner.node("write", input=Reply, output=Reply)
    async def write(state: Reply) -> Reply:
        current_node().emit("Hello")
        return Reply(text="Hello")

    @runner.flow("chat", input=Reply, output=Reply)
    async def chat(flow: Flow, state: Reply) -> Reply:
        await flow.wait_for(Approval, reason="Answer it?")
        return await flow.step(write, state)

    async def read(after: str | None) -> list[dict[str, Any]]:
        events = StromaRunner.quick(store=store).follow("r1", after=after)
        return [chunk async for chunk in (ag_ui(events, REQUEST) if protocol == "ag_ui" else vercel(events))]

    await runner.run(chat, Reply(), run_id="r1")
    chunks = await read(None)
    end = chunks[-1]["metadata" if protocol == "ag_ui" else "messageMetadata"]["stroma"]
    (question,) = end["details"]["questions"]
    await runner.signal("r1", Approval(ok=True), question=question["id"])
    await runner.resume(chat, "r1")
    chunks = await read(end["cursor"] if protocol == "ag_ui" else None)
    assert texts_of(protocol, chunks) == ["Hello"]
    assert not [chunk for chunk in chunks if chunk["type"] == "data-question"]
    assert chunks[-1].get("finishReason", "stop") == "stop"
