"""Runs as their readers are told of them: events by hand and at random, and the texts of a page."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from stroma import StreamEvent
from stroma.wire import ag_ui, vercel

REQUEST = {
    "threadId": "thread",
    "runId": "request",
    "messages": [{"id": "u1", "role": "user", "content": "Hello?"}],
}
QUESTION = {
    "id": "q1",
    "reason": "Send it?",
    "kind": "approval",
    "node_id": "write",
    "schema": {"type": "object"},
}


class Story:
    """Makes the events of one run."""

    def __init__(self) -> None:
        self.events: list[StreamEvent] = []
        self._attempts: dict[str, str] = {}

    def add(self, kind: Any, node: str = "", **fields: Any) -> Story:
        """Add an event; a node's is of its present attempt, with "node_start" of another one."""
        number = len(self.events) + 1
        if node:
            place, _, branch = node.partition("/")
            if kind == "node_start":
                self._attempts[node] = f"1-{number}"
            attempt = self._attempts.get(node)
            fields = {
                "node_id": place,
                "position": ord(place[0]),
                "branch": branch,
                "attempt_id": attempt,
                **fields,
            }
        self.events.append(StreamEvent(number, kind, "r1", **fields))
        return self

    def start(self, node: str = "write") -> Story:
        return self.add("node_start", node, attempt=1, state={"secret": "input"})

    def restart(self) -> Story:
        """Let another process start the run and its node again."""
        return self.add("run_start").start()

    def restore(self, text: str, node: str = "write") -> Story:
        return self.add("node_skipped", node, attempt_id=None, state={"text": text})

    def ask(self) -> Story:
        return self.add("node_suspended", "write", details={"question": QUESTION})

    def say(self, *texts: str, node: str = "write") -> Story:
        for text in texts:
            self.add("node_event", node, name="delta", data=text)
        return self

    def succeed(self, text: str, node: str = "write") -> Story:
        return self.add("node_success", node, state={"text": text})

    def fail(self, node: str = "write") -> Story:
        return self.add(
            "node_failure", node, details={"failure": {"message": "lost", "class": "RECOVERABLE"}}
        )

    def end(self, status: str = "COMPLETED", **details: Any) -> Story:
        return self.add("run_end", details={"status": status, "final_state": {"text": "Hello"}, **details})


def text_of(event: StreamEvent) -> str | None:
    """Return the text in the output of a node."""
    return None if event.state is None else event.state.get("text")


@dataclass
class Scene:
    """A story, the texts that the page shows in the end, and how the run ends for it."""

    story: Story
    texts: list[str]
    end: str = "success"
    text: Callable[[StreamEvent], str | None] | None = None
    request: dict[str, Any] | None = field(default_factory=lambda: REQUEST)

    @property
    def events(self) -> list[StreamEvent]:
        return self.story.events


def _run() -> Story:
    return Story().add("run_start", state={"secret": "input"}, details={"pipeline": "p"})


def _begun(*texts: str) -> Story:
    return _run().start().say(*texts)


_OLD = {"id": "r1:119::0-1", "role": "assistant", "content": "Shall I?"}

