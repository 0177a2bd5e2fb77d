"""Payloads under a codec: what somebody who can write to the store, and has no key, can do."""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.checkpoint.test_payloads import AesGcm
from tests.kit import NEVER
from tests.servers import shared_redis
from tests.servers_postgres import shared_postgres

from stroma import (
    CorruptCheckpoint,
    NodeContract,
    PipelineChanged,
    PostgresStore,
    RedisStore,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    Suspend,
    current_node,
    stroma_node,
)
from stroma.checkpoint.durable.annotations import annotate
from stroma.checkpoint.durable.integrity import seal
from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.rows import Annotation, Fence, Rows, RunEnd, Step

KEY = bytes(range(32))
NUMBERS = count()

Open = Callable[..., Any]


class Order(BaseModel):
    to: str = ""
    amount: int = 0


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.slow),
        pytest.param("redis", marks=pytest.mark.slow),
    ]
)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Open the same store as often as wanted, with a codec or without."""
    if request.param == "sqlite":
        yield lambda **options: SQLiteStore(tmp_path / "runs.db", **options)
    elif request.param == "postgres":
        server, schema = shared_postgres(), f"codec_{next(NUMBERS)}"
        yield lambda **options: PostgresStore(server.dsn, schema=schema, **options)
        server.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
    else:
        redis = shared_redis()
        redis.execute("FLUSHALL")
        yield lambda **options: RedisStore(redis.url, **options)


def codec() -> Any:
    return AesGcm({"k": KEY}, writes_with="k")


def nodes(calls: list[Any], *, fails: bool = False, asks: str = "") -> list[Any]:
    contract: Any = lambda node_id: NodeContract(  # noqa: E731
        node_id=node_id, input_schema=Order, output_schema=Order
    )

    async def decide(state: Order) -> Any:
        calls.append(("decide", state.to, state.amount))
        return state

    async def double(state: Order) -> Any:
        calls.append(("double", state.to, state.amount))
        return {"to": state.to, "amount": 2 * state.amount}

    async def pay(state: Order) -> Any:
        calls.append(("pay", state.to, state.amount))
        if fails:
            raise PermissionError(f"no budget for {state.to}")
        here = current_node()
        if asks and here.signal is None:
            raise Suspend(asks)
        return state

    return [stroma_node(f.__name__, contract(f.__name__))(f) for f in (decide, double, pay)]


async def run(store: Any, calls: list[Any], to: str, amount: int, run_id: str, **options: Any) -> Any:
    config = {key: options.pop(key) for key in ("resume", "if_exists") if key in options}
    runner = StromaRunner.quick(store=store, policy_map=NEVER, **config)
    return await runner.run(nodes(calls, **options), Order(to=to, amount=amount), run_id=run_id)


async def rewrite(store: Any, run_id: str, position: int, step: Callable[[Step], Step]) -> None:
    """Put something else where a commit stands, as somebody who can write to the store would."""

    def do(rows: Rows) -> None:
        result = rows.find(run_id, lock=True)
        entry = next(row for row in rows.steps(result.run, result.execution) if row.position == position)
        (attempt,) = rows.attempts_at(result.run, result.execution, position, "")
        fence = Fence(result.run, result.execution, result.epoch, result.owner or "", 30.0)
        later = replace(attempt, started_ns=attempt.started_ns + 1)
        changed = seal(entry.position, entry.branch, entry.node_id, step(entry.step))
        assert rows.commit(fence, later, changed)

    await store._submit(Transaction(run_id, do))


async def stored(store: Any, run_id: str, position: int) -> bytes:
    def do(rows: Rows) -> bytes:
        result = rows.find(run_id)
        entry = rows.steps(result.run, result.execution)
        return next(row.step.output for row in entry if row.position == position)

    return bytes(await store._submit(Transaction(run_id, do)))


def put(data: bytes) -> Callable[[Step], Step]:
    return lambda step: step._replace(output=data)


async def test_an_unsealed_output_is_refused(open_store: Open) -> None:
    """With a codec, a payload that no codec wrote is CorruptCheckpoint: without a key nobody forges one."""
    async with open_store(codec=codec()) as store:
        await run(store, [], "alice", 1, "r", fails=True)
        await rewrite(store, "r", 0, put(b'{"to":"mallory","amount":1000000}'))
    async with open_store(codec=codec()) as store:
        calls: list[Any] = []
        with pytest.raises(CorruptCheckpoint, match=r"'decide' at position 0 .*not written by the codec"):
            await run(store, calls, "alice", 1, "r", resume=True)
        assert calls == []
        assert any(a.damaged for a in store.attempts("r") if a.position == 0)


@pytest.mark.parametrize("source", ["another run", "another position", "an earlier execution"])
async def test_a_sealed_output_cannot_be_moved(open_store: Open, source: str) -> None:
    """What is sealed for one run, execution and position is refused at another one, of the same run too."""
    async with open_store(codec=codec()) as store:
        if source == "an earlier execution":
            await run(store, [], "mallory", 7, "r", fails=True)
            stolen = await stored(store, "r", 0)
        await run(store, [], "alice", 1, "r", fails=True)
        if source == "another run":
            await run(store, [], "mallory", 7, "other", fails=True)
            stolen = await stored(store, "other", 0)
        elif source == "another position":
            stolen = await stored(store, "r", 1)
        await rewrite(store, "r", 0, put(stolen))
    async with open_store(codec=codec()) as store:
        calls: list[Any] = []
        with pytest.raises(CorruptCheckpoint, match=r"'decide' at position 0 .*written for another place"):
            await run(store, calls, "alice", 1, "r", resume=True)
        assert calls == []


async def test_an_answer_answers_one_question(open_store: Open) -> None:
    """An answer that was sealed for one question is refused for another one at the same place."""
    async with open_store(codec=codec()) as store:
        for run_id, question in (("small", "pay 1?"), ("large", "pay 1000000?")):
            await run(store, [], "alice", 1, run_id, asks=question)
        await StromaRunner.quick(store=store).signal("small", "yes")

        def steal(rows: Rows) -> None:
            small, large = rows.find("small"), rows.find("large")
            answer = next(iter(rows.annotations(small.run, Annotation.WAITING)))
            request = next(iter(rows.annotations(large.run, Annotation.WAITING)))
            step = request.step._replace(output=answer.step.output, number=answer.step.number)
            annotate(rows, rows.key_of("large"), Annotation.WAITING, request.branch, request.node_id, step)

        await store._submit(Transaction(None, steal))
        calls: list[Any] = []
        with pytest.raises(CorruptCheckpoint, match="written for another place"):
            await run(store, calls, "alice", 1, "large", asks="pay 1000000?", resume=True)
        assert calls == []
        done = await run(store, calls, "alice", 1, "small", asks="pay 1?", resume=True)
        assert done.status is RunStatus.RESUMED


async def test_messages_and_questions_are_sealed(open_store: Open) -> None:
    """Messages of failures and questions to people are payloads: readable with the codec, not without it."""
    async with open_store(codec=codec()) as store:
        await run(store, [], "alice", 1, "failed", fails=True)
        await run(store, [], "alice", 1, "asking", asks="may alice have it?")
        record = store.get_run("failed")
        assert "no budget for alice" in record.error
        assert record.cause.message == "no budget for alice"
        assert [a.message for a in store.attempts("failed") if a.message] == ["no budget for alice"]
        messages = [a.message for a in store.attempt_page("failed").attempts if a.message]
        assert messages == ["no budget for alice"]
        assert [w.reason for w in store.waiting("asking")] == ["may alice have it?"]
        assert "alice" in store.list_runs()[0].error
    async with open_store() as store:
        report = repr(
            [store.list_runs(), store.get_run("failed"), store.attempts("failed"), store.waiting("asking")]
        )
        assert "alice" not in report
        assert "open the store with codec=" in report

    def forge(rows: Rows) -> None:
        result = rows.find("failed", lock=True)
        fence = Fence(result.run, result.execution, result.epoch, result.owner or "", 30.0)
        rows.finish(fence, RunEnd("FAILED", "all is well"))

    async with open_store(codec=codec()) as store:
        await store._submit(Transaction("failed", forge))
        assert store.get_run("failed").error == "[not written by the codec of this store]"


async def test_a_fork_is_sealed_for_its_own_run(open_store: Open) -> None:
    """What a fork copies can be read in the fork, and goes on there."""
    async with open_store(codec=codec()) as store:
        await run(store, [], "alice", 1, "r", fails=True)
        runner, calls = StromaRunner.quick(store=store, policy_map=NEVER), list[Any]()
        assert (await runner.fork("r", nodes(calls), at="pay")).status is RunStatus.RESUMED
        assert calls == [("pay", "alice", 2)]
        result = await runner.fork("r", nodes(calls), at="pay", state=Order(to="alice", amount=9))
        messages = [attempt.message for attempt in store.attempts(result.run_id)]
        assert messages == [None, "output given at the fork", None]


async def test_a_fork_says_where_it_comes_from(open_store: Open) -> None:
    """Until a fork is resumed, its run can be read and says which run it was forked from, and where."""
    async with open_store(codec=codec()) as store:
        await run(store, [], "alice", 1, "r", fails=True)
        await store.fork("r", "fork", 2)
        assert store.get_run("fork").error == "forked from run 'r' before position 2"


async def test_plain_payloads_are_read_until_they_are_migrated(open_store: Open) -> None:
    """plain_until_migrated=True reads what is older than the codec; without it, that is refused by name."""
    async with open_store() as store:
        await run(store, [], "alice", 1, "r", fails=True)
    async with open_store(codec=codec()) as store:
        with pytest.raises(CorruptCheckpoint, match="plain_until_migrated=True"):
            await run(store, [], "alice", 1, "r", resume=True)
    async with open_store(codec=codec(), plain_until_migrated=True) as store:
        with pytest.raises(PipelineChanged):
            await run(store, [], "bob", 1, "r", resume=True)
        assert "no budget for alice" in store.get_run("r").error
        assert (await run(store, [], "alice", 1, "r", resume=True)).status is RunStatus.RESUMED
        await run(store, [], "alice", 1, "new")
        assert (await stored(store, "new", 0)).startswith(b"stroma:c1\0")


async def test_an_input_is_sealed_for_its_execution(open_store: Open) -> None:
    """The input of a second execution is sealed for it, and read back."""
    async with open_store(codec=codec()) as store:
        await run(store, [], "bob", 2, "r")
        await run(store, [], "alice", 1, "r", fails=True)
        assert b"alice" in store.input_of("r")
        assert (await run(store, [], "alice", 1, "r", resume=True)).status is RunStatus.RESUMED


def test_plain_until_migrated_needs_a_codec(tmp_path: Path) -> None:
    """plain_until_migrated without a codec is a ValueError."""
    with pytest.raises(ValueError, match="needs a codec"):
        SQLiteStore(tmp_path / "runs.db", plain_until_migrated=True)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_key_name_that_cannot_be_read_back(name: str) -> None:
    """The example's codec refuses a key whose name could not be found again in what it wrote."""
    with pytest.raises(ValueError, match="cannot be read back"):
        AesGcm({name: KEY}, writes_with=name)


async def test_nothing_of_a_failure_is_readable_on_disk(tmp_path: Path) -> None:
    """No file of an encrypted store holds a message, a question or an answer as text."""
    path = tmp_path / "runs.db"
    async with SQLiteStore(path, codec=codec()) as store:
        await run(store, [], "canary", 1, "failed", fails=True)
        await run(store, [], "canary", 1, "asking", asks="canary?")
        await StromaRunner.quick(store=store).signal("asking", "canary!")
    for file in tmp_path.iterdir():
        assert b"canary" not in file.read_bytes(), file
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM attempts WHERE message IS NOT NULL").fetchone() == (2,)
