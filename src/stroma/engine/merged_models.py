"""Classes of the outputs of groups: the fields of all their children in one model."""

from __future__ import annotations

import copyreg
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ConfigDict, create_model

from stroma.contracts.core_schema import core_schema_of, is_never_dict
from stroma.contracts.node import output_class
from stroma.failures.errors import ItemFailure


@functools.lru_cache(maxsize=1024)
def merged_model(
    name: str, classes: tuple[type[BaseModel], ...], own: tuple[frozenset[str] | None, ...]
) -> type[BaseModel]:
    """Return one model with the fields of all, later ones winning; open where a child has no contract.

    ``own``: the fields that each child sets, None for any. Those that it passes on come before all others.
    """
    fields: dict[str, Any] = {}
    for cls in classes:
        fields.update(_declared_fields(cls))
    for cls, names in zip(classes, own, strict=True):
        declared = _declared_fields(cls)
        if names is None:  # It may give any field any value, and later outputs take precedence.
            fields = dict.fromkeys(fields, (Any, ...)) | declared
        else:
            fields.update((name, declared[name]) for name in names)
    model = _make_model(name, fields, classes)
    _recipes[model] = merged_model, (name, classes, own)
    _own_fields[model] = None if None in own else frozenset().union(*cast("tuple[frozenset[str], ...]", own))
    return model


def own_fields_of(model: type[BaseModel]) -> frozenset[str] | None:
    """Return the fields that an output of this class sets; None for any.

    The output of a group passes on all others, unchanged.
    """
    if model in _own_fields:
        return _own_fields[model]
    return None if is_open(model) else frozenset(_declared_fields(model))


#: Of each class of merged_model(), the fields that one of the children sets.
_own_fields: Final[WeakKeyDictionary[type[BaseModel], frozenset[str] | None]] = WeakKeyDictionary()


@functools.lru_cache(maxsize=1024)
def is_open(cls: type[BaseModel]) -> bool:
    """Return True if the model may have any fields: extra ones, or the keys of a root dict."""
    if cls.__pydantic_root_model__:
        return not is_never_dict(core_schema_of(cls))
    return cls.model_config.get("extra") == "allow"


def _declared_fields(cls: type[BaseModel]) -> dict[str, Any]:
    """Return its fields, for create_model(); none for a root dict. Excluded fields cross no boundary."""
    if cls.__pydantic_root_model__ and is_open(cls):
        return {}
    return {n: (info.annotation, info) for n, info in cls.model_fields.items() if not info.exclude}


@functools.lru_cache(maxsize=1024)
def with_list(
    name: str, base: type[BaseModel], into: str, item: type[BaseModel], failed: str = ""
) -> type[BaseModel]:
    """Return the model ``base`` with a field ``into: list[item]``, and one for the items that failed."""
    fields = _declared_fields(base)
    fields[into] = (list[Any] if item is output_class(None) else list[item], ...)  # type: ignore[valid-type]
    if failed:
        fields[failed] = (list[ItemFailure], ...)
    model = _make_model(name, fields, (base,))
    _recipes[model] = with_list, (name, base, into, item, failed)
    return model


class _MergedType(type(BaseModel)):  # type: ignore[misc]
    """Class of merged classes: a pickle has what one was made of, since no module has it."""


#: Of each merged class, the function that made it and its arguments.
_recipes: Final[WeakKeyDictionary[type[BaseModel], tuple[Callable[..., Any], tuple[Any, ...]]]] = (
    WeakKeyDictionary()
)
copyreg.pickle(_MergedType, lambda model: _recipes[model])  # pyright: ignore[reportArgumentType]


def _make_model(name: str, fields: dict[str, Any], bases: Sequence[type[BaseModel]]) -> type[BaseModel]:
    config = ConfigDict(
        arbitrary_types_allowed=True,
        extra="allow" if any(map(is_open, bases)) else "ignore",
        # A value that was accepted as an enum member is read back from a store as a member.
        use_enum_values=any(cls.model_config.get("use_enum_values", False) for cls in bases),
    )
    make = functools.partial(
        create_model,
        name,
        __config__=config,
        __module__=__name__,
        __cls_kwargs__={"metaclass": _MergedType},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic has warned the author of the classes of odd names.
        try:
            model: type[BaseModel] = make(**fields)
            core_schema_of(model)
            return model
        except Exception:  # An annotation means something in its own module only.
            undescribed: dict[str, Any] = dict.fromkeys(fields, (Any, ...))
            return make(**undescribed)


def is_merged(state: BaseModel) -> bool:
    """Return True for the output of a group, whose class nobody else has."""
    return type(state).__module__ == __name__
