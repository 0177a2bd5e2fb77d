"""Messages to flows: anybody sends them, each is received once and in order, over every store."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field
from tests.fixtures import store_fixture
from tests.flows.steps import Clock, Text, World, runner_on
from tests.kit import Num
from tests.shared_stores import STORES

from stroma import (
    CheckpointNotFound,
    Flow,
    InMemoryStore,
    NotSerialisable,
    Pipeline,
    PipelineChanged,
    RunStatus,
    StepFailed,
    StoreError,
    StromaRunner,
    stroma_flow,
)
from stroma.checkpoint.memory.store import MemorySession

store = store_fixture(*STORES)


def receiver(count: int, **options: Any) -> Any:
    """A flow that receives a number of messages, and returns their texts."""

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        texts = [(await flow.receive(Text, **options)).text for _ in range(count)]
        return Text(text=" ".join(texts))

    return f


async def test_messages_are_received_in_order(store: Any) -> None:
    """A run that waits for a message is suspended, says so, and is due with each; it gets them in order."""
    runner, f = runner_on(store), receiver(4)
    first = await runner.run(f, Num())
    assert (first.status, first.suspended) == (RunStatus.SUSPENDED, ["waiting for a message"])
    assert first.questions == ()
    assert (store.get_run("r").error, store.get_run("r").due_ms) == ("waiting for a message", None)
    await runner.send("r", Text(text="a"))
    await runner.handle("r").send({"text": "b"})
    assert store.get_run("r").due_ms == 0
    assert (await runner_on(store).run(f, Num())).status is RunStatus.SUSPENDED
    assert store.get_run("r").due_ms is None
    await runner.send("r", {"text": "c"}, id="c")
    await runner.send("r", {"text": "d"})
    await runner.send("r", {"text": "c"}, id="c")
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.output) == (RunStatus.RESUMED, Text(text="a b c d"))
    assert [mark.kind for mark in result.trace.marks] == ["received"] * 2
    with pytest.raises(StoreError, match="has ended"):
        await runner.send("r", {"text": "e"})


async def test_each_topic_is_an_order_of_its_own(store: Any) -> None:
    """A message reaches those who wait for its topic, whatever was sent on others, also long before."""
    runner = runner_on(store)

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        texts = [(await flow.receive(Text, topic=topic)).text for topic in ("b", "b", "a", "", "a")]
        return Text(text=" ".join(texts))

    suspended = await runner.run(f, Num())
    assert suspended.suspended == ["waiting for a message on 'b'"]
    for text, topic in (("1", "a"), ("2", "a"), ("3", "b"), ("4", ""), ("5", "c"), ("6", "a")):
        await runner.send("r", {"text": text}, topic=topic)
    assert (await runner_on(store).run(f, Num())).status is RunStatus.SUSPENDED
    await runner.send("r", {"text": "7"}, topic="b")
    result = await runner_on(store).run(f, Num())
    assert result.output == Text(text="3 7 1 4 2")


async def test_a_message_reaches_a_flow_beside_its_steps(store: Any) -> None:
    """A message is received while a step is at work, and the step may be given up for it."""
    began, calls = asyncio.Event(), list[str]()

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        work = asyncio.create_task(flow.step(slow, state))
        stop = asyncio.create_task(flow.receive(Text))
        await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        return stop.result()

    runner = runner_on(store)

    @runner.node("slow", input=Num, output=Num)
    async def slow(state: Num) -> Num:
        calls.append("slow")
        began.set()
        await asyncio.Event().wait()
        return state

    life = asyncio.ensure_future(runner.run(f, Num()))
    await began.wait()
    await runner_on(store).send("r", {"text": "stop"})
    result = await life
    assert (result.status, result.output, calls) == (RunStatus.COMPLETED, Text(text="stop"), ["slow"])


async def test_a_message_that_nobody_has_received_stays(store: Any) -> None:
    """A wait that times out or is given up takes no message: the next one gets it."""
    runner = runner_on(store)

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        with pytest.raises(TimeoutError, match="no message on 'late' came in time"):
            await flow.receive(Text, topic="late", timeout=0)
        waiting = asyncio.create_task(flow.receive(Text, topic="late"))
        await asyncio.sleep(0)
        waiting.cancel()
        first = await flow.receive(Text, key="first")
        return Text(text=f"{first.text} {(await flow.receive(Text, topic='late')).text}")

    assert (await runner.run(f, Num())).suspended == ["waiting for a message"]
    await runner.send("r", {"text": "b"}, topic="late")
    await runner.send("r", {"text": "a"})
    result = await runner_on(store).run(f, Num())
    assert result.output == Text(text="a b")


async def test_a_message_comes_before_a_timeout_that_passes_later(store: Any, clock: Clock) -> None:
    """A message that is there when a process looks again is received, although the time is over by then."""
    runner, f = runner_on(store), receiver(2, timeout=3600)
    assert (await runner.run(f, Num())).status is RunStatus.SUSPENDED
    await runner.send("r", {"text": "a"})
    clock.pass_by(hours=2)
    assert (await runner_on(store).run(f, Num())).suspended == ["waiting for a message"]
    clock.pass_by(hours=2)
    result = await runner_on(store).run(f, Num())
    assert isinstance(result.failure.exception if result.failure else None, TimeoutError)


async def test_a_message_that_does_not_fit_is_a_failure(store: Any) -> None:
    """It raises StepFailed in the body, which may catch it, on replay too; the next message follows it."""
    runner, failures = runner_on(store), list[Any]()

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        try:
            await flow.receive(Text)
        except StepFailed as error:
            failures.append((error.failure.message, error.failure.reason, error.path))
        return await flow.receive(Text)

    assert (await runner.run(f, Num())).status is RunStatus.SUSPENDED
    await runner.send("r", {"text": ["secret"]}, id="m")
    assert (await runner_on(store).run(f, Num())).status is RunStatus.SUSPENDED
    await runner.send("r", {"text": "a"})
    assert (await runner_on(store).run(f, Num())).output == Text(text="a")
    message = "message 'm' is not a Text: text: Input should be a valid string"
    assert failures == [(message, "contract", ("f", "receive"))] * 2


async def test_a_failed_flow_receives_its_message_again(store: Any) -> None:
    """A message whose failure ended a run is received by a resume with a class that it fits, in order."""

    def flow_with(model: type[BaseModel]) -> Any:
        @stroma_flow("f", input=Num, output=Text)
        async def f(flow: Flow, state: Num) -> Text:
            first, second = await flow.receive(model), await flow.receive(Text)
            return Text(text=f"{first!r} {second.text}")

        return f

    runner = runner_on(store)
    assert (await runner.run(flow_with(Num), Num())).status is RunStatus.SUSPENDED
    await runner.send("r", {"text": "a", "n": "one"})
    failed = await runner_on(store).run(flow_with(Num), Num())
    assert (failed.status, failed.failure and failed.failure.reason) == (RunStatus.FAILED, "contract")
    with pytest.raises(StoreError, match="has ended"):
        await runner.send("r", {"text": "b"})
    again = await runner_on(store).run(flow_with(Text), Num())
    assert (again.status, again.suspended) == (RunStatus.SUSPENDED, ["waiting for a message"])
    await runner.send("r", {"text": "b"})
    assert (await runner_on(store).run(flow_with(Text), Num())).output == Text(text="Text(text='a') b")


async def test_a_message_that_no_longer_fits_blocks_the_run(store: Any) -> None:
    """Code whose class refuses a message that was accepted cannot continue the run, which stays as it was."""

    class Strict(BaseModel):
        text: str = Field(min_length=3)

    def flow_with(model: type[BaseModel]) -> Any:
        @stroma_flow("f", input=Num, output=Num)
        async def f(flow: Flow, state: Num) -> Num:
            await flow.receive(model)
            await flow.receive(Text)
            return state

        return f

    runner = runner_on(store)
    await runner.run(flow_with(Text), Num())
    await runner.send("r", {"text": "a"}, id="m")
    await runner_on(store).run(flow_with(Text), Num())
    with pytest.raises(
        PipelineChanged, match="the accepted message 'm' is not a Strict: text: String should have"
    ):
        await runner_on(store).run(flow_with(Strict), Num())
    await runner.send("r", {"text": "b"})
    assert (await runner_on(store).run(flow_with(Text), Num())).status is RunStatus.RESUMED


@pytest.mark.parametrize("dies", [False, True])
async def test_a_wait_that_was_given_up_keeps_no_message(dies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message recorded for a wait that the body gave up goes to the next one first, also after a death."""
    store, record, noted = InMemoryStore(), MemorySession.record, asyncio.Event()
    runner = runner_on(store)

    def has_note() -> bool:
        return "0:m:?receive#0" in store.flow_notes("r")

    def record_late(session: Any, row: Any, *rest: Any) -> Any:
        async def wait() -> None:
            await runner.send("r", {"text": "a"})
            await runner.send("r", {"text": "b"})
            while not has_note():
                await asyncio.sleep(0)
            noted.set()
            record(session, row, *rest)

        return wait() if row.node_id == "add" else record(session, row, *rest)

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        first, second = (asyncio.create_task(flow.receive(Text)) for _ in range(2))
        await flow.step(add, state)
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        texts = [(await second).text, (await flow.receive(Text)).text]
        return Text(text=" ".join(texts))

    add = World().step("add")
    monkeypatch.setattr(MemorySession, "record", record_late)
    life = asyncio.ensure_future(runner.run(f, Num()))
    await noted.wait()
    if dies:
        life.cancel()
        await asyncio.wait([life])
        assert has_note()
        life = asyncio.ensure_future(runner_on(store).run(f, Num()))
    assert (await life).output == Text(text="a b")
    assert not has_note()


