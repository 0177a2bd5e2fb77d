"""Views of arguments and results of a framework, for contracts, hooks and the journal."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ValidationError

from stroma.adapters.base import extract_state_dict
from stroma.contracts.contract import ContractViolation, NodeContract, as_violation
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState
from stroma.trace.plain import jsonable

_DEEPEST: Final = 20
#: What is to be seen of a call's positional and keyword arguments.
View = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def arguments_of(func: Callable[..., Any]) -> View:
    """Return a view of arguments by the names of parameters, with defaults, without ``self`` and ``cls``."""
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):  # Some builtins have none.
        return lambda args, kwargs: {"args": list(args), **kwargs}
    # Of a function that is still to become a method.
    owner = next((name for name in signature.parameters if name in ("self", "cls")), None)

    def view(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # The call itself says so.
            return {"args": list(args), **kwargs}
        bound.apply_defaults()
        seen: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                seen.update(value)
            elif name != owner:
                seen[name] = list(value) if kind is inspect.Parameter.VAR_POSITIONAL else value
        return seen

    return view


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the state of a call: its first argument, or the one that is named ``state``."""
    if args:
        return args[0]
    return kwargs.get("state", next(iter(kwargs.values()), None))


def newest_of(messages: Any) -> dict[str, Any]:
    """Return the newest message and their number: whole conversations would grow as the square."""
    if isinstance(messages, (list, tuple)):
        return {"messages": len(messages), "newest": messages[-1] if messages else None}
    return {"messages": 1, "newest": messages}


def as_it_is(value: Any) -> Any:
    return value


def parse_text(value: Any) -> Any:
    """Return the data of a text that is JSON, and any other value as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def given_to(view: Any, contract: NodeContract[Any, Any] | None) -> BaseModel:
    """Return the view of the arguments as an input; the engine refuses one that violates the contract."""
    if contract is None or contract.input_schema is UntypedState:
        return _untyped(jsonable(_as_record(view)))
    model = contract.input_schema
    valid, value = _validated(model, view)
    return value if valid else _untyped(value)


def made_by(view: Any, contract: NodeContract[Any, Any] | None) -> Any:
    """Return the view of a result as an output; the engine refuses one that violates the contract."""
    if contract is None or contract.output_schema is UntypedState:
        return jsonable(_as_record(view))
    valid, value = _validated(contract.output_schema, view)
    # A tuple would be taken for an output and its usage.
    return list(value) if not valid and type(value) is tuple else value


def violation(
    node_id: str, contract: NodeContract[Any, Any], direction: Literal["input", "output"], view: Any
) -> ContractViolation | None:
    """Return the violation of one side of a contract by a value, or None."""
    model = contract.input_schema if direction == "input" else contract.output_schema
    valid, value = _validated(model, view)
    if valid:
        return None
    try:
        schema_of(model).validate(value)
    except Exception as error:
        return as_violation(node_id, direction, value, error, model)
    raise AssertionError("a value was refused, and then accepted")


def _validated(model: type[BaseModel], view: Any) -> tuple[bool, Any]:
    """Return True and the instance of a model, or False and the value as the engine shows it."""
    schema = schema_of(model)
    value = view if schema.is_root else _fields(model, view)
    try:
        instance = schema.validate(value)
    except ValidationError:
        # Frameworks hand objects of their own: messages, parts, dataclasses.
        try:
            instance = model.model_validate(value, from_attributes=True)
        except Exception:
            return False, _apart(value)  # So that what is wrong inside an object is named.
    except Exception:
        return False, value
    return True, schema.mark_exclusive(schema.detach(instance))


def _fields(model: type[BaseModel], view: Any) -> Any:
    """Return a value as the fields of a model; a plain value is that of the only required field."""
    if view is None:
        return {}
    value = _as_record(view)
    if isinstance(value, dict):
        return value
    required = [name for name, info in model.model_fields.items() if info.is_required()]
    return {required[0]: value} if len(required) == 1 else value


def _apart(value: Any, depth: int = 0) -> Any:
    """Return a value in which objects are dicts of their attributes."""
    if depth > _DEEPEST:
        return value
    if isinstance(value, Mapping):
        return {key: _apart(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_apart(inner, depth + 1) for inner in value]
    record = value if isinstance(value, BaseModel) else _as_record(value)
    return _apart(record, depth + 1) if record is not value else value


def _as_record(value: Any) -> Any:
    """Return the fields of an object that has some; any other value as it is."""
    if value is None or isinstance(value, (str, bytes, int, float, list, tuple, set, frozenset, type)):
        return value
    try:
        return extract_state_dict(value)
    except Exception:
        return value


def _untyped(value: Any) -> BaseModel:
    return schema_of(UntypedState).construct(
        {"root": value if not isinstance(value, Mapping) else dict(value)}
    )
