"""Answers of OpenAI's API, without its servers."""

import json
from typing import Any

import httpx


def completion(answer: Any) -> dict[str, Any]:
    """Return the response of OpenAI's API to a request: a text, or a call of a tool."""
    message: dict[str, Any] = {"role": "assistant"}
    if isinstance(answer, str):
        message["content"] = answer
    else:
        function = {"name": answer[0], "arguments": json.dumps(answer[1])}
        message["tool_calls"] = [{"index": 0, "id": "call", "type": "function", "function": function}]
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "gpt-4o",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
    }


def provider_of(*answers: Any) -> httpx.MockTransport:
    """Answer requests in place of OpenAI's servers, with a stream where one is asked for."""
    left = list(answers)

    def complete(request: httpx.Request) -> httpx.Response:
        whole = completion(left.pop(0))
        if not json.loads(request.content).get("stream"):
            return httpx.Response(200, json=whole)
        (choice,) = whole["choices"]
        part = {"index": 0, "delta": choice["message"], "finish_reason": "stop"}
        chunk = {**whole, "object": "chat.completion.chunk", "choices": [part]}
        headers = {"content-type": "text/event-stream"}
        return httpx.Response(200, text=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", headers=headers)

    return httpx.MockTransport(complete)
