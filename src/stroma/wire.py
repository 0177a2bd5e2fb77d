"""Wire formats for web pages: server-sent events, AG-UI, and UI message streams of the Vercel AI SDK.

Each function takes the events of ``runner.stream`` or ``runner.follow``, and changes nothing of the run. What
nodes emit as "delta" is text. Each attempt has a text of its own; its failure, or another attempt, discards
it.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from stroma.checkpoint import CheckpointNotFound
from stroma.checkpoint.queue import COMPLETE
from stroma.runner.events import StreamEvent

__all__ = ["SSE_HEADERS", "VERCEL_HEADERS", "ag_ui", "sse", "vercel"]

Chunk: TypeAlias = dict[str, Any]
#: Returns the text in the output of a "node_success" or "node_skipped"; None for a node whose output is no
#: text for users.
TextOf: TypeAlias = Callable[[StreamEvent], str | None]

#: Headers of a response with :func:`sse`: no cache and no proxy holds it back.
SSE_HEADERS: Final = {
    "content-type": "text/event-stream",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}
#: Headers of a response with the chunks of :func:`vercel`.
VERCEL_HEADERS: Final = {**SSE_HEADERS, "x-vercel-ai-ui-message-stream": "v1"}
_WITH_OUTPUT: Final = ("node_success", "node_skipped")
_ENDS: Final = (*_WITH_OUTPUT, "node_failure", "node_cancelled", "node_suspended")


def ag_ui(
    events: AsyncIterable[StreamEvent],
    request: Mapping[str, Any] | None = None,
    *,
    text: TextOf | None = None,
) -> AsyncIterator[Chunk]:
    """Yield the events of a run as events of AG-UI 1.0, as JSON data.

    The last one is RUN_FINISHED or RUN_ERROR. A run that waits for answers is finished with an interrupt for
    each question, by its id. Attempts of nodes are steps, with the output in the metadata of STEP_FINISHED. A
    CUSTOM event "stroma.discarded" names a message to remove; with ``request``, a MESSAGES_SNAPSHOT removes
    it.

    ``request``: the client's RunAgentInput, for its ids and messages. ``text``: returns the text of a node's
    output; it completes or replaces what the node has emitted.
    """
    return _mapped(events, _AgUi(request, text))


def vercel(events: AsyncIterable[StreamEvent], *, text: TextOf | None = None) -> AsyncIterator[Chunk]:
    """Yield the events of a run as the chunks of one message of the Vercel AI SDK, as JSON data.

    The last one is "finish" or "abort". A run that waits for answers is finished with a part "data-question"
    for each question. Nodes are parts "data-node", with the output. A part "data-discarded" names a text to
    hide: the one with that id in ``providerMetadata.stroma``. Begin with the first event of the run, also for
    a page that reconnects.

    ``text``: see :func:`ag_ui`.
    """
    return _mapped(events, _Vercel(text))


async def sse(parts: AsyncIterable[StreamEvent | Chunk], *, ping_seconds: float = 15) -> AsyncIterator[str]:
    """Yield messages of a ``text/event-stream`` for events of a run, or for chunks of the other formats.

    Messages of events have an id, which a browser that reconnects sends as ``Last-Event-ID``; chunks have
    none. Send it with :data:`SSE_HEADERS`. A comment after ``ping_seconds`` without a message keeps proxies
    from closing the connection. The stream ends if the run that it follows is deleted or restarted.
    """
    pending: asyncio.Queue[StreamEvent | Chunk | None] = asyncio.Queue()

    async def read() -> None:
        # In one task: the iterator may have a timeout around its yields.
        async for part in parts:
            pending.put_nowait(part)
            await pending.join()

    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda _: pending.put_nowait(None))
    try:
        while True:
            try:
                async with asyncio.timeout(ping_seconds):
                    part = await pending.get()
            except TimeoutError:
                yield ": ping\n\n"
                continue
            if part is None:
                break
            if isinstance(part, StreamEvent):
                yield part.to_sse()
            else:
                yield f"data: {json.dumps(part, allow_nan=False)}\n\n"
                if part["type"] in ("finish", "abort"):
                    yield "data: [DONE]\n\n"
            pending.task_done()
        try:
            await reading
        except CheckpointNotFound:
            return
    finally:
        reading.cancel()
        await asyncio.wait({reading})


async def _mapped(events: AsyncIterable[StreamEvent], mapper: _Mapper) -> AsyncIterator[Chunk]:
    async for event in events:
        for chunk in mapper.map(event):
            yield chunk
        if mapper.has_ended:
            return


# ---------------------------------------------------------------------- what both protocols share


@dataclass(slots=True)
class _Text:
    """The text of one attempt. ``parts``: what it consists of."""

    id: str
    attempt_id: str | None
    about: Chunk
    parts: list[str] = field(default_factory=list)


class _Mapper(ABC):
    """Maps the events of one run, in order."""

    def __init__(self, text: TextOf | None) -> None:
        self.has_ended = False
        self._has_begun = False
        self._text_of = text
        #: By call: the open text of its attempt, and the id of the last text that was closed and not
        #: discarded.
        self._open: dict[str, _Text] = {}
        self._shown: dict[str, str] = {}

    def map(self, event: StreamEvent) -> Iterator[Chunk]:
        """Yield the chunks for an event."""
        if not self._has_begun:
            self._has_begun = True
            yield from self._begin(event)
        yield from self._map_text(event)
        # Without a question a suspended run sleeps, or waits for a message: the events continue.
        if event.kind == "run_end" or (event.kind == "run_suspended" and event.details.get("questions")):
            # Without a success a text is kept only where its attempt waits for an answer.
            for call in list(self._open):
                yield from self._close(call, discarded=_status(event) != "SUSPENDED")
            yield from self._end(event)
            self.has_ended = True
        elif event.kind != "run_start" and not _is_delta(event):
            yield from self._map_other(event)

    def _map_text(self, event: StreamEvent) -> Iterator[Chunk]:
        call = _call_of(event)
        if _is_delta(event):
            yield from self._write(event, event.data)
        elif event.kind in ("node_start", "node_failure", "node_cancelled"):
            yield from self._discard_all(call)
        elif event.kind in _WITH_OUTPUT:
            whole = None if self._text_of is None else self._text_of(event)
            if whole is None:
                # An attempt that died after its commit may have emitted more than was stored.
                yield from self._close(call, discarded=event.kind == "node_skipped")
            elif call in self._open or call not in self._shown:
                yield from self._complete(event, whole)

    def _complete(self, event: StreamEvent, whole: str) -> Iterator[Chunk]:
        """Yield what is missing of a text; a text that does not begin so is discarded first."""
        call = _call_of(event)
        emitted = "".join(self._open[call].parts) if call in self._open else ""
        if not whole.startswith(emitted):
            yield from self._close(call, discarded=True)
            emitted = ""
        if len(whole) > len(emitted):
            yield from self._write(event, whole[len(emitted) :])
        yield from self._close(call)

    def _write(self, event: StreamEvent, delta: str) -> Iterator[Chunk]:
        call = _call_of(event)
        text = self._open.get(call)
        if text is None or (event.kind == "node_event" and text.attempt_id != event.attempt_id):
            yield from self._discard_all(call)
            attempt = event.attempt_id if event.kind == "node_event" else event.kind
            text = _Text(f"{event.run_id}:{call}:{attempt}", event.attempt_id, _facts(event))
            self._open[call] = text
            yield self._text("start", text)
        text.parts.append(delta)
        yield {**self._text("delta", text), "delta": delta}

    def _discard_all(self, call: str) -> Iterator[Chunk]:
        """Discard what earlier attempts of a call have left: they failed, died, or waited for an answer."""
        yield from self._close(call, discarded=True)
        if call in self._shown:
            yield from self._discard(self._shown.pop(call))

    def _close(self, call: str, *, discarded: bool = False) -> Iterator[Chunk]:
        text = self._open.pop(call, None)
        if text is None:
            return
        yield self._text("end", text)
        if discarded:
            yield from self._discard(text.id)
        else:
            self._shown[call] = text.id

    @abstractmethod
    def _begin(self, event: StreamEvent) -> Iterator[Chunk]: ...
    @abstractmethod
    def _text(self, part: Literal["start", "delta", "end"], text: _Text) -> Chunk: ...
    @abstractmethod
    def _discard(self, text_id: str) -> Iterator[Chunk]: ...
    @abstractmethod
    def _map_other(self, event: StreamEvent) -> Iterator[Chunk]: ...
    @abstractmethod
    def _end(self, event: StreamEvent) -> Iterator[Chunk]: ...


def _call_of(event: StreamEvent) -> str:
    """Return the identity of an event's call in its run."""
    return f"{event.position}:{event.branch}"


