"""What a middleware of Microsoft Agent Framework stands before, and what its messages say."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from agent_framework import MiddlewareTermination

from stroma.adapters._state_views import newest_of
from stroma.adapters._step import Control
from stroma.cost.usage import Usage

__all__ = ["Rest", "answer_of", "asked_of", "control_of", "result_of", "used_by"]


class Rest:
    """The rest of a pipeline of middleware, as a function that can be called again, and as one that gives parts."""

    def __init__(self, context: Any, call_next: Any, judge: Callable[[], None] = lambda: None) -> None:
        self._context, self._next, self._judge = context, call_next, judge
        self._final: Any = None

    async def whole(self) -> Any:
        try:
            await self._next()
        except Exception:
            self._judge()  # What is behind the error of the framework comes out in its place.
            raise
        self._judge()
        return self._context.result

    async def parts(self) -> AsyncGenerator[Any, None]:
        stream = await self.whole()
        try:
            async for part in stream:
                yield part
            # That is what keeps the history of a session, too.
            self._final = await stream.get_final_response()
        except Exception:
            self._judge()
            raise
        self._judge()

    def final(self, _: Any) -> Any:
        """The response that the parts came to."""
        return self._final


def control_of(error: BaseException) -> Control | None:
    """Middleware that ends what is under way has made its result."""
    return (
        Control("returned", getattr(error, "result", None)) if type(error) is MiddlewareTermination else None
    )


def asked_of(messages: Any) -> dict[str, Any]:
    """What an agent or a model is asked: the newest message in words, which are the same in each process, and how many there are."""
    asked = newest_of(messages)
    newest = asked["newest"]
    if hasattr(newest, "text"):
        asked["newest"] = {"role": str(getattr(newest, "role", "")), "text": newest.text}
    return asked


def answer_of(made: Any) -> dict[str, Any]:
    """What a model or an agent answered."""
    return {"text": getattr(made, "text", None)}


def result_of(made: Any) -> Any:
    """What a tool returned: of contents whose text is JSON, what that says."""
    text = made
    if isinstance(made, list) and made and all(hasattr(part, "text") for part in made):
        text = "".join(part.text or "" for part in made)
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def used_by(response: Any) -> Usage | None:
    """What a response says that it used."""
    used = getattr(response, "usage_details", None)
    if not used:
        return None
    given, cached = used.get("input_token_count") or 0, used.get("cache_read_input_token_count") or 0
    model = getattr(response, "model", None) or getattr(response, "model_id", None)
    return Usage(given, used.get("output_token_count") or 0, min(cached, given), model=model)
