"""Guarded steps after a crash are called again: a recorded output is not the object that callers need."""

import asyncio
import gc
import signal
import textwrap
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import NEVER, Note, run_python
from tests.shared_stores import STORES, store_of

from stroma import (
    FailureClass,
    FailurePolicy,
    InMemoryStore,
    RunStatus,
    StromaRunner,
    Suspend,
    Usage,
    current_node,
    current_run,
    parallel,
    stroma_node,
)
from stroma.adapters import Control, Guard


class Approval(BaseModel):
    approved: bool


ROOT = Path(__file__).parents[2]
KILLED = """
import asyncio, os, signal, sys
from stroma import StromaRunner, current_node
from stroma.adapters import Control, Guard
db, dies = sys.argv[1], sys.argv[3] == "dies"
side = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
guard = Guard(StromaRunner.quick(store=db, run_id="r", resume=True, lease_seconds=0.2))
def called(what):
    os.write(side, f"{what}|{current_node().idempotency_key}\\n".encode())
def die():
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
"""
BODIES = {
    "call": """
@guard.step("model")
def model(n): called(n); return f"answer {n}"
@guard.step("agent")
def agent(question):
    out = [model(1)]
    die()
    return [*out, model(2)]
with guard.run("q"): print(agent("q"))
""",
    "acall": """
@guard.step("model")
async def model(n): called(n); return f"answer {n}"
@guard.step("agent")
async def agent(question):
    out = await asyncio.gather(model(1), model(3))
    die()
    return [out[0], await model(2)]
async def main():
    async with guard.run("q"): print(await agent("q"))
asyncio.run(main())
""",
    "stream": """
@guard.step("model")
def model(n):
    called(n)
    yield "answer"
    yield n
@guard.step("agent")
def agent(question):
    yield " ".join(map(str, model(1)))
    die()
    yield " ".join(map(str, model(2)))
with guard.run("q"): print(list(agent("q")))
""",
    "astream": """
@guard.step("model")
async def model(n):
    called(n)
    yield f"answer {n}"
@guard.step("agent")
async def agent(question):
    async for part in model(1): yield part
    die()
    async for part in model(2): yield part
async def main():
    async with guard.run("q"): print([part async for part in agent("q")])
asyncio.run(main())
""",
    "deep": """
@guard.step("model")
def model(n): called(n); return f"answer {n}"
@guard.step("agent")
def agent(question):
    @guard.step("inner")
    def inner(n): return model(n)
    out = [inner(1)]
    die()
    return [*out, inner(2)]
with guard.run("q"): print(agent("q"))
""",
    "a node": """
from pydantic import BaseModel
from stroma import NodeContract, current_run, stroma_node
class Text(BaseModel):
    parts: list[str] = []
@stroma_node("node", NodeContract(node_id="node", input_schema=Text, output_schema=Text))
async def node(state):
    inside = Guard(current_run())
    @inside.step("model")
    async def model(n): called(n); return f"answer {n}"
    out = [await model(1)]
    die()
    return {"parts": [*out, await model(2)]}
print(asyncio.run(guard.runner.run([node], Text())).final_state.parts)
""",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", BODIES)
def test_killed_inside_of_a_guarded_step(way: str, tmp_path: Path) -> None:
    """After SIGKILL in a step, a resume returns what its steps return, and never None."""
    program, side = tmp_path / "program.py", tmp_path / "side"
    program.write_text(textwrap.dedent(KILLED + BODIES[way]))
    words = (program, tmp_path / "r.db", side)
    run_python(*words, "dies", status=-signal.SIGKILL)
    assert run_python(*words, "lives") == "['answer 1', 'answer 2']\n"
    keys: dict[str, set[str]] = {}
    for line in side.read_text().splitlines():
        what, _, key = line.partition("|")
        keys.setdefault(what, set()).add(key)
    assert {what: len(result) for what, result in keys.items()} == dict.fromkeys(keys, 1)
    assert len(set.union(*keys.values())) == len(keys)


@pytest.mark.parametrize("kind", STORES)
async def test_steps_of_a_guard_in_the_nodes_of_a_pipeline(kind: str) -> None:
    """A pipeline whose nodes use a guard is resumed: the guard's records are not nodes of the pipeline."""
    calls: list[str] = []
    fails = [True]

    def node(name: str) -> Any:
        async def call(state: Note) -> Any:
            run = current_run()
            assert run is not None

            def model(n: int) -> str:
                calls.append(f"{name} {n}")
                return f"{name}{n}"

            step = Guard(run).wrap("model", model)
            text = state.text + step(1)
            if name == "b" and fails[0]:
                raise ValueError("no")
            return {"text": text + step(2)}

        return stroma_node(name, input=Note, output=Note)(call)

    with store_of(kind) as store:
        runner = StromaRunner.quick(store=store, run_id="r", resume=True, policy_map=NEVER)
        assert (await runner.run([node("a"), node("b")], Note())).status is RunStatus.PARTIAL
        fails[0] = False
        result = await runner.run([node("a"), node("b")], Note())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Note(text="a1a2b1b2"))
    assert calls == ["a 1", "a 2", "b 1", "b 1", "b 2"]


