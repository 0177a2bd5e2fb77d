"""Single steps for code with its own control flow: the same engine without a pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial, update_wrapper
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from stroma.checkpoint import CheckpointLost, Fenced, PipelineChanged, StepCall, inside_of
from stroma.checkpoint.entries import INSIDE
from stroma.checkpoint.identity import SCOPE, Identity, StepCalls, is_called
from stroma.contracts.codec import describe_difference
from stroma.contracts.contract import NodeContract
from stroma.contracts.node import Group, Node, find_node, make_node
from stroma.contracts.schema import Schema, has_secrets, schema_of
from stroma.contracts.untyped import UntypedState
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import CURRENT, RunningNode
from stroma.engine.lifecycle import announce_start, heed_requests, open_run
from stroma.engine.loop import execute
from stroma.engine.outcome import Halt, Place, cancelled
from stroma.engine.restore import redeliver
from stroma.failures.errors import RunCancelled
from stroma.failures.failure import Failure
from stroma.hooks.dispatch import HookNotAsync
from stroma.runner.flows.body_loop import refuse_in_body
from stroma.runner.map import branches_in, is_apart
from stroma.runner.pipeline import check_state, require_runnable
from stroma.trace.result import ExecutionResult, RunStatus


async def execute_step(
    step_id: str,
    func: Callable[..., Awaitable[Any]],
    input_state: BaseModel,
    ctx: ReliabilityContext,
    *,
    contract: NodeContract[Any, Any] | None = None,
) -> ExecutionResult:
    """Run one function as a step of a context. The result has the totals and trace of the whole context.

    ``contract`` takes precedence over the registry's, and that over the function's own. Without any, output
    that fits the input's class is converted to it, and other output is returned as it is. Each call in plain
    code has its own position; in a node of the same run, with ``current_run()`` as the context, it is a child
    of that node: no node of the pipeline takes its place, nor it theirs. ``async with ctx:`` around the steps
    leases the run, stores how it ended, and calls the hooks of its start and end. A ``cancel()`` of that run
    lets the current step finish, without another attempt; the next one is not called, and its result is
    CANCELLED with a RunCancelled. In new code, write a flow: it resumes with its own decisions.

    Under ``resume=True`` a call returns the output that is recorded for it, without calling the function:

    - A step is known by the asyncio task that calls it, its id, and which call of that id it is in the task.
      Tasks are numbered by their first call. So steps under ``gather`` or a ``TaskGroup`` are found again,
      with the same idempotency key, whatever order they finish in. The order of the first calls must be the
      same: call a step before you wait for anything else.
    - The input must be the recorded one; inputs that have no stored form are not compared. Inside a node,
      another input fails the node as TERMINAL, reason "changed". A group that did not end is compared as a
      whole before anything of it is called.
    - Another attempt of a node calls its steps again. A resume continues each attempt with what the attempt
      of that number recorded.
    - A step that failed is called again on resume, with whatever input it gets then.
    - Steps of an agent framework follow the rules of its adapter.

    Raises ValueError for a node whose id was later assigned to another function with another contract,
    PipelineChanged for another input, RuntimeError in a pipeline outside of its nodes, as in a task that its
    node does not await, NotImplementedError in the body of a flow.
    """
    refuse_in_body("execute_step()", "await flow.step(node, state)")
    check_state(f"the input of step {step_id!r}", input_state)
    node = _node_of(step_id, func, ctx, contract)
    parent = CURRENT.get()
    if parent is not None and (parent.ctx is not ctx or parent.ended is not None):
        parent = None  # It is of another run, or this is a task that its node has not awaited.
    if parent is not None:
        calls = parent.calls
    else:
        calls = ctx.plain_steps.calls = ctx.plain_steps.calls or StepCalls()
    # Before anything is awaited, so that the identity depends on the order of calls alone.
    scope = calls.scope()
    identity = calls.next(scope, step_id)
    await open_run(ctx, input_state, ends=ctx.plain_steps.has_end)
    if parent is None and (ctx.plain_steps.has_end or ctx.fire.delivers):
        await ctx.plain_steps.begin(partial(_start_run, ctx, input_state))
    position, branch, call = _place_of(ctx, parent, identity, input_state)
    restored = await _restore_inside_item(ctx, node, position, branch)
    _check_input(ctx, node, identity, call, (position, branch), schema_of(type(input_state)))
    task = asyncio.current_task()
    cancelling = task.cancelling() if task is not None else 0
    try:
        outcome: BaseModel | Halt
        is_restored = (position, branch) in ctx.journal.restored
        if ctx.stopping.is_cancelled and not is_restored:
            outcome = cancelled(ctx, step_id)
        elif ctx.plain_steps.fenced is not None and not is_restored:
            outcome = Halt(replace(ctx.plain_steps.fenced, node_id=step_id), partial=True)
        else:
            place = Place(
                position, branch, parent=parent, contract=contract, step=call, cancelling=cancelling
            )
            outcome = await execute(ctx, node, input_state, place)
    except HookNotAsync as error:
        error.result = ctx.build_result(RunStatus.INTERRUPTED, input_state)
        raise
    finally:
        SCOPE.set(scope)  # Steps inside this one have set their own scopes.
        for at in restored:
            cast("dict[Any, Any]", ctx.journal.restored).pop(at, None)
    if isinstance(outcome, Halt) and isinstance(outcome.failure.exception, Fenced | CheckpointLost):
        ctx.plain_steps.fenced = outcome.failure
    status, state, failure = _end_of(outcome, input_state)
    if parent is None:  # For the end of the run of plain code.
        ctx.plain_steps.status, ctx.plain_steps.failure = status, failure
    result = ctx.build_result(status, state, failure)
    for interceptor in ctx.fire.interceptors:
        interceptor.ended(ctx, result)
    return result


def _node_of(
    step_id: str, func: Any, ctx: ReliabilityContext, contract: NodeContract[Any, Any] | None
) -> Node | Group:
    """Return the record of a step's function. Raises ValueError if another one has its id."""
    marked = getattr(func, "_stroma_contract", None)
    node = find_node(func) if isinstance(func, Group) else make_node(step_id, func, marked)
    if contract is None and getattr(func, "_stroma_node_id", None) == step_id:
        require_runnable((node,), ctx.registry)
    return node


