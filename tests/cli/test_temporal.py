"""The command line with a real Temporal server: `stroma worker` and `submit` with --temporal."""

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


def run_of(inside: Any, run_id: str) -> Any:
    """Follow a run until it ends, and return its entry."""
    assert inside("tail", run_id, "--follow", "--db", "runs.db").code == 0
    return json.loads(inside("show", run_id, "--db", "runs.db", "--json").out)


def test_workers_run_a_submitted_run(stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]) -> None:
    """submit prints the id of the run, which workers start later; every command finds it in the store."""
    run_id = uuid.uuid4().hex
    words = ("submit", "sums.py:pipeline", GOOD, *there, "--run-id", run_id, "--tag", "blue")
    done = inside(*words)
    assert (done.code, done.out.strip()) == (0, run_id), done
    with worker() as process:
        assert "'sums' at task queue" in process.ready
        entry = run_of(inside, run_id)
        assert (entry["run"]["status"], entry["run"]["tags"]) == ("COMPLETED", ["blue"])
        assert [a["tokens"] for a in entry["attempts"]] == [120, 15, 0]
        assert "the run is COMPLETED already" in inside(*words).err
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "worker drained: after SIGTERM" in err
    assert stroma.calls() == ["first", "second", "third"]


def test_a_failed_run_is_resumed(stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]) -> None:
    """`stroma resume RUN` has the workers continue a failed run after its last committed node."""
    run_id = uuid.uuid4().hex
    assert inside("submit", "sums.py:pipeline", GOOD, *there, "--run-id", run_id).code == 0
    with worker(env={"SECOND": "raise ValueError('never')"}):
        assert run_of(inside, run_id)["run"]["status"] == "PARTIAL"
    assert inside("resume", run_id, "--db", "runs.db").code == 0
    with worker():
        deadline = time.monotonic() + 60
        while run_of(inside, run_id)["run"]["status"] != "RESUMED":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert stroma.calls() == ["first", "second", "second", "second", "third"]


def test_a_run_is_cancelled(stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]) -> None:
    """`stroma cancel` ends a run in progress on a worker."""
    run_id = uuid.uuid4().hex
    assert inside("submit", "sums.py:pipeline", GOOD, *there, "--run-id", run_id).code == 0
    with worker(env={"SECOND_AWAITS": "asyncio.sleep(60)"}):
        deadline = time.monotonic() + 60
        while "second" not in stroma.calls():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert inside("cancel", run_id, "--db", "runs.db").code == 0
        assert run_of(inside, run_id)["run"]["status"] == "CANCELLED"


def test_a_worker_of_a_place(stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]) -> None:
    """`stroma worker --place` calls its nodes and drives no runs; a queue of runs is no place."""
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
    env = {"WHERE": "place"}
    place = stroma.popen("worker", "gpu.py:pipeline", *there, "--place", f"gpu-{queue}", env=env)
    try:
        assert f"'gpu' at place 'gpu-{queue}' of" in wait_for(place, "worker ready: ")
        with worker("gpu.py:pipeline"):
            run_id = inside("submit", "gpu.py:pipeline", GOOD, *there).out.strip()
            assert run_of(inside, run_id)["run"]["status"] == "COMPLETED"
        output = inside("show", run_id, "--node", "third", "--output", "--db", "runs.db").out
        assert json.loads(output) == {"n": 42}
        assert stroma.calls() == ["first", "big-place", "third"]
    finally:
        place.terminate()
        _, err = place.communicate(timeout=60)
    assert place.returncode == 0
    assert "worker drained: after SIGTERM" in err
    done = inside("worker", "gpu.py:pipeline", *there, "--place", queue)
    assert done.code == 2
    assert "a run would wait for itself" in done.err


def test_what_is_refused(
    inside: Any, fails: Any, there: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of one process are refused with --temporal; a server that does not answer is one message."""
    words = ("submit", "sums.py:pipeline", GOOD)
    fails(inside("worker", "sums.py:pipeline", *there, "--poll", "5"), 2, "do not go with --temporal")
    fails(inside(*words, "--temporal", "localhost:1"), 3, "cannot be used: Failed client connect")
    fails(inside(*words, "--temporal", "nowhere"), 2, "HOST:PORT")
    fails(inside(*words, "--task-queue", "q"), 2, "needs --temporal")
    monkeypatch.setenv("TEMPORAL_NAMESPACE", "nope")
    fails(inside("worker", "sums.py:pipeline", *there), 3, "cannot be used: Namespace nope")
    monkeypatch.setenv("TEMPORAL_TLS_CLIENT_CERT_PATH", "none.pem")
    fails(inside(*words, *there), 3, "cannot be used: [Errno 2]", "none.pem")
