"""A flow as its body uses it: it numbers its calls, and compares them with the records."""

from __future__ import annotations

import weakref
from asyncio.events import _get_running_loop
from contextvars import ContextVar
from sys import exception
from typing import NoReturn, TypeVar

from stroma.checkpoint.identity import quoted, with_outer
from stroma.contracts.node import FlowNode
from stroma.contracts.schema import schema_of
from stroma.engine.execution import CURRENT
from stroma.runner.flows.call import FlowCall, FlowScope
from stroma.runner.flows.driver import FlowDriver
from stroma.runner.flows.endings import FlowClosed, describe
from stroma.runner.flows.journal import encode_input, input_schema

#: The innermost flow around the code of a body, and around what it has begun. Weak: tasks of the body
#: reference it.
INNERMOST: ContextVar[weakref.ref[FlowPath] | None] = ContextVar("stroma_flow", default=None)


CallT = TypeVar("CallT", bound=FlowCall)


class FlowPath(FlowScope):
    """A flow as its body uses it: it numbers its calls. ``count``: their number so far."""

    def __init__(self, driver: FlowDriver, parent: FlowPath | None, node: FlowNode, branch: str) -> None:
        super().__init__(driver.ctx, parent, node, driver.position, branch)
        self.driver = driver
        if parent is None:
            driver.execution = self.execution
        self.count = self.random_count = self.sleep_count = 0
        self.keys: set[str] = set()

    def begin_call(self, what: str) -> None:
        """Check that a call may be made here."""
        driver = self.driver
        if _get_running_loop() is not driver.loop:
            self._refuse_call(what)
        if driver.closing or self.is_over:
            raise FlowClosed(
                f"{what} was called after flow {self.node.node_id!r} had ended, or while it is being stopped"
            )
        driver.called_at = driver.woken_by
        error = exception()
        if error is not None:
            driver.endings.note_handled(error, driver.woken_by)

    def _refuse_call(self, what: str) -> NoReturn:
        current = CURRENT.get()
        if self.driver.is_over:
            why = f"after flow {self.node.node_id!r} had ended; call it in the body of the flow"
        elif current is not None:
            why = f"inside node {current.node_id!r}; return the data, and make the call in the flow"
        else:
            why = "in another thread or event loop; call it in that of the flow"
        raise RuntimeError(f"{what} was called {why}")

    def identify(self, name: str, key: str | None, kind: str = "") -> str:
        """Return the identity of the next call: its number, or its key.

        ``name``: as :func:`quoted` returns it. Raises ValueError for a used key, TypeError for one that is
        not a string.
        """
        driver = self.driver
        if key is not None:
            if not isinstance(key, str):
                raise TypeError(f"key must be a string, got {key!r}")
            identity = f"{kind}#{quoted(key)}"
            if identity in self.keys:
                raise ValueError(
                    f"key={key!r} is used by two calls of flow {self.node.node_id!r}; use another for each"
                )
            self.keys.add(identity)
            return identity
        number = self.count
        self.count = number + 1
        identity = f"{kind}{name}#{number}"
        if driver.records.calls:
            recorded = driver.records.calls.get((self.branch, number))
            if recorded is not None and recorded.partition("@")[0] != identity:
                driver.stop_as_changed(
                    f"makes {describe(identity)} now, and {describe(recorded)} is recorded", self.node.node_id
                )
        return identity

    def prepare(self, call: CallT) -> CallT:
        """Give a call the identity and the input that it is recorded with."""
        driver = self.driver
        if driver.needs_input:
            call.input_key = encode_input(driver.ctx, call.node, call.state)
        if driver.is_recorded:
            self._find_identity(call)
        if len(driver.loop.tasks) > 1:  # The body may change it before the call begins.
            call.state = schema_of(type(call.state)).copy(call.state)
        return call

    def _find_identity(self, call: FlowCall) -> None:
        """Give a call another place, and so another idempotency key, if a loose output has its place."""
        records = self.driver.records
        identity, number, loose = call.identity, 1, records.loose
        if loose and call.input_key is not None:
            records.renew_keys(call.node.node_id, input_schema(self.driver.ctx, call.node, call.state))
        while (output := loose.get(call.branch)) is not None and call.is_other_than(output):
            number += 1
            call.name(f"{identity}@{number}")
        for branch in list(records.unknown) if type(call.node) is not FlowNode else ():
            if call.branch in with_outer(branch):
                node_id = records.unknown.pop(branch)
                if branch == call.branch and not (node_id == call.node.node_id and call.is_effect()):
                    self.driver.stop_as_changed(
                        f"makes {describe(branch)} of node {call.node.node_id!r} now, and the outcome of "
                        f"effect {node_id!r} there is unknown"
                    )
