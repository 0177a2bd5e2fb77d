"""Encode states for stores, and decode what stores return.

A stored state is UTF-8 JSON: pydantic's own, where that changes no value, and tagged JSON of ours everywhere
else. Where a class might not read its own output, the encoded state is decoded again before it is returned: a
store never commits a state that cannot be restored. A state that only :attr:`Validators.reinstate` reads is
marked as such.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable
from typing import Any, Final, cast

import pydantic_core
from pydantic import BaseModel, ValidationError

from stroma._utils.access import message_of
from stroma._utils.models import complaints_of
from stroma.contracts.copying import classes_in
from stroma.contracts.core_schema import build_constant_writer, core_schema_of
from stroma.contracts.tagged_json import NotSerialisable, keeping_secrets, tag, untag
from stroma.contracts.traits import SchemaTraits, Validators

#: Starts a stored value in tagged encoding; a plain JSON object never does.
_TAGGED_START: Final = b'["stroma/1",'
_TAGGED_END: Final = b"]"
#: Ends a tagged value that is read back without functions and strictness; see :attr:`Validators.reinstate`.
_REINSTATED_END: Final = b',"settled"]'
#: Tags a value that only the class of its field can restore.
_CLASS_TAG: Final = b'{"$c":'
#: Python reads no integer of more digits.
_TOO_MANY_DIGITS: Final = b"0" * 4301
#: Written by pydantic in place of each lone surrogate in the key of a dict.
_REPLACEMENT: Final = "\ufffd".encode()
_DIGITS_AS_ZEROS: Final = bytes(b"0"[0] if chr(i) in "0123456789" else b" "[0] for i in range(256))
_MAX_ERRORS: Final = 5
_subclasses_of: Final = operator.methodcaller("__subclasses__")


class SchemaCodec:
    """Encodes and decodes the instances of one model class.

    ``schema``: its Schema, whose module this one must not import.
    """

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._traits: SchemaTraits = schema.traits
        self._validators: Validators = schema.validators
        self._name: str = schema.traits.model.__name__

    def encode(self, model: BaseModel) -> bytes:
        """Return the stored form of a model. Raises NotSerialisable, naming the field."""
        traits = self._traits
        data = self._write(model)
        # Subclasses are looked up on each call, because one may be defined at any time.
        has_classes = (
            traits.has_ambiguous_union
            or _CLASS_TAG in data
            or (bool(traits.nested_classes) and any(map(_subclasses_of, traits.nested_classes)))
        )
        if (
            has_classes
            or traits.may_change_on_revalidation
            or (traits.is_strict and data.startswith(_TAGGED_START))
        ):
            return self._verify(model, data, has_classes)
        return data

    def encode_with_secrets(self, model: BaseModel) -> bytes:
        """Return the stored form including secrets, for a store that encrypts what it stores."""
        with keeping_secrets():
            return self.encode(model)

    def decode(self, data: bytes) -> BaseModel:
        """Return the model that :meth:`encode` encoded, validated by this class. Stored data names no class.

        Raises pydantic's ValidationError, or ValueError for data that this codec did not write.
        """
        if data.startswith(_TAGGED_START):
            _, raw, *marks = json.loads(data)
            return (self._validators.reinstate if marks else self._validators.rebuild)(untag(raw))
        validator = self._traits.model.__pydantic_validator__
        if self._traits.has_validation_aliases:
            return cast("BaseModel", validator.validate_json(data, by_alias=False, by_name=True))
        return cast("BaseModel", validator.validate_json(data))

    # ------------------------------------------------------------------ writing

    def _write(self, model: BaseModel) -> bytes:
        if self._traits.is_exact_in_json and self._write_json is not None:
            try:
                data = self._write_json(model, by_alias=False, warnings="error")
            except pydantic_core.PydanticSerializationError:
                pass  # Tagged JSON represents it: a lone surrogate, for example, or a value of another type.
            else:
                if self._is_readable(data):
                    return data
        return self._write_tagged(model, _TAGGED_END)

    @functools.cached_property
    def _write_json(self) -> Callable[..., bytes] | None:
        """Writes JSON, with NaN and Infinity; None if this pydantic would write null for them."""
        model = self._traits.model
        if self._traits.has_floats:
            return build_constant_writer(core_schema_of(model))
        return model.__pydantic_serializer__.to_json

    def _is_readable(self, data: bytes) -> bool:
        """Return False for JSON that may have lost a value, or that cannot be read back.

        It may hold NaN, an infinite float, a lone surrogate, or an integer that is too long.
        """
        if self._traits.has_floats and (b"NaN" in data or b"Infinity" in data):
            return False
        if _REPLACEMENT in data:
            return False
        return len(data) < len(_TOO_MANY_DIGITS) or _TOO_MANY_DIGITS not in data.translate(_DIGITS_AS_ZEROS)

    def _write_tagged(self, model: BaseModel, end: bytes) -> bytes:
        raw = self._schema.raw(model)
        try:
            text = json.dumps(tag(raw, (self._name,), self._schema.to_plain), separators=(",", ":"))
        except (RecursionError, ValueError) as error:
            why, fix = str(error), "keep it smaller"  # An integer of more digits than Python reads back.
            if isinstance(error, RecursionError):
                why, fix = "it contains itself, or is nested too deeply", "keep the state a shallow tree"
            field = self._unwritable_field(raw)
            raise NotSerialisable(f"{field} cannot be serialised: {why}; {fix}") from None
        return _TAGGED_START + text.encode() + end

    def _unwritable_field(self, raw: Any) -> str:
        """Return the first field that cannot be written because of its depth or its digits."""
        for name, value in raw.items() if isinstance(raw, dict) else ():
            try:
                json.dumps(tag(value, (), self._schema.to_plain))
            except NotSerialisable:
                continue
            except (RecursionError, ValueError):
                return f"{self._name}.{name}"
        return self._name

    # ------------------------------------------------------------------ reading back

    def _verify(self, model: BaseModel, data: bytes, has_classes: bool) -> bytes:
        """Return a stored form that decodes to an equal model. Raises NotSerialisable, naming the field."""
        problem: NotSerialisable | None = None
        for reinstated in (False, True):
            stored = self._write_tagged(model, _REINSTATED_END) if reinstated else data
            try:
                decoded = self.decode(stored)
                # If no class is in question, equal bytes prove equal values.
                is_equal = not has_classes and self._write(decoded) == data
                difference = None if is_equal else self._difference(model, decoded)
            except (
                Exception
            ) as error:  # A strict class, for example, requires instances, and data holds none.
                problem = problem or self._unreadable(model, error)
            else:
                if difference is None:
                    return stored
                problem = difference
        assert problem is not None
        raise problem

    def _difference(self, model: BaseModel, decoded: BaseModel) -> NotSerialisable | None:
        """Return the error for a field of a decoded model that differs, or None."""
        before, after = self._schema.fields(model), self._schema.fields(decoded)
        extra_before, extra_after = model.__pydantic_extra__ or {}, decoded.__pydantic_extra__ or {}
        for name, value in before.items():
            classes_before = classes_in(model.__dict__.get(name, extra_before.get(name)))
            classes_after = classes_in(decoded.__dict__.get(name, extra_after.get(name)))
            for kind, other in zip(classes_before, classes_after, strict=False):
                if kind is not other:
                    return NotSerialisable(
                        f"{self._name}.{name} cannot be serialised: its {kind.__name__} would come back as "
                        f"{other.__name__}; declare the field with the class it holds, "
                        "or as a discriminated union"
                    )
            to_plain = self._schema.to_plain
            if name not in after or tag(value, (name,), to_plain) != tag(after[name], (name,), to_plain):
                return NotSerialisable(
                    f"{self._name}.{name} cannot be serialised: it would come back as another value; "
                    "make its validators return their own output unchanged"
                )
        return None

    def _unreadable(self, model: BaseModel, error: Exception) -> NotSerialisable:
        where: tuple[Any, ...] = ()
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where, error = first["loc"], ValueError(first["msg"])
        else:
            for name, value in self._schema.fields(model).items():
                try:
                    untag(tag(value, (name,), self._schema.to_plain))
                except Exception:
                    where = (name,)
                    break
        return NotSerialisable(
            f"{'.'.join(map(str, (self._name, *where)))} cannot be serialised: it could not be read back "
            f"({error}); declare the field with the class it holds, and keep models out of sets and keys"
        )


def sort_keys(data: bytes) -> bytes:
    """Return a stored form with the keys of all dicts sorted, as equal dicts may differ in their order.

    Data that is not JSON is returned as it is.
    """
    is_tagged = data.startswith(_TAGGED_START)
    try:
        value = json.loads(data, object_hook=_sort_pairs if is_tagged else None)
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return data


def _sort_pairs(value: dict[str, Any]) -> dict[str, Any]:
    """Sort a tagged dict whose keys are not all text: a list of pairs."""
    pairs = value.get("$d")
    if len(value) == 1 and isinstance(pairs, list):
        return {"$d": sorted(pairs, key=functools.partial(json.dumps, sort_keys=True))}
    return value


def is_same_data(data: bytes, other: bytes) -> bool:
    """Return True if two stored forms have the same data, whatever the order of the keys in their dicts."""
    return data == other or _content(data) == _content(other)


def is_extended(data: bytes, before: bytes, *, values: bool = True) -> bool:
    """Return True if a stored form has all fields of another one, with their values: it may have more.

    Raises ValueError for data that is not JSON.
    """
    return _has_all(json.loads(_content(data)), json.loads(_content(before)), values)


def _has_all(value: Any, before: Any, values: bool) -> bool:
    if type(value) is dict and type(before) is dict:
        return all(name in value and _has_all(value[name], one, values) for name, one in before.items())
    if type(value) is list and type(before) is list:
        pairs = zip(value, before, strict=False)
        return (len(value) == len(before) or not values) and all(_has_all(*pair, values) for pair in pairs)
    return not values or (type(value) is type(before) and bool(value == before))


def _content(data: bytes) -> bytes:
    data = sort_keys(data)
    if not data.startswith(_TAGGED_START):
        return data
    end = _REINSTATED_END if data.endswith(_REINSTATED_END) else _TAGGED_END
    return data.removeprefix(_TAGGED_START).removesuffix(end)


def decode_raw(data: bytes) -> Any:
    """Return stored data as plain values, without a schema. Raises ValueError for other data."""
    raw = json.loads(data)
    return untag(raw[1]) if data.startswith(_TAGGED_START) else raw


def has_class_tags(data: bytes) -> bool:
    """Return True if stored data has values that only the class of their field can restore."""
    return _CLASS_TAG in data


def describe_error(error: Exception) -> tuple[str, Exception | None]:
    """Return why stored data was refused, in one line, and the exception to chain as the cause, if any.

    Neither shows the data. The text and the cause of a pydantic error are omitted, because printing one
    formats all of the data first, with up to four bytes for each byte of it.
    """
    if not isinstance(error, ValidationError):
        return message_of(error), error
    errors = complaints_of(error)
    lines = [": ".join(filter(None, one)) for one in errors[:_MAX_ERRORS]]
    more = f"; and {len(errors) - _MAX_ERRORS} more" if len(errors) > _MAX_ERRORS else ""
    return "; ".join(lines) + more, None


def describe_difference(before: bytes, now: bytes) -> str:
    """Return in which fields two stored inputs differ, without their values."""
    try:
        one, two = _fields_of(before), _fields_of(now)
        names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "another input"
    return f"other values of {', '.join(map(repr, names))}" if names else "another input"


def _fields_of(encoded: bytes) -> Any:
    """Return the fields of a stored value, which may be behind the mark of its form."""
    value = json.loads(encoded)
    return value[1] if type(value) is list else value
