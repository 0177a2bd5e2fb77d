"""crash_at: everything that a process has not kept is lost, and nothing that it has kept."""

import asyncio
import sys
import textwrap

import pytest
from tests.fixtures import store_fixture
from tests.kit import NEVER, context_on, environment, failing_with, run_python
from tests.testing.pipelines import Number, counted, make, patient

from stroma import Flow, NodeHooks, RunConfig, RunStatus, StromaRunner, execute_step, parallel, stroma_flow
from stroma.testing import POINTS, Crashed, FaultPlan, crash_at

store = store_fixture("async-memory", "sqlite")


#: What is called before and after a death at each point of the second of three nodes.
CALLED = {
    "before_node": (["a"], ["b", "c"]),
    "after_node": (["a", "b"], ["b", "c"]),
    "after_commit": (["a", "b"], ["c"]),
    "after_hooks": (["a", "b"], ["c"]),
    "before_end": (["a", "b", "c"], []),
    "after_end": (["a", "b", "c"], []),
}


@pytest.mark.core
@pytest.mark.parametrize("point", POINTS)
async def test_a_death_loses_what_was_not_kept(point, store):
    """Another process goes on at once, and calls again what was not committed, and nothing else."""
    calls = []
    nodes = [counted(node_id, calls) for node_id in "abc"]
    runner = StromaRunner.quick(store=store)
    with crash_at(point, None if point.endswith("_end") else "b") as crash:
        await runner.run(nodes, Number(), run_id="r")
        raise AssertionError("the run came to its end")
    assert crash.boundary.point == point
    assert calls == CALLED[point][0]
    entry = {"before_node": "a", "after_node": "a", "before_end": "abc", "after_end": "abc"}.get(point, "ab")
    assert [(attempt.node_id, attempt.outcome) for attempt in store.attempts("r")] == [
        (n, "success") for n in entry
    ]
    status = store.get_run("r").status
    assert status == ("COMPLETED" if point == "after_end" else "RUNNING")
    calls.clear()
    result = await runner.run(nodes, Number(), run_id="r", resume=True)
    assert (result.status, result.final_state, calls) == (RunStatus.RESUMED, Number(n=3), CALLED[point][1])


@pytest.mark.core
async def test_a_process_that_has_died_says_nothing_more(store):
    """No hook is told after the death: of the node, its siblings or the end of the run."""
    reports, calls = [], []

    def note(name):
        async def hook(run_id, node_id="", *_):
            reports.append((name, node_id))

        return hook

    events = ("on_node_start", "on_node_success", "on_node_failure", "on_node_cancelled", "on_run_end")
    hooks = NodeHooks(**{event: note(event) for event in events})
    with crash_at("after_node", "a"):
        nodes = [parallel(counted("a", calls), counted("b", calls)), counted("c", calls)]
        await StromaRunner.quick(store=store, hooks=hooks).run(nodes, Number(), run_id="r")
    assert {name for name, _ in reports} == {"on_node_start"}
    assert "c" not in calls
    assert [a.node_id for a in store.attempts("r") if a.output is not None] in ([], ["b"])


async def test_the_attempt_and_the_branch_say_which(store):
    """A death on the second attempt leaves the first in the journal."""
    calls = []
    with FaultPlan().fail("a"), crash_at("before_node", "a", attempt=2) as crash:
        await patient(0, store=store).run([counted("a", calls)], Number(), run_id="r")
    assert (crash.boundary.attempt, calls) == (2, [])
    assert [(a.attempt, a.outcome) for a in store.attempts("r")] == [(1, "failure")]

    with crash_at("after_commit", branch="1") as crash:
        nodes = [parallel(counted("a", calls), counted("b", calls))]
        await StromaRunner.quick(store=store).run(nodes, Number())
    assert crash.boundary.node_id == "b"


