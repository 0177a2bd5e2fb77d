"""Models, tools, MCP servers and sessions of the OpenAI Agents SDK whose calls are steps of a flow.

Also the agents that an agent can reach. Each class stands for one of the SDK's, and does as that one
anywhere else. ``run`` is a DurableRun. Imports nothing that patches the SDK.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import AsyncIterator
from functools import partial
from itertools import takewhile
from typing import Any, Final

import mcp.types
import openai
from agents import (
    AgentBase,
    FunctionTool,
    ModelBehaviorError,
    ModelResponse,
    ToolOutputFileContent,
    ToolOutputImage,
    ToolOutputText,
)
from agents.retry import ModelRetryAdvice
from agents.tool import (
    invoke_function_tool,
    maybe_invoke_function_tool_failure_error_function,
    set_function_tool_failure_error_function,
)
from openai.types.responses import ResponseOutputItem, ResponseStreamEvent
from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from stroma.adapters._durable_steps import ModelCall, OtherCall, ToolCall
from stroma.adapters._step import emit_delta
from stroma.contracts.contract import NotDone
from stroma.engine.execution import current_node
from stroma.runner.flows.body_loop import WITHOUT_THREADS
from stroma.runner.flows.flow import current_flow
from stroma.telemetry.messages import note_request


class Proxy:
    """Stands for another object: it has its class and its attributes."""

    def __init__(self, wrapped: Any, run: Any = None) -> None:
        self._wrapped, self._run = wrapped, run

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_wrapped":
            raise AttributeError(name)  # Asked for while a copy of it is made.
        return getattr(self._wrapped, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._wrapped.__class__


# ---------------------------------------------------------------------- agents


def reached_agents(agent: Any) -> tuple[list[Any], bool]:
    """Return an agent and all that it can hand off to or call as tools, and False if some are unknown."""
    reached, is_complete = [agent], True
    for each in reached:
        targets = [target if isinstance(target, AgentBase) else _agent_of(target) for target in each.handoffs]
        is_complete = is_complete and None not in targets
        for other in [*targets, *map(agent_of_tool, each.tools)]:
            if isinstance(other, AgentBase) and not any(other is known for known in reached):
                reached.append(other)
    return reached, is_complete


def agent_of_tool(tool: Any) -> Any:
    """Return the agent that a tool calls; None for any other tool."""
    return getattr(tool, "_agent_instance", None)


def _agent_of(handoff: Any) -> Any:
    reference = getattr(handoff, "_agent_ref", None)  # It is a weak one.
    return None if reference is None else reference()


# ---------------------------------------------------------------------- models


class _Output(openai.BaseModel):
    """Reads the output of an answer as the client does: unknown fields are not an error."""

    output: list[ResponseOutputItem]


class _Events(openai.BaseModel):
    """Reads the events of a streamed answer in the same way."""

    events: list[ResponseStreamEvent]


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the input of a request to a model."""
    return kwargs["input"] if "input" in kwargs else args[1]


