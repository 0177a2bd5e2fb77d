"""The suite of behaviour over DBOS, as far as its model allows: Temporal is not baked into the seam.

./dev test --framework dbos
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.drivers.conftest import Bound, LocalDriver
from tests.drivers.dbos_ import Cluster, DbosRunner
from tests.drivers.scenarios import SCENARIOS
from tests.drivers.test_parity import (  # noqa: F401
    run_id,
    test_a_hook_that_is_not_async_is_a_type_error,
    test_a_hook_that_raises_changes_nothing,
    test_bad_input_fires_the_failure_hook_and_no_start,
    test_hooks_are_told_the_same_in_the_same_order,
    test_what_is_no_node_and_no_model_is_a_type_error,
)
from tests.drivers.test_scenarios import test_a_run_comes_to_the_same_under_every_driver  # noqa: F401
from tests.servers_postgres import PostgresServer

from stroma import Pipeline, RunConfig, RunStatus

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    instance = PostgresServer()
    yield instance
    instance.stop()


@pytest.fixture(scope="module")
def cluster(postgres: PostgresServer) -> Iterator[Cluster]:
    instance = Cluster(postgres.dsn)
    instance.launch()
    yield instance
    instance.close()


class DbosDriver:
    name = "dbos"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @contextlib.asynccontextmanager
    async def bind(self, nodes: list[Any], **config: Any) -> AsyncIterator[Bound]:
        pipeline, settings = Pipeline("pipe", nodes), RunConfig(**config)
        self._cluster.serve(pipeline, settings)
        yield Bound(DbosRunner(self._cluster, settings), pipeline, self.name)


@pytest.fixture(params=["dbos"])
def any_driver(cluster: Cluster) -> DbosDriver:
    return DbosDriver(cluster)


@pytest.fixture(params=["local", "dbos"])
def driver(request: pytest.FixtureRequest, cluster: Cluster) -> Any:
    return LocalDriver() if request.param == "local" else DbosDriver(cluster)


def test_the_suite_is_not_empty() -> None:
    """The tests that are imported above are no tests without it."""
    assert len(SCENARIOS) > 20


async def test_the_same_id_again_gives_what_it_came_to(cluster: Cluster) -> None:
    """A workflow id is used once: the second run() attaches, and calls nothing."""
    from tests.drivers.scenarios import counted
    from tests.kit import Num

    calls: list[str] = []
    async with DbosDriver(cluster).bind([counted(calls, "a")]) as bound:
        for _ in range(2):
            result = await bound.run(Num(), run_id="again")
            assert (result.status, result.final_state) == (RunStatus.COMPLETED, Num(n=1))
    assert calls == ["a"]


#: argv: dsn, file of calls, run id. The third call of a process kills it if ``die`` is given.
PROGRAM = """
import asyncio, os, signal, sys
from tests.drivers.dbos_ import Cluster, DbosRunner
from tests.drivers.scenarios import Texts, lengths
from tests.kit import Num, node
from stroma import Pipeline, RunConfig, parallel, map_over, current_node

dsn, path, run_id, die = sys.argv[1:5]
count = 0

def noted(name):
    async def func(state):
        global count
        count += 1
        number = count
        await asyncio.sleep(0.02 * (3 - number % 3))
        here = current_node()
        with open(path, "a") as file:
            file.write(f"{here.position}|{here.branch}\\n")
        if number == int(die):
            await asyncio.sleep(0.2)  # What is done beside it is recorded.
            os.kill(os.getpid(), signal.SIGKILL)
        return {"n": state.n + 1}, 10
    return node(name, func)

nodes = [noted("a"), parallel(noted("b"), noted("c"), noted("d")), noted("e"), parallel(noted("f"), parallel(noted("g"), noted("h"))), noted("i")]

async def main():
    cluster = Cluster(dsn, "crash")
    pipeline = Pipeline("crash", nodes)
    cluster.serve(pipeline)
    cluster.launch()
    result = await DbosRunner(cluster, RunConfig()).run(pipeline, Num(), run_id=run_id)
    print(result.status, result.total_tokens, len(list(result.trace.walk())))
    cluster.close()

asyncio.run(main())
"""


def test_a_process_that_is_killed_again_and_again(postgres: PostgresServer, tmp_path: Path) -> None:
    """A recovered workflow runs no recorded step again, also in groups whose children raced; the totals are exact."""
    calls = tmp_path / "calls"
    run = uuid.uuid4().hex
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def process(die: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", PROGRAM, postgres.dsn, str(calls), run, str(die)]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False)

    deaths = 0
    for die in (2, 3, 2):
        done = process(die)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        deaths += 1
    else:
        done = process(0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["COMPLETED", "90", "12"]
    assert deaths >= 2
    called = calls.read_text().split()
    # Each death repeats what was in flight, of a group of at most three; nothing else.
    assert len(set(called)) == 9
    assert len(called) - 9 <= 3 * deaths
    assert called.count("0|") == 1
