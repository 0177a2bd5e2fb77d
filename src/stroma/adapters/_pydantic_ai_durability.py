"""Pydantic AI in a flow: each model request and each call of a tool is a step of the flow around the agent.

Built on ``pydantic_ai.durable_exec``, the framework's interface for durable engines.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar, Final, Literal, cast

try:
    from pydantic_ai.capabilities import AbstractCapability
    from pydantic_ai.durable_exec import (
        JSON_CODEC,
        BaseDurabilityCapability,
        CapabilityOperationId,
        DurabilityEngineSpec,
        DurableOperation,
        DurableOperationBackend,
        DurableOperationId,
        DynamicToolsetCallToolParams,
        EventStreamHandlerId,
        ModelCancelSuspendedResponseId,
        ModelCompactMessagesId,
        ModelRequestId,
        ModelRequestParams,
        ToolsetCallToolId,
        ToolsetCallToolParams,
        ToolsetGetInstructionsId,
        ToolsetGetToolsId,
        ToolsetValidateToolArgumentsId,
        conversation_id_from_run_id,
        durable_unit_scope,
    )

    _ = AbstractCapability.get_wrapper_model
except (ImportError, AttributeError) as error:
    raise ImportError("StromaDurability needs pydantic-ai-slim 2.64 or newer; upgrade it") from error

from pydantic import BaseModel, JsonValue
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelRequest
from pydantic_ai.models import infer_model
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.tools import DeferredToolResults, ToolApproved, ToolDenied
from pydantic_core import to_jsonable_python

from stroma.adapters._durable_steps import (
    ModelCall,
    OtherCall,
    ToolCall,
    ToolOptions,
    agent_step,
    ask_approval,
    check_options,
    is_in_step,
)
from stroma.adapters._pydantic_ai_responses import emitting, usage_of
from stroma.engine.execution import CURRENT, RunningNode, running_agent
from stroma.runner.flows.body_loop import BodyExecutor
from stroma.runner.flows.flow import Flow, current_flow
from stroma.telemetry.messages import note_request

#: Key of a tool's metadata.
_METADATA: Final = "stroma"


class ToolAnswer(BaseModel):
    """Answer in place of a tool that is called elsewhere: what the tool returned."""

    result: JsonValue


class StromaDurability(BaseDurabilityCapability[Any]):
    """Makes an agent durable in the body of a flow: ``Agent(..., capabilities=[StromaDurability()])``.

    There each model request is the step ``a.model`` and each call of a tool the step ``a.TOOL``, with
    everything that a step has; policies and timeouts go by these ids. Approvals and results of deferred tools
    are questions of the flow, answered with a ToolApproval or a ToolAnswer. Anywhere else the agent runs as
    it does without. Options of a tool: ToolOptions.

    Keywords: ``stream=True``, in a flow each answer is streamed in its step, which emits the text;
    ``models``, further models by the id with which a run selects one; ``event_stream_handler``, a function
    that receives the events of streamed answers and of tools; ``name``, in place of the agent's.
    """

    def __init__(self, *, stream: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._stream = stream

    engine_spec: ClassVar[DurabilityEngineSpec] = DurabilityEngineSpec(
        engine_name="Stroma",
        durable_unit_noun="step",
        durable_container_noun="flow",
        codec=JSON_CODEC,
        toolset_lifecycles={
            "function": "enter-always",
            "mcp": "enter-outside-durable",
            "dynamic": "enter-never",
        },
        # Their tools would run in the body without a record.
        unsupported_runtime_toolset_kinds=frozenset({"function", "mcp", "dynamic"}),
        tool_config_key=_METADATA,
    )

    @property
    def in_durable_context(self) -> bool:
        return current_flow() is not None

    def get_durable_operation_backend(self) -> DurableOperationBackend[Any]:
        return self._backend

    @cached_property
    def _backend(self) -> _Backend:
        return _Backend(self.name)

    def _bind_to_agent(self, agent: Any) -> None:
        self.__dict__.pop("_backend", None)  # A copy for each agent: their steps have its name.
        super()._bind_to_agent(agent)

    def get_default_run_id(self) -> str | None:
        flow = current_flow()
        return None if flow is None else str(flow.uuid())

    def get_default_conversation_id(self, run_id: str) -> str | None:
        return None if current_flow() is None else conversation_id_from_run_id(run_id)

    async def get_run_start_time(self, run_id: str) -> datetime | None:
        flow = current_flow()
        return None if flow is None else flow.now()

    async def wrap_run(self, ctx: Any, *, handler: Any) -> Any:
        """Run the agent; its plain functions that are not tools run in the body."""
        if current_flow() is None:
            return await super().wrap_run(ctx, handler=handler)
        with Agent.using_thread_executor(_EXECUTOR), running_agent(self.name):
            return await super().wrap_run(ctx, handler=handler)

    def get_wrapper_model(self, model: Any) -> Any:
        """Have the step of a request report its usage."""
        return _StepModel(model) if is_in_step() else None

    @property
    def has_wrap_run_event_stream(self) -> bool:
        return super().has_wrap_run_event_stream or (self._stream and self.in_durable_context)

    def _model_stream_event_handler(self) -> Any:
        """Return what reads a streamed answer in its step: it emits the text and calls the user's handler."""
        handler = super()._model_stream_event_handler()

        async def read(ctx: Any, events: AsyncIterable[Any]) -> None:
            events = emitting(aiter(events), _node())
            if handler is not None:
                await handler(ctx, events)
            async for _ in events:  # What the handler has not read.
                pass

        return read

    async def handle_deferred_tool_calls(self, ctx: Any, *, requests: Any) -> DeferredToolResults | None:
        """Ask for approvals, and for results of tools that are called elsewhere, as questions of the flow."""
        flow = current_flow()
        if flow is None:
            return None
        approvals, calls = await asyncio.gather(
            asyncio.gather(*(_ask_approval(flow, call) for call in requests.approvals)),
            asyncio.gather(*(_ask_result(flow, call) for call in requests.calls)),
        )
        return DeferredToolResults(calls=dict(calls), approvals=dict(approvals))


