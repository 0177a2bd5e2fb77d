"""Model classes as contracts: validation, conversion and copying of their instances at each boundary.

All that depends on the class alone is decided once, in :class:`~stroma.contracts.traits.SchemaTraits`. Values
are read by *field name*, never through serializers: an alias, a computed field or a lossy
``field_serializer`` must not change what the next node receives. A model inside a model crosses as an
instance, validated by its own class: as a dict, an instance of a subclass would become one of the class that
the field declares.

A class that calls user code or decodes text (``Json``, ``Base64Str``) may change or refuse its own output.
Its instances are therefore not validated twice: the schema remembers those that it validated and that nobody
else can change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from weakref import WeakValueDictionary

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from stroma.contracts.codec import SchemaCodec, decode_raw, has_class_tags, is_extended, sort_keys
from stroma.contracts.copying import (
    PickledSnapshot,
    Snapshot,
    construct,
    copy_containers,
    isolate,
    pickle_data,
    renew_dataclass,
    replace_records,
    replicate,
    set_extra,
)
from stroma.contracts.tagged_json import NotSerialisable
from stroma.contracts.traits import SchemaTraits, Validators

_DEFINITIONS: Final = "#/$defs/"
#: Keys of a JSON schema that hold values and no schemas.
_VALUES: Final = frozenset({"const", "default", "enum"})
#: Keys that hold schemas by names of the user's own.
_MAPS: Final = frozenset({"mapping", "patternProperties", "properties"})
_WORDS: Final = ("title", "description", "examples")
#: Of functions and objects in the text of an annotation: another one in each process.
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint_of(model: type[BaseModel]) -> str:
    """Return 16 hexadecimal digits that change when the fields, their types or their constraints change.

    Names, docstrings, titles and examples of the class and of the classes inside it do not count.
    """
    try:
        # Pydantic warns of defaults that JSON cannot represent; a contract has none.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape = model.model_json_schema(by_alias=False)
        shape = _without_words(shape)
    except Exception:  # Not every type has a JSON schema.
        shape = {name: _text_of(info) for name, info in model.model_fields.items()}
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _text_of(info: FieldInfo) -> str:
    return _ADDRESS.sub("", f"{info.annotation} {info.metadata} {info.is_required()}")


def _without_words(shape: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema without titles, descriptions and examples, whose definitions have numbers."""
    definitions: dict[str, Any] = shape.get("$defs", {})
    numbers: dict[str, int] = {}

    def strip(value: Any) -> Any:
        if isinstance(value, list):
            return [strip(item) for item in value]
        if isinstance(value, str) and value.startswith(_DEFINITIONS):
            return f"{_DEFINITIONS}{numbers.setdefault(value.removeprefix(_DEFINITIONS), len(numbers))}"
        return strip_schema(value) if isinstance(value, dict) else value

    def strip_schema(schema: dict[str, Any]) -> dict[str, Any]:
        stripped: dict[str, Any] = {}
        for key in sorted(schema):
            value = schema[key]
            if key in _MAPS:
                stripped[key] = {name: strip(value[name]) for name in sorted(value)}
            elif key in _VALUES:
                stripped[key] = value
            elif key not in _WORDS and key != "$defs":
                stripped[key] = strip(value)
        return stripped

    def strip_definitions() -> Iterator[tuple[int, Any]]:
        done = 0
        while done < len(numbers):  # A definition may refer to further ones.
            name = list(numbers)[done]
            yield done, strip(definitions.get(name))
            done += 1

    return {"schema": strip_schema(shape), "definitions": dict(strip_definitions())}


_subclasses_of: Final = operator.methodcaller("__subclasses__")
_MAX_JSON_SCHEMA: Final = 65_536  # characters


