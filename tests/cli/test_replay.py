"""`stroma replay` and `stroma record`."""

import json
import subprocess
import sys
import textwrap

import pytest
from tests.kit import environment

GOOD = '{"start": 1}'


@pytest.fixture
def recorded(stroma, inside):
    """A store with a run that completed after a retry, and no call noted."""
    flaky = (
        "fail = not os.path.exists('failed'); open('failed', 'w').close()\nif fail: raise TimeoutError('x')"
    )
    done = inside("run", "sums.py:pipeline", GOOD, "--run-id", "run-a", env={"SECOND": flaky})
    assert done.code == 0, done
    (stroma.home / "calls").unlink()
    return stroma


def change(stroma, old, new, name="changed.py"):
    """The pipeline with one thing changed."""
    text = (stroma.home / "sums.py").read_text()
    assert text.count(old) == 1
    # Python takes compiled code of the same size, written in the same second, for that of this text.
    (stroma.home / name).write_text(text.replace(old, new) + "\n# changed\n")


def test_what_is_printed(recorded, golden):
    """Code that goes the same way ends with 0, other code with 6; each difference is a line; no node runs."""
    change(recorded, "class Sum(BaseModel):\n    n: int", "class Sum(BaseModel):\n    n: int = Field(lt=4)")
    change(recorded, "max_retries=1", "max_retries=0", "fewer.py")
    golden(
        "replay",
        *(
            f"replay run-a {name}.py:pipeline{json}"
            for name in ("sums", "changed", "fewer")
            for json in ("", " --json")
        ),
    )
    assert recorded.calls() == []


def test_a_right_upcast_passes_a_gate_on_the_exit_code(recorded, inside):
    """A replay that only an upcast changed prints what it changed, and ends with 0."""
    upcast = """None

class Named(Sum):
    unit: str

third = stroma_node("third", input=Sum, output=Named, upcast=lambda raw: raw | {"unit": "EUR"})(last)
"""
    change(recorded, 'node("third", last)\n', upcast, "upcast.py")
    done = inside("replay", "run-a", "upcast.py:pipeline")
    assert (done.code, done.out) == (0, 'upcast    2 third  output.unit is new: "EUR"\n'), done
    assert done.err.endswith("the code behaves as it did, with 1 difference by upcasts\n")
    assert json.loads(inside("replay", "run-a", "upcast.py:pipeline", "--json").out)["same"] is True


def test_what_is_wrong_with_the_arguments(recorded, inside, fails):
    """A run that is not there and a missing pipeline are each one message."""
    fails(inside("replay", "none", "sums.py:pipeline"), 4, "no run whose id begins with 'none'")
    fails(inside("record", "run-a", "--as-test", "test_x.py"), 2, "FILE_OR_MODULE:NAME")


def run_test(stroma, path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:ddtrace", "-p", "no:cacheprovider", path]
    return subprocess.run(
        command, cwd=stroma.home, env=environment(), check=False, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sums.py:pipeline", "sums:pipeline"])
def test_a_run_becomes_a_regression_test(recorded, inside, target):
    """The test that is written passes without a call, and fails once the code behaves differently."""
    done = inside("record", "run-a", target, "--as-test", "tests/test_run.py")
    assert done.code == 0, done
    assert done.out.split() == ["tests/test_run.py", "tests/test_run.run.json"]
    text = (recorded.home / "tests" / "test_run.py").read_text()
    assert "It is COMPLETED: first, second (2 attempts), third." in text
    assert "assert replay.result.total_tokens == 135" in text
    passed = run_test(recorded, "tests/test_run.py")
    assert (passed.returncode, recorded.calls()) == (0, []), passed.stdout
    change(recorded, "max_retries=1", "max_retries=0", "sums.py")
    failed = run_test(recorded, "tests/test_run.py")
    assert failed.returncode == 1
    assert "decision: 1 second" in failed.stdout


WAITS = """
    from sums import *

    runner = StromaRunner.quick(inline_wait_seconds=0)
    double = runner.node("double", input=Sum, output=Sum)(last)

    @runner.flow
    async def asked(flow: Flow, state: Sum) -> Sum:
        answer = await flow.wait_for(Sum, reason="how many?")
        return await flow.step(double, answer)
"""


@pytest.mark.slow
def test_a_flow_that_was_answered_becomes_a_regression_test(stroma, inside):
    """A flow that waited for an answer is replayed with it, and becomes a test that passes."""
    (stroma.home / "asked.py").write_text(textwrap.dedent(WAITS))
    assert inside("run", "asked.py:asked", '{"n": 1}', "--run-id", "q").code == 7
    assert inside("replay", "q", "asked.py:asked").code == 0
    assert inside("approve", "q", "asked.py:asked", '{"n": 4}', "--resume").code == 0
    (stroma.home / "calls").unlink()
    done = inside("replay", "q", "asked.py:asked")
    assert done.code == 0
    assert "RESUMED then, COMPLETED now" in done.err
    assert inside("record", "q", "asked.py:asked", "--as-test", "test_q.py").code == 0
    passed = run_test(stroma, "test_q.py")
    assert (passed.returncode, stroma.calls()) == (0, []), passed.stdout


def test_files_that_are_there_are_left_alone(recorded, inside, fails):
    """Only --force writes over a test."""
    assert inside("record", "run-a", "sums.py:pipeline", "--as-test", "test_run.py").code == 0
    (recorded.home / "test_run.py").write_text("mine")
    fails_there = inside("record", "run-a", "sums.py:pipeline", "--as-test", "test_run.py")
    fails(fails_there, 2, "exists already", "--force")
    assert (recorded.home / "test_run.py").read_text() == "mine"
    assert inside("record", "run-a", "sums.py:pipeline", "--as-test", "test_run.py", "--force").code == 0


@pytest.mark.core
def test_a_test_that_would_fail_is_not_written(recorded, inside):
    """If the code behaves differently already, the differences are told in place of a test."""
    change(recorded, "max_retries=1", "max_retries=0")
    done = inside("record", "run-a", "changed.py:pipeline", "--as-test", "test_run.py")
    assert done.code == 6
    assert "behaves differently from run run-a, so its test would fail" in done.err
    assert "stroma replay run-a changed.py:pipeline" in done.err
    assert not (recorded.home / "test_run.py").exists()


@pytest.mark.slow
def test_what_is_redacted_is_not_written(recorded, inside):
    """The redact of the pipeline's config applies; where it breaks a contract nothing is written."""
    change(
        recorded,
        "policy_map=quick",
        "policy_map=quick, redact=lambda state: {name: 77 for name in state}",
        "hides.py",
    )
    done = inside("record", "run-a", "hides.py:pipeline", "--as-test", "test_run.py")
    assert done.code == 0, done
    data = json.loads((recorded.home / "test_run.run.json").read_text())
    assert [one.get("output") for one in data["attempts"] if "output" in one] == [{"n": 77}] * 3
    assert run_test(recorded, "test_run.py").returncode == 0
    change(
        recorded,
        "policy_map=quick",
        "policy_map=quick, redact=lambda state: {name: '*' for name in state}",
        "breaks.py",
    )
    done = inside("record", "run-a", "breaks.py:pipeline", "--as-test", "test_other.py")
    assert done.code == 6
    assert "have it give other values of the same type" in done.err
