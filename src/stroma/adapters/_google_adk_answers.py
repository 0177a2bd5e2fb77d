"""Questions of Google ADK for a person, and the stored answers that a session continues with."""

from __future__ import annotations

from typing import Any, Final

from google.genai import types

from stroma.adapters.guard import Guard

__all__ = ["answers_of", "ask", "asking_calls", "has_no_message", "is_continuation", "pending_calls"]

#: The calls by which ADK asks begin so.
_ASKS: Final = "adk_request_"
_CONFIRMATION: Final = "adk_request_confirmation"


def is_continuation(message: Any) -> bool:
    """Return True if a message responds to what ADK has asked, or if there is none."""
    return message is None or any(
        part.function_response is not None and (part.function_response.name or "").startswith(_ASKS)
        for part in message.parts or ()
    )


def has_no_message(kwargs: dict[str, Any]) -> bool:
    """Return True for a call with nothing to continue with, which ADK alone refuses."""
    return kwargs.get("new_message") is None and kwargs.get("invocation_id") is None


def asking_calls(event: Any) -> list[Any]:
    return [call for call in event.get_function_calls() if (call.name or "").startswith(_ASKS)]


async def pending_calls(runner: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Return the calls by which ADK has asked in a session, and that have no response."""
    session = await runner.session_service.get_session(
        app_name=runner.app_name, user_id=kwargs["user_id"], session_id=kwargs["session_id"]
    )
    events = [] if session is None else session.events
    done = {response.id for event in events for response in event.get_function_responses()}
    return [call for event in events for call in asking_calls(event) if call.id not in done]


def answers_of(guard: Guard, calls: list[Any]) -> Any:
    """Return the message with the stored answers to calls, or None unless all of them are answered."""
    answers = guard.current.questions.answers_to(call.id for call in calls)
    if not calls or len(answers) < len(calls):
        return None
    guard.current.questions.taken.update(answers)
    parts = []
    for call in calls:
        response = answers[call.id]
        if not isinstance(response, dict):
            is_confirmation = call.name == _CONFIRMATION
            response = {"confirmed": response is True} if is_confirmation else {"result": response}
        function_response = types.FunctionResponse(id=call.id, name=call.name, response=response)
        parts.append(types.Part(function_response=function_response))
    return types.Content(role="user", parts=parts)


async def ask(guard: Guard, calls: list[Any]) -> None:
    for call in calls:
        original = (call.args or {}).get("originalFunctionCall") or {}
        if call.name == _CONFIRMATION and original.get("name"):
            await guard.current.questions.ask(original["name"], call.id, f"approval of {original['name']}")
        else:
            await guard.current.questions.ask(call.name, call.id, call.name)