_EXECUTOR: Final = BodyExecutor()


async def _ask_approval(flow: Flow, call: Any) -> tuple[str, ToolApproved | ToolDenied]:
    answer = await ask_approval(flow, call.tool_name, call.args_as_json_str())
    if answer.approved:
        return call.tool_call_id, ToolApproved(override_args=cast("dict[str, Any] | None", answer.arguments))
    return call.tool_call_id, ToolDenied(answer.message)


async def _ask_result(flow: Flow, call: Any) -> tuple[str, Any]:
    reason = f"result of {call.tool_name}({call.args_as_json_str()})"
    return call.tool_call_id, (await flow.wait_for(ToolAnswer, reason=reason)).result


class _Backend(DurableOperationBackend[ToolOptions]):
    """Turns operations of an agent into steps."""

    def __init__(self, agent: str) -> None:
        self.agent = agent

    def bind(self, operation: DurableOperation[Any, Any, Any]) -> Any:
        return _Step(operation, self)

    def registrations(self) -> Sequence[Callable[..., object]]:
        return ()

    def config_for_tool(
        self, operation: DurableOperation[Any, Any, Any], *, tool: Any, tool_name: str
    ) -> ToolOptions | Literal[False]:
        """Return the options of a tool; False if it is not a step.

        Raises TypeError for unknown ones, and for an effect whose errors go to the model.
        """
        options = None if tool is None else (tool.tool_def.metadata or {}).get(_METADATA)
        if options is False:
            return False
        check_options(f"metadata[{_METADATA!r}] of tool {tool_name!r}", options or {})
        if tool is not None and options and options.get("effect") and _gives_errors_to_model(tool.toolset):
            raise TypeError(
                f"tool {tool_name!r} is an effect, and the model may call it again after a lost "
                'connection; pass tool_error_behavior="error" to its MCPToolset'
            )
        return cast("ToolOptions", options or {})


