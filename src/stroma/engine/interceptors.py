"""Where a test kit reaches into runs. Nothing is here unless a test has asked for it, and then nothing is paid for it."""

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

__all__ = ["PROBES", "Call", "Probe"]

Call = Callable[[BaseModel], Awaitable[Any]]


class Probe:
    """Stands around what a run does. Each method leaves things as they are, unless a probe says otherwise.

    ``ctx`` is the ReliabilityContext and ``run`` the NodeExecution; the context imports this module, so it cannot name them.
    """

    def begins(self, ctx: Any) -> NodeHooks | None:
        """A run, or plain code with steps, begins. Hooks that are given begin first and end last."""
        return None

    def opened(self, ctx: Any, session: Session) -> Session:
        """The run was opened in its store. What is returned takes the place of the session."""
        return session

    async def call(self, run: Any, node: Node | Group, call: Call, state: BaseModel) -> Any:
        """Called in place of a node's function, which ``call`` calls; within its timeout."""
        return await call(state)

    def diagnosed(self, run: Any, failure: Failure) -> Failure:
        """An attempt has failed, and was classified."""
        return failure

    def ended(self, ctx: Any, result: ExecutionResult) -> None:
        """A run has come to its end, or a step of plain code has, and this is about to be returned.

        What is raised comes out of ``run()``, or ``execute_step()``.
        """


#: Asked when a run begins; the first one stands outermost.
PROBES: list[Probe] = []
