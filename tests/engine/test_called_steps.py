"""Steps that code calls, in a node or in plain code: each is known by what it is."""

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.fixtures import store_fixture
from tests.flows.steps import runner_on
from tests.kit import THRICE, Note, cancel, computing, context_of, ended, start_python
from tests.shared_stores import IN_PROCESS, SHARED, place

from stroma import (
    FailureClass,
    FailurePolicy,
    Journal,
    NodeHooks,
    PipelineChanged,
    ReliabilityContext,
    RunStatus,
    StromaRunner,
    current_node,
    current_run,
    execute_step,
    map_over,
    parallel,
    stroma_node,
)
from stroma.adapters import RunCancelled
from stroma.checkpoint import AttemptRecord
from stroma.checkpoint.history.bars import find_progress, in_order
from stroma.engine.lifecycle import open_run

HELPER = Path(__file__).with_name("called_steps_helper.py")


class Texts(BaseModel):
    texts: list[Note] = []
    done: list[Any] = []


class Numbers(BaseModel):
    n: int = 0
    a: int = 0
    b: int = 0


store = store_fixture(*IN_PROCESS)


def node(node_id: str, func: Callable[..., Any], input_model: Any = Note, output_model: Any = Note) -> Any:
    return stroma_node(node_id, input=input_model, output=output_model)(func)


def context_on(store: Any, **config: Any) -> ReliabilityContext:
    runner = runner_on(store, **config)
    return context_of(runner)


