"""The command line on a real Temporal server: `stroma worker`, and the commands that take --temporal."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.cli.test_approve import DESK
from tests.cli.test_signals import wait_for
from tests.servers_temporal import TemporalServer

GOOD = '{"start": 1}'
#: The second node goes on once there is a file.
HELD = {"SECOND_AWAITS": "until('go')"}


@pytest.fixture
def there(temporal_server: TemporalServer) -> tuple[str, ...]:
    """The words that name a cluster, with a task queue for this test alone."""
    return "--temporal", temporal_server.address, "--task-queue", uuid.uuid4().hex[:12]


@pytest.fixture
def worker(stroma: Any, there: tuple[str, ...]) -> Callable[..., Any]:
    """Start a worker, ready when that is left; it is told to end at the end of the block."""

    @contextlib.contextmanager
    def working(
        *words: str, env: dict[str, str] | None = None, target: str = "sums.py:pipeline"
    ) -> Iterator[Any]:
        process = stroma.popen("worker", target, *there, *words, env=env)
        try:
            process.said = wait_for(process, "worker ready: ")
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=60)

    return working


@pytest.fixture
def held(stroma: Any) -> Any:
    """The pipeline whose second node waits for a file."""
    text = (stroma.home / "sums.py").read_text()
    stroma.file(
        "sums.py",
        text
        + "\nasync def until(name):\n    while not pathlib.Path(name).exists():\n        await asyncio.sleep(0.02)\n",
    )
    return stroma


def let_go(stroma: Any) -> None:
    (stroma.home / "go").touch()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_run_what_the_command_asks_for(
    stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]
) -> None:
    """The state is on stdout, the attempts on stderr; the cluster and the workers' store both show the run afterwards."""
    with worker("--db", "mirror.db") as process:
        assert "'sums' (3 nodes)" in process.said
        assert "written to mirror.db" in process.said
        done = inside("run", "sums.py:pipeline", GOOD, *there, "--run-id", "one", "--tag", "blue")
        assert (done.code, json.loads(done.out)) == (0, {"n": 4})
        for word in (
            "sums: run one on task queue",
            "first",
            "120 tok",
            "COMPLETED",
            "stroma show one --temporal",
        ):
            assert word in done.err, done
        assert stroma.calls() == ["first", "second", "third"]

        listed = json.loads(inside("runs", *there, "--json").out)["runs"]
        one = next(run for run in listed if run["run_id"] == "one")
        assert (one["pipeline"], one["status"], one["nodes"], one["tokens"]) == ("sums", "COMPLETED", 3, 135)
        shown = json.loads(inside("show", "one", *there, "--json").out)
        assert [attempt["node_id"] for attempt in shown["attempts"]] == ["first", "second", "third"]
        entry = json.loads(inside("show", "one", "--db", "mirror.db", "--json").out)
        assert entry["run"]["tags"] == ["blue"]
        assert (
            [a["tokens"] for a in entry["attempts"]]
            == [a["tokens"] for a in shown["attempts"]]
            == [120, 15, 0]
        )

        again = inside("cancel", "one", *there)
        assert (again.code, "ended already" in again.err) == (0, True)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "worker drained: after SIGTERM; 5 tasks done" in err
    # What it came to can be seen without any worker.
    table = inside("show", "one", *there, "--tree").out
    assert "COMPLETED" in table
    assert table.count("success") == 3


def test_a_run_that_failed_is_gone_on_with(
    stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]
) -> None:
    """Exit codes are those of a local run, and so is the command that goes on; finished nodes are not called again."""
    with worker(env={"SECOND": "raise ValueError('never')"}):
        done = inside("run", "sums.py:pipeline", GOOD, *there, "--run-id", "two", "--json")
    assert (done.code, json.loads(done.out)["status"]) == (1, "PARTIAL")
    assert "ValueError" in done.err or "never" in done.err
    again = f"stroma resume two sums.py:pipeline {' '.join(there)}"
    assert again in done.err
    assert json.loads(done.out)["resume"] == again
    with worker():
        done = inside(*again.split()[1:])
    assert (done.code, json.loads(done.out)) == (0, {"n": 4})
    assert stroma.calls() == ["first", "second", "second", "second", "third"]


def test_a_budget_goes_with_the_run(inside: Any, worker: Any, there: tuple[str, ...]) -> None:
    """5 is the exit code of a run that its budget stopped, and the hint has a bigger one."""
    with worker():
        done = inside("run", "sums.py:pipeline", GOOD, *there, "--budget-tokens", "100")
    assert done.code == 5
    assert "--budget-tokens" in done.err


