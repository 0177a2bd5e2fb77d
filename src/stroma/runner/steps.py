"""Single steps, for code that has its own loop: the same engine without a pipeline."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial, update_wrapper
from textwrap import shorten
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from stroma.checkpoint import PipelineChanged, StepCall, inside_of
from stroma.checkpoint.identity import SCOPE, Identity, StepCalls, is_called
from stroma.checkpoint.protocols import INSIDE
from stroma.contracts.contract import NodeContract
from stroma.contracts.node import Group, Node, find_node, make_node
from stroma.contracts.schema import schema_of
from stroma.contracts.tagged_json import NotSerialisable
from stroma.contracts.untyped import Kept
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import current_node
from stroma.engine.loop import execute
from stroma.engine.outcome import Halt, Place
from stroma.engine.redelivery import redeliver
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RunCancelled
from stroma.failures.failure import Failure
from stroma.hooks.dispatch import HookNotAsync
from stroma.runner.map import branches_in
from stroma.runner.sequence import check_owners
from stroma.trace.result import ExecutionResult, RunStatus

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
    the input's class becomes it, other output is kept as it was returned. Each call in plain code is a position of its own;
    in a node of the same run, with ``current_run()`` as the context, it is a child of that node. Under ``resume=True`` the
    n-th call of a step id in an asyncio task gives the output that is recorded for it, without calling the function; another
    attempt of a node calls its steps again. ``async with ctx:`` around the steps holds the run against others, notes in the
    journal how it ended, and makes the hooks hear of its start and end. A ``cancel()`` of that run lets the step that is under
    way finish, without another attempt; the next one is not called, and its result is CANCELLED with a RunCancelled.

    Raises ValueError for a node whose id was given to another function with another contract since. Raises PipelineChanged if
    that, or a part of a group, was recorded for another input; inputs that have no stored form are not compared. Raises
    RuntimeError in a pipeline outside of its nodes.
    """
    if not isinstance(input_state, BaseModel):
        raise TypeError(
            f"the input of step {step_id!r} must be a pydantic model, not {type(input_state).__name__}"
        )
    marked = getattr(func, "_stroma_contract", None)
    node = find_node(func) if isinstance(func, Group) else make_node(step_id, func, marked)
    if contract is None and getattr(func, "_stroma_node_id", None) == step_id:
        check_owners((node,), ctx.registry)
    parent = current_node()
    if parent is not None and parent.ctx is not ctx:
        parent = None
    if parent is not None:
        calls = parent.calls
    else:
        calls = ctx.plain_steps.calls = ctx.plain_steps.calls or StepCalls()
    # Before anything is awaited: which call it is depends on the order of the calls alone.
    scope = calls.scope()
    identity = calls.next(scope, step_id)
    await ctx.open(input_state, ends=ctx.plain_steps.has_end)
    if parent is None:
        if ctx.plain_steps.has_end or ctx.delivers:
            await ctx.plain_steps.begin(partial(_begin, ctx, input_state))
        position, branch = ctx.place_of(identity.text), ""
        call = StepCall(identity.number, _encoded(input_state), identity.text)
    else:
        position, branch = parent.position, parent.branch_of(identity.text)
        call = StepCall(identity.number, _encoded(input_state))
    apart = await _look_up(ctx, node, position, branch)
    _compare(ctx, node, identity, call, position, branch)
    task = asyncio.current_task()
    cancelling = task.cancelling() if task is not None else 0
    try:
        if ctx.cancelled and (position, branch) not in ctx.restored:
            outcome: BaseModel | Halt = _not_called(ctx, step_id)
        else:
            place = Place(
                position, branch, parent=parent, contract=contract, step=call, cancelling=cancelling
            )
            outcome = await execute(ctx, node, input_state, place)
    except HookNotAsync as error:
        error.result = ctx.build_result(RunStatus.INTERRUPTED, input_state)
        raise
    finally:
        SCOPE.set(scope)  # Steps inside of this one have had scopes of their own.
        for at in apart:
            cast("dict[Any, Any]", ctx.restored).pop(at, None)
    if parent is None:
        ctx.plain_steps.status, ctx.plain_steps.failure = RunStatus.COMPLETED, None
        if isinstance(outcome, Halt):
            ctx.plain_steps.status, ctx.plain_steps.failure = (
                _status_of(outcome),
                None if outcome.suspended else outcome.failure,
            )
    if isinstance(outcome, Halt) and outcome.suspended:
        result = ctx.build_result(RunStatus.SUSPENDED, input_state)
    elif isinstance(outcome, Halt):
        state = outcome.output if outcome.output is not None else input_state
        result = ctx.build_result(_status_of(outcome), _as_returned(state, input_state), outcome.failure)
    else:
        result = ctx.build_result(RunStatus.COMPLETED, _as_returned(outcome, input_state))
    for probe in ctx.probes:
        probe.ended(ctx, result)
    return result