def _is_delta(event: StreamEvent) -> bool:
    return event.kind == "node_event" and event.name == "delta" and isinstance(event.data, str)


def _facts(event: StreamEvent) -> Chunk:
    """Return an event as JSON data with an output, and without inputs and emitted data."""
    facts = event.to_dict()
    state = facts.pop("state", None)
    if event.kind in _WITH_OUTPUT:
        facts["output"] = state
    return {name: value for name, value in facts.items() if name not in ("name", "data")}


def _status(event: StreamEvent) -> str:
    """Return the status of a run that has ended or is suspended."""
    return str(event.details.get("status", "SUSPENDED"))


def _reason(event: StreamEvent) -> str:
    """Return why a run that has not completed has ended."""
    failure = event.details.get("failure") or {}
    return failure.get("message") or f"the run ended as {_status(event)}"


# ---------------------------------------------------------------------- AG-UI


class _AgUi(_Mapper):
    def __init__(self, request: Mapping[str, Any] | None, text: TextOf | None) -> None:
        super().__init__(text)
        self._request = request or {}
        #: The conversation without texts that are open; None if it is unknown.
        self._messages: list[Chunk] | None = None if request is None else list(request.get("messages", ()))
        #: By call: the name of the step that has started.
        self._steps: dict[str, str] = {}

    def _begin(self, event: StreamEvent) -> Iterator[Chunk]:
        prefix = f"{event.run_id}:"
        for message in self._messages or ():
            if message["id"].startswith(prefix):
                self._shown[message["id"][len(prefix) :].rpartition(":")[0]] = message["id"]
        yield {"type": "RUN_STARTED", "protocolVersion": "1.0", **self._ids(event)}

    def _ids(self, event: StreamEvent) -> Chunk:
        get = self._request.get
        return {"threadId": get("threadId", event.run_id), "runId": get("runId", event.run_id)}

    def _text(self, part: Literal["start", "delta", "end"], text: _Text) -> Chunk:
        name = {"start": "START", "delta": "CONTENT", "end": "END"}[part]
        chunk = {"type": f"TEXT_MESSAGE_{name}", "messageId": text.id}
        if part == "end" and self._messages is not None:
            self._messages.append(_message(text))
        about = {"role": "assistant", "metadata": {"stroma": text.about}}
        return {**chunk, **about} if part == "start" else chunk

    def _discard(self, text_id: str) -> Iterator[Chunk]:
        yield {"type": "CUSTOM", "name": "stroma.discarded", "value": {"messageId": text_id}}
        if self._messages is not None:
            self._messages = [message for message in self._messages if message["id"] != text_id]
            pending = [_message(text) for text in self._open.values()]
            yield {"type": "MESSAGES_SNAPSHOT", "messages": [*self._messages, *pending]}

    def _map_other(self, event: StreamEvent) -> Iterator[Chunk]:
        call, about, is_end = _call_of(event), {"stroma": _facts(event)}, event.kind in _ENDS
        if event.kind == "node_start" or (is_end and call not in self._steps):
            yield from self._finish_step(call, {})  # Of a process that died.
            yield {"type": "STEP_STARTED", "stepName": self._start_step(event, call), "metadata": about}
        if is_end:
            yield from self._finish_step(call, {"metadata": about})
        elif event.kind == "node_event":
            yield {"type": "CUSTOM", "name": event.name, "value": event.data, "metadata": about}
        elif event.kind != "node_start":
            yield {"type": "CUSTOM", "name": f"stroma.{event.kind}", "value": about["stroma"]}

    def _start_step(self, event: StreamEvent, call: str) -> str:
        """Return a name for a step, which no other active one has: the node's id, if it is free."""
        name = str(event.node_id)
        if name in self._steps.values():
            name = f"{name} {call}"
        self._steps[call] = name
        return name

    def _finish_step(self, call: str, about: Chunk) -> Iterator[Chunk]:
        if call in self._steps:
            yield {"type": "STEP_FINISHED", "stepName": self._steps.pop(call), **about}

    def _end(self, event: StreamEvent) -> Iterator[Chunk]:
        for call in list(self._steps):
            yield from self._finish_step(call, {})
        status, about = _status(event), {"stroma": _facts(event)}
        finished = {"type": "RUN_FINISHED", **self._ids(event), "metadata": about}
        if status in COMPLETE:
            yield {**finished, "result": event.details.get("final_state"), "outcome": {"type": "success"}}
        elif status == "CANCELLED":
            yield {**finished, "outcome": {"type": "cancelled"}}
        elif status == "SUSPENDED":
            interrupts = [_interrupt(question) for question in event.details.get("questions", ())]
            if not interrupts:  # Paused, or until a time: a resume takes it up.
                interrupts = [{"id": event.run_id, "reason": "stroma:suspended"}]
            yield {**finished, "outcome": {"type": "interrupt", "interrupts": interrupts}}
        else:
            yield {"type": "RUN_ERROR", "message": _reason(event), "code": status, "metadata": about}


