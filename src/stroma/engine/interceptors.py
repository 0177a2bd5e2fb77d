"""Interception points of runs for the test kit. Outside of tests the list is empty."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from stroma.checkpoint import Session
    from stroma.contracts.node import Group, Node
    from stroma.failures.failure import Failure
    from stroma.hooks.sets import NodeHooks
    from stroma.trace.result import ExecutionResult

__all__ = ["INTERCEPTORS", "Call", "Interceptor"]

Call = Callable[[BaseModel], Awaitable[Any]]


class Interceptor:
    """Interceptor around the parts of a run. Each method changes nothing, unless a subclass does.

    ``ctx`` is the ReliabilityContext and ``run`` the RunningNode; the context imports this module, so it
    cannot name them.
    """

    def begins(self, ctx: Any) -> NodeHooks | None:
        """Return hooks for a run, or plain code with steps, that begins; they begin first and end last."""
        return None

    def opened(self, ctx: Any, session: Session) -> Session:
        """Return the session of a run that was opened in its store, or one to use in place of it."""
        return session

    async def call(self, run: Any, node: Node | Group, call: Call, state: BaseModel) -> Any:
        """Call a node's function by ``call``, or something in place of it; within its timeout."""
        return await call(state)

    def diagnosed(self, run: Any, failure: Failure) -> Failure:
        """Return the failure of an attempt, or one to use in place of it."""
        return failure

    def ended(self, ctx: Any, result: ExecutionResult) -> None:
        """Inspect the result of a run, or of a step of plain code, before it is returned.

        An exception comes out of ``run()``, or ``execute_step()``.
        """


#: Interceptors of each run that begins; the first one is outermost.
INTERCEPTORS: list[Interceptor] = []
