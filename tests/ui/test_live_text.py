"""The text of an attempt in progress, on the page of its run."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.kit import Note
from tests.ui.browser import Browser
from tests.ui.conftest import Site

from stroma import SQLiteStore, StromaRunner, current_node
from stroma.runner.events import StreamEvent
from stroma.ui.events import LiveText


class Writer:
    """A node that writes a half whenever it is asked to; its first attempt fails in the middle."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.loop = asyncio.new_event_loop()
        self.steps = asyncio.Queue[str]()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def write() -> None:
            async with SQLiteStore(self.url) as store:
                runner = StromaRunner.quick(store=store, events="store")

                @runner.node("write", input=Note, output=Note)
                async def node(state: Note) -> Note:
                    while (word := await self.steps.get()) != "end":
                        if word == "fail":
                            raise ConnectionError("cut off")
                        current_node().emit(word)
                    return Note(text="done")

                await runner.run([node], Note(), run_id="r")

        self.loop.run_until_complete(write())

    def step(self, word: str) -> None:
        self.loop.call_soon_threadsafe(self.steps.put_nowait, word)


@pytest.mark.timeout(90)
def test_text_grows_and_goes(store: SQLiteStore, serve: Callable[..., Site], chromium: Browser) -> None:
    """A page shows text as it is written, also after a reload; a failed attempt and the end discard it."""
    writer, site = Writer(str(store.path)), serve(store)
    shown = "document.querySelector('#texts pre')?.textContent ?? ''"
    writer.thread.start()
    while not store.exists() or store.get_run("r") is None:
        threading.Event().wait(0.02)
    chromium.size(1280, 900)
    chromium.goto(f"{site.url}/run?id=r")
    writer.step("Dear ")
    chromium.until(shown, lambda text: text == "Dear ")
    writer.step("<b>Ada</b>")
    chromium.goto(f"{site.url}/run?id=r")
    chromium.until(shown, lambda text: text == "Dear <b>Ada</b>")
    writer.step("fail")
    chromium.until(shown, lambda text: text == "")
    writer.step("Dear Bob")
    chromium.until(shown, lambda text: text == "Dear Bob")
    writer.step("end")
    chromium.until(shown, lambda text: text == "")
    writer.thread.join()


def event(kind: Any, attempt_id: str = "1-1", **fields: Any) -> StreamEvent:
    return StreamEvent(1, kind, "r", "write", 0, "", 1, attempt_id, **fields)


def test_texts_are_those_of_attempts_under_way() -> None:
    """A text belongs to its attempt: another one, its end and a suspension discard it, and redact sees it."""

    def hide(state: dict[str, Any]) -> dict[str, Any]:
        return {name: str(value).replace("secret", "***") for name, value in state.items()}

    live = LiveText(hide)
    live.take(event("node_event", name="delta", data="a secret"))
    live.take(event("node_event", name="progress", data="half"))
    assert live.shown() == [{"node": "write", "text": "a ***"}]
    live.take(event("node_event", "1-2", name="delta", data="b"))
    assert live.shown() == [{"node": "write", "text": "b"}]
    live.take(event("node_success", "1-2"))
    assert live.shown() == []
    live.take(event("node_event", "1-3", name="delta", data="c"))
    live.take(StreamEvent(2, "run_suspended", "r"))
    assert live.changed.is_set()
    assert live.shown() == []