def test_nobody_is_there_to_do_the_work(stroma: Any, there: tuple[str, ...]) -> None:
    """After some seconds the command that starts a worker is named; SIGTERM leaves the run, which cancel can end."""
    process = stroma.popen("run", "sums.py:pipeline", GOOD, *there, "--run-id", "three")
    message = wait_for(process, "no worker polls")
    assert f"stroma worker sums.py:pipeline {' '.join(there)}" in message
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "run three continues without this command" in err
    assert f"stroma run sums.py:pipeline --run-id three --attach {' '.join(there)}" in err


def test_a_detached_run_is_waited_for_by_another_command(
    inside: Any, worker: Any, there: tuple[str, ...]
) -> None:
    """--detach prints the id and leaves; --attach gives the result, and does not run anything again."""
    done = inside("run", "sums.py:pipeline", GOOD, *there, "--detach", "--run-id", "four", "-q")
    assert (done.code, done.out, done.err) == (0, "four\n", "")
    with worker():
        done = inside("run", "sums.py:pipeline", *there, "--run-id", "four", "--attach")
        assert (done.code, json.loads(done.out)) == (0, {"n": 4})
        done = inside("run", "sums.py:pipeline", *there, "--run-id", "four", "--attach", "--json")
        assert json.loads(done.out)["status"] == "COMPLETED"


def test_interrupting_the_command_cancels_the_run(
    held: Any, worker: Any, inside: Any, there: tuple[str, ...]
) -> None:
    """Ctrl-C asks for the end and tells what came of it, with 130; what was finished is kept."""
    with worker(env=HELD):
        process = held.popen("run", "sums.py:pipeline", GOOD, *there, "--run-id", "five")
        wait_until(lambda: "second" in held.calls())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, "")
        assert "cancelling the run" in err
        assert "run five is CANCELLED" in err
        let_go(held)
        done = inside("resume", "five", "sums.py:pipeline", *there)
        assert (done.code, json.loads(done.out)) == (0, {"n": 4})
    assert held.calls() == ["first", "second", "second", "third"]


def test_a_worker_that_is_told_to_end_finishes_what_it_is_at(
    held: Any, worker: Any, there: tuple[str, ...]
) -> None:
    """SIGTERM drains: the attempt in flight is committed by the worker that began it, the next one is another's."""
    with worker(env=HELD) as first:
        process = held.popen("run", "sums.py:pipeline", GOOD, *there)
        wait_until(lambda: "second" in held.calls())
        first.send_signal(signal.SIGTERM)
        wait_for(first, "draining")
        let_go(held)
        first.communicate(timeout=60)
        assert first.returncode == 0
    with worker():
        out, err = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)) == (0, {"n": 4}), err
    assert held.calls() == ["first", "second", "third"]


def test_a_person_answers_a_run_on_the_cluster(
    stroma: Any, inside: Any, worker: Any, there: tuple[str, ...]
) -> None:
    """A run that waits ends the command with 7 and the command that answers; after that it goes on by itself."""
    stroma.file("desk.py", DESK)
    with worker(target="desk.py:pipeline"):
        done = inside("run", "desk.py:pipeline", '{"n": 1}', *there, "--run-id", "six")
        assert (done.code, done.out) == (7, "")
        assert "stroma approve six desk.py:pipeline" in done.err
        shown = inside("show", "six", *there)
        assert "is this right?" in shown.out
        wrong = inside("approve", "six", "desk.py:pipeline", '{"approved": "perhaps"}', *there)
        assert wrong.code == 2
        done = inside("approve", "six", "desk.py:pipeline", '{"approved": true}', *there, "--resume")
        assert (done.code, json.loads(done.out)) == (0, {"n": 103})
        late = inside("approve", "six", "desk.py:pipeline", '{"approved": true}', *there)
        assert (late.code, "is not waiting for an answer" in late.err) == (4, True)


def test_a_cluster_that_is_not_there(inside: Any, fails: Any, temporal_server: TemporalServer) -> None:
    """No server, no such namespace, no such run, no address: one message each, with the mend."""
    run = ("run", "sums.py:pipeline", GOOD)
    fails(
        inside(*run, "--temporal", "127.0.0.1:1"), 3, "no Temporal server answers at 127.0.0.1:1", "start-dev"
    )
    fails(inside("worker", "sums.py:pipeline", "--temporal", "127.0.0.1:1"), 3, "no Temporal server answers")
    fails(inside(*run, "--temporal", "localhost"), 2, "pass HOST:PORT")
    fails(
        inside(*run, "--temporal", temporal_server.address, "--namespace", "nowhere"),
        4,
        "does not have the namespace",
        "--namespace",
    )
    for command in (("show",), ("cancel",)):
        fails(
            inside(*command, "absent", "--temporal", temporal_server.address),
            4,
            "no run",
            "stroma runs --temporal",
        )


