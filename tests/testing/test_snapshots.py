"""Snapshots of traces, and responses of providers that vcrpy has recorded."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import vcr
from openai import AsyncOpenAI
from tests.kit import Note, Text, failing_with, returning
from tests.providers.server import Answer, Server
from tests.testing.pipelines import Number, add_one, make, patient

from stroma import StromaRunner, parallel
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


async def test_a_file_holds_any_text(tmp_path):
    """A lone surrogate, which no file can hold, is escaped."""
    nodes = [make("a", returning({"text": "\ud800"}), Number, Text)]
    path, text = tmp_path / "x.txt", trace_snapshot(await patient().run(nodes, Number()))
    compare_with_file(text, path, update=True)
    compare_with_file(text, path, update=False)
    assert r'> {"text": "\ud800"}' in text


def test_a_file_is_compared(tmp_path):
    """A missing file and another text are errors that show the difference and say how to write it anew."""
    path = tmp_path / "snapshots" / "x.txt"
    with pytest.raises(AssertionError, match="--stroma-update-snapshots"):
        compare_with_file("a\nb\n", path, update=False)
    compare_with_file("a\nb\n", path, update=True)
    compare_with_file("a\nb\n", path, update=False)
    with pytest.raises(AssertionError, match=r"\n-b\n\+c"):
        compare_with_file("a\nc\n", path, update=False)


OPENAI = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Dear"}}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
}
ANTHROPIC = {
    "id": "2",
    "type": "message",
    "role": "assistant",
    "model": "claude-test",
    "stop_reason": "end_turn",
    "content": [{"type": "text", "text": "Ada"}],
    "usage": {"input_tokens": 3, "output_tokens": 1},
}


async def test_recorded_responses_of_both_clients_are_replayed(tmp_path: Path, provider: Server) -> None:
    """A cassette of vcrpy replays both clients without provider or keys, with the usage of responses."""
    openai, anthropic = provider.url(Answer(body=OPENAI)), provider.url(Answer(body=ANTHROPIC))
    runner = StromaRunner.quick()

    @runner.node("greet", input=Note, output=Note)
    async def greet(state: Note) -> Any:
        client = AsyncOpenAI(base_url=openai, api_key="sk-openai", max_retries=0)
        prompt: Any = [{"role": "user", "content": "greet"}]
        response = await client.chat.completions.create(model="gpt-4o", messages=prompt)
        return Note(text=response.choices[0].message.content or ""), response

    @runner.node("name", input=Note, output=Note)
    async def name(state: Note) -> Any:
        # It takes 2 s of each worker to import.
        from anthropic import AsyncAnthropic

        client = AsyncAnthropic(base_url=anthropic, api_key="sk-anthropic", max_retries=0)
        prompt: Any = [{"role": "user", "content": "name"}]
        response = await client.messages.create(model="claude-test", max_tokens=5, messages=prompt)
        return Note(text=f"{state.text} {response.content[0].text}"), response

    async def run(mode: str) -> Any:
        hidden = ["authorization", "x-api-key"]
        with vcr.use_cassette(str(tmp_path / "greet.yaml"), record_mode=mode, filter_headers=hidden):
            return await runner.run([greet, name], Note())

    live, again = await run("once"), await run("none")
    assert provider.calls_of(openai) == provider.calls_of(anthropic) == 1
    for result in (live, again):
        assert (result.final_state, result.total_tokens) == (Note(text="Dear Ada"), 11), result.failure
    assert "sk-" not in (tmp_path / "greet.yaml").read_text("utf-8")