async def test_a_group_that_is_tried_again_calls_guarded_steps_again() -> None:
    """A guarded step in a child of a group returns its own value in each attempt of the group."""
    tries = iter([False, True])

    async def part(state: Note) -> Any:
        run = current_run()
        assert run is not None
        match = Guard(run).wrap("model", lambda n: f"answer {n}")(1)
        if not next(tries):
            raise ValueError("no")
        return {"text": match}

    child = stroma_node("part", input=Note, output=Note)(part)
    again = {"parallel(part)": {FailureClass.AMBIGUOUS: FailurePolicy(max_retries=1, backoff_seconds=0)}}
    runner = StromaRunner.quick(policy_map=NEVER, node_policies=again)
    result = await runner.run([parallel(child)], Note())
    assert result.final_state.text == "answer 1"


def test_calls_with_other_inputs_never_share_a_key(tmp_path: Path) -> None:
    """A framework that continues behind finished calls gives its next call no key of a finished one."""
    keys: list[str] = []

    def model(n: int, text: str) -> int:
        keys.append(current_node().idempotency_key)
        return n

    for inputs in ((1, 2), (3,), (1, 1)):
        guard = Guard(StromaRunner.quick(store=str(tmp_path / "r.db"), run_id="r", resume=True))
        step = guard.wrap("model", model)
        with guard.run("q"):
            assert [step(n, f"<Job object at 0x7f01> {n}") for n in inputs] == list(inputs)
    first, second, third, once_more, twice = keys
    assert once_more == first
    assert len({first, second, third, twice}) == 4


async def test_a_step_in_a_thread_that_knows_nothing_of_its_node() -> None:
    """In a framework's own thread a step takes no position of the pipeline, and is called on resume."""
    calls: list[int] = []
    fails = [True]

    async def first(state: Note) -> Any:
        run = current_run()
        assert run is not None
        step = Guard(run).wrap("model", calls.append)
        thread = threading.Thread(target=step, args=(1,))
        thread.start()
        await asyncio.to_thread(thread.join)
        return {"text": "first"}

    async def second(state: Note) -> Any:
        if fails[0]:
            raise ValueError("no")
        return {"text": f"{state.text} second"}

    runner = StromaRunner.quick(run_id="r", resume=True, policy_map=NEVER)
    nodes = [
        stroma_node(name, input=Note, output=Note)(func)
        for name, func in (("first", first), ("second", second))
    ]
    assert (await runner.run(nodes, Note())).status is RunStatus.PARTIAL
    fails[0] = False
    result = await runner.run(nodes, Note())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Note(text="first second"))
    assert calls == [1]


@pytest.mark.parametrize("kind", ["guard", "runner"])
def test_the_memory_of_a_guard_that_is_used_many_times_is_flat(kind: str) -> None:
    """Its default store forgets ended runs; the newest hundred are still listed, and a suspended one is."""
    guard = Guard() if kind == "guard" else Guard(StromaRunner.quick(tags=["a"]))
    step = guard.wrap("step", lambda n: "x" * n)
    waits = guard.wrap("waits", lambda: 1 // 0, control=lambda _: Control("suspended", "a person"))
    store: Any = guard.runner.checkpoint_manager.store

    def use(times: int) -> int:
        for _ in range(times):
            with guard.run("q"):
                step(100)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    with pytest.raises(ZeroDivisionError), guard.run(run_id="waiting"):
        waits()
    tracemalloc.start()
    try:
        before = use(200)
        assert use(500) - before < 100 * 500, "less than 100 bytes for each run"
    finally:
        tracemalloc.stop()
    listed = {run.run_id for run in store.list_runs(limit=1000)}
    assert len(listed) == 101
    assert "waiting" in listed


def test_a_run_that_is_resumed_again_and_again_is_not_forgotten() -> None:
    """A fixed run id in the default store: its bill is carried on, however often the run ended."""
    guard = Guard(StromaRunner.quick(run_id="r", resume=True))
    step = guard.wrap("step", lambda: 1, usage=lambda _: Usage(1, 1))
    for _ in range(250):
        with guard.run("q") as run:
            step()
    assert run.ctx.cost_tracker.prior_tokens == 2 * 249


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize(
    "policies", [{}, {"agent": {FailureClass.RECOVERABLE: FailurePolicy(max_retries=2, backoff_seconds=0)}}]
)
def test_a_step_that_asks_suspends_the_steps_around_it(policies: Any, is_wrapped: bool) -> None:
    """They have not failed, ask nothing themselves and are not tried again, whatever a framework does."""
    runner = StromaRunner.quick(store=InMemoryStore(), run_id="r", resume=True, node_policies=policies)
    guard, calls = Guard(runner), []

    @guard.step("tool")
    def tool() -> bool:
        calls.append("tool")
        return current_node().wait_for(Approval, reason="may I?").approved

    @guard.step("agent")
    def agent() -> bool:
        try:
            return tool()
        except Suspend as error:
            if is_wrapped:
                raise RuntimeError("a tool has failed") from error
            raise

    with pytest.raises(RuntimeError if is_wrapped else Suspend), guard.run("q") as run:
        agent()
    assert (run.result.status, run.result.suspended) == (RunStatus.SUSPENDED, ["may I?"])
    assert [(event.node_id, event.outcome) for event in run.result.trace] == [("agent", "suspended")]
    asyncio.run(runner.signal("r", {"approved": True}))
    with guard.run("q"):
        assert agent() is True
    assert calls == ["tool", "tool"]
