"""Responses of providers that vcrpy has recorded, as the page on testing has it."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import vcr
from openai import AsyncOpenAI
from tests.kit import Note

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


class Provider(BaseHTTPRequestHandler):
    """A provider that answers as both do."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps(OPENAI if "chat" in self.path else ANTHROPIC).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


async def test_recorded_responses_of_both_clients_are_replayed(tmp_path: Path) -> None:
    """A cassette of vcrpy replays both clients without provider or keys, with the usage of responses."""
    server = HTTPServer(("127.0.0.1", 0), Provider)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    runner = StromaRunner.quick()

    @runner.node("greet", input=Note, output=Note)
    async def greet(state: Note) -> Any:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-openai", max_retries=0)
        prompt: Any = [{"role": "user", "content": "greet"}]
        response = await client.chat.completions.create(model="gpt-4o", messages=prompt)
        return Note(text=response.choices[0].message.content or ""), response

    @runner.node("name", input=Note, output=Note)
    async def name(state: Note) -> Any:
        # It takes 2 s of each worker to import.
        from anthropic import AsyncAnthropic

        client = AsyncAnthropic(base_url=url, api_key="sk-anthropic", max_retries=0)
        prompt: Any = [{"role": "user", "content": "name"}]
        response = await client.messages.create(model="claude-test", max_tokens=5, messages=prompt)
        return Note(text=f"{state.text} {response.content[0].text}"), response

    async def run(mode: str) -> Any:
        hidden = ["authorization", "x-api-key"]
        with vcr.use_cassette(str(tmp_path / "greet.yaml"), record_mode=mode, filter_headers=hidden):
            return await runner.run([greet, name], Note())

    Thread(target=server.serve_forever, daemon=True).start()
    live = await run("once")
    server.shutdown()
    server.server_close()
    again = await run("none")
    for result in (live, again):
        assert (result.final_state, result.total_tokens) == (Note(text="Dear Ada"), 11), result.failure
    assert "sk-" not in (tmp_path / "greet.yaml").read_text("utf-8")
