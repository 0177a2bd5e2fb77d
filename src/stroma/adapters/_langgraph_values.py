"""Values of LangGraph's state as JSON, with messages, commands, models and dataclasses."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
import typing
from collections.abc import Iterator
from typing import Any, Final, TypeAlias, cast

from langchain_core.messages import BaseMessage, messages_from_dict
from langgraph.types import Command, Send
from pydantic import BaseModel

from stroma.contracts.tagged_json import NotSerialisable, tag, untag

#: By module and qualified name: "shop.orders:Order".
Classes: TypeAlias = dict[str, type]
_COLLECTIONS: Final[dict[str, Any]] = {"@tuple": tuple, "@dict": dict, "@set": set, "@frozenset": frozenset}


class NotStorable(TypeError):
    """A value has no form in JSON. The text is its class, and where it is."""


def encode(value: Any, place: str = "") -> Any:
    """Return the JSON form of a value. ``place``: where it is, for the error. Raises NotStorable.

    What JSON has no form for is a dict with one key, which begins with "@", or with "$" as in tagged JSON.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith(("@", "$")) for key in value):
            return {key: encode(item, f"{place}[{key!r}]") for key, item in value.items()}
        return {"@dict": [[encode(each, place) for each in item] for item in value.items()]}
    if isinstance(value, list) or kind is tuple:
        items = [encode(item, f"{place}[{number}]") for number, item in enumerate(value)]
        return {"@tuple": items} if kind is tuple else items
    if kind in (set, frozenset):  # In an order that the next process has as well.
        return {f"@{kind.__name__}": sorted((encode(item, place) for item in value), key=json.dumps)}
    if kind is Send:
        return {"@send": [value.node, encode(value.arg, place)]}
    if isinstance(value, enum.Enum):
        return {"@enum": [_name_of(kind), encode(value.value, place)]}
    own = _fields_of(value)
    if own is None:
        return _tagged(value, place)
    fields = {name: encode(item, f"{place}.{name}") for name, item in own.items()}
    if not (isinstance(value, BaseMessage) and kind.__module__.startswith("langchain_core.")):
        return {"@object": [_name_of(kind), fields]}
    del fields["type"]
    # Without what is empty: releases of LangChain differ in it.
    data = {name: item for name, item in fields.items() if name == "content" or item or item == 0}
    return {"@message": {"type": value.type, "data": data}}


def _fields_of(value: Any) -> dict[str, Any] | None:
    kind = type(value)
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in kind.model_fields} | (value.__pydantic_extra__ or {})
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _tagged(value: Any, place: str) -> Any:
    """Return the tagged JSON of a value that Python's own classes restore."""
    try:
        form = tag(value, (), dict)
    except NotSerialisable:
        form = {"$c": None}
    if isinstance(form, dict) and "$c" in form:  # Its class would be lost.
        kind = type(value)
        raise NotStorable(f"{kind.__module__}.{kind.__qualname__}{f' in {place}' if place else ''}")
    return form


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def decode(value: Any, classes: Classes) -> Any:
    """Return the value of a JSON form. ``classes``: beside those in imported modules. Raises LookupError."""
    if type(value) is list:
        return [decode(item, classes) for item in value]
    if type(value) is not dict:
        return value
    key = next(iter(value), "")
    if key.startswith("$"):
        return untag(value)
    if not key.startswith("@"):
        return {name: decode(item, classes) for name, item in value.items()}
    content = value[key]
    if key in _COLLECTIONS:
        return _COLLECTIONS[key](decode(content, classes))
    if key == "@message":
        return messages_from_dict([{"type": content["type"], "data": decode(content["data"], classes)}])[0]
    name, inner = content[0], decode(content[1], classes)
    if key == "@send":
        return Send(name, inner)
    kind = _class_of(name, classes)
    return kind(inner) if key == "@enum" else _build(kind, inner)


def _class_of(name: str, classes: Classes) -> Any:
    """Return a class by its name. Nothing is imported, as the name comes from a store."""
    if name in classes:
        return classes[name]
    module, _, qualname = name.partition(":")
    kind: Any = sys.modules.get(module)
    for part in qualname.split("."):
        kind = getattr(kind, "__dict__", {}).get(part)
    if not isinstance(kind, type):
        # A program that was __main__ then may be a module now.
        alike = [each for each in classes.values() if each.__qualname__ == qualname]
        if len(alike) != 1:
            raise LookupError(
                f"class {name!r} is in no imported module; import it, and define it outside of functions"
            )
        (kind,) = alike
    return kind


def _build(kind: Any, fields: dict[str, Any]) -> Any:
    """Return an instance with the fields as they were: neither validated again nor converted."""
    if issubclass(kind, BaseModel):
        return kind.model_construct(**fields)
    if not dataclasses.is_dataclass(kind):
        raise LookupError(f"class {_name_of(kind)!r} is neither a model nor a dataclass")
    instance: Any = object.__new__(cast("type[Any]", kind))
    for name, item in fields.items():
        object.__setattr__(instance, name, item)
    return instance


def classes_in(*annotations: Any) -> Classes:
    """Return the models, dataclasses and enums in annotations, and in those of their fields."""
    classes: Classes = {}
    seen: list[Any] = []
    pending = list(annotations)
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.append(one)
        pending += typing.get_args(one)
        if not isinstance(one, type):
            continue
        if issubclass(one, (BaseModel, enum.Enum)) or dataclasses.is_dataclass(one):
            classes[_name_of(one)] = one
        try:
            pending += typing.get_type_hints(one).values()
        except Exception:  # Names that only type checkers know.
            continue
    return classes


def messages_in(value: Any) -> Iterator[BaseMessage]:
    """Yield the messages in a value, and in the updates of its commands."""
    if isinstance(value, BaseMessage):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from messages_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from messages_in(item)
    elif isinstance(value, Command):
        yield from messages_in(value.update)
