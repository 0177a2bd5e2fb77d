"""Responses of the demo's provider in the format of OpenAI: completions and errors."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from stroma.demo import rules
from stroma.demo.fault_plan import Decision

__all__ = ["HTTPError", "answer_task", "completion", "to_error", "with_wrong_type"]


def answer_task(task: str, text: str) -> dict[str, Any]:
    """Return the answer to a task, computed by rules from the text of the user message."""
    if task == "extract":
        return rules.extract(text)
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError('the user message must be JSON of the form {"records": [...]}')
    return rules.classify(message) if task == "classify" else rules.risk(message)


def with_wrong_type(task: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer in which one field has a wrong type."""
    if task == "extract":
        return {**answer, "total": "twelve hundred"}
    key, spoilt = ("labels", {"priority": 3}) if task == "classify" else ("risks", {"level": 3})
    if not answer[key]:
        return {key: "none"}
    return {key: [{**answer[key][0], **spoilt}, *answer[key][1:]]}


def _tokens(text: str) -> int:
    return -(-len(text) // 4)


def completion(
    model: str, messages: Sequence[tuple[str, str]], content: str, decision: Decision
) -> dict[str, Any]:
    """Return a chat completion in the format of OpenAI's."""
    # The protocol's own overhead: four tokens a message and three for the reply's start.
    prompt = sum(_tokens(text) + 4 for _, text in messages) + 3
    completion = _tokens(content)
    return {
        "id": f"chatcmpl-demo-{decision.sha[:12]}-{decision.call}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": None,
                "finish_reason": "length" if decision.outcome == "malformed" else "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
        "system_fingerprint": "fp_stroma_demo",
    }


class HTTPError(Exception):
    """Error response in the format of OpenAI's."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def to_error(decision: Decision, model: str) -> HTTPError:
    """Return the error response for a decision."""
    if decision.outcome == "429":
        wait = decision.retry_after_ms
        # Both forms are in use; the one in milliseconds is OpenAI's own and the finer.
        header = {"retry-after": str(wait // 1000)} if wait >= 1000 else {"retry-after-ms": str(wait)}
        return HTTPError(
            429,
            f"Rate limit reached for {model} in organization org-demo on requests per min (RPM): Limit 500, "
            f"Used 500, Requested 1. Please try again in {wait}ms.",
            "requests",
            code="rate_limit_exceeded",
            headers={"x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "0", **header},
        )
    if decision.outcome == "quota":
        return HTTPError(
            429,
            "You exceeded your current quota, please check your plan and billing details.",
            "insufficient_quota",
            code="insufficient_quota",
        )
    if decision.outcome == "503":
        return HTTPError(
            503, "The engine is currently overloaded, please try again later.", "service_unavailable_error"
        )
    return HTTPError(
        500, "The server had an error while processing your request. Sorry about that!", "server_error"
    )
