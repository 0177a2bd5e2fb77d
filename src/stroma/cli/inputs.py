"""A run's input: read, checked against what the first node asks for, and told apart field by field if it fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from stroma._utils.text import clean, plural
from stroma.checkpoint.records import RunRecord
from stroma.cli.errors import Code, Problem, command
from stroma.cli.stores import Database
from stroma.cli.user_errors import said
from stroma.contracts.node import Group, Node, find_node
from stroma.contracts.schema import schema_of
from stroma.runner.runner import Pipeline

__all__ = ["example", "input_model", "parse_as", "parse_input", "parse_json", "read_input", "stored_input"]


class Input(BaseModel):
    """The input of a pipeline whose first node does not say what it takes, or whose first nodes say it together."""

    model_config = ConfigDict(extra="allow")


def read_input(given: str | None, called: str = "INPUT") -> tuple[bytes, str]:
    """The JSON text that an argument stands for, and what to call it. Raises Problem."""
    if given is None:
        return b"{}", "an empty input, {}"
    if given == "-":
        if sys.stdin is None:
            raise Problem("there is no stdin to read the input from: it is closed", code=Code.USAGE)
        return sys.stdin.buffer.read(), "stdin"
    if not given.startswith("@"):
        return os.fsencode(given), called
    path = Path(given[1:])
    try:
        return path.read_bytes(), str(path)
    except FileNotFoundError:
        raise Problem(
            f"there is no input file {path}", "check the path after the @", code=Code.NOT_FOUND
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Problem(f"the input file {path} cannot be read: {reason}", code=Code.USAGE) from error


def parse_json(given: str | None, called: str = "INPUT") -> tuple[Any, str, str]:
    """What an argument says: as JSON data, as its text, and what to call it. Raises Problem if that is no JSON."""
    data, source = read_input(given, called)
    text = _decode(data, source)
    try:
        return json.loads(text), text, source
    except json.JSONDecodeError as error:
        raise _not_json(error, text, source, given, called) from None
    except (ValueError, RecursionError) as error:  # A number of 5,000 digits, or too many brackets.
        raise Problem(f"{source} is not JSON that can be read: {error}", code=Code.USAGE) from None


def parse_input(pipeline: Pipeline, given: str | None, target: str) -> BaseModel:
    """The initial state that INPUT is. Raises Problem: no JSON, or not what the first node's contract asks for."""
    value, text, source = parse_json(given)
    model = input_model(pipeline)
    checks = _contracts(pipeline) or [("", Input)]
    for node_id, contract in checks:
        try:
            _validate(contract, text)
        except Exception as error:
            raise _misfit(error, contract, node_id, value, source, target) from None
    return _validate(model, text)


def parse_as(
    model: type[BaseModel], given: str, called: str, asked: str, again: Callable[[str], str]
) -> BaseModel:
    """What an argument says, as a model. Raises Problem.

    ``asked``: what it must satisfy, in words. ``again``: the command to call, given an argument that fits.
    """
    value, text, source = parse_json(given, called)
    try:
        return _validate(model, text)
    except Exception as error:
        lines, wrong = _errors(error)
        fits = clean(json.dumps(example(model, value, wrong), ensure_ascii=False), 400)
        raise Problem(
            f"{source} does not fit {asked} ({plural(len(lines), 'error')})", *lines, f"give it so: {again(fits)}",
            code=Code.USAGE,
        ) from None  # fmt: skip


def input_model(pipeline: Pipeline) -> type[BaseModel]:
    """What the initial state of a pipeline is an instance of.

    The first node's own input model. Nodes side by side may ask for different things, and each must find all of its
    fields: if their models differ, it is an open model that keeps whatever was given.
    """
    contracts = {model for _, model in _contracts(pipeline)}
    whole = bool(pipeline.nodes) and _all_declared(find_node(pipeline.nodes[0]))
    return contracts.pop() if whole and len(contracts) == 1 else Input


def _contracts(pipeline: Pipeline) -> list[tuple[str, type[BaseModel]]]:
    """What the input must satisfy: (node id, model) of each node that is given it."""
    return _asked(find_node(pipeline.nodes[0])) if pipeline.nodes else []


def _asked(node: Node | Group) -> list[tuple[str, type[BaseModel]]]:
    if isinstance(node, Node):
        return [(node.node_id, node.contract.input_schema)] if node.contract is not None else []
    if node.has_external_items:
        return []
    field = _mapped_field(node)
    if field is not None:
        fields: dict[str, Any] = {field: (list[Any], ...)}
        return [(node.node_id, create_model("Input", __base__=Input, **fields))]
    return [asked for child in node.children for asked in _asked(child)]