def messages_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the messages of a request to a model, its instructions first."""
    instructions = args[0] if args else kwargs.get("system_instructions")
    request = input_of(args, kwargs)
    return [
        {"role": "system", "content": instructions},
        *([request] if isinstance(request, str) else request),
    ]


class DurableProvider(Proxy):
    """A provider of models whose requests are steps."""

    def get_model(self, model_name: str | None) -> Any:
        return DurableModel(self._wrapped.get_model(model_name), self._run)


class DurableModel(Proxy):
    """A model whose requests are steps."""

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        if current_flow() is None:
            return await self._wrapped.get_response(*args, **kwargs)

        async def work() -> Any:
            model = self._serving()
            note_request(current_node()._own, messages_of(args, kwargs))
            response = await model.get_response(*args, **kwargs)
            current_node().report_usage(response, model=model_name_of(model))
            fields = {one.name: getattr(response, one.name) for one in dataclasses.fields(ModelResponse)}
            return to_jsonable_python({**fields, "output": [_dump(item) for item in response.output]})

        fields = await self._step(args, kwargs, work)
        return ModelResponse(**{**fields, "output": _Output.construct(output=fields["output"]).output})

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        if current_flow() is None:
            async for event in self._wrapped.stream_response(*args, **kwargs):
                yield event
            return

        async def work() -> Any:
            model, node, events, response = self._serving(), current_node()._own, list[Any](), None
            note_request(node, messages_of(args, kwargs))
            async for event in model.stream_response(*args, **kwargs):
                if event.type == "response.output_text.delta":
                    emit_delta(node, event.delta)
                _append(events, _dump(event))
                response = getattr(event, "response", response)
            if response is not None:
                node.report_usage(response, model=model_name_of(response) or model_name_of(model))
            return events

        for event in _Events.construct(events=await self._step(args, kwargs, work)).events:
            yield event

    def get_retry_advice(self, request: Any) -> ModelRetryAdvice:
        """Have the SDK not retry: the step had its retries."""
        return ModelRetryAdvice(suggested=False, replay_safety="unsafe")

    async def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any], work: Any) -> Any:
        state = _model_call(input_of(args, kwargs))
        return await self._run.step(f"{self._run.asking}.model", state, work)

    def _serving(self) -> Any:
        """Return the model of a fallback that is due, else the wrapped one."""
        fallback = current_node().ctx.fallback_model()
        return self._wrapped if fallback is None else self._run.provider.get_model(fallback)


def model_name_of(model: Any) -> str | None:
    """Return the name of a model, or of the one that gave a response."""
    name = getattr(model, "model", None)
    return name if isinstance(name, str) and name else None


def _dump(item: Any) -> Any:
    """Return an item or event as JSON data, with set fields only: the SDK sends no others to the model."""
    return (
        item.model_dump(mode="json", exclude_unset=True, warnings=False)
        if hasattr(item, "model_dump")
        else item
    )


def _append(events: list[Any], event: dict[str, Any]) -> None:
    """Append an event; a further piece of a text to the piece before: the body gets all of them at once."""
    last = events[-1] if events else {}
    if isinstance(event.get("delta"), str) and all(last.get(name) == event.get(name) for name in _OF_TEXT):
        last["delta"] += event["delta"]
    else:
        events.append(event)


_OF_TEXT: Final = ("type", "item_id", "output_index", "content_index", "summary_index")


def _model_call(items: Any) -> ModelCall:
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    newest = list(takewhile(_is_given, reversed(items)))[::-1]
    parts = [{name: value for name, value in item.items() if name != "id"} for item in newest]
    return ModelCall(earlier=len(items) - len(newest), parts=to_jsonable_python(parts, fallback=repr))


def _is_given(item: Any) -> bool:
    """Return True for an item that no model made."""
    return item.get("role", "assistant") != "assistant" or str(item.get("type")).endswith(
        ("_output", "_response")
    )


# ---------------------------------------------------------------------- tools and MCP servers


class ToolInvoker:
    """Calls a tool as a step. What the model gets of a failure is decided in the body, after the retries."""

    def __init__(self, tool: Any, run: Any, node_id: str) -> None:
        self._tool, self._run, self._node_id = tool, run, node_id
        self._options = run.options_of(tool.name)
        self._is_function = isinstance(tool, FunctionTool)
        self._bare = copy.copy(tool)
        if self._is_function:
            set_function_tool_failure_error_function(self._bare, None)

    async def __call__(self, context: Any, arguments: str) -> Any:
        if current_flow() is None:
            return await self._tool.on_invoke_tool(context, arguments)
        arguments = self._run.arguments.get(context.tool_call_id, arguments)
        try:
            if self._options is False:
                return await self._call_here(context, arguments)
            state = ToolCall(tool=self._tool.name, arguments=_arguments(arguments))
            work = partial(self._work, context, arguments)
            return (await self._run.step(self._node_id, state, work, self._options))["result"]
        except NotImplementedError:
            raise  # It waits in the body for something that is not an event of a flow.
        except Exception as error:
            return await self._message(context, error)

    async def _call_here(self, context: Any, arguments: str) -> Any:
        token = WITHOUT_THREADS.set(True)
        try:
            return await self._call(context, arguments)
        finally:
            WITHOUT_THREADS.reset(token)

    async def _work(self, context: Any, arguments: str) -> Any:
        try:
            output = await self._call(context, arguments)
        except ModelBehaviorError as error:  # Wrong arguments: it is the model that tries again.
            output = await self._message(context, error)
        has_schema = getattr(self._tool, "output_json_schema", None) is not None
        return {"result": to_jsonable_python(output) if has_schema else _recorded(output)}

    async def _call(self, context: Any, arguments: str) -> Any:
        if self._is_function:
            return await invoke_function_tool(function_tool=self._bare, context=context, arguments=arguments)
        return await self._bare.on_invoke_tool(context, arguments)

    async def _message(self, context: Any, error: Exception) -> Any:
        """Return what the model gets of a failure. Raises it where the tool does not handle failures."""
        message = None
        if hasattr(self._tool.on_invoke_tool, "__agents_bind_function_tool__"):
            message = await maybe_invoke_function_tool_failure_error_function(
                function_tool=self._tool, context=context, error=error
            )
        if message is None:
            raise error
        return message


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        arguments = text
    return arguments if isinstance(arguments, dict) else {"input": arguments}


def _recorded(output: Any) -> Any:
    """Return JSON data of which the SDK makes what it makes of the output itself, for the model."""
    plain = _plain(output)
    try:
        if json.loads(json.dumps(plain)) == plain:
            return plain
    except (TypeError, ValueError):
        pass
    return str(output)


def _plain(output: Any) -> Any:
    if isinstance(output, _STRUCTURED):
        return output.model_dump(mode="json")
    if isinstance(output, (list, tuple)) and any(isinstance(one, _STRUCTURED) for one in output):
        return [_plain(one) for one in output]
    return output


_STRUCTURED: Final = (ToolOutputText, ToolOutputImage, ToolOutputFileContent)


class DurableServer(Proxy):
    """An MCP server: the discovery of its tools and their calls are steps of an agent."""

    def __init__(self, wrapped: Any, run: Any, agent: str) -> None:
        super().__init__(wrapped, run)
        self._agent = agent
        self._tools: Any = None

    async def list_tools(self, *args: Any, **kwargs: Any) -> Any:
        if current_flow() is None:
            return await self._wrapped.list_tools(*args, **kwargs)

        async def work() -> Any:
            return _TOOLS.dump_python(await self._wrapped.list_tools(*args, **kwargs), **_AS_SENT)

        operation = f"{self._wrapped.name}.tools"
        if self._tools is None or not getattr(self._wrapped, "cache_tools_list", False):
            state = OtherCall(operation=operation)
            self._tools = await self._run.step(f"{self._agent}.{operation}", state, work)
        return _TOOLS.validate_python(self._tools)

    async def call_tool(self, tool_name: str, arguments: Any, *args: Any, **kwargs: Any) -> Any:
        if current_flow() is None:
            return await self._wrapped.call_tool(tool_name, arguments, *args, **kwargs)

        options = self._run.options_of(tool_name) or {}

        async def work() -> Any:
            result = await self._wrapped.call_tool(tool_name, arguments, *args, **kwargs)
            answer = _RESULT.dump_python(result, **_AS_SENT)
            if answer.get("isError") and options.get("effect"):  # The model would call it again.
                raise RuntimeError(f"tool {tool_name!r} answered with an error: {answer['content']}")
            return {"result": answer}

        state = ToolCall(tool=tool_name, arguments=arguments or {})
        recorded = await self._run.step(f"{self._agent}.{tool_name}", state, work, options)
        return _RESULT.validate_python(recorded["result"])


_TOOLS: Final = TypeAdapter(list[mcp.types.Tool])
_RESULT: Final = TypeAdapter(mcp.types.CallToolResult)
_AS_SENT: Final[dict[str, Any]] = {"mode": "json", "by_alias": True, "exclude_unset": True}


# ---------------------------------------------------------------------- sessions


class _SessionWrite(ToolCall):
    """Items that are added to a session."""


class AgentSession(Proxy):
    """A session whose reads and writes are steps."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return partial(self._call, name, value) if name in _OF_SESSIONS else value

    async def _call(self, name: str, method: Any, *args: Any, **kwargs: Any) -> Any:
        if current_flow() is None:
            return await method(*args, **kwargs)
        node_id, is_write = f"{self._run.name}.session.{name}", name == "add_items"

        async def work() -> Any:
            result = to_jsonable_python(await method(*args, **kwargs))
            return {"result": result} if is_write else result

        if not is_write:
            return await self._run.step(node_id, OtherCall(operation=name), work)
        state = _SessionWrite(tool=name, arguments={"items": to_jsonable_python(args[0])})
        return await self._run.step(node_id, state, work, {"effect": True, "reconcile": self._find})

    async def _find(self, arguments: dict[str, Any], _: str) -> Any:
        """Return None if items are the last ones of the session."""
        items = arguments["items"]
        newest = await self._wrapped.get_items(limit=len(items))
        return None if to_jsonable_python(newest) == items else NotDone()


_OF_SESSIONS: Final = ("add_items", "clear_session", "get_items", "pop_item", "run_compaction")