async def test_a_step_of_plain_code_dies(store):
    """execute_step raises, and the next process has what was committed."""
    calls = []

    async def work(run_id, resume):
        config = RunConfig(run_id=run_id, resume=resume)
        ctx = context_on(store, config)
        async with ctx:
            state = Number()
            for node_id in "ab":
                state = (await execute_step(node_id, counted(node_id, calls), state, ctx)).final_state
        return state

    with crash_at("after_node", "b"):
        await work("r", False)
        raise AssertionError("the code came to its end")
    assert calls == ["a", "b"]
    assert await work("r", True) == Number(n=2)
    assert calls == ["a", "b", "b"]


@pytest.mark.core
async def test_a_step_of_plain_code_dies_after_its_hooks(store):
    """After a death behind a step that went well, the plain code around it does nothing more either."""
    with crash_at("after_hooks", "a"):
        config = RunConfig(run_id="r")
        async with context_on(store, config) as ctx:
            await execute_step("a", counted("a", []), Number(), ctx)
            raise AssertionError("the code went on after the death")
    assert store.get_run("r").status == "RUNNING"


async def test_no_except_exception_catches_a_death():
    """What handles errors of a run does not take a death for one."""
    with crash_at("before_node", "a"):
        try:
            await StromaRunner.quick().run([counted("a", [])], Number())
        except Exception:
            raise AssertionError("a process that has died handles nothing") from None
    assert not issubclass(Crashed, Exception)


async def test_a_flow_dies_before_the_failure_of_a_step_is_stored():
    """The death of the process ends the block, also if the flow has yet to store that a step has failed."""
    go = asyncio.Event()

    async def fail(state):
        await go.wait()
        raise ValueError("no answer")

    async def wait(state):
        await go.wait()
        return state

    @stroma_flow("both", input=Number, output=Number)
    async def both(flow: Flow, state: Number) -> Number:
        await asyncio.gather(flow.step(make("fails", fail), state), flow.step(make("waits", wait), state))
        return state

    asyncio.get_running_loop().call_later(0.01, go.set)
    with crash_at("after_hooks", "waits") as crash:
        await StromaRunner.quick(policy_map=NEVER).run(both, Number())
    assert crash.boundary.node_id == "waits"


@pytest.mark.core
async def test_a_point_that_no_run_comes_to_is_an_error():
    """A death that never happens proves nothing; the nodes that ran are named, and why the run failed."""
    with pytest.raises(
        AssertionError, match=r"no run reached 'after_node' of node 'x'; the nodes that ran are 'a'"
    ):
        with crash_at("after_node", "x"):
            await StromaRunner.quick().run([counted("a", [])], Number())
    with pytest.raises(
        AssertionError, match=r"that ran are 'fails'; the last run failed: KeyError: 'no price'"
    ):
        with crash_at("after_node", "x"):
            await StromaRunner.quick().run([make("fails", failing_with(KeyError, "no price"))], Number())
    with pytest.raises(ValueError, match="is not a point of a run; pass one of 'before_node'"):
        crash_at("somewhere")
    with pytest.raises(ValueError, match="remove the node"):
        crash_at("after_end", "a")


async def test_an_error_of_the_test_is_not_swallowed():
    """Only the death ends at the end of the block."""
    with pytest.raises(ZeroDivisionError):
        with crash_at("after_end"):
            raise ZeroDivisionError


@pytest.mark.slow
def test_a_real_kill(tmp_path):
    """With kill=True the process is gone, by SIGKILL; the next one finds what was committed."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from tests.testing.pipelines import Number, counted
        from stroma import SQLiteStore, StromaRunner
        from stroma.testing import crash_at

        calls = []
        nodes = [counted(node_id, calls) for node_id in "abc"]
        with SQLiteStore("x.db") as store:
            runner = StromaRunner.quick(store=store)
            if "die" in sys.argv:
                with crash_at("after_commit", "b", kill=True):
                    runner.run_sync(nodes, Number(), run_id="r")
            else:
                print(runner.run_sync(nodes, Number(), run_id="r", resume=True).status, *calls)
        """)
    )
    env = environment(PYTHONPATH=":".join(p for p in sys.path if p))
    run_python(script, "die", cwd=tmp_path, env=env, status=-9)
    assert run_python(script, cwd=tmp_path, env=env).split() == ["RESUMED", "c"]