def _all_declared(node: Node | Group) -> bool:
    """Whether every node that is given the input has a contract, so that nothing outside of it is asked for."""
    if isinstance(node, Node):
        return node.contract is not None
    return not node.is_map and all(map(_all_declared, node.children))


def _mapped_field(group: Group) -> str | None:
    """The list field that a ``map_over`` takes its items from; None for ``parallel``."""
    return group.items_field if group.is_map and not group.has_external_items else None


def _validate(model: type[BaseModel], text: str) -> BaseModel:
    validated = schema_of(model).validator.validate_json(text, by_alias=True, by_name=True)
    assert isinstance(validated, BaseModel)
    return validated


# ---------------------------------------------------------------------- messages


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem(
            f"{source} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}",
            "save it as UTF-8",
            code=Code.USAGE,
        ) from None


def _not_json(error: json.JSONDecodeError, text: str, source: str, given: str | None, called: str) -> Problem:
    line = text.splitlines()[error.lineno - 1] if text.strip() else ""
    start = max(0, error.colno - 1 - 40)
    more = (
        [clean(line[start : start + 80]), " " * len(clean(line[start : error.colno - 1])) + "^"]
        if line
        else []
    )
    if given is not None and not given.startswith("@") and Path(given).is_file():
        more = [f"to read the file {given}, put an @ before it: @{given}"]
    elif not text.strip():
        more = ["give JSON, @FILE, or - to read it from stdin"]
        more[0] += "; no INPUT at all means {}" if called == "INPUT" else ""
    else:
        more.append('give JSON in quotes for the shell, such as \'{"key": "value"}\', or @FILE, or -')
    return Problem(
        f"{source} is not JSON: {error.msg} (line {error.lineno}, column {error.colno})",
        *more,
        code=Code.USAGE,
    )


def _misfit(
    error: Exception, model: type[BaseModel], node_id: str, value: Any, source: str, target: str
) -> Problem:
    lines, wrong = _errors(error)
    what = (
        f"{source} does not fit the contract of the first node, {node_id!r}"
        if node_id
        else f"{source} is no JSON object"
    )
    fits = clean(json.dumps(example(model, value, wrong), ensure_ascii=False), 400)
    return Problem(
        f"{what} ({plural(len(lines), 'error')})", *lines, f"give it so: {command('run', target, fits)}",
        code=Code.USAGE,
    )  # fmt: skip


def _errors(error: Exception) -> tuple[list[str], set[Any]]:
    """What a model found wrong, line by line, and the fields that are."""
    if not isinstance(error, ValidationError):  # A validator may raise anything at all.
        return [_told("", f"{type(error).__name__}: {error}")], set()
    # Not the values: they may be secret, and the user has just typed them.
    told = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [_told(".".join(map(str, e["loc"])), e["msg"]) for e in told[:20]]
    lines += [f"... and {len(told) - 20} more"] if len(told) > 20 else []
    return lines, {e["loc"][0] for e in told if e["loc"]}


def _told(path: str, message: str) -> str:
    return clean(f"{path}: {message}" if path else message)


_PLACEHOLDERS: dict[Any, Any] = {str: "...", int: 0, float: 0.0, bool: False, list: [], dict: {}}


def example(model: type[BaseModel], value: Any = None, wrong: Collection[Any] = ()) -> Any:
    """What was given, with a placeholder for each field that is missing or wrong."""
    if model.__pydantic_root_model__:
        return "..."
    made: dict[str, Any] = dict(value) if isinstance(value, dict) else {}
    for name, info in model.model_fields.items():
        alias = info.validation_alias if isinstance(info.validation_alias, str) else name
        missing = info.is_required() and alias not in made and name not in made
        if missing or name in wrong or alias in wrong:
            kind = getattr(info.annotation, "__origin__", info.annotation)
            made[name if name in made else alias] = _PLACEHOLDERS.get(kind, "...")
    return made


def stored_input(database: Database, record: RunRecord, pipeline: Pipeline, target: str) -> BaseModel:
    """The state that a run began with, as the first node of the pipeline takes it. Raises Problem."""
    schema = schema_of(input_model(pipeline))
    with database.explained():
        data = database.reader.input_of(record.run_id)
    why = "it is of another class"
    try:
        state = schema.decode(data)
        if schema.encode(state) == data:
            return state
    except Exception as error:
        why = said(error)
    raise Problem(
        f"run {clean(record.run_id)} did not begin with a {schema.model.__name__}, which is what the first node of "
        f"{target} takes: {why}",
        "give the pipeline that began the run, or resume it from the program that began it: "
        "runner.run(nodes, state, run_id=..., resume=True)",
        code=Code.USAGE,
    )
