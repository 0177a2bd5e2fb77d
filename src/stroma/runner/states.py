"""Conversion between plain data, the fields of states, and the states of groups and their items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from pydantic import BaseModel, ConfigDict

from stroma._utils.models import LazyModel
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.copying import isolate
from stroma.contracts.node import Group, Node, first_in, make_node
from stroma.contracts.schema import Schema, schema_of
from stroma.contracts.untyped import UntypedState

__all__ = ["as_state", "fields_of_output", "fields_of_state", "item_output", "item_state", "items_in"]


def fields_of_output(output: Any) -> dict[str, Any]:
    """Return the fields that a child adds to the merged state. Raises TypeError for anything but dicts and models."""
    value = output.root if isinstance(output, UntypedState) else output
    if isinstance(value, dict):
        return _check_names(value)
    if isinstance(value, BaseModel):
        return fields_of_state(value, Schema.values)
    raise TypeError(
        f"a child of parallel() returned {type(value).__name__}; only dicts and models can be merged"
    )


def fields_of_state(state: Any, read: Callable[[Schema, BaseModel], dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of a state as ``read`` takes them; of a root model, those of its dict or model."""
    if isinstance(state, UntypedState) and isinstance(state.root, (BaseModel, dict)):
        state = state.root
    if isinstance(state, dict):
        return _check_names(cast("dict[Any, Any]", isolate(state)))
    schema = schema_of(type(state))
    fields = read(schema, state)
    return _check_names(fields["root"]) if schema.is_root and isinstance(fields["root"], dict) else fields


def _check_names(fields: dict[Any, Any]) -> dict[str, Any]:
    """Return a dict as it is; raise TypeError for a key that is no text, which would not be read back."""
    odd = next((key for key in fields if not isinstance(key, str)), None)
    if odd is not None:
        raise TypeError(
            f"fields of a group must have text as their names, got the key {odd!r}; use text for all keys"
        )
    return fields


def items_in(value: BaseModel, field: str) -> list[Any]:
    """Return the items in the list field of a state. Raises TypeError if there is no list."""
    fields = fields_of_state(value, Schema.fields)
    items = fields.get(field)
    if not isinstance(items, (list, tuple)):
        known = ", ".join(map(str, fields)) or "none"
        raise TypeError(
            f"map_over needs a list in field {field!r}, got {type(items).__name__}; the state has the fields: {known}"
        )
    return list(items)


def item_output(output: BaseModel) -> Any:
    """Return the output of an item as an element of the list of outputs."""
    return output.root if isinstance(output, UntypedState) else schema_of(type(output)).clone(output)


def item_state(registry: ContractRegistry | None, node: Node | Group, item: Any) -> BaseModel:
    """Return an item as a state that the input contract of its node can validate."""
    if isinstance(item, BaseModel):
        return item
    if isinstance(item, dict):
        return _open_model(item) if all(isinstance(k, str) for k in item) else UntypedState(item)
    contract = None
    node = first_in(node)
    if isinstance(node, Node):
        contract = (registry and registry.find(node.node_id)) or node.contract
    if contract is not None and not contract.input_schema.__pydantic_root_model__:
        required = [n for n, info in contract.input_schema.model_fields.items() if info.is_required()]
        if len(required) == 1:
            return _open_model({required[0]: item})
    return UntypedState(item)


def as_state(raw: Any) -> BaseModel:
    """Return plain data as a state that any input contract can validate."""
    return item_state(None, _ANY_NODE, raw)


def _open_model(fields: dict[str, Any]) -> BaseModel:
    return schema_of(_Item).construct(fields)


class _Item(LazyModel):
    """Fields of an item before its node's contract validates them."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


_ANY_NODE = make_node("any", _open_model, None)