def _place_of(
    ctx: ReliabilityContext, parent: RunningNode | None, identity: Identity, input_state: BaseModel
) -> tuple[int, str, StepCall]:
    """Return the position, the branch and the record of a call."""
    if parent is None:
        call = StepCall(identity.number, _encoded(ctx, input_state), identity.text)
        return ctx.place_of(identity.text), "", call
    call = StepCall(identity.number, _encoded(ctx, input_state))
    return parent.position, parent.branch_of(identity.text), call


def _end_of(outcome: BaseModel | Halt, input_state: BaseModel) -> tuple[RunStatus, Any, Failure | None]:
    """Return the status, the state and the failure of a result."""
    if not isinstance(outcome, Halt):
        return RunStatus.COMPLETED, _as_returned(outcome, input_state), None
    if outcome.suspended:
        return RunStatus.SUSPENDED, input_state, None
    is_cancelled = isinstance(outcome.failure.exception, RunCancelled)
    state = input_state if outcome.output is None else outcome.output
    status = RunStatus.CANCELLED if is_cancelled else outcome.status
    return status, _as_returned(state, input_state), outcome.failure


async def _restore_inside_item(
    ctx: ReliabilityContext, node: Node | Group, position: int, branch: str
) -> list[tuple[int, str]]:
    """Load the committed outputs of a step inside an item of a map that restores its items a few at a time.

    Returns their places; the caller removes them afterwards, as there may be very many such items.
    """
    if not (ctx.session.continued and is_apart(ctx, position, branch)):
        return []
    inside = branches_in(node) if isinstance(node, Group) else []
    pending = ctx.session.committed(position, [branch, *(f"{branch}.{rest}" for rest in inside)])
    committed = pending if isinstance(pending, Mapping) else await pending
    # The map around this step has replaced ctx.journal.restored by a dict of its own.
    cast("dict[Any, Any]", ctx.journal.restored).update(
        {(position, at): commit for at, commit in committed.items()}
    )
    return [(position, at) for at in committed]