def test_variables_of_temporal(inside: Any, fails: Any, temporal_server: TemporalServer) -> None:
    """They say how to get in, never that a run is to be elsewhere: that is for the command to say."""
    run = ("run", "sums.py:pipeline", GOOD)
    nowhere = {"TEMPORAL_NAMESPACE": "nowhere", "TEMPORAL_ADDRESS": temporal_server.address}
    fails(inside(*run, "--temporal", temporal_server.address, env=nowhere), 4, "does not have the namespace")
    there = ("--temporal", temporal_server.address)
    fails(inside("worker", "sums.py:pipeline", *there, env=nowhere), 4, "does not have the namespace")
    assert inside(*run, "--db", "x.db", env=nowhere).code == 0
    missing = {"TEMPORAL_CONFIG_FILE": "/nowhere/temporal.toml"}
    here = inside(*run, "--temporal", "127.0.0.1:1", env=missing)
    assert here.code in (2, 3)
    assert "Traceback" not in here.err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("run", "sums.py:pipeline", "--db", "x.db"), "stroma worker --db"),
        (("run", "sums.py:pipeline", "--drain", "3"), "--detach"),
        (("run", "sums.py:pipeline", "--take-over"), "reassigns runs"),
        (("run", "sums.py:pipeline", "--prometheus", "0"), "stroma worker"),
        (("resume", "x", "sums.py:pipeline", "--from", "second"), "continues where it stopped"),
        (("runs", "--tag", "blue"), "stroma worker --db"),
        (("show", "x", "--output"), "stroma worker --db"),
        (("show", "x", "--rejected"), "stroma worker --db"),
        (("worker", "sums.py:pipeline", "--health", "0"), "watches the runs"),
    ],
)
def test_options_of_one_machine(inside: Any, fails: Any, words: tuple[str, ...], why: str) -> None:
    """What means nothing on a cluster is refused, before anything is asked of it, and the place for it is named."""
    fails(inside(*words, "--temporal", "127.0.0.1:1"), 2, "does not go with --temporal", why)


def test_options_of_a_cluster_alone(inside: Any, fails: Any) -> None:
    fails(inside("run", "sums.py:pipeline", GOOD, "--task-queue", "q"), 2, "--task-queue needs --temporal")
    fails(inside("run", "sums.py:pipeline", GOOD, "--detach"), 2, "--detach needs --temporal")


def test_two_pipelines_of_one_name(stroma: Any, inside: Any, fails: Any) -> None:
    """Runs name their pipeline: a worker with two of a name could not tell which is meant."""
    done = inside("worker", "sums.py:pipeline", "sums.py:pipeline", "--temporal", "127.0.0.1:1")
    fails(done, 2, "2 of these pipelines have the name 'sums'")


def test_the_client_is_imported_only_for_a_cluster(stroma: Any) -> None:
    """A local run does not pay for it; without the package --temporal names what to install."""
    look = "import sys\nfrom stroma.cli import main\ncode = main({words!r})\nassert 'temporalio' not in sys.modules\nsys.exit(code)"
    words = ("run", "sums.py:pipeline", GOOD, "--db", "x.db")
    done = subprocess.run(
        [sys.executable, "-c", look.format(words=words)], cwd=stroma.home, env=stroma.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    without = "import sys\nsys.modules['temporalio'] = None\nsys.modules['temporalio.client'] = None\nfrom stroma.cli import main\nsys.exit(main({words!r}))"
    for words in (
        ("run", "sums.py:pipeline", GOOD, "--temporal", "127.0.0.1:1"),
        ("worker", "sums.py:pipeline", "--temporal", "127.0.0.1:1"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", without.format(words=words)], cwd=stroma.home, env=stroma.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert "pip install 'stroma-runner[temporal]'" in done.stderr


def test_a_process_with_a_client_ends_in_its_own_way(stroma: Any, worker: Any) -> None:
    """What was registered for its end is called. The interpreter's own end is left out: the client's threads may abort it."""
    text = (stroma.home / "sums.py").read_text()
    stroma.file(
        "sums.py",
        text
        + """
import atexit
atexit.register(lambda: print("bye", file=sys.stderr))
class Late:
    def __del__(self, write=os.write):
        write(2, b"finalized")
late = Late()
""",
    )
    with worker() as process:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "bye" in err
    assert "finalized" not in err
    done = stroma("check", "sums.py:pipeline")
    assert "finalized" in done.err  # Elsewhere it is as it always is.
