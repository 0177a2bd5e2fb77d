"""trace_snapshot: the same text from run to run, and another one once a run goes another way."""

import asyncio

import pytest
from tests.kit import failing_with
from tests.testing.pipelines import Number, add_one, make, patient

from stroma import parallel
from stroma.testing import FakeClock, FaultPlan, trace_snapshot
from stroma.testing.snapshots import compare_with_file


async def run(*, turn=False, **options):
    async def first(state):
        await asyncio.sleep(1 if turn else 2)
        return {"n": 1}, 10, 5, "gpt-4o-mini"

    async def second(state):
        await asyncio.sleep(2 if turn else 1)
        return {"n": 2}

    with FakeClock(), FaultPlan().fail("a", TimeoutError("too slow\nby far")):
        return await patient().run(
            [make("a", add_one), parallel(make("first", first), make("second", second))], Number(), **options
        )


EXPECTED = """\
COMPLETED, 15 tokens, $0.000005
0 a, attempt 1: failure, RECOVERABLE (timeout)
    ! TimeoutError: too slow
    ! by far
    < {"n": 0}
0 a, attempt 2: success
    < {"n": 0}
    > {"n": 1}
1 parallel(first, second), attempt 1: success
    < {"n": 1}
    > {"n": 2}
  1.0 first, attempt 1: success, 10+5 tokens of gpt-4o-mini
      < {"n": 1}
      > {"n": 1}
  1.1 second, attempt 1: success
      < {"n": 1}
      > {"n": 2}
"""


@pytest.mark.core
async def test_it_is_the_same_whatever_was_done_first():
    """Neither times nor ids nor the order in which siblings end are in it."""
    assert trace_snapshot(await run()) == trace_snapshot(await run(turn=True)) == EXPECTED


async def test_the_trace_alone_and_without_states():
    """A trace has no status line; states can be left out, and fields hidden."""
    result = await run()
    assert trace_snapshot(result.trace) == EXPECTED.split("\n", 1)[1]
    assert "{" not in trace_snapshot(result, states=False)
    assert '{"n": "..."}' in trace_snapshot(result, hide=["n"])
    assert '{"n": 1}' not in trace_snapshot(result, hide=["n"])


async def test_the_run_id_is_not_in_it():
    """A message that names the run stays the same."""
    nodes = [make("a", failing_with(PermissionError, "no way in run-77"))]
    text = trace_snapshot(await patient(retries=0).run(nodes, Number(), run_id="run-77"))
    assert "run-77" not in text
    assert "no way in <run id>" in text


def test_a_file_is_compared(tmp_path):
    """A missing file and another text are errors that show the difference and say how to write it anew."""
    path = tmp_path / "snapshots" / "x.txt"
    with pytest.raises(AssertionError, match="--stroma-update-snapshots"):
        compare_with_file("a\nb\n", path, update=False)
    compare_with_file("a\nb\n", path, update=True)
    compare_with_file("a\nb\n", path, update=False)
    with pytest.raises(AssertionError, match=r"\n-b\n\+c"):
        compare_with_file("a\nc\n", path, update=False)
