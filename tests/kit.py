"""What tests of many subjects share: a small state, nodes, policies that retry without waiting, and runners.

Imports Stroma and pydantic only: the environments of agent frameworks lack the rest.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel

from stroma import (
    FailureClass,
    FailurePolicy,
    NodeContract,
    NodeExecution,
    StromaRunner,
    current_node,
    stroma_node,
)


class Num(BaseModel):
    n: int = 0


class Text(BaseModel):
    text: str


def node(node_id: str, func: Any, input: type[BaseModel] = Num, output: type[BaseModel] = Num) -> Any:
    """Return a function as a node with a contract."""
    return stroma_node(node_id, NodeContract(node_id=node_id, input_schema=input, output_schema=output))(func)


def bare(node_id: str, func: Any) -> Any:
    """Return a function as a node without a contract: marked by hand, as the published attributes have it."""
    func._stroma_node_id, func._stroma_contract = node_id, None
    return func


def here() -> NodeExecution:
    """Return the node that runs here."""
    found = current_node()
    assert found is not None
    return found


def retry_policies(max_retries: int) -> dict[FailureClass, FailurePolicy]:
    """Return policies that retry a failure of any class so often, without waiting."""
    return {kind: FailurePolicy(max_retries=max_retries, backoff_seconds=0) for kind in FailureClass}


NEVER, ONCE, TWICE, THRICE = map(retry_policies, range(4))


def quick(**config: Any) -> StromaRunner:
    """Return a runner that retries every failure twice, without waiting, unless ``config`` has policies."""
    return StromaRunner.quick(**{"policy_map": TWICE, **config})


@contextmanager
def undone_command() -> Iterator[None]:
    """Undo what a command leaves behind that runs in this process: handlers of signals and of logs, `sys.path`."""
    logger = logging.getLogger("stroma")
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers, paths = logger.handlers[:], sys.path[:]
    try:
        yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        logger.handlers[:] = handlers
        sys.path[:] = paths
