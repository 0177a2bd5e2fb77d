"""assert_resumable: it finds what is unsafe, and passes what is safe."""

import os
import random
import threading
from collections import Counter

import pytest
from pydantic import BaseModel
from tests.kit import failing_with
from tests.testing.pipelines import Number, add_one, double, make, patient

from stroma import Flow, JsonLines, Pipeline, StromaRunner, current_node, map_over, parallel
from stroma.testing import POINTS, FaultPlan, assert_resumable, assert_resumable_sync

#: Many processes one after the other, on a machine that may be busy.
pytestmark = pytest.mark.timeout(600)
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
#: A process for each boundary takes long.
HOW = [
    pytest.param(True, marks=[forks, pytest.mark.nightly], id="killed"),
    pytest.param(False, id="simulated"),
]


class Text(BaseModel):
    text: str


class Many(BaseModel):
    items: list[Number]


@pytest.mark.slow
@pytest.mark.parametrize("processes", HOW)
async def test_a_safe_pipeline_passes(processes):
    """Nodes, groups and maps that go by their inputs alone survive a death at every boundary."""
    nodes = [make("a", add_one), parallel(make("b", add_one), make("c", double)), make("d", add_one)]
    proven = await assert_resumable(Pipeline("safe", nodes), Number(), processes=processes)
    assert proven.killed is processes
    assert {boundary.point for boundary in proven.boundaries} == set(POINTS)
    attempts = Counter(boundary.node_id for boundary in proven.boundaries if boundary.point == "before_node")
    assert attempts == {"a": 1, "b": 1, "c": 1, "d": 1, "parallel(b, c)": 1}
    many = Many(items=[Number(n=1), Number(n=2)])
    await assert_resumable([map_over("items", make("item", double), into="out")], many, processes=processes)


@pytest.mark.slow
def test_a_test_without_an_event_loop():
    """assert_resumable_sync does the same."""
    assert assert_resumable_sync([make("a", add_one)], Number()).boundaries


async def test_the_sync_one_says_so_where_a_loop_is_running():
    with pytest.raises(RuntimeError, match="await assert_resumable"):
        assert_resumable_sync([make("a", add_one)], Number())


@pytest.mark.slow
@forks
async def test_a_node_that_keeps_state_in_a_global_is_found():
    """What one node leaves in the memory of the process is gone after a death; both nodes are named."""
    memory = {}

    async def put(state):
        memory["n"] = state.n + 5
        return state

    async def get(state):
        return {"n": memory["n"]}

    with pytest.raises(AssertionError) as result:
        await assert_resumable([make("put", put), make("get", get)], Number())
    assert "dies after the commit of node 'put' (position 0, attempt 1), before its hooks" in str(
        result.value
    )
    assert "node 'get': KeyError: 'n'" in str(result.value)

    async def get_or_not(state):
        return {"n": memory.get("n", 0)}

    with pytest.raises(AssertionError) as result:
        await assert_resumable([make("put", put), make("get", get_or_not)], Number())
    assert "the final state differs, from the output of node 'get' (position 1) on: n 5 -> 0" in str(
        result.value
    )
    assert memory == {}  # It was never in this process.


@pytest.mark.core
async def test_state_in_the_context_is_found():
    """The run's context is that of the process, too."""

    async def unsafe():
        from stroma import NodeContract, stroma_node

        contract = NodeContract(node_id="x", input_schema=Number, output_schema=Number)

        @stroma_node("put", contract)
        async def put(state, ctx):
            ctx["n"] = 7
            return state

        @stroma_node("get", contract)
        async def get(state, ctx):
            return {"n": ctx.get("n", 0)}

        await assert_resumable([put, get], Number(), processes=False)

    with pytest.raises(AssertionError, match="the final state differs, from the output of node 'get'"):
        await unsafe()


@pytest.mark.slow
@pytest.mark.parametrize("processes", HOW)
async def test_chance_is_found(processes):
    """A node that answers by chance differs by itself; nothing is said about a death then."""

    async def guess(state):
        return {"n": random.SystemRandom().randrange(10**12)}

    with pytest.raises(AssertionError, match="two undisturbed runs differ, from the output of node 'guess'"):
        await assert_resumable([make("a", add_one), make("guess", guess)], Number(), processes=processes)


async def test_the_step_that_differs_first_is_named():
    """Of a flow, the message names the step that differs first, and neither the flow nor a later step."""

    async def guess(state):
        return {"n": random.SystemRandom().randrange(10**12)}

    steps = [make("zero", add_one), make("guess", guess), make("after", add_one)]

    @StromaRunner.quick().flow
    async def body(flow: Flow, state: Number) -> Number:
        for step in steps:
            state = await flow.step(step, state)
        return state

    with pytest.raises(AssertionError, match="two undisturbed runs differ, from the output of node 'guess'"):
        await assert_resumable(body, Number(), processes=False)


