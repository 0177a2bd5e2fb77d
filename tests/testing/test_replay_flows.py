"""replay() of flows: their events, answers, messages and times are those of the recording."""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretBytes, SecretStr
from tests.fixtures import store_fixture
from tests.flows.program_world import runner_of
from tests.flows.programs import Life, Program, flow_of, program_of
from tests.flows.test_flow_programs import disturbed, seeds
from tests.kit import Num, Rot, failing_with, node

from stroma import (
    CheckpointManager,
    Flow,
    InMemoryStore,
    SQLiteStore,
    StepFailed,
    StromaRunner,
    Suspend,
    parallel,
    stroma_flow,
)
from stroma.contracts.schema import schema_of
from stroma.runner.rehearsal import Rehearsal
from stroma.testing import FakeClock, RecordedRun, crash_at, replay

store = store_fixture("memory", "sqlite")


class Refused(Exception):
    status_code = 400


class Flows:
    """Flows whose runs end, wait or fail, and the nodes that they have called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.runner = runner = StromaRunner.quick()

        @runner.node
        async def add(state: Num) -> Num:
            self.calls.append("add")
            return Num(n=state.n + 1)

        @runner.node
        async def breaks(state: Num) -> Num:
            self.calls.append("breaks")
            raise PermissionError("no")

        @runner.node
        async def asks(state: Num) -> Num:
            raise Suspend("may this be paid?")

        @runner.flow
        async def question(flow: Flow, state: Num) -> Num:
            state = await flow.step(add, state)
            answer = await flow.wait_for(Num, reason="how many?")
            return await flow.step(add, answer)

        @runner.flow
        async def message(flow: Flow, state: Num) -> Num:
            first, second = await asyncio.gather(flow.receive(Num, topic="a"), flow.receive(Num))
            return await flow.step(add, Num(n=first.n * 10 + second.n))

        @runner.flow
        async def sleep(flow: Flow, state: Num) -> Num:
            await flow.sleep(hours=2)
            return Num(n=flow.now().minute + int(10 * flow.random()))

        @runner.flow
        async def nap(flow: Flow, state: Num) -> Num:
            await flow.sleep(5)
            return state

        @runner.flow
        async def late(flow: Flow, state: Num) -> Num:
            try:
                return await flow.wait_for(Num, reason="in time?", timeout=100)
            except TimeoutError:
                return await flow.step(add, state)

        @runner.flow
        async def race(flow: Flow, state: Num) -> Num:
            tasks = [asyncio.ensure_future(flow.step(add, Num(n=n))) for n in range(3)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return await flow.step(parallel(add, asks) if len(done) > 3 else add, done.pop().result())

        @runner.flow
        async def fallback(flow: Flow, state: Num) -> Num:
            try:
                return await flow.step(breaks, state)
            except StepFailed:
                return await flow.step(add, state)

        @runner.flow
        async def fails(flow: Flow, state: Num) -> Num:
            return await flow.step(breaks, await flow.step(add, state))

        @runner.flow
        async def raises(flow: Flow, state: Num) -> Num:
            raise ValueError((await flow.step(add, state)).n)

        @runner.flow
        async def step_asks(flow: Flow, state: Num) -> Num:
            return await flow.step(asks, await flow.step(add, state))

        @runner.node(effect=True)
        async def pay(state: Num) -> Num:
            self.calls.append("pay")
            raise Refused("bad card")

        @runner.flow
        async def charge(flow: Flow, state: Num) -> Num:
            return await flow.step(pay, state)

        self.by_name: dict[str, Any] = {name: value for name, value in locals().items() if name != "self"}

    def runner_on(self, store: Any) -> StromaRunner:
        return StromaRunner(self.runner.registry, CheckpointManager(store))


async def record(flows: Flows, store: Any, name: str, *, ends: bool = True) -> RecordedRun:
    """Return the recording of a run as a file has it; ``ends``: it gets answers and messages, and time."""
    flow = flows.by_name[name]
    runner = flows.runner._twin(flow, store, run_id="r", inline_wait_seconds=0.0)
    if ends:
        answers = () if name == "late" else [Num(n=4)]
        await Rehearsal(answers, [Num(n=3), ("a", Num(n=7))]).run(runner, flow, Num(), resume=False)
    else:
        await runner.run(flow, Num())
    flows.calls.clear()
    return RecordedRun.from_json(json.loads(json.dumps(RecordedRun.read(store, "r").to_json())))


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "ends", "status"),
    [
        ("question", True, "COMPLETED"),
        ("question", False, "SUSPENDED"),
        ("message", True, "COMPLETED"),
        ("message", False, "SUSPENDED"),
        ("sleep", True, "COMPLETED"),
        ("sleep", False, "SUSPENDED"),
        ("nap", False, "SUSPENDED"),
        ("late", True, "COMPLETED"),
        ("late", False, "SUSPENDED"),
        ("race", True, "COMPLETED"),
        ("fallback", True, "COMPLETED"),
        ("fails", True, "PARTIAL"),
        ("raises", True, "PARTIAL"),
        ("step_asks", False, "SUSPENDED"),
        ("charge", True, "FAILED"),
    ],
)
async def test_unchanged_flows_replay_the_same(store: Any, name: str, ends: bool, status: str) -> None:
    """A flow that asks, receives, sleeps or fails is replayed to its end a month later without a call."""
    flows = Flows()
    recorded = await record(flows, store, name, ends=ends)
    with FakeClock(start=datetime.now(UTC) + timedelta(days=30)):
        result = await replay(recorded, flows.by_name[name], runner=flows.runner)
    result.assert_same()
    assert (result.status, flows.calls) == (status, [])
    if status == "COMPLETED":
        (end,) = [one for one in recorded.attempts if not one.branch]
        assert end.output is not None
        assert schema_of(Num).decode(end.output) == result.result.output


async def test_an_answer_that_no_run_has_taken_is_not_replayed() -> None:
    """A recorded run that was suspended stays suspended, though its question has been answered since."""
    flows, store = Flows(), InMemoryStore()
    await record(flows, store, "question", ends=False)
    await flows.runner_on(store).signal("r", Num(n=9), schema=Num)
    result = await replay(RecordedRun.read(store, "r"), flows.by_name["question"], runner=flows.runner)
    result.assert_same()
    assert result.status == "SUSPENDED"


@pytest.mark.parametrize(
    ("recorded", "now", "difference"),
    [
        ("question", "message", "makes flow.receive .call 1. now, and step 'add' .call 1. is recorded"),
        ("question", "late", "makes flow.wait_for .call 1. now, and step 'add' .call 1. is recorded"),
        ("fallback", "fails", "makes step 'add' .call 1. now, and step 'breaks' .call 1. is recorded"),
        ("raises", "fails", "0.breaks#1 breaks: it is called, where the run had stopped as PARTIAL"),
    ],
)
async def test_changed_flows_differ(recorded: str, now: str, difference: str) -> None:
    """A flow that makes other calls than the recorded ones differs at the first of them."""
    flows = Flows()
    run = await record(flows, InMemoryStore(), recorded)
    changed = stroma_flow(recorded, input=Num, output=Num)(flows.by_name[now].body)
    result = await replay(run, changed, runner=flows.runner)
    decisions = [str(one) for one in result.differences if one.kind == "decision"]
    assert len(decisions) == 1
    assert re.search(difference, decisions[0])
    assert flows.calls == []


async def test_the_cause_of_other_calls_comes_first() -> None:
    """A step whose output no longer fits its class is listed before the calls that are missing after it."""
    run = await record(Flows(), InMemoryStore(), "question", ends=False)

    class Wide(Num):
        m: int

    add = node("add", failing_with(AssertionError), Num, Wide)

    @stroma_flow("question", input=Num, output=Num)
    async def question(flow: Flow, state: Num) -> Num:
        await flow.step(add, state)
        return await flow.wait_for(Num, reason="how many?")

    result = await replay(run, question)
    assert [one.kind for one in result.differences] == ["contract", "decision"]


@pytest.mark.parametrize("started", ["1", "2", None])
async def test_a_run_keeps_its_version(started: str | None) -> None:
    """A flow that accepts an earlier version is replayed as the version that the run started with."""
    flows, store = Flows(), InMemoryStore()
    runner, add = flows.runner_on(store), flows.by_name["add"]

    async def body(flow: Flow, state: Num) -> Num:
        return state if flow.version is None else await flow.step(add, Num(n=int(flow.version)))

    def release(version: str | None, *accepts: str) -> Any:
        return stroma_flow("f", input=Num, output=Num, version=version, accepts=accepts)(body)

    await runner.run(release(started), Num(), run_id="r")
    recorded = RecordedRun.from_json(json.loads(json.dumps(RecordedRun.read(store, "r").to_json())))
    (await replay(recorded, release("2", "1"), runner=flows.runner)).assert_same()


async def test_a_group_that_a_process_left_is_replayed() -> None:
    """A run whose process died inside a group is followed as far as it came."""
    flows, store = Flows(), InMemoryStore()
    add, breaks = flows.by_name["add"], flows.by_name["breaks"]
    group = parallel(add, breaks, max_concurrency=1)
    with crash_at("before_node", "breaks"):
        await flows.runner_on(store).run([add, group], Num(), run_id="r")
    result = await replay(RecordedRun.read(store, "r"), [add, group], runner=flows.runner)
    assert (result.differences, result.stopped) == ((), "at 1.1 breaks: the run came no further")


async def test_redaction_reaches_answers_and_messages() -> None:
    """What redact removes is neither in the answers nor in the messages of a recording."""
    flows = Flows()
    for name, place in (("question", "answers"), ("message", "events")):
        recorded = await record(flows, InMemoryStore(), name)
        redacted = recorded.redacted(lambda state: {**state, "n": 0} if "n" in state else state)
        before, after = (json.dumps(one.to_json()[place]) for one in (recorded, redacted))
        assert before != after
        assert not re.search(r'n.?.?": [1-9]', after)
        assert (await replay(redacted, flows.by_name[name], runner=flows.runner)).status == "COMPLETED"


class Login(BaseModel):
    password: SecretStr
    key: SecretBytes = SecretBytes(b"hunter2")


async def test_a_recording_in_a_file_has_no_secrets(tmp_path: Path) -> None:
    """Secrets of inputs, outputs, answers and messages, which the store encrypts, are masked in a file."""
    login = Login(password=SecretStr("hunter2"))
    async with SQLiteStore(tmp_path / "runs.db", codec=Rot()) as store:
        runner = StromaRunner.quick(store=store, run_id="r")

        @runner.node
        async def renew(state: Login) -> Login:
            return state

        @runner.flow
        async def logins(flow: Flow, state: Login) -> Num:
            for given in (state, await flow.wait_for(Login, reason="who?"), await flow.receive(Login)):
                await flow.step(renew, given)
            return Num()

        await runner.run(logins, login)
        await runner.signal("r", login)
        await runner.send("r", login)
        assert (await runner.resume(logins, "r")).status == "RESUMED"
        RecordedRun.read(store, "r").save(tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    assert text.count("*" * 10) == 6
    assert not re.search("hunter2|aHVudGVyMg", text)  # In base64, too.
    replayed = await replay(RecordedRun.load(tmp_path / "r.json"), logins, runner=runner)
    assert (replayed.status, replayed.differences) == ("COMPLETED", ())


def test_recorded_programs_replay_the_same() -> None:
    """Random flows that have completed, killed and resumed at random records, replay without a difference."""
    for seed in seeds(10, 300):
        program, store = program_of(seed), InMemoryStore()

        async def trial(program: Program = program, seed: int = seed, store: InMemoryStore = store) -> None:
            world = await disturbed(store, program, seed)
            recorded, paid = RecordedRun.read(store, "r"), len(world.ledger)
            flow = flow_of(program, world.nodes, Life())
            result = await replay(recorded, flow, runner=runner_of(InMemoryStore()))
            assert len(world.ledger) == paid
            if world.result.ok:
                result.assert_same()
            assert result.result.failure is None or not world.result.ok

        try:
            asyncio.run(trial())
        except BaseException as error:
            error.add_note(f"seed {seed}: {program}")
            raise
