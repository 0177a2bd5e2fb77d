"""Input of a run: read, validate against the contract of the first node, report errors by field."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from stroma._utils.models import complaints_of
from stroma._utils.text import clean, pluralize
from stroma.checkpoint import PipelineChanged
from stroma.checkpoint.records import RunRecord
from stroma.cli.errors import Code, Problem, describe_error
from stroma.cli.stores import Database
from stroma.contracts.codec import is_extended
from stroma.contracts.examples import NoExampleError, example_for
from stroma.contracts.node import FlowNode, Group, Node, find_node
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState
from stroma.runner.pipeline import Pipeline, steps_of
from stroma.runner.stored_runs import decode_input
from stroma.trace.outline import parse_call


class Input(BaseModel):
    """Input of a pipeline whose first node has no contract, or whose first nodes have several."""

    model_config = ConfigDict(extra="allow")


def _read_input(argument: str | None, called: str = "INPUT") -> tuple[bytes, str]:
    """Return the JSON text of an argument and the name of its source. Raises Problem."""
    if argument is None:
        return b"{}", "an empty input, {}"
    if argument == "-":
        if sys.stdin is None:
            raise Problem("cannot read the input from stdin: it is closed")
        return sys.stdin.buffer.read(), "stdin"
    if not argument.startswith("@"):
        return os.fsencode(argument), called
    path = Path(argument[1:])
    try:
        return path.read_bytes(), str(path)
    except FileNotFoundError:
        raise Problem(
            f"input file {path} does not exist", "check the path after the @", code=Code.NOT_FOUND
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Problem(f"input file {path} cannot be read: {reason}") from error


def parse_json(argument: str | None, called: str = "INPUT") -> tuple[Any, str, str]:
    """Return the JSON data of an argument, its text and the name of its source. Raises Problem."""
    data, source = _read_input(argument, called)
    try:
        text = data.decode("utf-8-sig")
        return json.loads(text), text, source
    except (ValueError, RecursionError) as error:
        fix = 'give JSON in quotes for the shell, such as \'{"key": "value"}\', or @FILE, or -'
        if argument is not None and not argument.startswith("@") and os.path.isfile(argument):
            fix = f"to read the file {argument}, put an @ before it: @{argument}"
        raise Problem(f"{source} is not JSON: {error}", fix) from None


def parse_input(pipeline: Pipeline, argument: str | None) -> BaseModel:
    """Parse INPUT as the initial state. Raises Problem if it does not fit the first node's contract."""
    _, text, source = parse_json(argument)
    model = input_model(pipeline)
    checks = _contracts(pipeline) or [("", Input)]
    for node_id, contract in checks:
        try:
            schema_of(contract).parse(text)
        except Exception as error:
            what = f"{source} is no JSON object"
            if node_id:
                is_flow = isinstance(find_node(pipeline.nodes[0]), FlowNode)
                kind = "input of the flow" if is_flow else "contract of the first node"
                what = f"{source} does not fit the {kind}, {node_id!r}"
            raise _misfit(error, contract, what) from None
    return schema_of(model).parse(text)


def parse_as(model: type[BaseModel], argument: str, called: str, requirement: str) -> BaseModel:
    """Parse an argument as an instance of a model. Raises Problem.

    ``requirement``: description of what it must satisfy.
    """
    _, text, source = parse_json(argument, called)
    try:
        return schema_of(model).parse(text)
    except Exception as error:
        raise _misfit(error, model, f"{source} does not fit {requirement}") from None


def find_call(pipeline: Pipeline, target: str, node_id: str) -> tuple[int, str | None]:
    """Return the position of the node that --from names; of a call of a flow, that of the flow and the call.

    Raises Problem.
    """
    ids = [find_node(node).node_id for node in pipeline.nodes]
    if node_id in ids:
        return ids.index(node_id), None
    flows = [at for at, node in enumerate(pipeline.nodes) if isinstance(find_node(node), FlowNode)]
    if len(flows) == 1:
        return flows[0], node_id
    raise Problem(
        f"--from {node_id!r} is not a node of {target}",
        f"its nodes are: {', '.join(clean(one, 100) for one in ids)}",
    )


def parse_input_at(pipeline: Pipeline, position: int, argument: str) -> BaseModel:
    """Parse what --state replaces at a position: the input of the run, or the output of the node before.

    Raises Problem.
    """
    if not position:
        return parse_input(pipeline, argument)
    # It replaces the output of the node before, so it must satisfy that contract.
    return _parse_output(find_node(pipeline.nodes[position - 1]), argument, "--state")