async def test_the_message_shows_where_long_values_differ():
    """Of a long text that differs at its end, the message shows the end."""
    ends = iter(("one", "two"))

    async def write(state):
        return {"text": f"{'x' * 500} {next(ends)}"}

    nodes = [make("write", write, output_model=Text)]
    with pytest.raises(AssertionError, match=r'text "?…x+ one" -> …x+ two"'):
        await assert_resumable(nodes, Number(), processes=False)


async def test_fields_that_may_differ():
    """What is named with ignore= is not looked at."""

    class Stamped(BaseModel):
        n: int = 0
        stamp: int = 0

    async def stamp(state):
        return {"n": 1, "stamp": random.SystemRandom().randrange(10**12)}

    node = make("stamp", stamp, Stamped, Stamped)
    await assert_resumable([node], Stamped(), ignore=["stamp"], processes=False)
    with pytest.raises(AssertionError):
        await assert_resumable([node], Stamped(), ignore=["sta"], processes=False)


async def test_a_flow_that_goes_by_something_else_is_found():
    """A flow that takes another way in each run is found before a process dies."""
    turns, runner = iter(range(10**6)), StromaRunner.quick()
    sides = make("left", add_one), make("right", add_one)

    @runner.flow("routed", input=Number, output=Number)
    async def routed(flow: Flow, state: Number) -> Number:
        return await flow.step(sides[next(turns) % 2], state)

    with pytest.raises(AssertionError, match=r"attempt 1 of node '(left|right)' is in one of them only"):
        await assert_resumable(routed, Number(), runner=runner, processes=False)


@pytest.mark.slow
async def test_output_that_cannot_be_stored_is_found():
    """An object that no store can keep fails the undisturbed run, and is named."""

    class Holds(BaseModel):
        what: object = None

    async def hold(state):
        return {"what": object()}

    with pytest.raises(
        AssertionError,
        match=r"the undisturbed run does not complete: it ends as FAILED, node 'hold'.*serialised",
    ):
        await assert_resumable([make("hold", hold, Number, Holds)], Number())


@pytest.mark.core
async def test_an_effect_that_is_made_twice_is_found():
    """A mail that is sent before its node is committed is sent again; with its key it is sent once."""
    sent, keys = [], {}

    async def send(state):
        sent.append("mail")
        return state

    async def send_once(state):
        keys[current_node().idempotency_key] = "mail"
        return state

    with pytest.raises(AssertionError) as result:
        await assert_resumable([make("send", send)], Number(), effects=lambda: sent, reset=sent.clear)
    assert "node 'send' did its work, and was called again" in str(result.value)
    assert "idempotency_key" in str(result.value)
    proven = await assert_resumable(
        [make("send", send_once)], Number(), effects=lambda: list(keys.values()), reset=keys.clear
    )
    # Each run has its own keys: a test cannot compare them.
    with pytest.raises(AssertionError, match=r"^two undisturbed runs have different effects: 0 .*such as an"):
        await assert_resumable([make("send", send_once)], Number(), effects=lambda: [*keys], reset=keys.clear)
    assert not proven.killed


@pytest.mark.slow
@forks
async def test_effects_on_files_are_seen_across_processes(tmp_path):
    """What processes share can be looked at, too."""
    log = tmp_path / "log"

    async def send(state):
        with log.open("a") as file:
            file.write("mail\n")
        return state

    with pytest.raises(AssertionError, match="its effects differ"):
        await assert_resumable(
            [make("send", send)],
            Number(),
            processes=True,
            effects=lambda: log.read_text() if log.exists() else "",
            reset=lambda: log.unlink(missing_ok=True),
        )


@pytest.mark.slow
@pytest.mark.parametrize("processes", HOW)
async def test_retries_are_boundaries_and_wait_for_nothing(processes):
    """A death between two attempts is tried, and no wait takes any time."""
    with FaultPlan().fail("a"):
        nodes = [make("a", add_one)]
        proven = await assert_resumable(nodes, Number(), runner=patient(3600), processes=processes)
    assert {b.attempt for b in proven.boundaries if b.point == "after_commit"} == {1, 2}


async def test_most_spreads_the_boundaries():
    """Of many boundaries as many are tried as were asked for, from the first on."""
    nodes = [make(str(i), add_one) for i in range(10)]
    proven = await assert_resumable(nodes, Number(), most=5, processes=False)
    assert len(proven.boundaries) == 5
    assert proven.boundaries[0].node_id == "0"
    with pytest.raises(ValueError, match="most must be at least 1"):
        await assert_resumable([make("a", add_one)], Number(), most=0, processes=False)