SCENES = {
    "streamed": Scene(_begun("Hel", "lo").succeed("x").end(), ["Hello"]),
    "retried": Scene(
        _begun("Hel").fail().add("node_retry", "write", attempt=2).start().say("Hello").succeed("x").end(),
        ["Hello"],
    ),
    "failed": Scene(_begun("Hel").fail().end("FAILED", failure={"message": "lost"}), [], "lost"),
    "cancelled": Scene(_begun("Hel").add("node_cancelled", "write").end("CANCELLED"), [], "cancelled"),
    "interrupted": Scene(_run().end("INTERRUPTED"), [], "the run ended as INTERRUPTED"),
    "taken over": Scene(_begun("Hel").restart().say("Hi").succeed("x").end(), ["Hi"]),
    "taken over after the commit": Scene(_begun("Hel").add("run_start").restore("Hello").end("RESUMED"), []),
    "taken over after the commit, with the text": Scene(
        _begun("Hel").add("run_start").restore("Hello").end("RESUMED"), ["Hello"], text=text_of
    ),
    "shown, then restored": Scene(
        _begun("Hello").succeed("Hello").restore("Hello").end("RESUMED"), ["Hello"], text=text_of
    ),
    "lost all but its end": Scene(_begun("Hel").end("RESUMED"), []),
    "not streamed": Scene(_run().start().succeed("Hello").end(), ["Hello"], text=text_of),
    "lost its end": Scene(_begun("Hel").succeed("Hello").end(), ["Hello"], text=text_of),
    "lost its middle": Scene(
        _begun("H").add("events_dropped", details={"dropped": 2}).say("o").succeed("Hello").end(),
        ["Hello"],
        text=text_of,
    ),
    "corrected": Scene(_begun("Hallo").succeed("Hello").end(), ["Hello"], text=text_of),
    "two at once": Scene(
        _run()
        .start("a/0")
        .start("a/1")
        .say("A", node="a/0")
        .say("B", node="a/1")
        .say("a", node="a/0")
        .fail("a/1")
        .succeed("x", "a/0")
        .start("a/1")
        .say("Bb", node="a/1")
        .succeed("x", "a/1")
        .end(),
        ["Aa", "Bb"],
    ),
    "asks": Scene(
        _begun("Shall I?").ask().add("run_suspended", details={"questions": [QUESTION]}), ["Shall I?"], "q1"
    ),
    "asked, and answered": Scene(
        _begun("Shall I?").ask().restart().say("Sent").succeed("x").end("RESUMED"), ["Sent"]
    ),
    "asks in one process": Scene(_run().end("SUSPENDED", questions=[QUESTION]), [], "q1"),
    "paused": Scene(_run().end("SUSPENDED"), [], "r1"),
    "sleeps": Scene(
        _run().add("run_suspended", details={}).start().say("Hello").succeed("x").end("RESUMED"), ["Hello"]
    ),
    "other events": Scene(
        _run()
        .start()
        .add("node_event", "write", name="page", data={"n": 1})
        .add("node_event", "write", name="delta", data=[1])
        .add("map_progress", "write")
        .add("budget_warning", details={"used": 1})
        .succeed("x")
        .end(),
        [],
    ),
    "from the middle": Scene(
        Story().add("node_event", "write", attempt_id="1-1", name="delta", data="lo").succeed("Hello").end(),
        ["Hello"],
        text=text_of,
    ),
    "answered in another request": Scene(
        Story().start().say("Sent").succeed("x").end("RESUMED"),
        ["Sent"],
        request={**REQUEST, "messages": [*REQUEST["messages"], _OLD]},
    ),
}


def random_scene(seed: int) -> Scene:
    """Return a run of three calls at once, whose attempts fail, die and are restored in any order."""
    chance, story, running = random.Random(seed), _run(), dict[str, str]()
    done, calls = dict[str, str](), ["a/0", "a/1", "write"]
    while len(done) < len(calls):
        node = chance.choice(calls)
        if node in done:
            if chance.random() < 0.1:
                story.restore(done[node], node)
        elif node not in running or chance.random() < 0.1:  # Or another process starts it again.
            running[node] = ""
            story.start(node)
        elif chance.random() < 0.6:
            word = chance.choice(["so ", "it ", "is "])
            running[node] += word
            if chance.random() < 0.8:  # Else it was dropped.
                story.say(word, node=node)
        elif chance.random() < 0.5:
            del running[node]
            story.fail(node)
        elif chance.random() < 0.7:
            done[node] = running[node]
            story.succeed(done[node], node)
        else:
            done[node] = running[node]
            story.restore(done[node], node)
    return Scene(story.end(), sorted(text for text in done.values() if text), text=text_of)


async def _iterate(events: Iterable[StreamEvent]) -> AsyncIterator[StreamEvent]:
    for event in events:
        yield event


def mapped(protocol: str, scene: Scene) -> AsyncIterator[dict[str, Any]]:
    """Return the chunks of a scene in one of the protocols."""
    events = _iterate(scene.events)
    return (
        ag_ui(events, scene.request, text=scene.text)
        if protocol == "ag_ui"
        else vercel(events, text=scene.text)
    )


async def chunks_of(protocol: str, scene: Scene) -> list[dict[str, Any]]:
    return [chunk async for chunk in mapped(protocol, scene)]


def shown_by(message: Any) -> list[str]:
    """Return the texts that a page shows of a message of the Vercel AI SDK."""
    hidden = {part["id"] for part in message["parts"] if part["type"] == "data-discarded"}
    return [
        part["text"]
        for part in message["parts"]
        if part["type"] == "text" and part["providerMetadata"]["stroma"]["id"] not in hidden
    ]
