"""Steps of agents in a flow: a framework's operation is the work of a node, recorded as JSON data."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypedDict

from pydantic import BaseModel, ConfigDict, JsonValue
from pydantic_core import to_jsonable_python

from stroma.contracts.contract import NodeContract, NotDone, Role, Unknown
from stroma.contracts.node import stroma_node
from stroma.runner.flows.flow import Flow, current_flow

Work = Callable[[], Awaitable[Any]]
#: Of an idempotency key: the output of the call, NotDone or Unknown; async or not.
Reconcile = Callable[[str], Any]


class ToolOptions(TypedDict, total=False):
    """Options of a tool whose calls are steps.

    effect: the tool must not be called twice blindly, see :class:`NodeContract`.
    reconcile: function, async or not, of the tool's arguments and the idempotency key: what the tool
        returned, NotDone or Unknown.
    """

    effect: bool
    reconcile: Callable[[dict[str, Any], str], Any]


class ToolApproval(BaseModel):
    """Answer to the question if a tool may be called. ``message``: what the model gets of a refusal."""

    approved: bool
    message: str = "The tool call was denied."
    #: In place of the model's arguments.
    arguments: dict[str, JsonValue] | None = None


class ModelCall(BaseModel):
    """A request to a model: how many messages came before, and the newest ones, without ids and times."""

    earlier: int
    parts: list[dict[str, JsonValue]]


class ToolCall(BaseModel):
    """A call of a tool."""

    tool: str
    arguments: dict[str, JsonValue]


class OtherCall(BaseModel):
    """Any other operation: discovery of tools, say."""

    operation: str


class OperationResult(BaseModel):
    """Result of an operation, as the framework encodes it."""

    value: JsonValue = None


class ToolResult(BaseModel):
    """Result of a tool, as the framework encodes it. ``kind``: "tool_return", or another request."""

    model_config = ConfigDict(extra="allow")

    kind: str = "tool_return"
    result: JsonValue  # Required: a person who states that the call happened has to state it too.


def check_options(owner: str, options: Any, known: type = ToolOptions) -> None:
    """Raise TypeError for options that are neither False nor those of the TypedDict ``known``."""
    names = known.__annotations__
    unknown = [] if options is False else sorted(set(options) - set(names))
    if unknown:
        raise TypeError(f"{owner} has unknown options {unknown}; pass {' or '.join(names)}, or False")


class _Call(NamedTuple):
    work: Work
    reconcile: Reconcile | None


#: The call that the step around this code makes.
_AT_WORK: Final[ContextVar[_Call]] = ContextVar("stroma_agent_step")


@lru_cache(maxsize=10_000)
def work_node(
    node_id: str,
    schemas: tuple[type[BaseModel], type[BaseModel]],
    *,
    role: Role | None = None,
    effect: bool = False,
    reconciles: bool = False,
) -> Any:
    """Return a node whose work comes with each call: the same one for the same arguments."""
    contract: NodeContract[Any, Any] = NodeContract(
        node_id=node_id,
        input_schema=schemas[0],
        output_schema=schemas[1],
        role=role,
        effect=effect,
        reconcile=_reconcile if reconciles else None,
    )
    return stroma_node(node_id, contract)(_perform)


async def perform_step(
    flow: Flow, node: Any, state: BaseModel, work: Work, reconcile: Reconcile | None = None
) -> Any:
    """Perform work as the step of a work node and return its recorded output.

    ``state``: what the step is recorded with: the same on replay, which ids and times that the body made are
        not.
    """
    token = _AT_WORK.set(_Call(work, reconcile))
    try:
        return await flow.step(node, state)
    finally:
        _AT_WORK.reset(token)


async def _perform(_: Any) -> Any:
    return await _AT_WORK.get().work()


async def _reconcile(_: Any, key: str) -> Any:
    reconcile = _AT_WORK.get().reconcile
    assert reconcile is not None
    answer = reconcile(key)
    return await answer if inspect.isawaitable(answer) else answer


def is_in_step() -> bool:
    """Return True for code that is the work of a step of an agent."""
    return _AT_WORK.get(None) is not None and current_flow() is None


async def agent_step(
    flow: Flow, node_id: str, state: BaseModel, work: Work, options: ToolOptions | None = None
) -> Any:
    """Perform work as a step of an agent. Return its recorded result; of a tool, the fields of a ToolResult.

    ``options``: of a call of a tool; its other operations, such as a check of its arguments, have none.
    """
    tool = state if isinstance(state, ToolCall) else None
    options = {} if tool is None or options is None else options

    async def perform() -> Any:
        result = await work()
        return {"value": result} if tool is None else {"result": None, **result}

    async def reconcile(key: str) -> Any:
        assert tool is not None
        assert "reconcile" in options
        answer = options["reconcile"](tool.arguments, key)
        if inspect.isawaitable(answer):
            answer = await answer
        is_unmade = isinstance(answer, (NotDone, Unknown))
        return answer if is_unmade else {"result": to_jsonable_python(answer)}

    node = work_node(
        node_id,
        (type(state), OperationResult if tool is None else ToolResult),
        role="tool" if type(state) is ToolCall else None,
        effect=options.get("effect", False),
        reconciles="reconcile" in options,
    )
    output = await perform_step(flow, node, state, perform, reconcile)
    return output.value if tool is None else output.model_dump()


async def ask_approval(flow: Flow, tool: str | None, arguments: str | None) -> ToolApproval:
    """Ask if a tool may be called, as a question of the flow. ``arguments``: as JSON."""
    return await flow.wait_for(ToolApproval, reason=f"approval of {tool}({arguments})")
