"""The other side of the SDK's protocol: what the program that it starts would say."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from claude_agent_sdk import Transport


class Partial(dict[str, Any]):
    """A part of a message, as the program streams it."""


class Script(Transport):
    """Plays a script: a text is an answer, (tool, arguments) a call of a tool, a dict what the program itself
    asks; what is an exception, it breaks with; then it ends with what it used."""

    def __init__(self, *script: Any, tokens: int = 10, fails: Exception | None = None) -> None:
        self.script, self.tokens, self.fails = list(script), tokens, fails
        self.by_model: dict[str, Any] | None = None
        #: Fields of the result; and whether the program waits for another question after it.
        self.end: dict[str, Any] = {}
        self.is_session = False
        self.messages: list[Any] = []
        self._ready = False
        self._calls: Any = None
        self._out: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()

    async def connect(self) -> None:
        if self.fails is not None:
            raise self.fails

    async def write(self, data: str) -> None:
        for line in data.splitlines():
            text = json.loads(line)
            if text["type"] == "control_request":
                answer = {"subtype": "success", "request_id": text["request_id"], "response": {}}
                await self._out.put({"type": "control_response", "response": answer})
            elif text["type"] == "control_response":
                answered = text["response"]["request_id"]
                if answered == "initialize":
                    await self._send("initialized", {"method": "notifications/initialized"})
                elif answered == "initialized":
                    await self._call()
                else:
                    self.messages.append(text["response"])
                    await self._play()
            elif text["type"] == "user":
                await self._play()

    async def _send(self, request_id: str, message: dict[str, Any]) -> None:
        request = {"subtype": "mcp_message", "server_name": "own", "message": {"jsonrpc": "2.0", **message}}
        await self._out.put({"type": "control_request", "request_id": request_id, "request": request})

    async def _call(self) -> None:
        params = {"name": self._calls[0], "arguments": self._calls[1]}
        await self._send("call", {"id": 1, "method": "tools/call", "params": params})

    async def _play(self) -> None:
        while self.script:
            step = self.script.pop(0)
            if isinstance(step, Partial):
                await self._out.put({"type": "stream_event", **step})
                continue
            if isinstance(step, dict):
                await self._out.put({"type": "control_request", "request_id": "asks", "request": step})
                return
            if isinstance(step, Exception):
                await self._out.put(step)
                return
            if isinstance(step, tuple):
                self._calls = step
                if self._ready:
                    await self._call()
                else:
                    self._ready = True
                    about = {"name": "fake", "version": "1"}
                    params = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": about}
                    await self._send("initialize", {"id": 0, "method": "initialize", "params": params})
                return
            content = [{"type": "text", "text": step}]
            message = {"role": "assistant", "model": "claude-sonnet-4-5", "content": content}
            await self._out.put(
                {"type": "assistant", "message": message, "parent_tool_use_id": None, "session_id": "s"}
            )
        usage = {"input_tokens": self.tokens - 1, "output_tokens": 1}
        await self._out.put(
            {
                "type": "result",
                "subtype": "success",
                "duration_ms": 1,
                "duration_api_ms": 1,
                "is_error": False,
                "num_turns": 1,
                "session_id": "s",
                "total_cost_usd": 0.1,
                "usage": usage,
                "modelUsage": self.by_model,
                "result": "done",
                **self.end,
            }
        )
        if not self.is_session:
            await self._out.put(None)

    async def read_messages(self) -> AsyncIterator[dict[str, Any]]:
        while (message := await self._out.get()) is not None:
            if isinstance(message, Exception):
                raise message
            yield message

    async def close(self) -> None:
        await self._out.put(None)

    def is_ready(self) -> bool:
        return True

    async def end_input(self) -> None:
        return None
