"""A plugin of pytest: a guard is attached to every graph, for LangGraph's own tests."""

import functools
from typing import Any

from guards import new_guard
from langgraph.graph.state import StateGraph
from langgraph.pregel import Pregel

from stroma.adapters.langgraph import attach

_GUARDS = [new_guard()]


def pytest_runtest_setup() -> None:
    """Give each test a guard of its own."""
    _GUARDS[0] = new_guard()


def _install() -> None:
    compile, create = StateGraph.compile, Pregel.__init__

    @functools.wraps(compile)
    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return attach(compile(self, *args, **kwargs), _GUARDS[0])

    @functools.wraps(create)
    def created(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        if type(self) is Pregel and "__previous__" not in self.channels:  # An @entrypoint has tasks.
            attach(self, _GUARDS[0])

    StateGraph.compile, Pregel.__init__ = compiled, created


_install()
