"""The calls of an LLM of CrewAI as steps."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stroma.adapters._views import newest_of
from stroma.adapters.guard import GUARDED, Guard
from stroma.context import NodeExecution, current_node
from stroma.usage import Usage

__all__ = ["guard_llm"]


def guard_llm(llm: Any, guard: Guard) -> Any:
    """Make steps of the calls of an LLM; changes it and returns it."""
    if hasattr(llm.call, GUARDED):
        return llm
    call, acall, ledger = llm.call, llm.acall, _Ledger(llm)

    def counted(*args: Any, **kwargs: Any) -> Any:
        with ledger.open():
            return call(*args, **kwargs)

    async def acounted(*args: Any, **kwargs: Any) -> Any:
        with ledger.open():
            return await acall(*args, **kwargs)

    about: Any = {"given": _asked, "made": lambda answer: {"answer": answer}}
    step, astep = guard.wrap("llm", counted, **about), guard.wrap("llm", acounted, **about)

    @functools.wraps(call)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        # An LLM may make one of its calls by another.
        return call(*args, **kwargs) if ledger.is_open() else step(*args, **kwargs)

    @functools.wraps(acall)
    async def aguarded(*args: Any, **kwargs: Any) -> Any:
        return await (acall(*args, **kwargs) if ledger.is_open() else astep(*args, **kwargs))

    guarded.__dict__[GUARDED] = "llm"
    object.__setattr__(llm, "call", guarded)
    object.__setattr__(llm, "acall", aguarded)
    return llm


class _Ledger:
    """What an LLM has used and no step has counted yet. It only has one counter, for all that call it at once."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._lock = threading.Lock()
        self._booked = self._counted()

    def _counted(self) -> tuple[int, int, int]:
        kept = self._llm._token_usage
        return kept["prompt_tokens"], kept["completion_tokens"], kept.get("cached_prompt_tokens", 0)

    def is_open(self) -> bool:
        """Whether a call of this LLM is the step that is under way."""
        node = current_node()
        return node is not None and self in node.notes

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around a call: what it used is counted on its step, of a failed one too."""
        node = current_node()
        assert node is not None
        node.notes[self] = True
        try:
            yield
        finally:
            self._book(node)

    def _book(self, node: NodeExecution) -> None:
        with self._lock:
            now, before = self._counted(), self._booked
            self._booked = now
        given, made, cached = (max(0, a - b) for a, b in zip(now, before, strict=True))
        if given or made:
            node.report_usage(Usage(given, made, min(cached, given), model=self._llm.model))


def _asked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return newest_of(args[0] if args else kwargs.get("messages"))