def _check_input(
    ctx: ReliabilityContext,
    node: Node | Group,
    identity: Identity,
    call: StepCall,
    at: tuple[int, str],
    schema: Schema,
) -> None:
    """Raise PipelineChanged if the recorded output of a call is of another input."""
    if call.input_key is None or not ctx.journal.restored:
        return
    committed = ctx.journal.restored.get(at)
    if committed is not None:
        recorded = None if committed.step is None else committed.step.input_key
        if recorded in (None, call.input_key) or schema.renew_key(recorded) == call.input_key:
            return
        difference = describe_difference(recorded, call.input_key)
    elif not isinstance(node, Group):
        return
    else:
        # A group that did not end: the rows inside it have a checksum of the group's input.
        mark = inside_of(call)
        if mark is None or all(other == mark.input_key for other in _checksums_inside(ctx, *at)):
            return
        recorded, difference = None, "another input"
    where = f" in task {identity.path}" if identity.path else ""
    error = PipelineChanged(
        f"run {ctx.run_id!r} cannot be resumed: call {identity.number + 1} of step {node.node_id!r}{where} "
        f"was recorded with {difference}; pass the same input, or start a new run"
    )
    error.inputs = None if recorded is None else (recorded, call.input_key)
    raise error


def _checksums_inside(ctx: ReliabilityContext, position: int, branch: str) -> Iterator[bytes]:
    """Yield the checksums of inputs recorded inside a group that is a step, without steps called there."""
    prefix = f"{branch}." if branch else ""
    for (at, inner), committed in ctx.journal.restored.items():
        if at != position or not inner.startswith(prefix) or is_called(inner[len(prefix) :]):
            continue
        checksum = None if committed.step is None else committed.step.input_key
        if checksum is not None and checksum.startswith(INSIDE):
            yield checksum


async def _start_run(ctx: ReliabilityContext, initial: BaseModel) -> None:
    if ctx.plain_steps.has_end:
        heed_requests(ctx)
        await announce_start(ctx, initial)
    if ctx.fire.delivers:
        await redeliver(ctx, ())


def _encoded(ctx: ReliabilityContext, state: BaseModel) -> bytes | None:
    """Return what an input is compared by; None without a stored form, or with secrets and no codec."""
    is_sealed = ctx.session.stores_secrets
    key = schema_of(type(state)).input_key(state, is_sealed=is_sealed)
    return None if key is None or (has_secrets(key) and not is_sealed) else key


def _as_returned(state: BaseModel, input_state: BaseModel) -> Any:
    if not isinstance(state, UntypedState):
        return state
    if isinstance(state.root, dict):
        try:
            return schema_of(type(input_state)).validate(state.root)
        except ValidationError:
            pass
    return state.root


class StromaStep:
    """Wraps functions as steps of one context.

    ```python
    step = StromaStep(ctx)

    @step("search", input=Query, output=Hits)
    async def search(state: Query) -> dict: ...

    result = await search(Query(text="..."))     # an ExecutionResult
    ```
    """

    def __init__(self, ctx: ReliabilityContext) -> None:
        self.ctx = ctx

    def wrap(
        self, step_id: str, func: Callable[..., Any], *, contract: NodeContract[Any, Any] | None = None
    ) -> Callable[..., Awaitable[ExecutionResult]]:
        """Return a coroutine function that runs the function as a step and returns its ExecutionResult."""

        async def step(state: BaseModel) -> ExecutionResult:
            return await execute_step(step_id, func, state, self.ctx, contract=contract)

        update_wrapper(step, func, updated=())
        contract_or_own = contract or getattr(func, "_stroma_contract", None)
        step.__dict__.update(_stroma_node_id=step_id, _stroma_contract=contract_or_own)
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
