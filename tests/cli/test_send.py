"""`stroma send`, and what other commands say of runs that wait for a message."""

import json
from typing import Any

import pytest

CHAT = """
from pydantic import BaseModel

from stroma import Flow, stroma_flow


class Say(BaseModel):
    text: str = ""


@stroma_flow("chat", input=Say, output=Say)
async def chat(flow: Flow, first: Say) -> Say:
    said = await flow.receive(Say)
    more = await flow.receive(Say, topic="more")
    return Say(text=f"{first.text} {said.text} {more.text}")
"""


@pytest.fixture
def chat(stroma: Any, inside: Any) -> Any:
    (stroma.home / "chat.py").write_text(CHAT)
    done = inside("run", "chat.py:chat", '{"text": "a"}', "--run-id", "c")
    assert done.code == 7
    assert "run c is waiting for a message\n  send a message: stroma send c MESSAGE" in done.err
    return stroma


def test_a_message_continues_a_run(chat: Any, inside: Any) -> None:
    """Messages are stored, once for an id and continue the run; its pages say what it awaits."""
    shown = inside("show", "c")
    assert "waits     waiting for a message\n" in shown.out
    assert "send a message: stroma send c MESSAGE" in shown.err
    done = inside("send", "c", '{"text": "b"}')
    assert (done.code, done.out) == (0, "")
    assert "the message to run c is stored" in done.err
    assert "or continue it here: stroma resume c chat.py:chat" in done.err
    assert inside("resume", "c", "chat.py:chat").code == 7
    shown = inside("show", "c")
    assert "waiting for a message on 'more'" in shown.out
    assert "send a message: stroma send c MESSAGE --topic more" in shown.err
    tree = inside("show", "c", "--tree").out
    assert "received" in tree
    assert "receiving" in tree
    for _ in range(2):
        data = json.loads(
            inside("send", "last", '{"text": "c"}', "--topic", "more", "--id", "m", "--json").out
        )
        assert data == {"schema": "stroma.send/1", "run_id": "c", "topic": "more", "status": "SUSPENDED"}
    done = inside("resume", "c", "chat.py:chat")
    assert (done.code, json.loads(done.out)) == (0, {"text": "a b c"})


def test_a_message_that_nothing_waits_for(chat: Any, inside: Any) -> None:
    """A message that no flow.receive waits for is stored; the hints name what the run waits for instead."""
    done = inside("send", "c", '{"text": "c"}', "--topic", "more")
    assert done.code == 0
    assert (
        "no flow.receive of the run waits for a message on 'more': it is waiting for a message\n" in done.err
    )
    assert done.err.endswith("send a message: stroma send c MESSAGE\n")
    (chat.home / "ask.py").write_text(
        CHAT.replace("flow.receive(Say)", "flow.wait_for(Say, reason='well?')").partition("    more")[0]
        + "    return said\n"
    )
    assert inside("run", "ask.py:chat", "{}", "--run-id", "q").code == 7
    done = inside("send", "q", '{"text": "c"}')
    assert "waits for a message: it is waiting for an answer: well?\n" in done.err
    assert """answer: stroma approve q ask.py:chat '{"text": ""}' --question """ in done.err


def test_a_message_that_cannot_be_sent(chat: Any, inside: Any, fails: Any) -> None:
    """What is no JSON, an unknown run, an id of another message and a run that has ended are errors."""
    fails(inside("send", "c", "{"), 2, "MESSAGE is not JSON")
    fails(inside("send", "x", "1"), 4, "no run whose id begins with 'x'")
    fails(inside("send", "c", "NaN"), 2, "MESSAGE cannot be sent")
    fails(inside("send", "c", "1", "--id", ""), 2, "message id must not be empty")
    assert inside("send", "c", "1", "--id", "m").code == 0
    fails(inside("send", "c", "2", "--id", "m"), 2, "was sent another message with the id 'm'")
    assert inside("cancel", "c").code == 0
    fails(inside("send", "c", "3"), 2, "run 'c' has ended (CANCELLED), and takes no message")
