"""Single steps, for code that has its own loop: the same engine without a pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial, update_wrapper
from textwrap import shorten
from typing import Any

from pydantic import BaseModel, ValidationError

from stroma._engine import Halt, execute
from stroma._redeliver import redeliver
from stroma._sequence import check_owners
from stroma.checkpoint import PipelineChanged, StepCall
from stroma.context import ReliabilityContext
from stroma.contracts import NodeContract
from stroma.hooks import HookNotAsync
from stroma.nodes import Group, Kept, find_node, make_node
from stroma.schemas import NotSerialisable, schema_of
from stroma.trace import ExecutionResult, RunStatus

__all__ = ["ReliabilityContext", "StromaStep", "execute_step"]


async def execute_step(
    step_id: str,
    func: Callable[..., Awaitable[Any]],
    input_state: BaseModel,
    ctx: ReliabilityContext,
    *,
    contract: NodeContract[Any, Any] | None = None,
) -> ExecutionResult:
    """Run one function as a step of a context; the result has the totals and trace of the whole context so far.

    ``contract`` wins over the registry's, that over the marker's. Without any, nothing is refused: output that fits
    the input's class becomes it, other output is kept as it was returned. Each call is a position of its own. Under
    ``resume=True`` the n-th call of a step id gives the output that is recorded for it, without calling the function.
    ``async with ctx:`` around the steps holds the run against others, notes in the journal how it ended, and makes the
    hooks hear of its start and end.

    Raises ValueError for a node whose id was given to another function with another contract since, PipelineChanged if
    that call was recorded for another input; inputs that have no stored form are not compared.
    """
    if not isinstance(input_state, BaseModel):
        raise TypeError(
            f"the input of step {step_id!r} must be a pydantic model, not {type(input_state).__name__}"
        )
    await ctx.open(input_state, ends=ctx.ends)
    if ctx.ends or ctx.delivers:
        await ctx.begin(partial(_begin, ctx, input_state))
    position, number = ctx.next_step(step_id)
    call = StepCall(number, _encoded(input_state))
    kept = ctx.restored.get((position, ""))
    if kept is not None and kept.step is not None and kept.step.given not in (None, call.given):
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot go on: call {number + 1} of step {step_id!r} was recorded with the input "
            f"{_short(kept.step.given)}, and now gets {_short(call.given)}; give it the same one, or begin a new run"
        )
    marked = getattr(func, "_stroma_contract", None)
    node = find_node(func) if isinstance(func, Group) else make_node(step_id, func, marked)
    if contract is None and getattr(func, "_stroma_node_id", None) == step_id:
        check_owners((node,), ctx.registry)
    task = asyncio.current_task()
    cancelling = task.cancelling() if task is not None else 0
    try:
        outcome = await execute(
            ctx, node, input_state, position, contract=contract, step=call, cancelling=cancelling
        )
    except HookNotAsync as error:
        error.result = ctx.build_result(RunStatus.INTERRUPTED, input_state)
        raise
    ctx.step_status, ctx.step_failure = RunStatus.COMPLETED, None
    if isinstance(outcome, Halt):
        ctx.step_status, ctx.step_failure = outcome.status, None if outcome.suspended else outcome.failure
    if isinstance(outcome, Halt) and outcome.suspended:
        result = ctx.build_result(RunStatus.SUSPENDED, input_state)
    elif isinstance(outcome, Halt):
        state = outcome.output if outcome.output is not None else input_state
        result = ctx.build_result(outcome.status, _as_returned(state, input_state), outcome.failure)
    else:
        result = ctx.build_result(RunStatus.COMPLETED, _as_returned(outcome, input_state))
    for probe in ctx.probes:
        probe.ended(ctx, result)
    return result


async def _begin(ctx: ReliabilityContext, initial: BaseModel) -> None:
    if ctx.ends:
        await ctx.tell_start(initial)
    if ctx.delivers:
        await redeliver(ctx, ())


def _encoded(state: BaseModel) -> bytes | None:
    try:
        return schema_of(type(state)).encode(state)
    except NotSerialisable:
        return None


def _short(given: bytes | None) -> str:
    return "one without a stored form" if given is None else shorten(given.decode(), 200, placeholder=" ...")


def _as_returned(state: BaseModel, given: BaseModel) -> Any:
    if not isinstance(state, Kept):
        return state
    if isinstance(state.root, dict):
        try:
            return schema_of(type(given)).validate(state.root)
        except ValidationError:
            pass
    return state.root


class StromaStep:
    """Wraps functions as steps of one context.

    ::

        step = StromaStep(ctx)

        @step("search", input=Query, output=Hits)
        async def search(state: Query) -> dict: ...

        result = await search(Query(text="..."))     # an ExecutionResult
    """

    def __init__(self, ctx: ReliabilityContext) -> None:
        self.ctx = ctx

    def wrap(
        self, step_id: str, func: Callable[..., Any], *, contract: NodeContract[Any, Any] | None = None
    ) -> Callable[..., Awaitable[ExecutionResult]]:
        """The function as a step: a call with the input state gives the ExecutionResult. Carries the markers."""

        async def step(state: BaseModel) -> ExecutionResult:
            return await execute_step(step_id, func, state, self.ctx, contract=contract)

        update_wrapper(step, func, updated=())
        carried = contract or getattr(func, "_stroma_contract", None)
        step.__dict__.update(_stroma_node_id=step_id, _stroma_contract=carried)
        return step

    def __call__(
        self, step_id: str, *, input: type[BaseModel], output: type[BaseModel]
    ) -> Callable[[Callable[..., Any]], Callable[..., Awaitable[ExecutionResult]]]:
        """Decorate a function as a step and register its contract with the context."""
        contract: NodeContract[Any, Any] = NodeContract(
            node_id=step_id, input_schema=input, output_schema=output
        )
        self.ctx.registry.register(contract)

        def decorate(func: Callable[..., Any]) -> Callable[..., Awaitable[ExecutionResult]]:
            return self.wrap(step_id, func, contract=contract)

        return decorate
