"""The plugin, in sessions of pytest of their own."""

import re
import textwrap
from pathlib import Path

import pytest
from tests.kit import run_python

pytest_plugins = ["pytester"]
#: Many processes one after the other, on a machine that may be busy.
pytestmark = pytest.mark.timeout(600)

HEAD = """
    import pytest
    from pydantic import BaseModel
    from stroma import FailurePolicy, NodeContract, StromaRunner, current_node, stroma_node

    class Number(BaseModel):
        n: int = 0

    def make(node_id, func):
        contract = NodeContract(node_id=node_id, input_schema=Number, output_schema=Number)
        return stroma_node(node_id, contract)(func)

    async def add_one(state):
        return {"n": state.n + 1}

    slow = FailurePolicy(max_retries=2, backoff_seconds=60, jitter=False)
    patient = StromaRunner.quick(policy_map={"RECOVERABLE": slow})
"""


@pytest.fixture
def session(pytester, monkeypatch):
    """Runs a file of tests, and gives what it came to."""
    for name in ("COV_CORE_SOURCE", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)

    def run(body, *options):
        pytester.makepyfile(test_it=textwrap.dedent(HEAD) + textwrap.dedent(body))
        plain = ["-p", "no:ddtrace", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto"]
        return pytester.runpytest_inprocess(
            *plain, "-o", "asyncio_default_fixture_loop_scope=function", *options
        )

    run.path = pytester.path
    return run


@pytest.mark.slow
def test_the_plugin_is_light():
    """A session that uses nothing of it imports no module of Stroma but the plugin, and no pydantic."""
    code = (
        "import stroma.testing.plugin, sys; print([m for m in sys.modules if m.count('.') > 1 and "
        "m.startswith('stroma.') or m in ('pydantic', 'hypothesis')])"
    )
    modules = ["stroma._utils.distributions", "stroma._utils.lazy", "stroma.testing.plugin"]
    assert run_python(code=code).strip() == repr(modules)


@pytest.mark.slow
def test_the_core_does_not_import_the_test_kit():
    """Running a pipeline loads nothing of stroma.testing, nor pytest."""
    code = (
        "import sys, stroma, stroma.runner; print([m for m in sys.modules if 'testing' in m or 'pytest' "
        "in m])"
    )
    assert run_python(code=code) == "[]\n"


def test_the_fixtures(session):
    """Each fixture does what it says, without an import in the test."""
    result = session("""
        async def test_the_clock(stroma_clock, stroma_faults):
            stroma_faults.fail("a", TimeoutError("x"))
            runner = StromaRunner.quick(policy_map=patient.config.policy_map)
            result = await runner.run([make("a", add_one)], Number(), run_id="r")
            assert result.final_state.n == 1
            assert stroma_clock.waits == [60]

        async def test_a_fault_that_is_never_met(stroma_faults):
            stroma_faults.fail("nobody")

        async def test_that_fails_by_itself(stroma_faults):
            stroma_faults.fail("nobody")
            assert 1 == 2
    """)
    result.assert_outcomes(passed=2, failed=1, errors=1)
    result.stdout.fnmatch_lines(["*planned faults never occurred: fail 'nobody'*"])


def test_the_fixtures_as_the_page_shows_them(session):
    """The test on docs/testing.md passes, with the pipeline that the page begins with."""
    page = (Path(__file__).parent.parent.parent / "docs" / "testing.md").read_text("utf-8")
    codes = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (test,) = [code for code in codes if "stroma_clock" in code]
    session(f"\n{codes[0]}\n{test}", "--stroma-update-snapshots").assert_outcomes(passed=1)
    session(f"\n{codes[0]}\n{test}").assert_outcomes(passed=1)


def test_snapshots_are_written_when_asked_for(session):
    """The first run without the option fails; with it the file is written, and afterwards it is compared."""
    body = """
        async def test_it(stroma_snapshot):
            result = await patient.run([make("a", add_one)], Number())
            stroma_snapshot(result)
            stroma_snapshot(result.trace, name="trace", states=False)
    """
    first = session(body)
    first.assert_outcomes(failed=1)
    first.stdout.fnmatch_lines(["*no snapshot*--stroma-update-snapshots*"])
    session(body, "--stroma-update-snapshots").assert_outcomes(passed=1)
    names = sorted(path.name for path in (session.path / "snapshots" / "test_it").iterdir())
    assert names == ["test_it.trace.txt", "test_it.txt"]
    session(body).assert_outcomes(passed=1)
    changed = session(body.replace("add_one)", "lambda state: add_one(Number(n=4)))"))
    changed.assert_outcomes(failed=1)
    changed.stdout.fnmatch_lines(['*-    > {"n": 1}*', '*+    > {"n": 5}*'])


@pytest.mark.core
def test_each_test_has_snapshots_of_its_own(session):
    """Tests of one name in two classes share no file; a test with two of one name must give names."""
    body = """
        class TestOne:
            async def test_it(self, stroma_snapshot):
                stroma_snapshot(await patient.run([make("a", add_one)], Number()))

        class TestTwo:
            async def test_it(self, stroma_snapshot):
                stroma_snapshot(await patient.run([make("b", add_one)], Number()))
    """
    session(body, "--stroma-update-snapshots").assert_outcomes(passed=2)
    session(body).assert_outcomes(passed=2)
    twice = session(
        """
        async def test_it(stroma_snapshot):
            stroma_snapshot(await patient.run([make("a", add_one)], Number()))
            stroma_snapshot(await patient.run([make("b", add_one)], Number()))
        """,
        "--stroma-update-snapshots",
    )
    twice.assert_outcomes(failed=1)
    twice.stdout.fnmatch_lines(["*this test has two snapshots test_it.txt; pass a name for each*"])
    alike = session(
        """
        import pytest

        @pytest.mark.parametrize("node_id", ["a/b", "a b"])
        async def test_it(node_id, stroma_snapshot):
            stroma_snapshot(await patient.run([make(node_id, add_one)], Number()))
        """,
        "--stroma-update-snapshots",
    )
    alike.assert_outcomes(passed=1, failed=1)
    alike.stdout.fnmatch_lines(
        ["*snapshot test_it-a-b.txt belongs to test_it.py::test_it?a/b?; pass another*"]
    )


CHAOS = """
    sent, keys, built = [], {}, []

    @pytest.fixture(autouse=True)
    def mailbox():
        sent.clear()
        built.append(1)

    async def send(state):
        sent.append("mail")
        return state

    async def send_once(state):
        keys[current_node().idempotency_key] = "mail"
        return state

    async def test_unsafe():
        result = await patient.run([make("count", add_one), make("send", send)], Number())
        assert sent == ["mail"]

    async def test_safe():
        keys.clear()
        await patient.run([make("count", add_one), make("send_once", send_once)], Number())
        assert len(keys) == 1

    def test_that_runs_nothing():
        assert len(built) == 1 or True

    @pytest.mark.stroma_no_chaos
    async def test_that_is_left_alone():
        await patient.run([make("send", send)], Number())
        assert sent == ["mail"]

    async def test_that_fails_anyway():
        await patient.run([make("send", send)], Number())
        assert sent == []
"""


@pytest.mark.core
@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["alone", "xdist"])
def test_chaos_names_the_node_that_is_not_safe_to_retry(session, workers):
    """Tests of pipelines run again with faults: only the node whose second call breaks a test is named."""
    result = session(CHAOS, "--stroma-chaos=20", "--stroma-chaos-seed=7", *workers)
    result.assert_outcomes(passed=4, failed=2)
    text = result.stdout.str()
    assert "--stroma-chaos-seed=7" in text
    named = [line for line in text.splitlines() if line.startswith("node ")]
    (line,) = named
    assert line.startswith(
        "node 'send' is not safe to retry: test_it.py::test_unsafe fails if its call 1 is made twice"
    )


def test_chaos_is_the_same_with_the_same_seed(session):
    """The seed makes the same faults again; without one it is made up, and told."""
    body = CHAOS.replace("async def test_safe", "async def test_noted")
    first, again = (
        session(body, "--stroma-chaos=6", "--stroma-chaos-seed=11").stdout.str() for _ in range(2)
    )
    events = [[line for line in text.splitlines() if line.startswith("run ")] for text in (first, again)]
    assert events[0] == events[1]
    made_up = session(body, "--stroma-chaos=1").stdout.str()
    assert "--stroma-chaos-seed=" in made_up


def test_without_the_option_nothing_runs_twice(session):
    """A session without chaos calls each test once."""
    result = session("""
        calls = []

        async def test_it():
            await patient.run([make("a", add_one)], Number())
            calls.append(1)
            assert calls == [1]
    """)
    result.assert_outcomes(passed=1)
    assert "chaos" not in result.stdout.str()
