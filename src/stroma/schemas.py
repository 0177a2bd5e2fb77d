"""How a model class crosses a boundary: validated, taken apart, stored and read back.

Everything here is decided once per class, from pydantic's own core schema, and cached on the class:

* *flat* classes hold only immutable leaves, so a shallow copy of their fields is already isolated;
* *JSON* classes survive pydantic's JSON serializer unchanged (no float, no bytes, no custom serializer ...);
* all others are stored in a tagged JSON encoding of ours, so that what comes back equals what was stored.

Values are taken apart by *field name*, never through serializers: an alias, a computed field or a lossy
``field_serializer`` must not change what the next node receives.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import hashlib
import json
import math
import operator
import pathlib
import re
import uuid
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import pydantic_core
from pydantic import BaseModel, SecretBytes, SecretStr

from stroma._core_schema import (
    CLOSED,
    FLAT_LEAVES,
    JSON_LEAVES,
    MODELS,
    core_schema_of,
    field_nodes,
    nodes_of,
    plain_json,
    reachable,
)
from stroma._encoding import NotSerialisable, tag, untag

__all__ = ["NotSerialisable", "Schema", "Snapshot", "schema_of"]

#: What a trace or a store keeps of a state: the values of a flat one, the bytes of any other, or, where no
#: encoding exists, a private copy of the fields. See :meth:`Schema.snapshot`.
Snapshot = tuple[Any, ...] | bytes | dict[str, Any]


_ATOMS: Final = frozenset(
    {
        str,
        int,
        bool,
        float,
        type(None),
        bytes,
        complex,
        decimal.Decimal,
        uuid.UUID,
        dt.date,
        dt.time,
        dt.datetime,
        dt.timedelta,
        SecretStr,
        SecretBytes,
        re.Pattern,
        pathlib.PurePosixPath,
        pathlib.PosixPath,
    }
)

_LONG_INT: Final = 4300
_TOO_LONG: Final = re.compile(rb"\d{%d}" % _LONG_INT)
#: Starts a stored value in our tagged encoding; a plain JSON object never does.
_TAGGED: Final = b'["stroma/1",'


class Schema:
    """One model class, seen from its boundaries. Made by :func:`schema_of`."""

    __slots__ = (
        "__dict__",  # for the fingerprint, which few need
        "_bare",
        "_by_name",
        "_computed",
        "_deep",
        "_excluded",
        "_extra",
        "_floats",
        "_json",
        "_opaque",
        "_quiet",
        "_rebuild",
        "_shares",
        "_size",
        "_source",
        "_source_model",
        "_to_json",
        "_values",
        "any",
        "flat",
        "model",
        "names",
        "root",
        "validate",
        "validator",
    )

    def __init__(self, model: type[BaseModel]) -> None:
        core = core_schema_of(model)
        nodes = list(nodes_of(core))
        kinds = {node["type"] for node in nodes}
        fields = model.model_fields
        serializers = model.__pydantic_decorators__
        self.model: Final = model
        self.validator: Final = model.__pydantic_validator__
        self.root: Final = bool(model.__pydantic_root_model__)
        self._excluded = frozenset(n for n, f in fields.items() if f.exclude)
        self._extra = model.model_config.get("extra") == "allow"
        self._computed = frozenset(model.model_computed_fields)
        self._by_name = any("validation_alias" in node for node in nodes)
        #: Field names in order, as a flat snapshot holds their values.
        self.names: Final = tuple(fields)
        self._size = len(fields)
        self._values = _picker(self.names)
        simple = not (self._excluded or self._extra or self.root)
        self.flat: Final = (
            simple
            and kinds
            <= FLAT_LEAVES
            | {
                "model",
                "model-fields",
                "model-field",
                "nullable",
                "default",
                "union",
                "function-before",
            }
            and sum(node["type"] == "model" for node in nodes) == 1
        )
        self._source_model: type[BaseModel] | None = None
        self._source: Schema = self
        #: A root model of Any: whatever is given stays what it is.
        self.any = self.root and kinds <= {"model", "any"}
        self._bare = self.flat and not self._computed
        own_code = any(node.get("custom_init") or node.get("post_init") for node in nodes)
        self._quiet = not own_code and not any(kind.startswith("function") for kind in kinds)
        self._quiet &= not _overrides_validation(model)
        custom = (
            any("serialization" in node or "serialization_exclude" in node for node in nodes)
            or serializers.field_serializers
            or serializers.model_serializers
            or any(
                key in model.model_config for key in ("json_encoders", "ser_json_bytes", "ser_json_inf_nan")
            )
        )
        structural = CLOSED - (FLAT_LEAVES - JSON_LEAVES) - {"set", "frozenset", "tuple", "dataclass"}
        custom = custom or not all(map(plain_json, nodes))
        self._json = simple and not custom and not self._open_subclass(nodes) and kinds <= structural
        self._floats = simple and self.flat and not custom and kinds <= structural | {"float"}
        self._to_json = model.__pydantic_serializer__.to_json
        self._opaque: dict[str, bool] = {}
        self._deep: tuple[str, ...] = ()
        self._shares = self._extra or not kinds <= CLOSED
        if not self.flat:
            self._sort_fields(core)
        self.validate: Final = self._make_validate()

    @staticmethod
    def _open_subclass(nodes: list[dict[str, Any]]) -> bool:
        # pydantic serialises a nested model by its *declared* class and would drop a subclass's own fields.
        return any(node["type"] == "model" and node["cls"].__subclasses__() for node in nodes[1:])

    def _sort_fields(self, core: Any) -> None:
        """Which fields need a recursive copy, and which hold values that no schema describes."""
        deep: list[str] = []
        # A validator of the whole model may have put anything anywhere.
        wrapped = core["type"] != "model" or core["schema"]["type"] != "model-fields"
        defs = {n["ref"]: n for n in nodes_of(core) if "ref" in n}
        for name in self.names:
            field = next((n for n in field_nodes(core, self.model, name)), None)
            kinds = reachable(field, defs) if field is not None else {"any"}
            if (
                kinds
                <= FLAT_LEAVES
                | {
                    "nullable",
                    "default",
                    "union",
                    "model-field",
                    "function-before",
                }
                and not wrapped
            ):
                continue
            deep.append(name)
            # A model held by an undescribed field stays the instance that it is; elsewhere it is taken apart.
            self._opaque[name] = bool(kinds - CLOSED) and not kinds & MODELS
        self._deep = tuple(deep)

    def _make_validate(self) -> Callable[[Any], BaseModel]:
        model = self.model
        self._rebuild: Callable[[Any], BaseModel] = lambda raw: self.validate(raw)
        if _overrides_validation(model):
            return model.model_validate
        run = self.validator.validate_python
        if self._by_name:
            self._rebuild = lambda raw: cast("BaseModel", run(raw, by_alias=False, by_name=True))
            return lambda raw: cast("BaseModel", run(raw, by_alias=True, by_name=True))
        return run

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when the fields, their types or their constraints do."""
        try:
            with (
                warnings.catch_warnings()
            ):  # Of defaults that JSON cannot say: they take no part in a contract.
                warnings.simplefilter("ignore")
                shape = self.model.model_json_schema(by_alias=False)
            _strip(shape)
        except Exception:  # Not every type has a JSON schema.
            shape = {name: str(info.annotation) for name, info in self.model.model_fields.items()}
        return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]

    # ------------------------------------------------------------------ taking apart

    def fields(self, model: BaseModel) -> dict[str, Any]:
        """The field values by name, in containers of their own: changing either side leaves the other alone."""
        values = model.__dict__
        if self.flat and len(values) == self._size:
            return values.copy()
        out = {
            k: v for k, v in values.items() if k in model.__class__.model_fields and k not in self._excluded
        }
        for name in self._deep:
            if name in out:
                out[name] = _isolate(out[name]) if self._opaque[name] else _plain(out[name])
        if self._extra and model.__pydantic_extra__:
            out.update({k: _isolate(v) for k, v in model.__pydantic_extra__.items()})
        return out

    def raw(self, model: BaseModel) -> Any:
        """What :meth:`validate` accepts to rebuild the same model: the fields, or the value of a root model."""
        fields = self.fields(model)
        return fields["root"] if self.root else fields

    def state(self, model: BaseModel) -> dict[str, Any]:
        """The state as the dict that hooks and the trace show."""
        raw = self.raw(model)
        return raw if isinstance(raw, dict) else {"root": raw}

    def own(self, model: BaseModel) -> BaseModel:
        """A validated model that shares nothing mutable with the object it was validated from.

        Validation makes new containers wherever a schema describes them; what hides under ``Any`` it passes on.
        """
        if not self._shares:
            return model
        # Copied, not validated again: a validator that changes values would change them twice.
        values = model.__dict__
        update = {name: _isolate(values[name]) for name in self._deep if name in values}
        update.update({k: _isolate(v) for k, v in (model.__pydantic_extra__ or {}).items()})
        return model.model_copy(update=update)

    def copy(self, model: BaseModel) -> BaseModel:
        """A copy without validation, for nodes without a contract."""
        try:
            return model.model_copy(deep=True)
        except Exception:  # Something inside cannot be copied.
            return model.model_copy(update=self.fields(model))

    def cross(self, value: BaseModel) -> BaseModel:
        """Validate a model of any class as one of this class; the result shares nothing mutable with it.

        Raises pydantic's ValidationError.
        """
        source = schema_of(type(value))
        raw = source.raw(value)
        if source._computed and source is not self and isinstance(raw, dict):
            # A computed field counts as a field for the next node if that node has a field of its name.
            for name in source._computed & frozenset(self.names):
                raw.setdefault(name, getattr(value, name))
        # A class's own values have its field names: another field's alias may be one of them.
        return self._rebuild(raw) if source is self else self.validate(raw)

    def take(self, value: BaseModel, compact: bool) -> tuple[BaseModel, Snapshot]:
        """A node's input from the state before it, and its picture: a snapshot if ``compact``, else a plain dict."""
        # cross(), for the states that most nodes have. A node mostly gets the same class from the same neighbour, so the
        # last one is remembered; and a validator that does not call Python code leaves the dict that it reads alone.
        kind = type(value)
        source = self._source if kind is self._source_model else self._remember(kind)
        values = value.__dict__
        if source._bare and not source._by_name and len(values) == source._size:
            state = self.validate(values if self._quiet else values.copy())
        else:
            state = self.cross(value)
        if self.flat and compact:
            return state, self._values(state.__dict__)
        return state, self.snapshot(state) if compact else self.state(state)

    def give(self, output: Any, compact: bool) -> tuple[BaseModel, Snapshot]:
        """A node's validated output from what it returned, and its picture. Raises what validators raise."""
        # A model is taken apart first: it may have been made without validation, or changed since. (Most outputs are
        # dicts, and pydantic takes its time over isinstance.)
        if type(output) is not dict and isinstance(output, BaseModel) and not self.any:
            model = self.cross(output)
        else:
            model = self.validate(output)
            if self._shares:
                model = self.own(model)
        if self.flat and compact:
            return model, self._values(model.__dict__)
        return model, self.snapshot(model) if compact else self.state(model)

    def _remember(self, model: type[BaseModel]) -> Schema:
        self._source_model, self._source = model, schema_of(model)
        return self._source

    # ------------------------------------------------------------------ keeping

    def snapshot(self, model: BaseModel) -> Snapshot:
        """An immutable picture of a state, cheap to take; :meth:`thaw` makes a dict of it."""
        if self.flat:
            try:
                return self._values(model.__dict__)
            except KeyError:  # Made without validation, and without some fields.
                return self.state(model)
        try:
            return self.encode(model)
        except NotSerialisable:
            return self.state(model)

    def thaw(self, snapshot: Snapshot) -> dict[str, Any]:
        """The state dict of a snapshot, fresh on each call."""
        if isinstance(snapshot, tuple):
            return dict(zip(self.names, snapshot, strict=True))
        if isinstance(snapshot, bytes):
            raw = json.loads(snapshot)
            if snapshot.startswith(_TAGGED):
                raw = untag(raw[1])
            if b'{"$c":' in snapshot:  # Only the validator knows the class.
                try:
                    return self.state(self._rebuild(raw))
                except Exception:  # One that refuses its own output must not make the trace unreadable.
                    pass
            return raw if isinstance(raw, dict) else {"root": raw}
        return self.thaw_dict(snapshot)

    @staticmethod
    def thaw_dict(snapshot: dict[str, Any]) -> dict[str, Any]:
        """A snapshot that was kept as a dict, as a dict of its own."""
        return cast("dict[str, Any]", _isolate(snapshot))

    def restore(self, snapshot: Snapshot) -> BaseModel:
        """The model of a snapshot, revalidated."""
        if isinstance(snapshot, bytes):
            return self.decode(snapshot)
        raw = self.thaw(snapshot)
        # A root model whose root is a dict is its own state.
        return self._rebuild(raw["root"] if self.root and isinstance(snapshot, tuple) else raw)

    def encode(self, model: BaseModel) -> bytes:
        """The stored form: UTF-8 JSON. Raises NotSerialisable, naming the field."""
        if self._json or (self._floats and all(map(_finite, model.__dict__.values()))):
            try:
                data = self._to_json(model, by_alias=False)
                if len(data) < _LONG_INT or not _TOO_LONG.search(data):
                    return data
            except pydantic_core.PydanticSerializationError:
                pass  # A lone surrogate, say: the tagged encoding knows it.
        raw = self.raw(model)
        try:
            data = (
                _TAGGED
                + json.dumps(tag(raw, (self.model.__name__,), _plain), separators=(",", ":")).encode()
                + b"]"
            )
        except RecursionError:
            deep = self._unwritable(raw)
            raise NotSerialisable(
                f"{deep} cannot be serialised: it contains itself, or is nested too deeply; keep the state a shallow tree"
            ) from None
        except ValueError as error:  # An integer of more digits than Python reads back.
            raise NotSerialisable(
                f"{self._unwritable(raw)} cannot be serialised: {error}; keep it smaller"
            ) from None
        if b'{"$c":' in data:
            self._refuse_lost_classes(model, data)
        return data

    def _unwritable(self, raw: Any) -> str:
        """The first field that cannot be written down, for its depth or its digits."""
        for name, value in raw.items() if isinstance(raw, dict) else ():
            try:
                json.dumps(tag(value, (), _plain))
            except NotSerialisable:
                continue
            except (RecursionError, ValueError):
                return f"{self.model.__name__}.{name}"
        return self.model.__name__

    def _refuse_lost_classes(self, model: BaseModel, data: bytes) -> None:
        # Under a declared field the validator rebuilds an enum, a path, a model; under `Any` nothing can.
        for name, before in self.fields(model).items():
            try:
                after = self.fields(self.decode(data)).get(name)
            except Exception:  # A strict class wants the instance, and data holds none.
                after = _LOST
            if (
                after is _LOST
                or type(after) is not type(before)
                or tag(after, (), _plain) != tag(before, (), _plain)
            ):
                kind = type(before).__name__
                raise NotSerialisable(
                    f"{self.model.__name__}.{name} cannot be serialised: its {kind} would come back as another type; "
                    "declare the field with the class it holds"
                )

    def decode(self, data: bytes) -> BaseModel:
        """Read back what :meth:`encode` wrote, validated by this class. Nothing stored names a class.

        Raises pydantic's ValidationError or ValueError for data that is not ours.
        """
        raw = self._parse(data)
        return raw if isinstance(raw, BaseModel) else self._rebuild(raw)

    def _parse(self, data: bytes) -> Any:
        if data.startswith(_TAGGED):
            return untag(json.loads(data)[1])
        return (
            self.validator.validate_json(data, by_alias=False, by_name=True)
            if self._by_name
            else (self.validator.validate_json(data))
        )