def _message(text: _Text) -> Chunk:
    return {"id": text.id, "role": "assistant", "content": "".join(text.parts)}


def _interrupt(question: Mapping[str, Any]) -> Chunk:
    reason = "stroma:effect" if question["kind"] == "effect" else "input_required"
    interrupt = {"id": question["id"], "reason": reason, "message": question["reason"]}
    if question.get("schema") is not None:
        interrupt["responseSchema"] = question["schema"]
    return interrupt


# ---------------------------------------------------------------------- Vercel AI SDK


class _Vercel(_Mapper):
    def _begin(self, event: StreamEvent) -> Iterator[Chunk]:
        yield {"type": "start", "messageId": event.run_id}

    def _text(self, part: Literal["start", "delta", "end"], text: _Text) -> Chunk:
        chunk = {"type": f"text-{part}", "id": text.id}
        about = {"providerMetadata": {"stroma": {**text.about, "id": text.id}}}
        return {**chunk, **about} if part == "start" else chunk

    def _discard(self, text_id: str) -> Iterator[Chunk]:
        yield {"type": "data-discarded", "id": text_id, "data": {"id": text_id}}

    def _map_other(self, event: StreamEvent) -> Iterator[Chunk]:
        call, data = _call_of(event), _facts(event)
        if event.kind == "node_event":  # One part for each name and call, with the newest value.
            yield {"type": f"data-{event.name}", "id": f"{call}:{event.name}", "data": event.data}
            return
        name = "node" if event.kind == "node_start" or event.kind in _ENDS else event.kind
        part = {"type": f"data-{name}", "id": call, "data": data}
        # Parts stay in the message: not those of each item of a map.
        yield {**part, "transient": True} if event.branch else part

    def _end(self, event: StreamEvent) -> Iterator[Chunk]:
        status = _status(event)
        for question in event.details.get("questions", ()):
            yield {"type": "data-question", "id": question["id"], "data": dict(question)}
        if status == "CANCELLED":
            yield {"type": "abort", "reason": _reason(event)}
            return
        if status not in (*COMPLETE, "SUSPENDED"):
            yield {"type": "error", "errorText": _reason(event)}
        reasons = {**dict.fromkeys(COMPLETE, "stop"), "SUSPENDED": "other"}
        about = {"stroma": _facts(event)}
        yield {"type": "finish", "finishReason": reasons.get(status, "error"), "messageMetadata": about}
