"""The run and the node around the running code, as context variables.

Typed accessors are in :mod:`stroma.engine.execution`; the context of a run imports this module, and its class
is unknown here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import Any

#: The RunningNode around this code, or None.
CURRENT: ContextVar[Any] = ContextVar("stroma_current_node", default=None)

#: The RunningNode whose function runs here, and the id of its attempt, in a run whose events have
#: receivers.
ATTEMPT: ContextVar[tuple[Any, str] | None] = ContextVar("stroma_attempt", default=None)

#: The ReliabilityContext around this code, or None.
RUN: ContextVar[Any] = ContextVar("stroma_current_run", default=None)

#: The permits of the attempts around this code, see :class:`stroma.engine.admission.Permit`.
RESERVED: ContextVar[tuple[Any, ...]] = ContextVar("stroma_reserved", default=())


class AgentRun:
    """A run of an agent in the body of a flow, whose requests and tools are steps.

    ``outer``: the run of the agent that called it.
    """

    def __init__(self, name: str, outer: AgentRun | None) -> None:
        self.name, self.outer = name, outer


#: The innermost run of an agent around this code, or None.
AGENT: ContextVar[AgentRun | None] = ContextVar("stroma_agent_run", default=None)


@contextlib.contextmanager
def running_agent(agent: AgentRun | str | None) -> Iterator[None]:
    """Have the code inside be part of an agent's run; with a name of a new one."""
    token = AGENT.set(AgentRun(agent, AGENT.get()) if isinstance(agent, str) else agent)
    try:
        yield
    finally:
        leave(token)


def leave(token: Token[Any]) -> None:
    """Restore a variable, such as the current node at the end of its execution. Never raises."""
    try:
        token.var.reset(token)
    except ValueError:
        pass  # A coroutine that was thrown away is closed in another context.
