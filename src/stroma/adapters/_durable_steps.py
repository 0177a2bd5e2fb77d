"""Steps of agents in a flow: a framework's operation is the work of a node, recorded as JSON data."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict, JsonValue
from pydantic_core import to_jsonable_python

from stroma.contracts.contract import NodeContract
from stroma.contracts.effects import NotDone, Unknown
from stroma.contracts.node import stroma_node
from stroma.runner.flows.flow import Flow, current_flow

__all__ = [
    "AgentSteps",
    "ModelCall",
    "OtherCall",
    "ToolApproval",
    "ToolCall",
    "ToolOptions",
    "ask_approval",
    "check_options",
    "is_in_step",
]

Work = Callable[[], Awaitable[Any]]


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
    result: JsonValue = None


def check_options(tool: str, options: Any, where: str) -> None:
    """Raise TypeError for options of a tool that are neither False nor a ToolOptions."""
    unknown = [] if options is False else sorted(set(options) - set(ToolOptions.__annotations__))
    if unknown:
        raise TypeError(
            f"tool {tool!r} has unknown options {unknown} in {where}; pass "
            f"{' or '.join(ToolOptions.__annotations__)}, or False"
        )


class AgentSteps:
    """The steps of agents. Calls with one id share a node."""

    def __init__(self) -> None:
        self._nodes: dict[str, Any] = {}

    async def call(
        self, flow: Flow, node_id: str, state: BaseModel, work: Work, options: ToolOptions | None = None
    ) -> Any:
        """Perform work as a step and return its recorded result; of a tool, the fields of a ToolResult.

        ``state``: what the step is recorded with: the same on replay, which ids and times that the body made
            are not.
        """
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = _make_node(node_id, type(state), options or {})
        token = _AT_WORK.set((work, options or {}))
        try:
            output = await flow.step(node, state)
        finally:
            _AT_WORK.reset(token)
        return output.model_dump() if isinstance(output, ToolResult) else output.value


#: What the step around this code does, and its options.
_AT_WORK: ContextVar[tuple[Work, ToolOptions]] = ContextVar("stroma_agent_step")


def is_in_step() -> bool:
    """Return True for code that is the work of a step of an agent."""
    return _AT_WORK.get(None) is not None and current_flow() is None


async def ask_approval(flow: Flow, tool: str | None, arguments: str | None) -> ToolApproval:
    """Ask if a tool may be called, as a question of the flow. ``arguments``: as JSON."""
    return await flow.wait_for(ToolApproval, reason=f"approval of {tool}({arguments})")


def _make_node(node_id: str, input_schema: type[BaseModel], options: ToolOptions) -> Any:
    is_tool = issubclass(input_schema, ToolCall)
    contract: NodeContract[Any, Any] = NodeContract(
        node_id=node_id,
        input_schema=input_schema,
        output_schema=ToolResult if is_tool else OperationResult,
        role="tool" if input_schema is ToolCall else None,
        effect=options.get("effect", False),
        reconcile=_reconcile if "reconcile" in options else None,
    )

    async def perform(_: Any) -> Any:
        result = await _AT_WORK.get()[0]()
        return result if is_tool else {"value": result}

    return stroma_node(node_id, contract)(perform)


async def _reconcile(call: ToolCall, key: str) -> Any:
    options = _AT_WORK.get()[1]
    assert "reconcile" in options
    answer = options["reconcile"](call.arguments, key)
    if inspect.isawaitable(answer):
        answer = await answer
    return answer if isinstance(answer, (NotDone, Unknown)) else {"result": to_jsonable_python(answer)}
