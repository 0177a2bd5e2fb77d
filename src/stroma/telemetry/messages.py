"""Messages of model calls in the form of the conventions: roles, with parts that are text or calls of tools.

Frameworks and clients have classes of their own for messages. They are read by the names of their fields, so
that no framework is imported.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from stroma.engine.execution import RunningNode

#: Key in the notes of a node: the last request to a model, with the attempt that made it.
_REQUEST: Final = "request to a model"
_ROLES: Final = {
    "ai": "assistant",
    "assistant": "assistant",
    "developer": "system",
    "function_call_output": "tool",
    "function_result": "tool",
    "human": "user",
    "model": "assistant",
    "response": "assistant",
    "retry-prompt": "user",
    "system": "system",
    "system-prompt": "system",
    "tool": "tool",
    "tool-return": "tool",
    "tool_result": "tool",
    "user": "user",
    "user-prompt": "user",
}
#: Names of fields, by what they hold: what a response or a message is made of; the text of a part; the
#: arguments of a tool; its result; the id of its call.
_PARTS: Final = (
    "choices",
    "candidates",
    "generations",
    "replies",
    "messages",
    "message",
    "output",
    "parts",
    "contents",
    "tool_call_results",
)
_TEXTS: Final = ("content", "texts", "text")
_ARGUMENTS: Final = ("arguments", "args", "input")
_RESULTS: Final = ("content", "output", "result", "response")
_IDS: Final = ("call_id", "tool_call_id", "tool_use_id", "id")
_MOST_DEPTH: Final = 8


def note_request(node: RunningNode, messages: Any) -> None:
    """Note the messages that an attempt sends to a model, in whatever form its framework has them."""
    node.notes[_REQUEST] = node.attempt, messages


def messages_of_call(node: RunningNode) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages of the last request and answer of the present attempt, as far as they are known."""
    requested, response = node.notes.get(_REQUEST, (0, None)), node.response
    request = _messages(requested[1], "user") if requested[0] == node.attempt else []
    answer = _messages(response[1], "assistant") if response[0] == node.attempt else []
    for message in answer:
        is_call = any(part["type"] == "tool_call" for part in message["parts"])
        message["finish_reason"] = "tool_call" if is_call else "stop"
    return request, answer


def _messages(value: Any, role: str) -> list[dict[str, Any]]:
    """Return the parts inside a value as messages; ``role`` is that of parts that do not say it."""
    messages: list[dict[str, Any]] = []
    for its_role, part in _parts(value, role, 0):
        if messages and messages[-1]["role"] == its_role:
            messages[-1]["parts"].append(part)
        else:
            messages.append({"role": its_role, "parts": [part]})
    return messages


def _parts(value: Any, role: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, str):
        if value:
            yield role, {"type": "text", "content": value}
    elif isinstance(value, (list, tuple)):
        for each in value if depth < _MOST_DEPTH else ():
            yield from _parts(each, role, depth + 1)
    elif value is not None and depth < _MOST_DEPTH:
        kind = _text(value, "part_kind", "type", "kind")
        role = _ROLES.get(_text(value, "role") or kind or "", role)
        call = _call_in(value, role)
        if call is not None:
            yield ("assistant" if call["type"] == "tool_call" else "tool"), call
        elif inner := _first(value, _PARTS):
            yield from _parts(inner, role, depth + 1)
        else:
            inner, calls = _first(value, _TEXTS), _field(value, "tool_calls")
            yield from _parts(inner, role, depth + 1)
            yield from _parts(calls, role, depth + 1)
            if not inner and not calls and kind is not None:
                yield role, {"type": kind}  # An image, say.


def _call_in(value: Any, role: str) -> dict[str, Any] | None:
    """Return the call of a tool that a part or an entry is, or its result; None for anything else."""
    call = _first(value, ("function_call", "function"))
    name = _text(value if call is None else call, "name", "tool_name")
    arguments = _first(value if call is None else call, _ARGUMENTS)
    if name is not None and arguments is not None:
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        return {
            "type": "tool_call",
            "id": _text(value, *_IDS) or _text(call, *_IDS),
            "name": name,
            "arguments": arguments,
        }
    answer = _field(value, "function_response")
    if answer is None and (role != "tool" or _first(value, ("parts", "contents", "tool_call_results"))):
        return None
    answer = value if answer is None else answer
    result = _first(answer, _RESULTS)
    if isinstance(result, list):  # Its parts, of which the texts count.
        texts = [part.get("content") for _, part in _parts(result, "user", _MOST_DEPTH - 2)]
        result = "".join(text for text in texts if text) or result
    return {"type": "tool_call_response", "id": _text(answer, *_IDS), "response": result}


def _field(value: Any, name: str) -> Any:
    """Return a field of a mapping or an object that is data, or None."""
    content = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return None if callable(content) else content


def _first(value: Any, names: tuple[str, ...]) -> Any:
    """Return the first of some fields that holds anything, or None."""
    return next((inner for name in names if (inner := _field(value, name)) is not None), None)


def _text(value: Any, *names: str) -> str | None:
    """Return the first of some fields that is a text; of a member of an enumeration its value."""
    for name in names:
        content = _field(value, name)
        content = getattr(content, "value", content)
        if isinstance(content, str) and content:
            return content
    return None