async def _look_up(
    ctx: ReliabilityContext, node: Node | Group, position: int, branch: str
) -> list[tuple[int, str]]:
    """Restore what the journal has of a step inside of an item of a map whose items are not restored at once.

    Returns the places of that, to be forgotten again: there may be very many such items.
    """
    if not (ctx.apart and branch and ctx.session.continued):
        return []
    if not any(position == at and branch.startswith(beginning) for at, beginning in ctx.apart):
        return []
    inside = branches_in(node) if isinstance(node, Group) else []
    found = ctx.session.committed(position, [branch, *(f"{branch}.{rest}" for rest in inside)])
    kept = found if isinstance(found, Mapping) else await found
    # The map around it has made the mapping its own.
    cast("dict[Any, Any]", ctx.restored).update({(position, at): commit for at, commit in kept.items()})
    return [(position, at) for at in kept]


def _compare(
    ctx: ReliabilityContext,
    node: Node | Group,
    identity: Identity,
    call: StepCall,
    position: int,
    branch: str,
) -> None:
    """Raise PipelineChanged if what would be restored of a call was recorded for another input."""
    if call.given is None or not ctx.restored:
        return
    kept = ctx.restored.get((position, branch))
    if kept is not None:
        recorded = None if kept.step is None else kept.step.given
        if recorded in (None, call.given):
            return
        was, now = f"the input {_short(recorded)}", _short(call.given)
    elif not isinstance(node, Group):
        return
    else:
        # A group that did not end: what is inside of it knows what the whole was called with.
        mark = inside_of(call)
        if mark is None or all(other == mark.given for other in _marks_inside(ctx, position, branch)):
            return
        was, now = "another input", _short(call.given)
    where = f" in task {identity.path}" if identity.path else ""
    raise PipelineChanged(
        f"run {ctx.run_id!r} cannot go on: call {identity.number + 1} of step {node.node_id!r}{where} was recorded with {was}, and "
        f"now gets {now}; give it the same one, or begin a new run"
    )


def _marks_inside(ctx: ReliabilityContext, position: int, branch: str) -> Iterator[bytes]:
    """The checksums of inputs that are recorded inside of a group that is a step, but not inside of steps called there."""
    beginning = f"{branch}." if branch else ""
    for (at, inner), kept in ctx.restored.items():
        if at != position or not inner.startswith(beginning) or is_called(inner[len(beginning) :]):
            continue
        given = None if kept.step is None else kept.step.given
        if given is not None and given.startswith(INSIDE):
            yield given


def _not_called(ctx: ReliabilityContext, step_id: str) -> Halt:
    """Return the end of a step of a run that somebody has cancelled since it was opened."""
    error = RunCancelled(
        f"run {ctx.run_id!r} was cancelled; step {step_id!r} is not called: resume the run, or call it in a run of its own"
    )
    return Halt(Failure(error, FailureClass.TERMINAL, step_id, 1, str(error)))


def _status_of(halt: Halt) -> RunStatus:
    return RunStatus.CANCELLED if isinstance(halt.failure.exception, RunCancelled) else halt.status


def _note_cancel(reference: weakref.ref[ReliabilityContext]) -> None:
    ctx = reference()
    if ctx is not None:
        ctx.cancelled = True


async def _begin(ctx: ReliabilityContext, initial: BaseModel) -> None:
    if ctx.plain_steps.has_end:
        # By a weak reference: no context may wait for the garbage collector.
        ctx.session.on_cancel = partial(_note_cancel, weakref.ref(ctx))
        await ctx.announce_start(initial)
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
