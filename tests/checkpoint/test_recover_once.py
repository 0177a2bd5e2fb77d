"""recover() in several processes, and the hooks of a run's end."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from tests.kit import Num, ended, start_python
from tests.shared_stores import SHARED, opened, place

from stroma import NodeHooks, Pipeline, RunStatus, StromaRunner, stroma_node


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
