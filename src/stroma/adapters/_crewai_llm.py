"""The calls of an LLM of CrewAI as steps."""

from __future__ import annotations

import inspect
import threading
from typing import Any

from stroma.adapters._delegation import guard_methods
from stroma.adapters._state_views import newest_of
from stroma.adapters.guard import Guard
from stroma.cost.usage import Usage
from stroma.engine.execution import current_node

__all__ = ["guard_llm"]


def guard_llm(llm: Any, guard: Guard) -> Any:
    """Make steps of the calls of an LLM; changes it and returns it."""
    ledger = _Ledger(llm)

    def around(bare: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return bare(*args, **kwargs)
            finally:
                ledger.book()

        async def acall(*args: Any, **kwargs: Any) -> Any:
            try:
                return await bare(*args, **kwargs)
            finally:
                ledger.book()

        return acall if inspect.iscoroutinefunction(bare) else call

    answer = lambda made: {"answer": made}  # noqa: E731
    return guard_methods(llm, ("call", "acall"), guard, "llm", around, given=_asked, made=answer)


class _Ledger:
    """What an LLM has used and no step has counted yet. It only has one counter, for all that call it at once."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._lock = threading.Lock()
        self._booked = self._counted()

    def _counted(self) -> tuple[int, int, int]:
        kept = self._llm._token_usage
        return kept["prompt_tokens"], kept["completion_tokens"], kept.get("cached_prompt_tokens", 0)

    def book(self) -> None:
        """Count what is new on the step that is under way; of a failed call, too."""
        node = current_node()
        assert node is not None
        with self._lock:
            now, before = self._counted(), self._booked
            self._booked = now
        given, made, cached = (max(0, a - b) for a, b in zip(now, before, strict=True))
        if given or made:
            node.report_usage(Usage(given, made, min(cached, given), model=self._llm.model))


def _asked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return newest_of(args[0] if args else kwargs.get("messages"))