async def test_a_fork_gets_the_messages_of_its_past(store: Any) -> None:
    """A fork gets what its flow had received before the call, and then what is sent to the fork."""
    world, runner = World(), runner_on(store)
    add = world.step("add")

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        texts = [(await flow.receive(Text)).text]
        await flow.step(add, state)
        texts.append((await flow.receive(Text)).text)
        return Text(text=" ".join(texts))

    await runner.run(f, Num())
    for text in "ab":
        await runner.send("r", {"text": text}, id=text)
    assert (await runner_on(store).run(f, Num())).output == Text(text="a b")
    fork = await runner.fork("r", f, at="add", new_run_id="fork")
    assert (fork.status, fork.suspended) == (RunStatus.SUSPENDED, ["waiting for a message"])
    await runner.send("fork", {"text": "c"}, id="a")
    again = await runner_on(store, run_id="fork").run(f, Num())
    assert (again.output, len(world.calls)) == (Text(text="a c"), 2)


async def test_the_next_flow_gets_what_one_has_left(store: Any) -> None:
    """Messages are sent to the run: a flow of it receives those that no flow before it has received."""
    runner = runner_on(store)

    @stroma_flow("next", input=Text, output=Text)
    async def following(flow: Flow, state: Text) -> Text:
        return Text(text=f"{state.text} {(await flow.receive(Text)).text}")

    flows = Pipeline("both", [receiver(1), following])
    await runner.run(flows, Num())
    for text in "ab":
        await runner.send("r", {"text": text})
    result = await runner_on(store).run(flows, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Text(text="a b"))