class Schema:
    """One model class, as seen from its boundaries. Created by :func:`schema_of`."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.traits: Final = SchemaTraits(model)
        self.validators: Final = Validators(self.traits)
        self.codec: Final = SchemaCodec(self)
        self.model: Final = model
        #: The attributes of the class itself. Looking one up through its metaclass takes four times as long.
        self.namespace: Final[Mapping[str, Any]] = model.__dict__
        self.validator: Final = model.__pydantic_validator__
        self.validate: Final = self.validators.validate
        self.field_names: Final = self.traits.field_names
        self.is_root: Final = self.traits.is_root
        self.is_flat: Final = self.traits.is_flat
        self._size = len(self.field_names)
        #: Of a ``__dict__`` that another class validates as it is; -1 if none does.
        self._plain_size = self._size if self.traits.passes_values_unchanged else -1
        self._pick: Final = _picker(self.field_names)
        self.decode: Final = self.codec.decode
        #: Models, by id, that this class validated and that nobody else can change: they cross without
        #: validation.
        self._exclusive: WeakValueDictionary[int, BaseModel] | None = (
            WeakValueDictionary() if self.traits.tracks_instances else None
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when the fields, their types or their constraints change."""
        return fingerprint_of(self.model)

    @functools.cached_property
    def json_schema(self) -> str:
        """The JSON schema of the model, as text; "" without one, or if it has over 65,536 characters."""
        try:
            text = json.dumps(self.model.model_json_schema())
        except Exception:  # Not every type has a JSON schema, and code of the class may raise anything.
            return ""
        return text if len(text) <= _MAX_JSON_SCHEMA else ""

    # ------------------------------------------------------------------ reading fields

    def fields(self, model: BaseModel) -> dict[str, Any]:
        """Return the field values by name, in new containers. Models and dataclasses inside become dicts."""
        values = model.__dict__
        if self.is_flat and len(values) == self._size:
            return values.copy()
        out = self._shallow(model)
        for name in self.traits.field_classes:
            if name in out:
                is_opaque = name in self.traits.opaque_fields
                out[name] = isolate(out[name]) if is_opaque else _to_plain(out[name])
        return out

    def _shallow(self, model: BaseModel) -> dict[str, Any]:
        names, excluded = model.__class__.model_fields, self.traits.excluded_fields
        out = {k: v for k, v in model.__dict__.items() if k in names and k not in excluded}
        if self.traits.allows_extra and model.__pydantic_extra__:
            # An extra value may have the name of a field that has an alias: the field takes precedence.
            out.update({k: isolate(v) for k, v in model.__pydantic_extra__.items() if k not in out})
        return out

    def values(self, model: BaseModel) -> dict[str, Any]:
        """Return the field values like :meth:`fields`, with copies of the models and dataclasses inside."""
        return self._values_for(self, model, _clone_record)

    def _values_for(self, target: Schema, model: BaseModel, renew: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the field values for another schema: instances of classes it names, else dicts."""
        out = self._shallow(model)
        accepted = target.traits.field_classes
        for name, declared in self.traits.field_classes.items():
            if name not in out:
                continue
            if name in self.traits.opaque_fields:
                out[name] = isolate(out[name])
            else:
                out[name] = _convert_records(out[name], declared, accepted.get(name, frozenset()), renew)
        return out

    def raw(self, model: BaseModel) -> Any:
        """Return the fields as a dict, or the value of a root model."""
        fields = self.fields(model)
        return fields["root"] if self.is_root else fields

    def state(self, model: BaseModel) -> dict[str, Any]:
        """Return the state as the dict that hooks and the trace show."""
        values = model.__dict__
        if self.is_flat and len(values) == self._size:  # As in fields(), without two more calls.
            return values.copy()
        return _as_dict(self.raw(model))

    @staticmethod
    def to_plain(value: Any) -> Any:
        """Return a copy of a value in which models and dataclasses are dicts of their fields."""
        return _to_plain(value)

    # ------------------------------------------------------------------ copying and ownership

    def detach(self, model: BaseModel) -> BaseModel:
        """Return a validated model that shares nothing mutable with the object that it was validated from.

        Validation creates new containers wherever a schema describes them, and passes on what ``Any``
        describes.
        """
        if not self.traits.has_undescribed_values:
            return model
        # Copied, not validated again: a validator that changes values would change them twice.
        values = model.__dict__
        update = {name: isolate(values[name]) for name in self.traits.field_classes if name in values}
        update.update({k: isolate(v) for k, v in (model.__pydantic_extra__ or {}).items()})
        return replicate(model, update)

    def clone(self, model: BaseModel) -> BaseModel:
        """Return an exact copy of a validated model that shares nothing mutable with it.

        It is not validated again, so that no validator changes it. Only a class whose construction runs user
        code, or that has excluded fields, is validated first, and may raise what its validators raise.
        """
        if self.traits.must_reconstruct:
            fields = self.values(model)
            twin = self._validate_from(self, model, fields)
            vars(twin).update({name: fields[name] for name in self.field_names if name in fields})
            return twin
        values, opaque = model.__dict__, self.traits.opaque_fields
        update = {
            name: isolate(values[name]) if name in opaque else copy_containers(values[name], _clone_record)
            for name in self.traits.field_classes
            if name in values
        }
        update.update({k: isolate(v) for k, v in (model.__pydantic_extra__ or {}).items()})
        return replicate(model, update)

    def copy(self, model: BaseModel) -> BaseModel:
        """Return a copy like :meth:`clone`, of a model that may be invalid, for nodes without a contract."""
        if self.traits.must_reconstruct:
            try:
                return self.clone(model)
            except Exception:  # It was not validated, and is invalid.
                pass
        values, described = model.__dict__, self.traits.field_classes.keys() - self.traits.opaque_fields
        update = {
            name: copy_containers(value, _copy_record) if name in described else isolate(value)
            for name, value in {**values, **(model.__pydantic_extra__ or {})}.items()
        }
        return replicate(model, update)

    def construct(self, values: dict[str, Any]) -> BaseModel:
        """Return a model with these values, unvalidated; a field without a value is None."""
        fields = {name: values.get(name) for name in self.field_names}
        model = construct(self.model, fields, values.keys() & fields.keys())
        if self.traits.allows_extra:
            set_extra(model, {k: v for k, v in values.items() if k not in fields})
        return model

    def mark_exclusive(self, model: BaseModel) -> BaseModel:
        """Record that this class validated the model, and that nobody else can change it."""
        if self._exclusive is not None:
            self._exclusive[id(model)] = model
        return model

    def mark_shared(self, model: BaseModel) -> None:
        """Record that user code holds the model from now on, and may change it."""
        if self._exclusive is not None:
            self._exclusive.pop(id(model), None)

    # ------------------------------------------------------------------ boundaries

    def convert(self, value: BaseModel) -> BaseModel:
        """Return a model of any class as a validated one of this class that shares nothing mutable with it.

        Raises pydantic's ValidationError.
        """
        source, values = schema_of(type(value)), value.__dict__
        if len(values) == source._plain_size:
            # Most states: half of the 8 us of a returned model. Pure validation does not change the dict.
            return self.validate(values if self.traits.is_pure else values.copy())
        if source.traits.can_renew and self.validators.renew is not None and self._can_renew_from(source):
            return self.validators.renew(source._shallow(value))
        renew = _renew_record
        if source._exclusive is not None and source._exclusive.get(id(value)) is value:
            if source is self:
                return self.clone(value)
            renew = _clone_record
        try:
            fields = source._values_for(self, value, renew)
        except ValidationError:
            # A model inside is invalid. Validating plain fields raises an error with its path from the
            # outermost model.
            self._validate_from(source, value, source.fields(value))
            raise
        return self._validate_from(source, value, fields)

    def _can_renew_from(self, source: Schema) -> bool:
        """Return True if models inside another class have the classes that the fields of this class name."""
        if source is not self:
            if source.traits.computed_fields:
                return False
            accepted = self.traits.field_classes
            for name, declared in source.traits.field_classes.items():
                if not declared <= accepted.get(name, frozenset()):
                    return False
        # An instance of a subclass must stay one. Subclasses are looked up on each call: one may be defined
        # at any time.
        return not any(map(_subclasses_of, self.traits.nested_classes))

    def _validate_from(self, source: Schema, value: BaseModel, fields: dict[str, Any]) -> BaseModel:
        """Validate the fields of an instance of another class."""
        raw = fields["root"] if source.is_root else fields
        # The field names of this very class: an alias of another field may be one of them.
        if source is self:
            return self.validators.rebuild(raw)
        if source.traits.computed_fields and isinstance(raw, dict):
            # A computed field counts as a field for a class that has a field of its name.
            for name in source.traits.computed_fields & frozenset(self.field_names):
                raw.setdefault(name, getattr(value, name))
        decoded = self.traits.decoded_fields
        is_decoded = decoded and decoded <= source.traits.decoded_fields
        return self.validators.decoded(raw) if is_decoded else self.validate(raw)

    def accept_output(self, output: Any) -> tuple[BaseModel, Snapshot]:
        """Return the validated output of a node, and its snapshot. Raises what validators raise."""
        if self.is_flat and self._exclusive is None and type(output) is dict:  # The output of most nodes.
            model = self.validate(output)
            return model, self._pick(model.__dict__)
        # The fields of a model are validated: it may have been constructed without validation, or changed
        # since.
        is_model = isinstance(output, BaseModel) and not self.traits.is_untyped
        model = self.convert(output) if is_model else self._admit(output)
        self.mark_exclusive(model)
        return model, self.snapshot(model)

    def _admit(self, output: Any) -> BaseModel:
        """Validate an output that is not a model, and the instances inside, which pydantic would accept."""
        if self.traits.is_untyped:
            return self.validate(isolate(output))
        if not self.traits.needs_isolation:
            return self.validate(output)
        renew, nested = self.validators.renew, self.traits.nested_classes
        if renew is not None and self._can_renew_from(self):
            return renew(output)
        if not nested or type(output) is not dict:
            return self.detach(self.validate(output))

        def renew_nested(value: Any) -> Any:
            return _renew_record(value) if nested.intersection(type(value).__mro__) else value

        try:
            renewed = replace_records(output, renew_nested)
        except ValidationError:  # As in convert().
            self.validate(_to_plain(output))
            raise
        return self.detach(self.validate(renewed))

    def assemble(self, values: dict[str, Any]) -> tuple[BaseModel, Snapshot]:
        """Return a model of values that other classes have validated, by field name, and its snapshot.

        It is not validated again: a validator would change the values twice, and a decoder refuse decoded
        ones.
        """
        model = self.mark_exclusive(self.construct(values))
        return model, self.snapshot(model)

    # ------------------------------------------------------------------ snapshots

    def snapshot(self, model: BaseModel) -> Snapshot:
        """Return an immutable form of a state; :meth:`thaw` and :meth:`restore` read it."""
        values = model.__dict__
        if self.is_flat:
            try:
                return self._pick(values)
            except KeyError:  # Constructed without validation, and without some fields.
                return self.copy(model)
        if self.traits.is_picklable and len(values) == self._size:
            data = pickle_data(values)
            if data is not None:
                return PickledSnapshot(data)
        try:
            return self.encode(model)
        except NotSerialisable:
            return self.copy(model)

    def thaw(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return the state of a snapshot as a dict, new on each call.

        Never raises for one in a store: a deleted blob must not make the rest of the trace unreadable.
        """
        if isinstance(snapshot, tuple):
            return dict(zip(self.field_names, snapshot, strict=True))
        if isinstance(snapshot, BaseModel):
            return self.state(snapshot)
        if isinstance(snapshot, dict):
            copied: dict[str, Any] = isolate(snapshot)
            return copied
        if isinstance(snapshot, PickledSnapshot):
            values = snapshot.open()
            return _as_dict(values["root"] if self.is_root else values)
        if isinstance(snapshot, bytes):
            return self.thaw_encoded(snapshot)
        try:
            data = snapshot.load()
            is_plain = self.is_flat or self.traits.is_picklable
            return self.state(self.decode(data)) if is_plain else self.thaw_encoded(data)
        except Exception as error:
            return {"unavailable": str(error)}

    def thaw_encoded(self, data: bytes) -> dict[str, Any]:
        """Return the state of an encoded snapshot as a dict."""
        if has_class_tags(data):
            try:
                return self.state(self.decode(data))
            except Exception:  # A class that refuses its own output must not make the trace unreadable.
                pass
        return _as_dict(decode_raw(data))

    def restore(self, snapshot: Snapshot) -> BaseModel:
        """Return a model equal to the one of which the snapshot was taken."""
        if isinstance(snapshot, tuple):
            model = self.validators.rebuild(self.thaw(snapshot))
            if not self.traits.is_pure:  # Validators may have changed the values.
                vars(model).update(zip(self.field_names, snapshot, strict=True))
            return model
        if isinstance(snapshot, BaseModel):
            return self.copy(snapshot)
        if isinstance(snapshot, dict):
            return self.validators.rebuild(self.thaw(snapshot))
        if isinstance(snapshot, PickledSnapshot):
            return self.construct(snapshot.open())
        return self.decode(snapshot if isinstance(snapshot, bytes) else snapshot.load())

    # ------------------------------------------------------------------ stored forms

    def encode(self, model: BaseModel, *, secrets: bool = False) -> bytes:
        """Return the stored form of a model: UTF-8 JSON. Raises NotSerialisable, naming the field.

        ``secrets``: include secrets, for a store that encrypts what it stores.
        """
        return self.codec.encode_with_secrets(model) if secrets else self.codec.encode(model)

    def encode_sorted(self, model: BaseModel, *, secrets: bool = False) -> bytes:
        """Return the stored form with the keys of dicts sorted: equal models have equal bytes.

        Raises NotSerialisable.
        """
        data = self.encode(model, secrets=secrets)
        return sort_keys(data) if self.traits.has_mappings else data

    def input_key(self, model: BaseModel, *, is_sealed: bool) -> bytes | None:
        """Return what an input is compared by: its sorted stored form, or a digest if it has secrets.

        None for one without a stored form. ``is_sealed``: the store encrypts the digest. Otherwise it has a
        key of this process, and other processes cannot compare it: a short secret could be guessed.
        """
        with contextlib.suppress(NotSerialisable):
            return self.encode_sorted(model)
        try:
            data = self.encode_sorted(model, secrets=True)
        except NotSerialisable:
            return None
        digest, owner = hashlib.sha256(data if is_sealed else _PROCESS_KEY + data), _PROCESS
        return b"%s%s %s" % (_SECRET, b"sealed" if is_sealed else owner, digest.hexdigest().encode())

    def renew_key(self, key: bytes | None) -> bytes | None:
        """Return a recorded input key as inputs are compared now: fields that are new have their defaults.

        None for an input that cannot be compared: its class had other fields, or see :func:`comparable`.
        """
        if key is None or has_secrets(key):
            return comparable(key)
        with contextlib.suppress(ValueError, NotSerialisable):
            now = self.encode_sorted(self.decode(key))
            if is_extended(now, key):
                return now
            if is_extended(now, key, values=False):  # Its validators change it each time.
                return key
        return None

    def parse(self, text: str) -> BaseModel:
        """Return the instance in a JSON text of a person: with fields by name or by alias."""
        parsed: BaseModel = self.validator.validate_json(text, by_alias=True, by_name=True)
        return parsed


#: Prefix of the digests of inputs with secrets; no stored form begins with it. The name of the process in
#: them, and its key.
_SECRET: Final = b"secret "
_PROCESS: Final = os.urandom(8).hex().encode()
_PROCESS_KEY: Final = os.urandom(32)


def has_secrets(input_key: bytes) -> bool:
    """Return True for a digest in place of the stored form of an input."""
    return input_key.startswith(_SECRET)


def comparable(input_key: bytes | None) -> bytes | None:
    """Return what an input is compared by; None if another process made it and it cannot be compared."""
    if input_key is None or not has_secrets(input_key):
        return input_key
    return input_key if input_key.split()[1] in (b"sealed", _PROCESS) else None


def schema_of(model: type[BaseModel]) -> Schema:
    """Return the Schema of a model class: one for each class, and a new one after ``model_rebuild``."""
    if model is BaseModel:
        raise TypeError("BaseModel itself describes no state; use a subclass with fields, or a RootModel")
    schema: Schema | None = getattr(model, "__stroma_schema__", None)
    # A class without a schema inherits its parent's. (Reading __dict__ of the class here takes longer than
    # all the rest.)
    if (
        schema is None
        or schema.model is not model
        or schema.namespace["__pydantic_validator__"] is not schema.validator
    ):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise TypeError(f"a state must be a pydantic model, got {getattr(model, '__name__', model)}")
        schema = Schema(model)
        type.__setattr__(model, "__stroma_schema__", schema)
    return schema


def _picker(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Return a function that makes a tuple of the named values; a ``__dict__`` may hold others."""
    if len(names) > 1:
        return operator.itemgetter(*names)
    if names:
        (name,) = names
        return lambda values: (values[name],)
    return lambda _: ()


def _as_dict(raw: Any) -> dict[str, Any]:
    """Return the fields of a state, or its root value under the name "root"."""
    return raw if isinstance(raw, dict) else {"root": raw}


def _to_plain(value: Any) -> Any:
    return copy_containers(value, _record_to_plain)


def _record_to_plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return schema_of(type(value)).raw(value)
    return {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}


def _copy_record(value: Any) -> Any:
    """Return a copy of a model or dataclass that may be invalid."""
    return schema_of(type(value)).copy(value) if isinstance(value, BaseModel) else isolate(value)


def _clone_record(value: Any) -> Any:
    """Return a copy of a model or dataclass without validation."""
    return schema_of(type(value)).clone(value) if isinstance(value, BaseModel) else isolate(value)


def _renew_record(value: Any) -> Any:
    """Return a model or dataclass validated again from its field values, as an instance of its own class."""
    if not isinstance(value, BaseModel):
        return renew_dataclass(value, lambda inner: copy_containers(inner, _renew_record))
    schema = schema_of(type(value))
    # pydantic validates it again, which is enough.
    return _clone_record(value) if schema.traits.revalidates_instances else schema.convert(value)


def _convert_records(
    value: Any, declared: frozenset[type], accepted: frozenset[type], renew: Callable[[Any], Any]
) -> Any:
    """Return a copy in which records of accepted classes are renewed, and all others become dicts."""

    def convert(value: Any) -> Any:
        kinds = type(value).__mro__
        if not accepted.isdisjoint(kinds):
            return renew(value)
        if declared.isdisjoint(kinds):
            return isolate(value)  # Under `Any`, it stays an instance.
        if not isinstance(value, BaseModel):
            return {
                f.name: copy_containers(getattr(value, f.name), convert)
                for f in dataclasses.fields(value)
                if f.init
            }
        schema = schema_of(type(value))
        fields = {k: copy_containers(v, convert) for k, v in schema._shallow(value).items()}
        return fields["root"] if schema.is_root else fields

    return copy_containers(value, convert)
