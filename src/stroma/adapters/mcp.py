"""MCP: the tools of a server, called over a client session, as steps.

::

    async with ClientSession(read, write) as session:
        attach(session, guard, {"weather": (City, Weather)})
        async with guard.run():
            await session.call_tool("weather", {"city": "Oslo"})
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, TypeVar

from stroma.adapters._releases import imports_of

with imports_of("mcp"):
    import mcp  # noqa: F401

from stroma.adapters._delegation import wrap_method
from stroma.adapters._state_views import parse_text
from stroma.adapters._step import Control, GuardedStep
from stroma.adapters.guard import Contracts, Guard, contract_for

__all__ = ["attach"]

T = TypeVar("T")
_CONTRACTS: Final = "_stroma_contracts"


def attach(session: T, guard: Guard, contracts: Contracts | None = None) -> T:
    """Make a step of each call of a tool over a session, by the tool's name; changes and returns the session.

    ``contracts``: by the names of tools; input is the arguments, output the structured content, or else the
    text, parsed if it is JSON. A result that says it is an error is returned as it is. A contract of no tool
    of the server raises UnknownNode when the session lists its tools.
    """
    by_name = {name: contract_for(name, contract) for name, contract in (contracts or {}).items()}
    known = vars(session).get(_CONTRACTS)
    if known is not None and by_name and known != by_name:
        raise ValueError("the session is attached already, with other contracts; pass all of them at once")
    object.__setattr__(session, _CONTRACTS, by_name if known is None else known)
    listed: set[str] = set()

    def calling(bare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(bare)
        async def call_tool(self: Any, name: str, arguments: Any = None, *args: Any, **kwargs: Any) -> Any:
            step = GuardedStep(
                name,
                by_name.get(name),
                input_view=lambda *_: dict(arguments or {}),
                output_view=_result,
                judge=_judge,
                role="tool",
            )
            return await guard.acall(step, bare, self, name, arguments, *args, **kwargs)

        return call_tool

    def listing(bare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(bare)
        async def list_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
            page = await bare(self, *args, **kwargs)
            listed.update(tool.name for tool in page.tools)
            if not (getattr(page, "nextCursor", None) or getattr(page, "next_cursor", None)):
                guard.contracts(contracts, listed, "tool")
            return page

        return list_tools

    wrap_method(session, "call_tool", guard, calling)
    wrap_method(session, "list_tools", guard, listing)
    return session


def _judge(result: Any) -> Control | None:
    is_error = getattr(result, "isError", False) or getattr(result, "is_error", False)
    return Control("passed", _text(result)) if is_error else None


def _text(result: Any) -> str:
    return "".join(getattr(part, "text", "") for part in getattr(result, "content", ()))


def _result(result: Any) -> Any:
    """Return the structured content of a result, or its text, parsed if that is JSON."""
    structured = getattr(result, "structuredContent", None) or getattr(result, "structured_content", None)
    return parse_text(_text(result)) if structured is None else structured