def parse_output(pipeline: Pipeline, position: int, call: str | None, argument: str) -> BaseModel:
    """Parse --output: that of the node at a position, or of a call of the flow there. Raises Problem."""
    node = find_node(pipeline.nodes[position])
    if call is not None:
        last = parse_call(call.rpartition(".")[2])
        node_id = call if last is None else last.name
        steps = {one.node_id: one for one in steps_of([node])}
        if node_id not in steps:
            raise Problem(
                f"flow {clean(node.node_id, 100)!r} names no node {clean(node_id, 100)!r}, so the class of "
                "its output is not known here",
                "check the id, or call runner.fork(..., output=) in Python",
            )
        node = steps[node_id]
    return _parse_output(node, argument, "--output")


def _parse_output(node: Node | Group, argument: str, called: str) -> BaseModel:
    name = clean(node.node_id, 200)
    if isinstance(node, Group):
        raise Problem(
            f"{called} cannot replace the output of {name!r}: a group's output is built from its children's",
            "start at the group, or at a later node",
        )
    model = UntypedState if node.contract is None else node.contract.output_schema
    return parse_as(model, argument, called, f"the output of node {name!r}")


def input_model(pipeline: Pipeline) -> type[BaseModel]:
    """Return the model of the initial state of a pipeline.

    The input model of the first node. If the first is a group whose children have different models, an open
    model that keeps all fields, so that each child gets its own.
    """
    contracts = {model for _, model in _contracts(pipeline)}
    whole = bool(pipeline.nodes) and _all_declared(find_node(pipeline.nodes[0]))
    return contracts.pop() if whole and len(contracts) == 1 else Input


def _contracts(pipeline: Pipeline) -> list[tuple[str, type[BaseModel]]]:
    """Return (node id, model) for each node that receives the input."""
    return _required_inputs(find_node(pipeline.nodes[0])) if pipeline.nodes else []


def _required_inputs(node: Node | Group) -> list[tuple[str, type[BaseModel]]]:
    if isinstance(node, Node):
        return [(node.node_id, node.contract.input_schema)] if node.contract is not None else []
    if node.has_external_items:
        return []
    if node.is_map:
        fields: dict[str, Any] = {node.items_field: (list[Any], ...)}
        return [(node.node_id, create_model("Input", __base__=Input, **fields))]
    return [requirement for child in node.children for requirement in _required_inputs(child)]


def _all_declared(node: Node | Group) -> bool:
    if isinstance(node, Node):
        return node.contract is not None
    return not node.is_map and all(map(_all_declared, node.children))


# ---------------------------------------------------------------------- messages


def _misfit(error: Exception, model: type[BaseModel], what: str) -> Problem:
    lines = _errors(error)
    return Problem(f"{what} ({pluralize(len(lines), 'error')})", *lines, *_example_hint(model))


def _errors(error: Exception) -> list[str]:
    if not isinstance(error, ValidationError):  # A validator may raise any exception.
        return [describe_error(error)]
    errors = complaints_of(error)
    lines = [clean(": ".join(filter(None, one))) for one in errors[:20]]
    return lines + ([f"... and {len(errors) - 20} more"] if len(errors) > 20 else [])


def _example_hint(model: type[BaseModel]) -> list[str]:
    """Return the line with an argument that fits; [] if none is known."""
    try:
        fits = clean(json.dumps(example_for(model), ensure_ascii=False), 400)
    except NoExampleError:
        return []
    return [f"for example: {shlex.quote(fits)}"]


def stored_input(database: Database, record: RunRecord, pipeline: Pipeline, target: str) -> BaseModel:
    """Return the stored input of a run as the input model of the first node. Raises Problem."""
    schema = schema_of(input_model(pipeline))
    data = database.reader.input_of(record.run_id)
    message = f"the input of run {record.run_id!r} is of another class than {target} takes"
    try:
        state = decode_input(record.run_id, schema, data)
        if is_extended(schema.encode(state), data):
            return state
    except PipelineChanged as error:
        message = str(error)
    except Exception as error:
        message += f": {describe_error(error)}"
    raise Problem(
        clean(message),
        "if another pipeline started the run, pass that one, or resume the run from its program: "
        "runner.run(nodes, state, run_id=..., resume=True)",
    )
