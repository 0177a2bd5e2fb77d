"""recover() in several processes, the hooks of a run's end, and a resume with nothing left to do."""

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from tests.kit import Num, ended, start_python
from tests.shared_stores import SHARED, STORES, opened, place, store_of

from stroma import NodeHooks, Pipeline, RunStatus, StromaRunner, parallel, stroma_node


def one_node(waits: float) -> Pipeline:
    @stroma_node("a", input=Num, output=Num)
    async def a(state: Num) -> Any:
        await asyncio.sleep(waits)
        return Num(n=1)

    return Pipeline("p", [a])


@pytest.mark.parametrize("kind", SHARED)
async def test_what_has_ended_meanwhile_is_left_alone(kind: str) -> None:
    """Three that recover the same runs at once end each of them once, with its outcome."""
    ends: Counter[str] = Counter()

    async def end(run_id: str, result: Any) -> None:
        ends[run_id] += 1

    with place(kind) as where, opened(kind, where) as store, opened(kind, where) as other:
        first = StromaRunner.quick(store=store)
        runs = [asyncio.create_task(first.run(one_node(60), Num(), run_id=f"r{i}")) for i in range(20)]
        while not store.exists() or len(store.list_runs(status="RUNNING")) < 20:
            await asyncio.sleep(0.02)
        await first.shutdown(drain_seconds=0)
        assert {(await run).status for run in runs} == {RunStatus.INTERRUPTED}
        runners = [
            StromaRunner.quick(store=one, hooks=NodeHooks(on_run_end=end)) for one in (store, other, store)
        ]
        outcomes = await asyncio.gather(*(r.recover(one_node(0.01), max_concurrency=3) for r in runners))
        assert ends == dict.fromkeys((f"r{i}" for i in range(20)), 1)
        assert sorted(run_id for outcome in outcomes for run_id in outcome) == sorted(ends)
        assert {result.status for outcome in outcomes for result in outcome.values()} == {RunStatus.RESUMED}


_DIES = """
import asyncio, json, os, signal, sys
from tests.shared_stores import opened
from tests.checkpoint.test_recover_once import one_node
from tests.kit import Num
from stroma import NodeHooks, StromaRunner

async def end(run_id, result):
    print(run_id, result.status, flush=True)
    if sys.argv[3] == "die":
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    with opened(*sys.argv[1:3]) as store:
        options = {"hooks": NodeHooks(on_run_end=end), "hook_delivery": "at_least_once", "lease_seconds": 0.5}
        runner = StromaRunner.quick(store=store, **options)
        if sys.argv[3] == "die":
            await runner.run(one_node(0), Num(), run_id="r")
        else:
            print(json.dumps({run: str(r.status) for run, r in (await runner.recover(one_node(0))).items()}))

asyncio.run(main())
"""


@pytest.mark.kills
@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_the_end_of_a_run_is_delivered_at_least_once(kind: str) -> None:
    """Under at_least_once, on_run_end is called again by recover() if its process died before that."""

    def process(what: str) -> list[str]:
        process = start_python(kind, where, what, code=_DIES)
        return ended(process, -9 if what == "die" else 0).splitlines()

    with place(kind) as where:
        assert process("die") == ["r COMPLETED"]
        assert process("recover") == ["r RESUMED", json.dumps({"r": "RESUMED"})]
        assert process("recover") == ["{}"]


def node(node_id: str, calls: list[str]) -> Any:
    @stroma_node(node_id, input=Num, output=Num)
    async def call(state: Num) -> Any:
        calls.append(node_id)
        return {"n": state.n + 1}, 10

    return call


@pytest.mark.parametrize("kind", STORES)
async def test_nothing_of_the_run_changes(kind: str) -> None:
    """A resume that finds every node committed is RESUMED, calls nothing, and leaves the record as it was."""
    with store_of(kind) as store:
        calls: list[str] = []
        skipped: list[str] = []

        async def skip(run_id: str, node_id: str, output: Any) -> None:
            skipped.append(node_id)

        nodes = [node("a", calls), parallel(node("b", calls), node("c", calls)), node("d", calls)]
        runner = StromaRunner.quick(store=store, hooks=NodeHooks(on_node_skipped=skip))
        first = await runner.run(nodes, Num(), run_id="r")
        assert first.status == "COMPLETED"
        before = store.get_run("r")
        await asyncio.sleep(0.01)
        for _ in range(2):
            again = await runner.run(nodes, Num(), run_id="r", resume=True)
            assert (again.status, again.final_state, again.total_tokens) == ("RESUMED", first.final_state, 0)
        after = store.get_run("r")
        assert after == before
        assert len(calls) == 4
        assert skipped.count("a") == skipped.count("d") == 2
        # A node more is something to do.
        longer = await runner.run([*nodes, node("e", calls)], Num(), run_id="r", resume=True)
        assert (longer.status, calls[-1], len(calls)) == ("RESUMED", "e", 5)
        assert store.get_run("r").status == "RESUMED"
