"""`stroma worker --db`: continues due runs of a store, until a signal."""

import asyncio
import json
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from tests.cli.test_signals import wait_for
from tests.kit import Num, failing_with

from stroma import Flow, PipelineChanged, StromaRunner
from stroma.cli.stores import Database
from stroma.cli.workers import LocalWorker, serve_health


def local_worker() -> LocalWorker:
    return LocalWorker(
        pipelines=[],
        database=Database.from_option("memory://"),
        max_concurrency=1,
        drain_seconds=1.0,
        quiet=False,
        poll_seconds=1.0,
        health_address=None,
    )


FLOW = """
    import asyncio, pathlib
    from pydantic import BaseModel
    from stroma import *

    class Num(BaseModel):
        n: int = 0

    class Yes(BaseModel):
        add: int

    def called(name):
        with open("calls", "a") as file:
            file.write(name + "\\n")

    @stroma_node("add", NodeContract(node_id="add", input_schema=Num, output_schema=Num))
    async def add(state: Num) -> Num:
        if state.n < 0:
            raise PermissionError("less than nothing")
        called(f"add-{state.n}")
        while state.n == 10 and not pathlib.Path("go").exists():
            await asyncio.sleep(0.02)
        return Num(n=state.n + 1)

    @stroma_flow("ask", input=Num, output=Num)
    async def ask(flow: Flow, state: Num) -> Num:
        state = await flow.step(add, state)
        answer = await flow.wait_for(Yes, reason="Go on?")
        return await flow.step(add, Num(n=state.n + answer.add))

    @stroma_flow("nap", input=Num, output=Num)
    async def nap(flow: Flow, state: Num) -> Num:
        await flow.sleep(1)
        return await flow.step(add, state)

    napping = Pipeline("nap", [nap], config=RunConfig(inline_wait_seconds=0))
"""
TARGETS = ("flows.py:ask", "flows.py:napping")


@pytest.fixture
def shell(stroma: Any) -> Any:
    stroma.file("flows.py", FLOW)
    return stroma


