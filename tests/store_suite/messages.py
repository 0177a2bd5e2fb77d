"""Tests of messages to runs."""

import asyncio
from typing import Any

import pytest
from tests.store_suite.helpers import (
    HARD_IDS,
    ROUNDS,
    State,
    begin,
    commit,
    due_runs,
    finish,
    settled,
    suspend_run,
)

from stroma.checkpoint import CheckpointNotFound, RequestRefused, RunRequest
from stroma.checkpoint.entries import SentMessage
from stroma.checkpoint.queue import QueueEntry
from stroma.contracts.schema import schema_of


def message(text: str, topic: str = "", *, payload: bytes = b'"hello"') -> SentMessage:
    return SentMessage(0, topic, text, payload)


async def send(store: Any, *ids: str, run_id: str = "run") -> None:
    for one in ids:
        await settled(store.send(run_id, message(one)))


async def read(session: Any, after: int = 0) -> list[tuple[int, str]]:
    return [(one.number, one.id) for one in await settled(session.messages(after))]


class MessageTests:
    """Tests of messages to runs."""

    async def test_messages_are_read_as_they_were_sent(self, store: Any) -> None:
        """Messages are numbered in their order, whatever their ids, topics and payloads, and read from any
        number on."""
        session = await begin(store)
        assert await read(session) == []
        sent = [
            message(one, topic, payload=f'{{"text": "{"é" * size}"}}'.encode())
            for one, topic, size in zip(HARD_IDS, ("", *HARD_IDS), range(len(HARD_IDS)), strict=False)
        ]
        for one in sent:
            await settled(store.send("run", one))
        numbered = [one._replace(number=number) for number, one in enumerate(sent, 1)]
        for after in (0, 1, len(sent) - 2, len(sent), len(sent) + 1):
            assert await settled(session.messages(after)) == numbered[after:]

    async def test_a_message_that_is_sent_again_is_one(self, store: Any) -> None:
        """A second message of an id changes nothing if it is equal, also in an ended run, else is refused."""
        session = await begin(store)
        await send(store, "a", "b", "a")
        await settled(store.send("run", message("c", payload=b'{"a":1,"b":[1.0]}')))
        await settled(store.send("run", message("c", payload=b' {"b": [1.0], "a": 1}')))
        third = message("c", payload=b'{"a":true,"b":[1.0]}')
        others = (message("a", "topic"), message("a", payload=b'"other"'), third)
        for other in others:
            with pytest.raises(RequestRefused, match="another message with the id") as caught:
                await settled(store.send("run", other))
            assert not caught.value.transient
        assert await read(session) == [(1, "a"), (2, "b"), (3, "c")]
        await finish(session)
        await send(store, "a")

    async def test_a_run_that_takes_no_message(self, store: Any) -> None:
        """A message to an unknown run or an ended one is refused; to a resumable run it is stored."""
        with pytest.raises(CheckpointNotFound):
            await send(store, "a")
        for status in ("COMPLETED", "RESUMED", "FAILED", "CANCELLED"):
            await finish(await begin(store, status), status)
            with pytest.raises(RequestRefused, match=f"has ended \\({status}\\)"):
                await send(store, "a", run_id=status)
        for status in ("SUSPENDED", "INTERRUPTED", "PARTIAL"):
            await finish(await begin(store, status), status)
            await send(store, "a", run_id=status)
            assert await read(await begin(store, status, if_exists="resume")) == [(1, "a")]

    async def test_messages_belong_to_the_execution(self, store: Any) -> None:
        """Messages stay when the execution is resumed, also from an earlier node, and a restart or a deletion
        deletes them."""
        session = await begin(store)
        await commit(session, 0, State())
        await send(store, "a", "b")
        await finish(session, "PARTIAL")
        again = await begin(store, if_exists="resume", discard_from=0)
        assert await read(again) == [(1, "a"), (2, "b")]
        await finish(again, "PARTIAL")
        restarted = await begin(store, if_exists="restart")
        assert await read(restarted) == []
        await send(store, "b")
        assert await read(restarted) == [(1, "b")]
        await settled(store.delete("run"))
        assert await read(await begin(store)) == []

    async def test_a_message_to_a_submitted_run(self, store: Any) -> None:
        """A queued run may be sent messages, which neither start it earlier nor are lost when it starts."""
        request = RunRequest("run", "pipeline", State(), schema_of(State))
        assert await store.submit(request, QueueEntry(1 << 50)) is True
        await send(store, "a")
        assert await due_runs(store, 1 << 49) == []
        assert await due_runs(store, 1 << 51) == ["run"]
        assert await read(await begin(store, if_exists="resume")) == [(1, "a")]

    async def test_a_message_makes_a_suspended_run_due(self, store: Any) -> None:
        """A message to a suspended run makes it due at once, and one that its session has read does not."""
        await finish(await begin(store), "SUSPENDED")
        assert await due_runs(store, 1 << 50) == []
        await send(store, "a")
        assert await due_runs(store, 0) == ["run"]
        session = await begin(store, if_exists="resume", due_ms=0)
        await send(store, "b")
        assert await read(session) == [(1, "a"), (2, "b")]
        await finish(session, "SUSPENDED")
        assert await due_runs(store, 1 << 50) == []

    async def test_a_message_that_a_session_has_not_read(self, store: Any) -> None:
        """A message since the last look of a session makes the run due when it is suspended or given back."""
        await finish(await begin(store), "SUSPENDED")
        session = await begin(store, if_exists="resume")
        await send(store, "a")
        assert await read(session) == [(1, "a")]
        await send(store, "b")
        await finish(session, "SUSPENDED")
        assert await due_runs(store, 2) == ["run"]
        session = await begin(store, if_exists="resume")
        assert await read(session) == [(1, "a"), (2, "b")]
        await settled(session.end("SUSPENDED", None, 1 << 49))
        assert await due_runs(store, 1 << 48) == []
        assert await due_runs(store, 1 << 50) == ["run"]
        session = await begin(store, if_exists="resume")
        await send(store, "c")
        await settled(session.give_back())
        assert await due_runs(store, 2) == ["run"]

    async def test_a_message_to_a_run_that_waits_for_none(self, store: Any) -> None:
        """A message that a running run does not want leaves it not due, and hides no answer or budget."""
        for run_id, error, due in (
            ("none", "ok?", False),
            ("answer", "ok?", True),
            ("budget", "budget", True),
        ):
            question = await suspend_run(store, run_id)
            session = await begin(store, run_id, if_exists="resume")
            await send(store, "a", run_id=run_id)
            if run_id == "answer":
                await settled(store.signal(run_id, question._replace(payload=b"1")))
            if run_id == "budget":
                assert await settled(store.set_budget(run_id, {"max_cost_usd": 1.0})) is True
            await send(store, "b", run_id=run_id)
            await finish(session, "SUSPENDED", error)
            assert (run_id in await due_runs(store, 2)) is due

    async def test_messages_of_several_senders(self, store: Any, other: Any) -> None:
        """Of messages that several clients send at once, none is lost, and each sender's stay in order."""
        session = await begin(store)
        clients = (("a", store), ("b", other), ("a", other))

        async def send_all(name: str, client: Any) -> None:
            for number in range(ROUNDS):
                await send(client, f"{name}{number}")

        await asyncio.gather(*(send_all(*one) for one in clients))
        messages = await read(session)
        assert [number for number, _ in messages] == list(range(1, 2 * ROUNDS + 1))
        for name in "ab":
            ids = [one for _, one in messages if one.startswith(name)]
            assert ids == [f"{name}{number}" for number in range(ROUNDS)]

    async def test_a_message_and_a_suspension_at_once(self, store: Any, other: Any) -> None:
        """A run that is suspended while a message is sent is due, or its session has read the message."""
        for number in range(ROUNDS):
            run_id = f"run {number}"
            session = await begin(store, run_id)

            async def suspend(session: Any = session) -> list[tuple[int, str]]:
                messages = await read(session)
                await finish(session, "SUSPENDED")
                return messages

            messages, _ = await asyncio.gather(suspend(), send(other, "a", run_id=run_id))
            assert (run_id in await due_runs(store, 2, limit=2 * ROUNDS)) is (messages == [])
