"""Requests of Agent Framework for an approval: their questions, and the stored answers that an agent continues with."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Final

from agent_framework import AgentResponse, Message

from stroma.adapters.guard import Guard

__all__ = ["ask", "asked_again", "is_continuation", "take_answers"]

_REQUEST: Final = "function_approval_request"
_RESPONSE: Final = "function_approval_response"


def is_continuation(messages: list[Any]) -> bool:
    """Return True if messages have a request for an approval, or the response to one."""
    return any(content.type in (_REQUEST, _RESPONSE) for message in messages for content in message.contents)


def take_answers(guard: Guard, messages: list[Any]) -> list[Any]:
    """Answer the requests among the messages from the store; return them if there is one without an answer."""
    run = guard.current
    requests = [content for message in messages for content in message.contents if content.type == _REQUEST]
    answers = run.questions.answers_to(request.id for request in requests)
    if len(answers) < len(requests):
        return requests
    run.questions.taken.update(answers)
    for number, message in enumerate(messages):
        if any(content.type == _REQUEST for content in message.contents):
            answered = messages[number] = copy.copy(message)
            answered.contents = [
                content.to_function_approval_response(approved=answers[content.id] is True)
                if content.type == _REQUEST
                else content
                for content in message.contents
            ]
    return []


def asked_again(requests: list[Any]) -> Any:
    """Return the response of an agent that was called without an answer to its requests."""
    return AgentResponse(messages=[Message("assistant", requests)])


async def ask(guard: Guard, requests: Iterable[Any]) -> None:
    """Suspend the run with a question for each request."""
    for request in requests:
        name = getattr(getattr(request, "function_call", None), "name", None) or request.type
        await guard.current.questions.ask(name, request.id, f"approval of {name}")