async def test_a_body_that_receives_no_more_is_changed(store: Any) -> None:
    """Code that waits elsewhere for a message than the code that has received it cannot continue the run."""
    runner, add = runner_on(store), World().step("add")

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        await flow.step(add, state)
        return await flow.receive(Text)

    await runner.run(receiver(2), Num())
    await runner.send("r", {"text": "a"})
    await runner_on(store).run(receiver(2), Num())
    with pytest.raises(
        PipelineChanged, match=r"makes step 'add' \(call 1\) now, and flow.receive \(call 1\) is recorded"
    ):
        await runner_on(store).run(f, Num())


async def test_what_is_no_message(store: Any) -> None:
    """What is neither a model nor JSON is refused before it is stored; so is an unstorable topic or id."""

    class Holder(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        value: object

    runner = runner_on(store)
    with pytest.raises(CheckpointNotFound):
        await runner.send("r", {"text": "a"})
    await runner.run(receiver(1), Num())
    for message in (object(), {1}, float("nan"), Holder(value=object())):
        with pytest.raises(NotSerialisable):
            await runner.send("r", message)
    with pytest.raises(NotSerialisable, match="a message must be a model or JSON data"):
        await runner.send("r", {1})
    for options in ({"topic": "\0"}, {"id": ""}, {"topic": None}, {"id": 5}):
        with pytest.raises(ValueError):
            await runner.send("r", {"text": "a"}, **options)  # type: ignore[arg-type]
    assert store.get_run("r").due_ms is None


async def test_mistakes_in_a_wait_for_a_message() -> None:
    """A class that is no model, an illegal topic, and a key that was used before are errors in the body."""
    wrong: Any = str
    calls: list[Any] = [
        lambda flow: flow.receive(wrong),
        lambda flow: flow.receive(Text, topic="\0"),
        lambda flow: (flow.receive(Text, key="k").close(), flow.receive(Text, key="k")),
    ]
    errors = []
    for call in calls:

        @stroma_flow("f", input=Num, output=Num)
        async def f(flow: Flow, state: Num, call: Any = call) -> Num:
            call(flow)
            return state

        failure = (await runner_on(InMemoryStore()).run(f, Num())).failure
        errors.append(failure and failure.exception)
    assert [type(error) for error in errors] == [TypeError, ValueError, ValueError]


async def test_a_message_in_json_may_have_aliases(store: Any) -> None:
    """JSON may name fields as the class does in JSON, a model is received as it is."""

    class Steer(BaseModel):
        max_words: int = Field(alias="maxWords")

    runner = runner_on(store)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        return Num(n=sum([(await flow.receive(Steer)).max_words for _ in range(2)]))

    await runner.run(f, Num())
    await runner.send("r", {"maxWords": 1})
    await runner.send("r", Steer(maxWords=2))
    assert (await runner_on(store).run(f, Num())).output == Num(n=3)


async def test_a_flow_that_receives_is_deterministic() -> None:
    """check_deterministic sends its messages to a flow that waits for them, each on its topic."""
    runner = StromaRunner.quick()

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        first = await flow.receive(Num)
        second = await flow.receive(Num, topic="more")
        try:
            await flow.receive(Num, timeout=3600)
        except TimeoutError:
            return Num(n=10 * first.n + second.n)
        return state

    result = await runner.check_deterministic(f, Num(), messages=[Num(n=1), ("more", Num(n=2))])
    assert result.output == Num(n=12)
    with pytest.raises(ValueError, match=r"flow 'f' does not end: it is waiting for a message; .* messages="):
        await runner.check_deterministic(f, Num())


async def test_a_flow_without_a_journal_receives_nothing() -> None:
    """A store that has no journal ends the run with an error that says what to use."""

    class States:
        def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
        def load(self, run_id: str, node_id: str) -> None: ...
        def delete(self, run_id: str) -> None: ...

    result = await StromaRunner.quick(store=States()).run(receiver(1), Num())
    assert result.status is RunStatus.PARTIAL
    assert "no journal, so a flow cannot receive messages" in str(result.failure)
    with pytest.raises(StoreError, match="has no journal"):
        await StromaRunner.quick(store=States()).send("r", {"text": "a"})


async def test_a_worker_continues_a_run_that_was_sent_a_message(store: Any) -> None:
    """A suspended run that is sent a message is continued by a worker, and ends its waits."""
    runner, f = runner_on(store, run_id="worker"), receiver(2)
    handle = await runner.submit(f, Num(), run_id="r")
    work = asyncio.ensure_future(runner.serve(f, poll_seconds=0.02))
    await handle.send({"text": "a"})
    await handle.send({"text": "b"})
    result = await handle.result(timeout=60)
    assert result.output == Text(text="a b")
    await runner.shutdown()
    await work