def _gives_errors_to_model(toolset: Any) -> bool:
    """Return True for a toolset that makes an answer to the model of every error, as MCP ones may."""
    while hasattr(toolset, "wrapped"):
        toolset = toolset.wrapped
    return getattr(toolset, "tool_error_behavior", "error") != "error"


class _Step:
    """An operation that is a step where a flow is around it."""

    def __init__(self, operation: DurableOperation[Any, Any, Any], backend: _Backend) -> None:
        self.operation, self._backend = operation, backend

    async def __call__(self, params: Any, *, config: object | None = None) -> Any:
        operation, flow = self.operation, current_flow()
        if flow is None:  # A capability's operation that a tool calls: a part of the tool's step.
            return await operation.handler(params)

        async def work() -> object:
            with durable_unit_scope():
                return operation.result_codec.dump(await operation.handler(params))

        result = await agent_step(
            flow,
            f"{self._backend.agent}.{_name_of(operation.operation_id, params)}",
            _input_of(operation.operation_id, params),
            work,
            cast("ToolOptions", config or {}),
        )
        return operation.result_codec.load(result)


def _name_of(operation: DurableOperationId, params: Any) -> str:
    """Return the id of an operation within its agent. It is recorded: it stays."""
    match operation:
        case ModelRequestId():
            return "model"
        case ModelCompactMessagesId():
            return "model.compact"
        case ModelCancelSuspendedResponseId():
            return "model.cancel"
        case EventStreamHandlerId():
            return "events"
        case ToolsetCallToolId():
            return str(params.name)
        case ToolsetValidateToolArgumentsId():
            return f"{params.name}.validate"
        case ToolsetGetToolsId():
            return f"{operation.toolset_id}.tools"
        case ToolsetGetInstructionsId():
            return f"{operation.toolset_id}.instructions"
        case CapabilityOperationId():
            return f"{operation.capability_id}.{operation.operation}"
        case _:
            return type(operation).__name__


def _input_of(operation: DurableOperationId, params: Any) -> BaseModel:
    """Return the input of a step: the same on replay, so without ids and times that the body made."""
    if isinstance(params, (ToolsetCallToolParams, DynamicToolsetCallToolParams)):
        arguments = to_jsonable_python(params.tool_args, fallback=repr)
        return (
            ToolCall(tool=params.name, arguments=arguments)
            if isinstance(operation, ToolsetCallToolId)
            else OtherCall(operation=params.name)
        )
    if isinstance(params, ModelRequestParams):
        newest = params.messages[-1]
        return ModelCall(earlier=len(params.messages) - 1, parts=_parts_of(newest))
    return OtherCall(operation=type(operation).__name__)


def _parts_of(message: ModelMessage) -> list[dict[str, JsonValue]]:
    if not isinstance(message, ModelRequest):
        return []
    parts = []
    for part in message.parts:
        shown = {
            "kind": part.part_kind,
            "content": to_jsonable_python(getattr(part, "content", None), fallback=repr),
        }
        name = getattr(part, "tool_name", None)
        parts.append(shown if name is None else {**shown, "tool": name})
    return parts


class _StepModel(WrapperModel):
    """A model in a step: it reports the usage of its answers, and gives way to a fallback."""

    async def request(self, *args: Any, **kwargs: Any) -> Any:
        node, model = _node(), self._serving()
        note_request(node, args[0] if args else kwargs["messages"])
        response = await model.request(*args, **kwargs)
        node.note_response(response)
        node.report_usage(usage_of(response))
        return response

    @contextlib.asynccontextmanager
    async def request_stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        node, model = _node(), self._serving()
        note_request(node, args[0] if args else kwargs["messages"])
        async with model.request_stream(*args, **kwargs) as streamed:
            yield streamed
        node.note_response(response := streamed.get())
        node.report_usage(usage_of(response))

    def _serving(self) -> Any:
        """Return the model of a fallback that is due, else the wrapped one."""
        fallback = _node().ctx.fallback_model()
        return self.wrapped if fallback is None else infer_model(fallback)


def _node() -> RunningNode:
    node = CURRENT.get()
    assert node is not None  # It is made in a step.
    return node