_LOST: Final = object()


def _strip(shape: Any) -> None:
    """Drop what a JSON schema says for people: renaming a class or wording a description changes no contract."""
    if isinstance(shape, dict):
        for key in ("title", "description", "examples"):
            if not isinstance(shape.get(key), dict):  # A field may bear the name.
                shape.pop(key, None)
        for value in shape.values():
            _strip(value)
    elif isinstance(shape, list):
        for value in shape:
            _strip(value)


def _overrides_validation(model: type[BaseModel]) -> bool:
    return bool(getattr(model.model_validate, "__func__", None) is not BaseModel.model_validate.__func__)  # type: ignore[attr-defined]


def _picker(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """What makes a tuple of the named values: by name, since a cached_property lives in __dict__ too."""
    if len(names) > 1:
        return operator.itemgetter(*names)
    return lambda values: tuple(values[name] for name in names)


def schema_of(model: type[BaseModel]) -> Schema:
    """The Schema of a model class, made once; made anew after ``model_rebuild``."""
    if model is BaseModel:
        raise TypeError("BaseModel itself describes no state; use a subclass with fields, or a RootModel")
    found: Schema | None = model.__dict__.get("__stroma_schema__")
    if found is None or found.validator is not model.__pydantic_validator__:
        found = Schema(model)
        type.__setattr__(model, "__stroma_schema__", found)
    return found


# ---------------------------------------------------------------------- values


def _finite(value: Any) -> bool:
    return type(value) is not float or math.isfinite(value)


def _plain(value: Any) -> Any:
    """A copy in which models and dataclasses are dicts of their fields."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list:
        return [_plain(v) for v in value]
    if kind is dict:
        return {k: _plain(v) for k, v in value.items()}
    if kind is tuple or kind is set or kind is frozenset:
        if kind is not tuple and not all(type(v) in _ATOMS for v in value):
            return _isolate(value)  # A dict cannot stand in a set.
        return kind(_plain(v) for v in value)
    if isinstance(value, BaseModel):
        return schema_of(kind).raw(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    return _isolate(value)


def _isolate(value: Any) -> Any:
    """A deep copy where one can be made; what cannot be copied (a lock, a client) is shared."""
    if type(value) in _ATOMS or isinstance(value, enum.Enum):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:
        return value
