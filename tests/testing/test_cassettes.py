"""Responses of providers that vcrpy has recorded, as the page on testing has it."""

from pathlib import Path
from typing import Any

import vcr
from openai import AsyncOpenAI
from tests.kit import Note
from tests.providers.server import Answer, Server

from stroma import StromaRunner

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
