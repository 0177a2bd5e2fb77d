"""Calls under a time limit: of the node, or the remaining budget of the run."""

from __future__ import annotations

import asyncio
import contextvars
import math
from functools import partial
from time import perf_counter_ns
from types import CoroutineType
from typing import Any

from pydantic import BaseModel

from stroma.contracts.node import Group, Node
from stroma.cost.budget import BudgetExceeded, is_set_for_run
from stroma.engine.config import limits_ms
from stroma.engine.context import Call, ReliabilityContext
from stroma.engine.execution import RunningNode
from stroma.hooks.dispatch import Started


class DeadlineExceeded(BudgetExceeded):
    """The latency budget was used up while a function was running."""

    def __init__(self, ctx: ReliabilityContext, limit: float, used: float, node_id: str) -> None:
        super().__init__("latency", limit, used, node_id, is_set_for_run(ctx.budget, "latency"))
        self.ctx = ctx  # of the run whose budget it was: a run inside the node has one of its own

    def __reduce__(self) -> Any:
        return (BudgetExceeded, (*self.args, self.is_set_for_run))


class IdleTimer:
    """Ends a scope that was not renewed for some time."""

    def __init__(self, scope: asyncio.Timeout, seconds: float) -> None:
        self._scope = scope
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self.is_over = False
        self.renew()
        self._wait()

    def renew(self) -> None:
        """Restart the time. Safe to call in any thread, and cheap: the timer itself is not moved."""
        self._renewed_at = self._loop.time()

    def cancel(self) -> None:
        """End the timer."""
        self._handle.cancel()

    def _wait(self) -> None:
        # An empty context: that of the caller would keep the run alive until the timer.
        self._handle = self._loop.call_at(
            self._renewed_at + self._seconds, self._check, context=contextvars.Context()
        )

    def _check(self) -> None:
        if self._renewed_at + self._seconds > self._loop.time():
            self._wait()
        elif not self._scope.expired():
            self.is_over = True
            self._scope.reschedule(self._loop.time())


async def call_in_time(run: RunningNode, node: Node | Group, call: Call, state: BaseModel, begin: int) -> Any:
    """Call under the time limits of the node and the latency deadline of the run.

    ``begin``: when the call began, in ns. Raises TimeoutError or DeadlineExceeded, besides what the function
        raises.
    """
    ctx, node_id = run.ctx, run.node_id
    limit = ctx.budget.max_latency_ms
    timeout_ms, idle_ms = limits_ms(ctx.step_timeouts.get(node_id))
    own = math.inf if timeout_ms is None else timeout_ms / 1000
    remaining = math.inf
    if limit is not None and not isinstance(node, Group):
        # The children of a group have the deadline themselves, each with an end of its own.
        used = ctx.cost_tracker.used("latency") + run.busy(begin) / 1e6
        remaining = (limit - used) / 1000
    seconds, loop = min(remaining, own), asyncio.get_running_loop()
    scope = asyncio.timeout_at(None if math.isinf(seconds) else loop.time() + max(0.0, seconds))
    awaitable: Any = None
    for interceptor in reversed(ctx.fire.interceptors):
        call = partial(interceptor.call, run, node, call)
    try:
        if idle_ms is not None:
            async with scope:
                run.idle_timer = IdleTimer(scope, idle_ms / 1000)
                awaitable = call(state)
                return await (Started(awaitable) if type(awaitable) is CoroutineType else awaitable)
        awaitable = call(state)
        if type(awaitable) is CoroutineType:
            # A function that never waits needs no timer: 3 us less of the 20 of a node under a budget.
            try:
                awaitable = Started(awaitable, awaitable.send(None))
            except StopIteration as ended:
                return ended.value
        async with scope:
            return await awaitable
    except TimeoutError:
        if not scope.expired():
            raise
        if run.idle_timer is not None and run.idle_timer.is_over:
            raise TimeoutError(
                f"node {node_id!r} emitted no event for {idle_ms} ms; raise idle_ms of "
                f"node_timeouts[{node_id!r}], or emit more often"
            ) from None
        if remaining < own:
            assert limit is not None
            now = perf_counter_ns()
            busy = run.busy(now) if run.parent else now - begin
            used = ctx.cost_tracker.used("latency") + busy / 1e6
            raise DeadlineExceeded(ctx, limit, max(used, limit), node_id) from None
        raise TimeoutError(
            f"node {node_id!r} did not end within {timeout_ms} ms; raise node_timeouts[{node_id!r}], or "
            "make the call shorter"
        ) from None
    finally:
        if run.idle_timer is not None:
            run.idle_timer.cancel()
            run.idle_timer = None
        # This frame is in the traceback of what is raised: as in NodeAttempt.make().
        del run, call, awaitable