async def test_a_pipeline_that_fails_is_not_proven():
    """The undisturbed run has to complete."""
    with pytest.raises(AssertionError, match="ends as PARTIAL, node 'broken': PermissionError: no"):
        nodes = [make("broken", failing_with(PermissionError, "no"))]
        await assert_resumable(nodes, Number(), runner=patient(0, 0), processes=False)


@pytest.mark.slow
@pytest.mark.parametrize("processes", HOW)
async def test_items_that_go_to_a_file_are_compared(processes, tmp_path):
    """An item that another process makes otherwise is found in files too; fields can be ignored."""
    (tmp_path / "in.jsonl").write_text('{"n":1}\n{"n":2}\n')
    memory = {"calls": 0}

    async def count(state):
        memory["calls"] += 1
        return Number(n=memory["calls"])

    items, instance = JsonLines(tmp_path / "in.jsonl"), JsonLines(tmp_path / "out.jsonl")
    nodes = [map_over(items, make("item", count), into=instance, max_concurrency=1)]
    again = {"processes": processes, "reset": lambda: memory.update(calls=0)}
    if processes:
        with pytest.raises(AssertionError, match=r"differs: n 2 -> 1 at node 'item' \(position 0\.1\)"):
            await assert_resumable(nodes, Number(), **again)
    else:
        with pytest.raises(AssertionError, match=r"differs: n 1 -> 2 at node 'item' \(position 0\.0\)"):
            await assert_resumable(nodes, Number(), **again)
    await assert_resumable(nodes, Number(), ignore=["n"], **again)


@pytest.mark.core
async def test_effects_are_looked_at_after_lives_alone(tmp_path):
    """What effects= gives is not asked for after a death, when it may not be there yet."""
    path = tmp_path / "sent"

    async def send(state):
        path.write_text("a mail")
        return state

    await assert_resumable(
        [make("send", send)], Number(), effects=path.read_text, reset=lambda: path.unlink(missing_ok=True)
    )


@pytest.mark.slow
@forks
async def test_a_process_that_hangs_is_ended():
    """A node that never ends is not waited for: the last boundary seen is named, no process is left."""

    async def hang(state):
        threading.Event().wait()

    with pytest.raises(
        AssertionError, match="did not end within 1 s; its last boundary is: before node 'hang'"
    ):
        await assert_resumable([make("hang", hang)], Number(), timeout_seconds=1)


@pytest.mark.slow
@forks
async def test_each_life_is_a_process_of_its_own(tmp_path):
    """No run of the proof is in this process, and those that die and those that go on are different ones."""
    log = tmp_path / "log"

    async def note(state):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return state

    proven = await assert_resumable([make("note", note)], Number())
    pids = log.read_text().split()
    assert str(os.getpid()) not in pids
    # Two undisturbed runs; all but the first and the last three points have called it before the death or
    # after it.
    assert len(set(pids)) == len(pids) >= len(proven.boundaries) + 1


@pytest.mark.parametrize("processes", [pytest.param(True, marks=[forks, pytest.mark.slow]), False])
async def test_a_flow_that_waits_passes(processes):
    """A flow that asks, sleeps and receives survives every death with its answers and messages."""
    runner = StromaRunner.quick()

    @runner.flow
    async def waits(flow: Flow, state: Number) -> Number:
        tens = await flow.wait_for(Number, reason="tens?")
        await flow.sleep(hours=2)
        ones = await flow.receive(Number)
        state = await flow.step(add_one_node, Number(n=10 * tens.n + ones.n))
        last = await flow.wait_for(Number, reason="more?")
        return await flow.step(add_one_node, Number(n=state.n + last.n))

    add_one_node = make("add", add_one)
    answers, messages = [Number(n=4), Number(n=100)], [Number(n=2)]
    proven = await assert_resumable(waits, Number(), answers=answers, messages=messages, processes=processes)
    assert {"after_commit", "before_end"} <= {boundary.point for boundary in proven.boundaries}
    with pytest.raises(AssertionError, match=r"ends as SUSPENDED, nobody answers 'more\?'; .* answers="):
        await assert_resumable(waits, Number(), answers=answers[:1], messages=messages, processes=processes)
    with pytest.raises(AssertionError, match=r"it is waiting for a message; .* messages="):
        await assert_resumable(waits, Number(), answers=answers, processes=processes)


async def test_a_list_that_asks_passes():
    """The questions of nodes of a list get their answers too."""

    async def ask(state):
        return current_node().wait_for(Number, reason="how many?")

    nodes = [make("ask", ask), make("add", add_one)]
    assert (await assert_resumable(nodes, Number(), answers=[Number(n=4)], processes=False)).boundaries