def _read(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def _suspend(shell: Any, target: str, state: str, run_id: str) -> None:
    done = shell("run", target, state, "--run-id", run_id, "--db", "x.db", "-q")
    assert done.code == 7, done


async def test_a_head_request_has_no_body() -> None:
    """HEAD of the health address has the head of the answer to GET, its length included, and no body."""
    answers: dict[str, bytes] = {}
    async with serve_health(("127.0.0.1", 0), lambda: (False, {"status": "draining"})) as url:
        assert url is not None
        port = int(url.rpartition(":")[2].partition("/")[0])
        for method in ("GET", "HEAD"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{method} /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            answers[method] = await reader.read()
            writer.close()
    head, body = answers["GET"].split(b"\r\n\r\n")
    assert (json.loads(body), answers["HEAD"]) == ({"status": "draining"}, head + b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head


@pytest.mark.slow
def test_a_worker_process(shell: Any) -> None:
    """It wakes a sleeping run, continues an answered one, reports, and drains at SIGTERM with exit code 0."""
    _suspend(shell, TARGETS[1], "{}", "n")
    _suspend(shell, TARGETS[0], '{"n": 1}', "a")
    worker = shell.popen("worker", *TARGETS, "--db", "x.db", "--poll", "0.1", "--health", "0")
    try:
        ready = wait_for(worker, "worker ready: ")
        assert "'ask', 'nap' in x.db, 10 runs at once, polling every 0.1 s, http://127.0.0.1:" in ready
        url = ready.rpartition(", ")[2].strip()
        status, health = _read(url)
        assert (status, health["status"], health["schema"]) == (200, "ok", "stroma.health/1")
        while health["queued"] is None:
            health = _read(url)[1]
        assert (health["queued"], health["unserved"]) == (0, {})
        assert 0 <= health["oldest_due_seconds"] < 30
        wait_for(worker, "run n: RESUMED")
        assert shell("approve", "a", TARGETS[0], '{"add": 5}', "--db", "x.db").code == 0
        wait_for(worker, "run a: RESUMED")
        assert shell("submit", TARGETS[0], "{}", "--run-id", "asks", "--db", "x.db").code == 0
        wait_for(worker, "run asks: SUSPENDED, waiting for an answer: Go on?")
        assert shell("submit", TARGETS[0], '{"n": -1}', "--run-id", "less", "--db", "x.db").code == 0
        wait_for(worker, "run less: PARTIAL, add: AMBIGUOUS: PermissionError: less than nothing")
        # A run in progress ends after its step; the worker starts nothing more.
        _suspend(shell, TARGETS[1], '{"n": 10}', "held")
        while "add-10" not in shell.calls():
            time.sleep(0.02)
        worker.send_signal(signal.SIGTERM)
        wait_for(worker, "draining: ")
        status, health = _read(url)
        assert (status, health["status"], health["active"]) == (503, "draining", 1)
        (shell.home / "go").touch()
        _, err = worker.communicate(timeout=30)
        assert worker.returncode == 0, err
        assert re.search(
            r"worker drained: after SIGTERM; continued runs 5 times in \S+ s \(1 PARTIAL, 3 RESUMED, ", err
        )
        assert "Traceback" not in err
    finally:
        worker.kill()
        worker.communicate()
    assert sorted(shell.calls()) == sorted(["add-0", "add-0", "add-1", "add-7", "add-10"])


@pytest.mark.core
async def test_the_line_of_a_suspended_run_has_the_reason(capsys: Any) -> None:
    """A worker says why a run is suspended: a sleep, a question, a message, or the outcome of an effect.

    When it ends, it counts how often it continued a run, and apart from that how often it could not.
    """
    runner = StromaRunner.quick()
    charge = runner.node("charge", input=Num, output=Num, effect=True)(failing_with(TimeoutError))

    @runner.flow("nap")
    async def nap(flow: Flow, state: Num) -> Num:
        await flow.sleep(3600)
        return state

    @runner.flow("ask")
    async def ask(flow: Flow, state: Num) -> Num:
        return await flow.wait_for(Num, reason="Go on?")

    worker = local_worker()
    for nodes in (nap, ask, [charge]):
        worker._report("r", await runner.run(nodes, Num()))
    worker._report("r", PipelineChanged("the flow makes another call"))
    assert re.fullmatch(
        r"continued runs 3 times in \S+ s \(3 SUSPENDED\); could not continue a run 1 time",
        worker._progress(time.monotonic()),
    )
    sleeping, asking, paying = capsys.readouterr().err.splitlines()
    assert re.search(r"run r: SUSPENDED, sleeping until 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d$", sleeping)
    assert asking.endswith("run r: SUSPENDED, waiting for an answer: Go on?")
    why = "the outcome of effect 'charge' is unknown: ask its provider again with `stroma resume`, or state"
    assert paying.endswith(f"run r: SUSPENDED, {why} it with `stroma approve`")


VERSIONS = """
from pydantic import BaseModel
from stroma import Flow, stroma_flow

class Num(BaseModel):
    n: int = 0

@stroma_flow("triage", input=Num, output=Num, version="1")
async def old(flow: Flow, state: Num) -> Num:
    return state

@stroma_flow("triage", input=Num, output=Num, version="2")
async def new(flow: Flow, state: Num) -> Num:
    return state
"""


@pytest.mark.slow
def test_a_worker_says_which_versions_it_does_not_serve(shell: Any) -> None:
    """The first lines of a worker count the runs of versions that it does not serve."""
    (shell.home / "versions.py").write_text(VERSIONS)
    for run_id in ("a", "b", "c"):
        assert shell("submit", "versions.py:old", "{}", "--run-id", run_id, "--db", "x.db").code == 0
    worker = shell.popen("worker", "versions.py:new", "--db", "x.db", "--poll", "0.1")
    try:
        wait_for(worker, "3 runs wait for triage version 1, which is not served here")
    finally:
        worker.kill()
        worker.communicate()


@pytest.mark.slow
def test_two_workers_on_one_file(shell: Any) -> None:
    """Workers of one SQLite file share the work; when one is killed, the other continues its runs at once."""
    workers = [shell.popen("worker", *TARGETS, "--db", "x.db", "--poll", "0.1") for _ in range(2)]
    try:
        for worker in workers:
            wait_for(worker, "worker ready: ")
        _suspend(shell, TARGETS[1], '{"n": 10}', "held")
        while "add-10" not in shell.calls():
            time.sleep(0.02)
        (run,) = json.loads(shell("runs", "--db", "x.db", "--json").out)["runs"]
        holder = next(worker for worker in workers if f"process {worker.pid} " in run["holder"])
        (other,) = [worker for worker in workers if worker is not holder]
        holder.kill()
        (shell.home / "go").touch()
        wait_for(other, "run held: RESUMED")
        other.send_signal(signal.SIGINT)
        assert other.wait(30) == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert shell.calls() == ["add-10", "add-10"]


def test_what_a_worker_refuses(shell: Any, inside: Any, fails: Any) -> None:
    """Options that cannot work and an unshared store are errors before anything continues."""
    fails(inside("worker", TARGETS[0], "--db", "memory://"), 2, "not durable")
    fails(inside("worker", TARGETS[0], TARGETS[0], "--db", "x.db"), 2, "have the name 'ask'")
    fails(inside("worker", TARGETS[0], "--db", "x.db", "--health", "http"), 2, "not an address")
    shell.file("broken.db", "text " * 1000)
    fails(inside("worker", TARGETS[0], "--db", "broken.db"), 3, "broken.db")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        fails(inside("worker", TARGETS[0], "--db", "x.db", "--health", port), 3, "cannot listen on")


def test_what_needs_a_place(inside: Any, fails: Any, stroma: Any) -> None:
    """Without Temporal, a pipeline with a place is refused with the command for the place's worker."""
    stroma.file(
        "gpu.py",
        """
        from pydantic import BaseModel
        from stroma import NodeContract, Pipeline, stroma_node

        class Num(BaseModel):
            n: int = 0

        @stroma_node("big", NodeContract(node_id="big", input_schema=Num, output_schema=Num, place="gpu"))
        async def big(state: Num) -> Num:
            raise AssertionError

        pipeline = Pipeline("gpu", [big])
        """,
    )
    words = ("place='gpu'", "stroma worker FILE:NAME --temporal HOST:PORT --place gpu")
    fails(inside("run", "gpu.py:pipeline", "{}", "--db", "runs.db"), 2, "the run cannot start: ", *words)
    fails(inside("worker", "gpu.py:pipeline", "--db", "runs.db"), 2, "the worker cannot start: ", *words)
    fails(inside("worker", "gpu.py:pipeline", "--place", "gpu"), 2, "--place needs --temporal HOST:PORT")
