"""A model of Pydantic AI whose requests are steps."""

from __future__ import annotations

import contextlib
from typing import Any

from pydantic_ai import exceptions
from pydantic_ai.models.wrapper import WrapperModel

from stroma.adapters._state_views import newest_of
from stroma.adapters._step import Control
from stroma.adapters.guard import Guard
from stroma.cost.usage import Usage

__all__ = ["GuardedModel", "control"]


class GuardedModel(WrapperModel):
    """A model whose requests are steps: they may be made again, which the handlers around a request may not be."""

    def __init__(self, wrapped: Any, guard: Guard) -> None:
        super().__init__(wrapped)
        about: dict[str, Any] = {"given": _asked, "made": _answer, "usage": _used, "control": control}
        self._request = guard.wrap("model", wrapped.request, **about)
        last: Any = {"collect": lambda opened: opened[-1].get(), **about}
        self._stream = guard.wrap("model", self._open, **last)

    async def _open(self, *args: Any, **kwargs: Any) -> Any:
        async with self.wrapped.request_stream(*args, **kwargs) as response:
            yield response

    async def request(self, *args: Any, **kwargs: Any) -> Any:
        return await self._request(*args, **kwargs)

    def request_stream(self, *args: Any, **kwargs: Any) -> Any:
        stream: Any = self._stream
        return contextlib.asynccontextmanager(stream)(*args, **kwargs)


def control(error: BaseException) -> Control | None:
    """What an exception of Pydantic AI means."""
    if isinstance(error, (exceptions.CallDeferred, exceptions.ApprovalRequired)):
        return Control("suspended", type(error).__name__)
    if isinstance(error, (exceptions.SkipToolExecution, exceptions.SkipModelRequest)):
        return Control("returned", getattr(error, "result", None) or getattr(error, "response", None))
    return Control("passed") if isinstance(error, _TOLD_TO_THE_MODEL) else None


_TOLD_TO_THE_MODEL = tuple(
    getattr(exceptions, name)
    for name in ("ModelRetry", "ToolRetryError", "ToolFailed", "ToolFailedError")
    if hasattr(exceptions, name)
)


def _asked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return newest_of(args[0] if args else kwargs.get("messages"))


def _answer(response: Any) -> dict[str, Any]:
    return {"model": response.model_name, "parts": response.parts}


def _used(response: Any) -> Usage:
    used = response.usage
    cached = min(used.cache_read_tokens, used.input_tokens)
    written = min(used.cache_write_tokens, used.input_tokens - cached)
    return Usage(used.input_tokens, used.output_tokens, cached, written, response.model_name)