class World:
    """What happens to functions, in all processes: what is called, with which key, and where they die."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.keys: dict[str, set[str]] = {}
        self.dies_in: str | None = None
        self.dies = asyncio.Event()

    def step(self, name: str) -> Any:
        async def step(state: Note) -> Any:
            return await self.call(name, state)

        return step

    async def call(self, name: str, state: Note) -> Any:
        what = f"{name} {state.text}"
        self.calls.append(what)
        self.keys.setdefault(what, set()).add(current_node().idempotency_key)
        if name == self.dies_in:
            await self.die()
        return {"text": f"{state.text}{name[0]}"}

    async def die(self) -> None:
        self.dies.set()
        await asyncio.Event().wait()

    async def ask(self, name: str, text: str, ctx: Any = None) -> str:
        """Call a step; in a node, one of its run."""
        result = await execute_step(name, self.step(name), Note(text=text), ctx or current_run())
        assert result.status is RunStatus.COMPLETED, result.failure
        return str(result.final_state.text)

    async def live(self, run: Callable[[], Any], dies_in: str | None = None) -> Any:
        """One process: it ends in the call of a step, or by itself."""
        self.dies_in = dies_in
        self.dies.clear()
        life, dying = asyncio.ensure_future(run()), asyncio.ensure_future(self.dies.wait())
        await asyncio.wait([life, dying], return_when=asyncio.FIRST_COMPLETED)
        if life.done():
            dying.cancel()
            return await life
        await cancel(life)
        return None


@pytest.mark.parametrize("next_id", ["second", "draft"])
@pytest.mark.parametrize("times", [1, 3])
async def test_steps_in_a_node_take_no_position_of_the_pipeline(store: Any, next_id: str, times: int) -> None:
    """G5: After a crash behind a node that calls steps, no later node is skipped, and the state is right."""
    world = World()

    async def answer(state: Note) -> Note:
        for _ in range(times):
            state = Note(text=await world.ask("draft", state.text))
        return state

    nodes = [node("answer", answer), node(next_id, world.step("second")), node("third", world.step("third"))]

    async def run() -> Any:
        return await runner_on(store).run(nodes, Note(text="x"))

    await world.live(run, "second")
    world.calls.clear()
    result = await world.live(run)
    drafted = "x" + "d" * times
    assert world.calls == [f"second {drafted}", f"third {drafted}s"]
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Note(text=f"{drafted}st"))


async def test_steps_in_a_node_are_its_children() -> None:
    """In trace and totals, what a node calls is inside of the node, and its time counts once."""
    world = World()

    async def answer(state: Note) -> Note:
        return Note(text=await world.ask("draft", state.text))

    result = await runner_on(None, resume=False).run([node("answer", answer)], Note(text="x"))
    (event,) = result.trace
    (inner,) = event.children
    assert (inner.node_id, inner.position, inner.branch) == ("draft", 0, "draft#0")


async def test_side_by_side_steps_are_known_by_their_task(store: Any) -> None:
    """G5: Branches that race have the same steps and idempotency keys after a crash, whichever is faster."""
    world, slow = World(), asyncio.Event()
    live = {"first": "1", "died": False}

    async def branch(name: str) -> str:
        if name != live["first"]:
            await slow.wait()
        text = await world.ask("fetch", name)
        slow.set()
        return await world.ask("judge", text)

    # Every branch makes a first call before one of them waits: that is what tasks are numbered by.
    async def all_first(state: Note) -> Note:
        async def one(name: str) -> str:
            await world.ask("begin", name)
            return await branch(name)

        return await _gathered(one, state)

    async def _gathered(one: Callable[[str], Any], state: Note) -> Note:
        slow.clear()
        outcome = await asyncio.gather(*map(one, "012"))
        if not live["died"]:
            live["died"] = True
            await world.die()
        return Note(text=" ".join(outcome))

    async def run() -> Any:
        return await runner_on(store).run([node("answer", all_first)], Note(text="x"))

    await world.live(run)
    world.calls.clear()
    live["first"] = "2"
    result = await world.live(run)
    assert world.calls == []
    assert result.final_state == Note(text="0fj 1fj 2fj")
    assert all(len(keys) == 1 for keys in world.keys.values())
    assert len(set.union(*world.keys.values())) == 9


async def test_another_attempt_of_a_node_calls_its_steps_again(store: Any) -> None:
    """A retry of a node buys new answers; after a crash in it, no answers of two attempts are mixed."""
    world = World()
    tries = iter([False, True, True])

    async def answer(state: Note) -> Note:
        text = await world.ask("draft", f"{state.text}{current_node().attempt}")
        await world.ask("judge", text)
        if not next(tries):
            raise ValueError("it is no good")
        return Note(text=await world.ask("polish", text))

    async def run() -> Any:
        policy = {"answer": {FailureClass.AMBIGUOUS: FailurePolicy(max_retries=1, backoff_seconds=0)}}
        return await runner_on(store, node_policies=policy).run([node("answer", answer)], Note(text="x"))

    await world.live(run, "polish")
    assert world.calls == ["draft x1", "judge x1d", "draft x2", "judge x2d", "polish x2d"]
    world.calls.clear()
    result = await world.live(run)
    assert result.status is RunStatus.RESUMED
    assert result.final_state in (Note(text="x1dp"), Note(text="x2dp"))
    assert [call.partition(" ")[0] for call in world.calls] == ["polish"]


async def test_a_step_in_a_node_with_another_input_is_refused(store: Any) -> None:
    """A node that calls another step than before under the same identity is refused, with both inputs."""
    world = World()
    seen = iter(["a", "b"])

    async def answer(state: Note) -> Note:
        await world.ask("draft", next(seen))
        return Note(text=await world.ask("judge", state.text))

    async def run() -> Any:
        return await runner_on(store).run([node("answer", answer)], Note(text="x"))

    await world.live(run, "judge")
    world.calls.clear()
    result = await world.live(run)
    assert result.status is RunStatus.FAILED
    assert isinstance(result.failure.exception, PipelineChanged)
    assert result.failure.reason == "changed"
    assert "other values of 'text'" in result.failure.message
    assert [json.loads(one)["text"] for one in result.failure.exception.inputs] == ["a", "b"]
    assert world.calls == []


@pytest.mark.parametrize("way", ["parallel", "map", "journal"])
async def test_steps_in_parts_of_groups_are_found_again(store: Any, way: str) -> None:
    """G5: In a child of a group, and each item of a map, committed steps are not called again on resume."""
    world = World()

    async def part(state: Note) -> Note:
        text = await world.ask("draft", state.text)
        return Note(text=await world.ask("judge", text))

    child = node("part", part)
    if way == "parallel":
        pipeline, state = [parallel(child, node("other", part))], Note(text="0")
    else:
        into: Any = "done" if way == "map" else Journal()
        pipeline, state = [map_over("texts", child, into=into)], Texts(texts=[Note(text="0"), Note(text="1")])  # type: ignore[assignment]

    async def run() -> Any:
        return await runner_on(store).run(pipeline, state)

    await world.live(run, "judge")
    before = set(world.keys)
    world.calls.clear()
    assert (await world.live(run)).status is RunStatus.RESUMED
    assert not [
        call for call in world.calls if call.startswith("draft") and call in before and way != "parallel"
    ]
    judged = [call for call in world.calls if call.startswith("judge")]
    assert len(judged) == 2
    if way == "parallel":  # Two of the same name, whose keys differ all the same.
        assert [len(keys) for keys in world.keys.values()] == [2, 2]
    else:
        assert all(len(keys) == 1 for keys in world.keys.values())


async def test_a_step_outside_of_the_nodes_of_a_pipeline_is_refused() -> None:
    """A hook of the run cannot take the position of a node by calling a step."""
    world, messages = World(), []

    async def start(*about: Any) -> None:
        try:
            await world.ask("draft", "x")
        except RuntimeError as error:
            messages.append(str(error))

    runner = runner_on(None, resume=False, hooks=NodeHooks(on_run_start=start))
    await runner.run([node("first", world.step("first"))], Note(text="x"))
    assert world.calls == ["first x"]
    assert messages == [
        "step 'draft' was called in run 'r' of a pipeline, outside of its nodes; call it in a node, await it "
        "there, or use a separate context"
    ]


async def test_a_step_that_a_task_calls_after_its_node_is_refused() -> None:
    """G7: a task that outlives its node calls no step of the run, which would be in no trace event."""
    world, tasks = World(), []

    async def call_later() -> None:
        await asyncio.sleep(0)
        await world.ask("late", "x")

    async def leave(state: Note) -> Note:
        tasks.append(asyncio.create_task(call_later()))
        return state

    nodes = [node("leaves", leave), node("next", world.step("next"))]
    result = await runner_on(None, resume=False).run(nodes, Note())
    with pytest.raises(RuntimeError, match="outside of its nodes"):
        await tasks[0]
    assert (result.status, world.calls) == (RunStatus.COMPLETED, ["next "])


async def test_racing_steps_of_plain_code_keep_their_keys(store: Any) -> None:
    """Steps of plain code that were in flight when the process died have the same keys, in any order."""
    world = World()

    async def run(first: str) -> list[str]:
        ctx, gone = context_on(store), asyncio.Event()

        async def branch(name: str) -> str:
            text = await world.ask("fetch", name, ctx)
            if name != first:
                await gone.wait()
            asyncio.get_running_loop().call_soon(gone.set)
            return await world.ask("judge", text, ctx)

        return await asyncio.gather(branch("0"), branch("1"))

    await world.live(lambda: run("1"), "judge")
    assert await world.live(lambda: run("0")) == ["0fj", "1fj"]
    assert {call: len(keys) for call, keys in world.keys.items()} == dict.fromkeys(world.keys, 1)
    assert len(set.union(*world.keys.values())) == 4


async def test_a_step_that_failed_keeps_its_place(store: Any) -> None:
    """Another process that calls another step first gets neither position nor key of one that failed."""
    world = World()

    async def broken(state: Note) -> Any:
        await world.call("a", state)
        raise ValueError("no")

    async with context_on(store) as ctx:
        failed = await execute_step("a", broken, Note(), ctx)
    assert failed.status is RunStatus.PARTIAL
    again = context_on(store)
    await world.ask("c", "", again)
    await world.ask("a", "", again)
    assert [(event.node_id, event.position) for event in again.trace] == [("c", 1), ("a", 0)]
    assert all(len(keys) == 1 for keys in world.keys.values())


async def test_an_answer_is_given_to_the_step_that_asked(store: Any) -> None:
    """The answer to a step of plain code never reaches another one that is called before it."""
    got: list[Any] = []

    asks = computing(lambda _: {"text": current_node().wait_for(Note, reason="say something").text})

    async def looks(state: Note) -> Any:
        got.append(current_node().signal)
        return {"text": state.text}

    ctx = context_on(store)
    async with ctx:
        assert (await execute_step("asks", asks, Note(), ctx)).status is RunStatus.SUSPENDED
    await runner_on(store).signal("r", Note(text="yes"))
    again = context_on(store)
    async with again:
        await execute_step("looks", looks, Note(), again)
        result = await execute_step("asks", asks, Note(), again)
    assert got == [None]
    assert result.final_state.text == "yes"


async def test_the_error_of_plain_code_is_the_message_of_its_run(store: Any) -> None:
    """A run whose plain code raises between its steps is INTERRUPTED, and its record names the error."""
    ctx = context_on(store)
    with pytest.raises(LookupError):
        async with ctx:
            await execute_step("a", computing(lambda _: {"text": "a"}), Note(), ctx)
            raise LookupError("no such letter")
    record = store.get_run("r")
    assert (record.status, record.stop_text) == ("INTERRUPTED", "LookupError: no such letter")


async def test_the_step_in_progress_follows_the_last_that_ended(store: Any) -> None:
    """Views of a run at work name the node after the last that ended, with its name if it is known."""
    seen: list[Any] = []

    async def looks(state: Note) -> Any:
        record, attempts = store.get_run("r"), store.attempts("r")
        seen.extend(find_progress(record, attempts, 0, names) for names in ((), ("first", "second")))
        return {"text": state.text}

    nodes = [node(one, looks) for one in ("first", "second")]
    assert (await runner_on(store).run(nodes, Note(), run_id="r")).ok
    assert [(one.at, one.label) for one in seen] == [
        ("0", "first node"),
        ("0", "first"),
        ("1", "next node"),
        ("1", "second"),
    ]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("way", ["parallel", "map"])
async def test_a_group_does_not_mix_two_inputs(store: Any, way: str, inside: bool) -> None:
    """A group that is a step, failed with one input, is refused with another before any call."""
    world = World()
    calls = world.calls
    fails = [True]

    def child(name: str) -> Any:
        async def call(state: Numbers) -> Any:
            calls.append(f"{name} {state.n}")
            if name == "b" and fails[0]:
                raise ValueError("no")
            return {name: state.n}

        return node(name, call, Numbers, Numbers)

    async def item(state: Note) -> Any:
        calls.append(f"item {state.text}")
        if state.text.startswith("b") and fails[0]:
            raise ValueError("no")
        return state

    group: Any = parallel(child("a"), child("b"), max_concurrency=1)
    one: Any = Numbers(n=1)
    two: Any = Numbers(n=2)
    if way == "map":
        group = map_over("texts", node("item", item), into="done", max_concurrency=1)
        one, two = (Texts(texts=[Note(text=f"a{n}"), Note(text=f"b{n}")]) for n in (1, 2))

    async def run(value: Any) -> Any:
        if not inside:
            ctx = context_on(store)
            await open_run(ctx, Note(), ends=False)
            return await execute_step("group", group, value, ctx)
        findings: list[Any] = []

        async def outer(state: Note) -> Note:
            findings.append(await execute_step("group", group, value, current_run()))  # type: ignore[arg-type]
            if findings[0].status is not RunStatus.COMPLETED:
                await world.die()
            return state

        result = await runner_on(store).run([node("outer", outer)], Note())
        if not findings:
            raise result.failure.exception
        return findings[0]

    await world.live(lambda: run(one))
    assert len(calls) == 2
    fails[0] = False
    calls.clear()
    with pytest.raises(PipelineChanged, match="recorded with another input"):
        await run(two)
    assert calls == []
    assert (await run(one)).status is RunStatus.COMPLETED
    assert calls == (["item b1"] if way == "map" else ["b 1"])


async def test_the_history_tells_the_keys(store: Any) -> None:
    """What a store tells of an attempt has the idempotency key its function saw, in plain code and nodes."""
    world = World()
    ctx = context_on(store)

    async def outer(state: Note) -> Any:
        await world.call("outer", state)
        return {"text": await world.ask("inner", "i")}

    async with ctx:
        await asyncio.gather(world.ask("a", "1", ctx), world.ask("a", "2", ctx))
        await execute_step("outer", outer, Note(text="o"), ctx)
    events = {a.idempotency_key("r", 1) for a in store.attempts("r")}
    assert events == set.union(*world.keys.values())
    assert len(events) == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("way", ["pipeline", "plain"])
def test_killed_inside_of_a_step(kind: str, way: str, tmp_path: Path) -> None:
    """G5: Killed with SIGKILL in a racing branch, a resume calls only what was in flight, same keys."""
    with place(kind) as where:
        side = tmp_path / "side"
        ends = []
        for life in range(3):
            process = start_python(HELPER, kind, where, side, way, life)
            printed = ended(process, 0, -signal.SIGKILL, timeout=180)
            ends.append(process.returncode)
        assert ends == [-signal.SIGKILL, -signal.SIGKILL, 0]
        assert printed.strip() == "0fj 1fj 2fj"
        lines = side.read_text().splitlines()
        called = [line.partition("|") for line in lines]
        keys: dict[str, set[str]] = {}
        for what, _, key in called:
            keys.setdefault(what, set()).add(key)
        assert {what: len(result) for what, result in keys.items()} == dict.fromkeys(keys, 1)
        assert len(set.union(*keys.values())) == len(keys) == 6


def test_steps_are_shown_with_what_is_inside_of_them() -> None:
    """In history, the steps of a node stand in order of their begin, each before its own children."""

    def at(branch: str, started: int) -> AttemptRecord:
        return AttemptRecord(0, started, branch, 1, "n", 0, "success")

    order = ["", "z#0", "z#0.0", "z#0.1", "z#0.10", "a#0", "a#0.x#0", "a#1"]
    events = [at(branch, started) for started, branch in enumerate(order)]
    assert [one.branch for one in in_order(reversed(events))] == order


@pytest.mark.core
@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_run_calls_no_further_step(store: Any, fails: bool) -> None:
    """After an acknowledged cancel() the current attempt of a step is the last; the run is CANCELLED."""
    runner = StromaRunner.quick(store=store, run_id="r", policy_map=THRICE)
    started, request = asyncio.Event(), asyncio.Event()
    calls: list[str] = []

    async def first(state: Note) -> dict[str, str]:
        calls.append("first")
        started.set()
        await request.wait()
        if fails:
            raise ValueError("no")
        return {"text": "first"}

    async def second(state: Note) -> dict[str, str]:
        calls.append("second")
        return {"text": "second"}

    async with context_of(runner) as ctx:
        under_way = asyncio.ensure_future(execute_step("first", first, Note(), ctx))
        await started.wait()
        assert await runner.cancel("r")
        async with asyncio.timeout(20):
            while not ctx.stopping.is_cancelled:
                await asyncio.sleep(0.001)
        request.set()
        one = await under_way
        two = await execute_step("second", second, Note(), ctx)
    assert one.status is (RunStatus.PARTIAL if fails else RunStatus.COMPLETED)
    assert two.status is RunStatus.CANCELLED
    assert isinstance(two.failure.exception, RunCancelled)
    assert "step 'second' is not called" in two.failure.message
    assert calls == ["first"]
    assert store.get_run("r").status == "CANCELLED"


async def test_a_step_that_waits_for_its_retry_when_the_run_is_cancelled() -> None:
    """A cancel() that comes while a step of plain code waits for its next attempt leaves out that attempt."""
    calls = 0

    async def cancel(*_: Any) -> None:
        assert await runner.cancel("r")

    async def fails(state: Note) -> Note:
        nonlocal calls
        calls += 1
        raise ValueError("no")

    runner = StromaRunner.quick(run_id="r", policy_map=THRICE, hooks=NodeHooks(on_node_retry=cancel))
    async with context_of(runner) as ctx:
        result = await execute_step("fails", fails, Note(), ctx)
    assert (result.status, calls) == (RunStatus.PARTIAL, 1)
