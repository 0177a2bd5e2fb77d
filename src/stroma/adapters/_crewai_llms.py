"""LLMs and tools of CrewAI as steps, and what CrewAI itself counts."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from crewai import BaseLLM

from stroma.adapters._delegation import before, guard_methods, within, wrap_method
from stroma.adapters._state_views import newest_of
from stroma.adapters._step import report_uncounted
from stroma.adapters.guard import Guard, what_stopped
from stroma.contracts.contract import NodeContract
from stroma.cost.usage import Usage
from stroma.engine.execution import current_node

__all__ = ["comparing", "guard_llm", "guard_tool", "raise_fatal"]

_LOCK: Final = threading.Lock()


def guard_llm(llm: Any, guard: Guard) -> Any:
    """Make steps of the calls of an LLM and of its copies; changes it and returns it."""

    @contextmanager
    def booking(self: Any, *_: Any, **__: Any) -> Iterator[None]:
        ledger = _Ledger.of(self)
        try:
            yield
        finally:
            ledger.book(self)

    names, around = ("call", "acall"), functools.partial(within, context=booking)
    output_view = lambda answer: {"answer": answer}  # noqa: E731
    guard_methods(llm, names, guard, "llm", around, input_view=_input_view, output_view=output_view)
    for name in names:
        wrap_method(llm, name, guard, lambda step: before(step, lambda *_, **__: raise_fatal(guard)))
    return llm


def guard_tool(tool: Any, guard: Guard, contract: NodeContract[Any, Any] | None) -> None:
    """Make steps of a tool's calls; a broken contract or a spent budget in one ends the run."""

    @contextmanager
    def ending(*_: Any, **__: Any) -> Iterator[None]:
        raise_fatal(guard)
        try:
            yield
        except Exception as error:
            if what_stopped(error) is not None:  # CrewAI tells the model of it, and would continue.
                guard.current.fatal = error
            raise

    names = ("_run", "_arun")
    guard_methods(tool, names, guard, tool.name, contract=contract, role="tool")
    for name in names:
        wrap_method(tool, name, guard, functools.partial(within, context=ending))


def raise_fatal(guard: Guard) -> None:
    """Raise what has ended the run in a tool."""
    if (fatal := guard.current.fatal) is not None:
        raise fatal


class _RunTokens:
    """Tokens that the LLMs of CrewAI have counted in a run, whether they are guarded or not."""

    def __init__(self, outer: _RunTokens | None) -> None:
        self.outer = outer
        self.tokens = 0

    def add(self, tokens: int) -> None:
        self.tokens += tokens
        if self.outer is not None:
            self.outer.add(tokens)


_COUNTER: ContextVar[_RunTokens | None] = ContextVar("stroma_crewai_counter", default=None)


@contextmanager
def comparing(guard: Guard) -> Iterator[None]:
    """Compare what CrewAI's own LLMs count in the calls inside with what the guard has."""
    _count_all()
    counter = _RunTokens(_COUNTER.get())
    token = _COUNTER.set(counter)
    try:
        yield
    finally:
        _COUNTER.reset(token)
        guard.compare_usage("CrewAI", counter.tokens)


def _count_all() -> None:
    """Let every LLM of CrewAI say what it counts."""
    with _LOCK:
        bare: Any = BaseLLM._track_token_usage_internal
        if hasattr(bare, "_stroma_counts"):
            return

        @functools.wraps(bare)
        def track(self: Any, usage_data: dict[str, Any]) -> None:
            counter = _COUNTER.get()
            if counter is None:
                bare(self, usage_data)
                return
            with _LOCK:
                before = sum(_counted(self)[:2])
                bare(self, usage_data)
                counter.add(sum(_counted(self)[:2]) - before)

        track.__dict__["_stroma_counts"] = True
        BaseLLM._track_token_usage_internal = track


_COUNTED: Final = ("prompt_tokens", "completion_tokens", "cached_prompt_tokens", "cache_creation_tokens")


def _counted(llm: Any) -> tuple[int, ...]:
    return tuple(llm._token_usage.get(name, 0) for name in _COUNTED)


class _Ledger:
    """Usage of an LLM that no step has counted yet. The LLM and its shallow copies have one counter for all their calls."""

    def __init__(self, llm: Any) -> None:
        self._counter = llm._token_usage
        self._lock = threading.Lock()
        self._booked = _counted(llm)

    @classmethod
    def of(cls, llm: Any) -> _Ledger:
        """Return the ledger of an LLM's counter."""
        with _LOCK:
            ledger: _Ledger | None = vars(llm).get("_stroma_ledger")
            if ledger is None or ledger._counter is not llm._token_usage:  # A deep copy counts for itself.
                ledger = cls(llm)
                object.__setattr__(llm, "_stroma_ledger", ledger)
            return ledger

    def __deepcopy__(self, _: Any) -> _Ledger:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()

    def book(self, llm: Any) -> None:
        """Count what is new on the step that is under way; of a failed call, too."""
        node = current_node()
        with self._lock:
            now, before = _counted(llm), self._booked
            self._booked = now
        input_tokens, output_tokens, cached, written = (
            max(0, a - b) for a, b in zip(now, before, strict=True)
        )
        if input_tokens or output_tokens:
            input_tokens = max(input_tokens, cached + written)
            report_uncounted(node, Usage(input_tokens, output_tokens, cached, written, llm.model))


def _input_view(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return newest_of(args[0] if args else kwargs.get("messages"))
