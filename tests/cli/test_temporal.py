"""The command line with a real Temporal server: `stroma worker`, `run` and `submit` with --temporal."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.cli.test_signals import wait_for
from tests.servers_temporal import TemporalServer

GOOD = '{"start": 1}'


@pytest.fixture
def there(temporal_server: TemporalServer) -> tuple[str, ...]:
    """Return the options that name a server, a task queue for this test alone, and a store."""
    queue = uuid.uuid4().hex[:12]
    return "--temporal", temporal_server.address, "--task-queue", queue, "--db", "runs.db"


@pytest.fixture
def worker(stroma: Any, there: tuple[str, ...]) -> Callable[..., Any]:
    """Start a worker, ready inside the block; it is stopped at its end."""

    @contextlib.contextmanager
    def working(target: str = "sums.py:pipeline", **options: Any) -> Iterator[Any]:
        process = stroma.popen("worker", target, *there, **options)
        try:
            process.ready = wait_for(process, "worker ready: ")
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=60)

    return working


def test_workers_run_a_submitted_run(stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]) -> None:
    """The state is on stdout; the store has the run with its attempts and tags, for every other command."""
    run_id = uuid.uuid4().hex
    with worker() as process:
        assert "'sums' on task queue" in process.ready
        done = inside("run", "sums.py:pipeline", GOOD, *there, "--run-id", run_id, "--tag", "blue")
        assert (done.code, json.loads(done.out)) == (0, {"n": 4})
        assert stroma.calls() == ["first", "second", "third"]
        entry = json.loads(inside("show", run_id, "--db", "runs.db", "--json").out)
        assert (entry["run"]["status"], entry["run"]["tags"]) == ("COMPLETED", ["blue"])
        assert [a["tokens"] for a in entry["attempts"]] == [120, 15, 0]
        again = inside("run", "sums.py:pipeline", GOOD, *there, "--run-id", run_id)
        assert (again.code, json.loads(again.out)) == (0, {"n": 4})
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "worker drained: after SIGTERM" in err
    assert stroma.calls() == ["first", "second", "third"]


def test_a_failed_run_is_resumed(stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]) -> None:
    """Exit codes are those of a local run; --resume continues the run on workers after its last commit."""
    run_id = uuid.uuid4().hex
    words = ("run", "sums.py:pipeline", GOOD, *there, "--run-id", run_id)
    with worker(env={"SECOND": "raise ValueError('never')"}):
        done = inside(*words, "--json")
    assert (done.code, json.loads(done.out)["status"]) == (1, "PARTIAL")
    with worker():
        done = inside(*words, "--resume")
    assert (done.code, json.loads(done.out)) == (0, {"n": 4})
    assert stroma.calls() == ["first", "second", "second", "second", "third"]


def test_a_submitted_run(stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]) -> None:
    """submit prints the id of the run, which workers start later; run --attach waits for it."""
    run_id = uuid.uuid4().hex
    done = inside("submit", "sums.py:pipeline", GOOD, *there, "--run-id", run_id)
    assert (done.code, done.out.strip()) == (0, run_id), done
    with worker():
        done = inside("run", "sums.py:pipeline", *there, "--run-id", run_id, "--attach")
    assert (done.code, json.loads(done.out)) == (0, {"n": 4})


def test_no_worker_polls(stroma: Any, inside: Any, there: tuple[str, ...]) -> None:
    """After some seconds the command that starts a worker is printed; SIGTERM leaves the run to cancel."""
    run_id = uuid.uuid4().hex
    process = stroma.popen("run", "sums.py:pipeline", GOOD, *there, "--run-id", run_id)
    message = wait_for(process, "no worker polls")
    assert "stroma worker sums.py:pipeline" in message
    assert "--temporal" in message
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "or cancel it: " in err
    assert inside("cancel", run_id, "--db", "runs.db").code == 0
    assert json.loads(inside("show", run_id, "--db", "runs.db", "--json").out)["run"]["status"] == "CANCELLED"


def test_ctrl_c_cancels_the_run(stroma: Any, worker: Any, there: tuple[str, ...]) -> None:
    """SIGINT cancels the run, prints its outcome, and exits with 130."""
    run_id = uuid.uuid4().hex
    with worker(env={"SECOND_AWAITS": "asyncio.sleep(60)"}):
        process = stroma.popen("run", "sums.py:pipeline", GOOD, *there, "--run-id", run_id)
        deadline = time.monotonic() + 60
        while "second" not in stroma.calls():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "CANCELLED" in err


def test_a_worker_of_a_place(stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]) -> None:
    """`stroma worker --place` calls the nodes with that place, and drives no runs; the queue of the runs is
    no place."""
    queue = there[3]
    stroma.file(
        "gpu.py",
        f"""
        import os
        from sums import *
        from sums import first, third

        async def big(state):
            called(f"big-{{os.environ.get('WHERE')}}")
            return {{"n": state.n + 40}}

        contract = NodeContract(node_id="big", input_schema=Sum, output_schema=Sum, place="gpu-{queue}")
        pipeline = Pipeline("gpu", [first, stroma_node("big", contract)(big), third])
        """,
    )
    place = stroma.popen(
        "worker", "gpu.py:pipeline", *there, "--place", f"gpu-{queue}", env={"WHERE": "place"}
    )
    try:
        assert f"'gpu' at place 'gpu-{queue}' of" in wait_for(place, "worker ready: ")
        with worker("gpu.py:pipeline"):
            done = inside("run", "gpu.py:pipeline", GOOD, *there)
        assert (done.code, json.loads(done.out)) == (0, {"n": 42})
        assert stroma.calls() == ["first", "big-place", "third"]
    finally:
        place.terminate()
        _, err = place.communicate(timeout=60)
    assert place.returncode == 0
    assert "worker drained: after SIGTERM" in err
    done = inside("worker", "gpu.py:pipeline", *there, "--place", queue)
    assert done.code == 2
    assert "a run would wait for itself" in done.err


def test_what_is_refused(inside: Any, fails: Any, there: tuple[str, ...]) -> None:
    """Options of one process are refused with --temporal; a server that does not answer is one message."""
    words = ("run", "sums.py:pipeline", GOOD, *there)
    fails(inside(*words, "--drain", "5"), 2, "does not go with --temporal", "SIGTERM")
    fails(inside(*words, "--budget-tokens", "5"), 2, "does not go with --temporal", "stroma budget")
    fails(inside("worker", "sums.py:pipeline", *there, "--poll", "5"), 2, "does not go with --temporal")
    fails(
        inside("run", "sums.py:pipeline", GOOD, "--temporal", "localhost:1"), 3, "no Temporal server answers"
    )
    fails(inside("run", "sums.py:pipeline", GOOD, "--temporal", "nowhere"), 2, "HOST:PORT")
    fails(inside("run", "sums.py:pipeline", GOOD, "--task-queue", "q"), 2, "needs --temporal")
