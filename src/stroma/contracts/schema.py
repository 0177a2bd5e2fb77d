"""How a model class crosses a boundary: validated, taken apart, stored and read back.

Everything here is decided once per class, from pydantic's own core schema, and cached on the class:

* *flat* classes hold only immutable leaves, so a shallow copy of their fields is already isolated;
* *JSON* classes survive pydantic's JSON serializer unchanged (no float, no bytes, no custom serializer ...);
* all others are stored in a tagged JSON encoding of ours, so that what comes back equals what was stored.

Values are taken apart by *field name*, never through serializers: an alias, a computed field or a lossy
``field_serializer`` must not change what the next node receives. A model inside a model crosses as an instance, each
validated by its own class: taken apart to a dict, a subclass would come out as the class that its field declares.

A class that calls functions of the user's, or decodes text (``Json``, ``Base64Str``), may change or refuse its own output.
Where it meets that again, it meets it without its decoders; where it validated the very object itself, not at all; and
what is stored is read back before it is promised, and marked if only the schema without those functions reads it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, cast
from weakref import WeakValueDictionary

import pydantic_core
from pydantic import BaseModel, ValidationError

from stroma.contracts.copying import (
    Packed,
    are_atoms,
    classes_in,
    holds_record,
    isolate,
    pack,
    pack_atoms,
    renew_dataclass,
    walk,
    with_records,
)
from stroma.contracts.core_schema import (
    CLOSED,
    FLAT_LEAVES,
    JSON_LEAVES,
    MODELS,
    ambiguous,
    chooses,
    core_schema_of,
    decodes,
    field_nodes,
    foreign,
    is_strict,
    nodes_of,
    plain_json,
    reachable,
    renewable,
    restless,
    validator_that_renews,
    validator_without,
    writer_of_constants,
)
from stroma.contracts.tagged_json import NotSerialisable, keeping_secrets, tag, untag

__all__ = [
    "Given",
    "NotSerialisable",
    "Packed",
    "Schema",
    "Snapshot",
    "Stored",
    "become",
    "filled",
    "schema_of",
    "stamped",
    "told_of",
]

ModelT = TypeVar("ModelT", bound=BaseModel)
# What object.__setattr__ comes to, in half its time.
_new: Final[Any] = object.__new__
_put_values: Final[Any] = BaseModel.__dict__["__dict__"].__set__
_put_given: Final[Any] = BaseModel.__dict__["__pydantic_fields_set__"].__set__
_put_extra: Final[Any] = BaseModel.__dict__["__pydantic_extra__"].__set__
_put_private: Final[Any] = BaseModel.__dict__["__pydantic_private__"].__set__


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A reference to a state that a store keeps apart from its rows, in stored form; :meth:`load` reads it, which may block.

    ``load`` raises StoreError.
    """

    load: Callable[[], bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """The picture of an input: that of the output before it. What the node's schema makes of it is found when it is read."""

    source: Packed | bytes | Stored

    def open(self) -> Any:
        if isinstance(self.source, Packed):
            return self.source.open()
        return (
            Schema.raw_of(self.source.load()) if isinstance(self.source, Stored) else json.loads(self.source)
        )


#: What a trace or a store keeps of a state: the values of a flat one, the bytes of any other, or, where no
#: encoding exists, a private copy of it; a reference to what stands in a blob. See :meth:`Schema.snapshot`.
Snapshot = tuple[Any, ...] | Packed | Given | Stored | bytes | dict[str, Any] | BaseModel

_MISSING: Final = object()
#: The type of the values that a node of a schema stands for, if JSON can say all of them.
_JSON_TYPES: Final[dict[str, type]] = {
    "str": str, "int": int, "bool": bool, "float": float, "none": type(None), "nullable": type(None),
}  # fmt: skip
#: Python reads no integer of more digits.
_LONG_INT: Final = 4300
#: Starts a stored value in our tagged encoding; a plain JSON object never does.
_TAGGED: Final = b'["stroma/1",'
#: Ends one that is read back without functions and strictness; see Schema._settle.
_SETTLED: Final = b',"settled"]'


class Schema:
    """One model class, seen from its boundaries. Made by :func:`schema_of`."""

    __slots__ = (
        "__dict__",  # for the fingerprint, which few need
        "_accepts",
        "_again",
        "_ambiguous",
        "_anew",
        "_bare",
        "_by_name",
        "_careful",
        "_changing",
        "_computed",
        "_copies",
        "_decoding",
        "_deep",
        "_derives",
        "_exact",
        "_excluded",
        "_extra",
        "_fast",
        "_floats",
        "_given",
        "_json",
        "_nested",
        "_nested_floats",
        "_opaque",
        "_packs",
        "_quiet",
        "_rebuild",
        "_renewable",
        "_revalidates",
        "_shares",
        "_size",
        "_source",
        "_strict",
        "_to_json",
        "_values",
        "any",
        "flat",
        "model",
        "names",
        "namespace",
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
        #: What the class itself has. Its metaclass makes an attribute take four times as long to look up.
        self.namespace: Final[Mapping[str, Any]] = model.__dict__
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
        #: The class that states for this one were of last, and how many values it has if they can be taken as they are.
        self._source: tuple[type[BaseModel] | None, int] = None, -1
        #: A root model of Any: whatever is given stays what it is.
        self.any = self.root and kinds <= {"model", "any"}
        self._bare = self.flat and not self._computed
        own_code = any(node.get("custom_init") or node.get("post_init") for node in nodes)
        #: Instances must be made anew, by validation: copies would share what is private, or keep what is excluded.
        self._anew = own_code or any("serialization_exclude" in node for node in nodes)
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
        self._json = simple and not custom and kinds <= structural
        self._floats = simple and self.flat and not custom and kinds <= structural | {"float"}
        #: The same, where a float that JSON cannot say may be anywhere: it is looked for in what is written.
        self._nested_floats = (
            simple and not (self.flat or custom) and "float" in kinds and kinds <= structural | {"float"}
        )
        self._to_json = model.__pydantic_serializer__.to_json
        self._exact = self._exact_types(core) if self.flat and (self._json or self._floats) else None
        self._opaque: dict[str, bool] = {}
        self._deep: tuple[str, ...] = ()
        #: Per field, the classes that its schema names: a value of one of them crosses as an instance.
        self._accepts: dict[str, frozenset[type]] = {}
        self._shares = self._extra or not kinds <= CLOSED
        #: Whether the values in its __dict__ are all that there is to copy.
        self._copies = not (self._extra or own_code or model.__private_attributes__)
        self._copies &= model.model_copy is BaseModel.model_copy
        #: Whether what it holds may be plain data that no schema describes, which is kept packed then.
        self._packs = self._shares and self._quiet and (simple or self.any)
        self._packs &= not (self._computed or self._anew)
        self._packs &= not model.__private_attributes__
        if not self.flat:
            self._sort_fields(core)
        #: The classes of the values inside: one of a subclass would be stored as its parent.
        self._nested: frozenset[type] = frozenset().union(*self._accepts.values())
        self._revalidates = model.model_config.get("revalidate_instances") == "always"
        defs = {node["ref"]: node for node in nodes if "ref" in node}
        #: Why a stored form must be read back to know that it says the same.
        self._changing = any(restless(node) or chooses(node) for node in nodes) or _overrides_validation(
            model
        )
        self._ambiguous = any(ambiguous(node, defs) for node in nodes)
        self._strict = any(map(is_strict, nodes))
        #: The fields that hold decoded text.
        self._decoding: frozenset[str] = frozenset()
        if any(map(decodes, nodes)):
            self._decoding = frozenset(
                name for name in self.names if any(map(decodes, nodes_of([*field_nodes(core, model, name)])))
            )
        #: Whether it makes the same of the same values each time.
        self._derives = self._quiet and not (self.root or self._by_name or self._decoding)
        self._derives &= not any("default_factory" in node for node in nodes)
        #: What this class validated and nobody else has, by id: it needs no validation to cross. None: not noted.
        self._given: WeakValueDictionary[int, BaseModel] | None = None
        if (self._changing or self._nested) and model.__weakrefoffset__:
            self._given = WeakValueDictionary()
            self._bare = False
        #: Whether pydantic itself makes all anew that is inside.
        self._renewable = (
            bool(self._nested)
            and self._quiet
            and not (
                self._shares
                or self._by_name
                or self._decoding
                or self._ambiguous
                or self._changing
                or self._anew
            )
        )
        self._renewable &= all(map(renewable, nodes))
        #: Whether a boundary has nothing to do but to validate, and to take the tuple of the values.
        self._careful = self._shares or bool(self._nested)
        self._fast = self.flat and self._given is None
        self.validate: Final = self._make_validate(core)

    def _sort_fields(self, core: Any) -> None:
        """Which fields need a recursive copy, and which hold values that no schema describes."""
        deep: list[str] = []
        # A validator of the whole model may have put anything anywhere.
        wrapped = core["type"] != "model" or core["schema"]["type"] != "model-fields"
        defs = {n["ref"]: n for n in nodes_of(core) if "ref" in n}
        for name in self.names:
            field = next((n for n in field_nodes(core, self.model, name)), None)
            kinds, classes = reachable(field, defs) if field is not None else ({"any"}, frozenset[type]())
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
            self._accepts[name] = classes
        self._deep = tuple(deep)

    def _exact_types(self, core: Any) -> tuple[tuple[str, frozenset[type]], ...] | None:
        """Per field, the types of values that JSON can say; None where more is to be known of a value than its type."""
        found: list[tuple[str, frozenset[type]]] = []
        for name in self.names:
            field = next(iter(field_nodes(core, self.model, name)), None)
            kinds = reachable(field, {})[0] if field is not None else {"any"}
            types = frozenset(_JSON_TYPES[kind] for kind in kinds & _JSON_TYPES.keys())
            if not types or kinds - _JSON_TYPES.keys() - {"model-field", "default", "union"}:
                return None
            found.append((name, types))
        return tuple(found)

    def _is_exact(self, values: Mapping[str, Any]) -> bool:
        assert self._exact is not None
        for name, types in self._exact:  # noqa: SIM110 a generator would take twice as long
            if type(values.get(name, _MISSING)) not in types:
                return False
        return True

    def _make_validate(self, core: Any) -> Callable[[Any], BaseModel]:
        """How a value is validated.

        As ``_again``, values that were decoded before; as ``_rebuild``, the values of the fields of this very class.
        """
        model = self.model
        self._again: Callable[[Any], BaseModel] = lambda raw: self.validate(raw)
        self._rebuild = self._again
        if _overrides_validation(model):
            return model.model_validate
        run = self.validator.validate_python
        decoding = any(map(decodes, nodes_of(core)))
        again = validator_without(core, decodes).validate_python if decoding else run
        if self._by_name:
            self._again = lambda raw: cast("BaseModel", again(raw, by_alias=True, by_name=True))
            self._rebuild = lambda raw: cast("BaseModel", again(raw, by_alias=False, by_name=True))
            return lambda raw: cast("BaseModel", run(raw, by_alias=True, by_name=True))
        if decoding:
            self._again = self._rebuild = lambda raw: cast("BaseModel", again(raw))
        return run

    @functools.cached_property
    def _settle(self) -> Callable[[Any], BaseModel]:
        """Makes a model of field values that this class has validated before, exactly as they are.

        The schema is the same, without what would refuse or change them now: functions, decoders, strictness.
        """
        validator = validator_without(core_schema_of(self.model), lambda node: decodes(node) or foreign(node))
        run = validator.validate_python
        if self._by_name:
            return lambda raw: cast("BaseModel", run(raw, strict=False, by_alias=False, by_name=True))
        return lambda raw: cast("BaseModel", run(raw, strict=False))

    @functools.cached_property
    def _renew(self) -> Callable[[Any], BaseModel] | None:
        """Makes a model of field values, and all models in them anew, in one call."""
        found = validator_that_renews(core_schema_of(self.model)) if self._renewable else None
        return None if found is None else found.validate_python

    @functools.cached_property
    def _constants(self) -> Callable[..., bytes] | None:
        """Like ``_to_json``, but that it writes NaN and Infinity for what they are."""
        return writer_of_constants(core_schema_of(self.model)) if self._nested_floats else None

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
        out = self._shallow(model)
        for name in self._deep:
            if name in out:
                out[name] = isolate(out[name]) if self._opaque[name] else _plain(out[name])
        return out

    def _shallow(self, model: BaseModel) -> dict[str, Any]:
        names = model.__class__.model_fields
        out = {k: v for k, v in model.__dict__.items() if k in names and k not in self._excluded}
        if self._extra and model.__pydantic_extra__:
            # One may have the name of a field that has an alias: a field counts more.
            out.update({k: isolate(v) for k, v in model.__pydantic_extra__.items() if k not in out})
        return out

    def values(self, model: BaseModel) -> dict[str, Any]:
        """The same, but that models and dataclasses inside stay what they are, as copies."""
        return self._hand(model, self, _twin)

    def _hand(self, model: BaseModel, target: Schema, renew: Callable[[Any], Any]) -> dict[str, Any]:
        """The field values for another schema: instances, renewed, where its fields name their classes, else dicts."""
        out = self._shallow(model)
        for name in self._deep:
            if name in out:
                out[name] = (
                    isolate(out[name])
                    if self._opaque[name]
                    else _hand(out[name], self._accepts[name], target._accepts.get(name, _NONE), renew)
                )
        return out

    def raw(self, model: BaseModel) -> Any:
        """The fields as a dict, or the value of a root model."""
        fields = self.fields(model)
        return fields["root"] if self.root else fields

    def state(self, model: BaseModel) -> dict[str, Any]:
        """The state as the dict that hooks and the trace show."""
        values = model.__dict__
        if self.flat and len(values) == self._size:  # As fields() has it.
            return values.copy()
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
        update = {name: isolate(values[name]) for name in self._deep if name in values}
        update.update({k: isolate(v) for k, v in (model.__pydantic_extra__ or {}).items()})
        return _copied(model, update)

    def clone(self, model: BaseModel) -> BaseModel:
        """An exact copy of a validated model that shares nothing mutable with it.

        Not validated again, so that no validator changes it. Only a class with code of its own in the making of
        instances, or with excluded fields, is made anew first, and may raise what validators raise.
        """
        if self._anew:
            fields = self.values(model)
            twin = self._receive(model, self, fields)
            vars(twin).update({name: fields[name] for name in self.names if name in fields})
            return twin
        values = model.__dict__
        update = {
            n: isolate(values[n]) if self._opaque[n] else walk(values[n], _twin)
            for n in self._deep
            if n in values
        }
        update.update({k: isolate(v) for k, v in (model.__pydantic_extra__ or {}).items()})
        return _copied(model, update)

    def trust(self, model: BaseModel) -> BaseModel:
        """Note that this class made the model and that nobody else holds it: it crosses unchanged."""
        if self._given is not None:
            self._given[id(model)] = model
        return model

    def release(self, model: BaseModel) -> None:
        """Note that somebody else holds the model from now on, and may change it."""
        if self._given is not None:
            self._given.pop(id(model), None)

    def _trusts(self, model: BaseModel) -> bool:
        return self._given is not None and self._given.get(id(model)) is model

    def copy(self, model: BaseModel) -> BaseModel:
        """A copy without validation, for nodes without a contract."""
        if self._copies:
            if are_atoms(model.__dict__):
                return _copied(model, _NOTHING) if self.root else stamped(model)
            packed = pack(model.__dict__)
            if packed is not None:
                return _copied(model, packed.open())
        try:
            return BaseModel.model_copy(model, deep=True)
        except Exception:  # Something inside cannot be copied.
            return _copied(model, self.fields(model))

    def cross(self, value: BaseModel) -> BaseModel:
        """Validate a model of any class as one of this class; the result shares nothing mutable with it.

        Raises pydantic's ValidationError.
        """
        source = schema_of(type(value))
        if source._renewable and self._renewable and self._renew is not None and self._takes_from(source):
            return self._renew(source._shallow(value))
        renew = _renewed
        if source._trusts(value):
            if source is self:
                return self.clone(value)
            renew = _twin
        try:
            fields = source._hand(value, self, renew)
        except ValidationError:
            # An invalid model inside. Taken apart, it is refused in the words of the whole: where it is, too.
            self._receive(value, source, source.fields(value))
            raise
        return self._receive(value, source, fields)

    def _takes_from(self, source: Schema) -> bool:
        """Whether the models inside another class's values are what the fields of this one want."""
        if source is not self and (
            source._computed
            or any(not source._accepts[name] <= self._accepts.get(name, _NONE) for name in source._deep)
        ):
            return False
        # One of a subclass stays one. (They are asked for each time: one may be defined at any time.)
        return not any(map(_SUBCLASSES, self._nested))

    def _receive(self, value: BaseModel, source: Schema, fields: dict[str, Any]) -> BaseModel:
        raw = fields["root"] if source.root else fields
        if source._computed and source is not self and isinstance(raw, dict):
            # A computed field counts as a field for the next node if that node has a field of its name.
            for name in source._computed & frozenset(self.names):
                raw.setdefault(name, getattr(value, name))
        # A class's own values have its field names: another field's alias may be one of them.
        if source is self:
            return self._rebuild(raw)
        decoded = self._decoding and self._decoding <= source._decoding
        return self._again(raw) if decoded else self.validate(raw)

    def take(self, value: BaseModel) -> tuple[BaseModel, Snapshot]:
        """A node's input from the state before it, and its picture."""
        # cross(), for the states that most nodes have. A node mostly gets the same class from the same neighbour, so the
        # last one is remembered; and a validator that does not call Python code leaves the dict that it reads alone.
        kind = type(value)
        source_model, plain_size = self._source
        if kind is not source_model:
            plain_size = self._remember(kind)
        values = value.__dict__
        if len(values) == plain_size:
            state = self.validate(values if self._quiet else values.copy())
        else:
            state = self.cross(value)
        if self.flat:
            return state, self._values(state.__dict__)
        return state, self.snapshot(state)

    def is_picture(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot is as good as the model for who goes on with it; see :meth:`take_pictured`."""
        return isinstance(snapshot, Packed) or (
            self._renewable and isinstance(snapshot, bytes) and snapshot.startswith(b"{")
        )

    def take_pictured(
        self, value: BaseModel, picture: Packed | bytes, ours: bool
    ) -> tuple[BaseModel, Snapshot, bool]:
        """Like :meth:`take`, for a state of which there is a picture already: its values can be had of that for less.

        ``ours``: nobody else has the values of the model itself, so that the input may have them, instead of copies.
        Returns whether it has.
        """
        source, used = schema_of(type(value)), False
        derives = self._derives and not self.flat and not source.root
        if isinstance(picture, Packed):
            state = self._receive(value, source, picture.open())
        elif ours and self._renewable and self._takes_from(source):
            state, used = self.validate(source._shallow(value)), True
            derives &= self._json or self._nested_floats
        else:
            state, derives = self.cross(value if ours else source.restore(picture)), False
        return state, Given(picture) if derives else self.snapshot(state), used

    def give(self, output: Any, lent: bool = False) -> tuple[BaseModel, Snapshot]:
        """A node's validated output from what it returned, and its picture. Raises what validators raise.

        ``lent``: if the picture is Packed, the model may share its values with what the node returned: whoever reads
        them takes them from the picture.
        """
        if self._fast and type(output) is dict:  # What most nodes do.
            model = self.validate(output)
            return model, self._values(model.__dict__)
        if self._packs and type(output) is dict and not self._nested:
            if self.any and not lent and are_atoms(output):
                model = self.validate(output.copy())  # All that there is to isolate.
                return model, pack_atoms(model.__dict__)
            model = self.validate(output)
            picture = self.snapshot(model)
            if type(picture) is Packed:
                return model if lent else self.restore(picture), picture
            model = self.own(model)
        # A model is taken apart first: it may have been made without validation, or changed since.
        elif isinstance(output, BaseModel) and not self.any:
            model = self.cross(output)
        else:
            model = self._admit(output) if self._careful else self.validate(output)
        self.trust(model)
        return model, self.snapshot(model)

    def assemble(self, values: dict[str, Any]) -> tuple[BaseModel, Snapshot]:
        """A model of values that other classes have validated, by field name, and its picture.

        Not validated again: a validator would change them twice, and a decoder refuse what it has decoded.
        """
        model = self.trust(self.made_of(values))
        return model, self.snapshot(model)

    def made_of(self, values: dict[str, Any]) -> BaseModel:
        """A model that holds values as they are, whatever they are; a field that they do not name is None."""
        held = {name: values.get(name) for name in self.names}
        if not self.root:
            model = filled(self.model, held, values.keys() & held.keys())
            if self._extra:
                _put_extra(model, {k: v for k, v in values.items() if k not in held})
            return model
        model = _new(self.model)
        _put_values(model, held)
        _put_given(model, values.keys() & held.keys())
        return cast("BaseModel", model)

    def _admit(self, output: Any) -> BaseModel:
        """Validate what a node returned: pydantic takes the instances in it as they are, unvalidated and shared."""
        if self._renewable and self._renew is not None and self._takes_from(self):
            return self._renew(output)
        if not self._nested or type(output) is not dict or not holds_record(output):
            return self.own(self.validate(output))

        def renew(value: Any) -> Any:
            return _renewed(value) if self._nested.intersection(type(value).__mro__) else value

        try:
            renewed = with_records(output, renew)
        except ValidationError:  # As in cross().
            self.validate(_plain(output))
            raise
        return self.own(self.validate(renewed))

    def _remember(self, model: type[BaseModel]) -> int:
        source = schema_of(model)
        plain_size = source._size if source._bare and not source._by_name else -1
        self._source = model, plain_size
        return plain_size

    # ------------------------------------------------------------------ keeping

    def snapshot(self, model: BaseModel) -> Snapshot:
        """An immutable picture of a state, cheap to take; :meth:`thaw` makes a dict of it."""
        if self.flat:
            try:
                return self._values(model.__dict__)
            except KeyError:  # Made without validation, and without some fields.
                return self.state(model)
        if self._packs and len(model.__dict__) == self._size:
            packed = pack(model.__dict__)
            if packed is not None:
                return packed
        try:
            return self.encode(model)
        except NotSerialisable:
            pass
        try:
            return self.clone(model)
        except Exception:  # It was not validated, and would not pass.
            return self.state(model)

    def thaw(self, snapshot: Snapshot) -> dict[str, Any]:
        """The state dict of a snapshot, fresh on each call."""
        if isinstance(snapshot, tuple):
            return dict(zip(self.names, snapshot, strict=True))
        if isinstance(snapshot, Stored):
            try:
                data = snapshot.load()
                return self.state(self.decode(data)) if self.flat or self._packs else self.thaw(data)
            except Exception as error:  # A blob that is gone must not make the rest of the trace unreadable.
                return {"unavailable": str(error)}
        if isinstance(snapshot, Given):
            return self.state(self.validate(snapshot.open()))
        if isinstance(snapshot, Packed):
            fields: dict[str, Any] = snapshot.open()
            raw = fields["root"] if self.root else fields
            return raw if isinstance(raw, dict) else {"root": raw}
        if isinstance(snapshot, bytes):
            raw = json.loads(snapshot)
            if snapshot.startswith(_TAGGED):
                raw = untag(raw[1])
            if b'{"$c":' in snapshot:  # Only the validator knows the class.
                try:
                    return self.state(self.decode(snapshot))
                except Exception:  # One that refuses its own output must not make the trace unreadable.
                    pass
            return raw if isinstance(raw, dict) else {"root": raw}
        return self.state(snapshot) if isinstance(snapshot, BaseModel) else self.thaw_dict(snapshot)

    @staticmethod
    def thaw_dict(snapshot: dict[str, Any]) -> dict[str, Any]:
        """A snapshot that was kept as a dict, as a dict of its own."""
        return cast("dict[str, Any]", isolate(snapshot))

    def restore(self, snapshot: Snapshot) -> BaseModel:
        """The model of a snapshot, equal to the one that it was taken of."""
        if isinstance(snapshot, Stored):
            snapshot = snapshot.load()
        if isinstance(snapshot, bytes):
            return self.decode(snapshot)
        if isinstance(snapshot, BaseModel):
            return self.clone(snapshot)
        if isinstance(snapshot, Packed):
            return self.made_of(snapshot.open())
        model = self._rebuild(self.thaw(snapshot))
        if isinstance(snapshot, tuple) and not self._quiet:
            vars(model).update(zip(self.names, snapshot, strict=True))  # Validators may have changed them.
        return model

    def encode(self, model: BaseModel, *, secrets: bool = False) -> bytes:
        """The stored form: UTF-8 JSON. Raises NotSerialisable, naming the field.

        ``secrets``: write secrets down too, for a store that encrypts what it keeps.
        """
        if secrets:
            with keeping_secrets():
                return self.encode(model)
        data = self._write(model)
        # Subclasses are asked for each time: one may be defined at any time.
        if self._ambiguous or b'{"$c":' in data or (self._nested and any(map(_SUBCLASSES, self._nested))):
            return self._proven(model, data, True)
        if self._changing or (self._strict and data.startswith(_TAGGED)):
            return self._proven(model, data, False)
        return data

    def _write(self, model: BaseModel) -> bytes:
        if self._json or self._nested_floats or (self._floats and all(map(_finite, model.__dict__.values()))):
            try:
                if self._exact is not None and self._is_exact(model.__dict__):
                    data = self._to_json(model, by_alias=False)
                else:  # Asking for errors takes ten times as long, so only where there may be one.
                    data = self._to_json(model, by_alias=False, warnings="error")
                if _is_readable(data) and not (self._nested_floats and self._lost_floats(model, data)):
                    return data
            except pydantic_core.PydanticSerializationError:
                pass  # A lone surrogate, say, or a value of another type: the tagged encoding knows them.
        return self._tagged(model) + b"]"

    def _lost_floats(self, model: BaseModel, data: bytes) -> bool:
        """Whether a null in what was written was NaN or an infinite number."""
        if b"null" not in data:
            return False
        told = b"NaN" if self._constants is None else self._constants(model, by_alias=False)
        return b"NaN" in told or b"Infinity" in told

    def _tagged(self, model: BaseModel) -> bytes:
        raw = self.raw(model)
        try:
            text = json.dumps(tag(raw, (self.model.__name__,), _plain), separators=(",", ":"))
        except RecursionError:
            deep = self._unwritable(raw)
            raise NotSerialisable(
                f"{deep} cannot be serialised: it contains itself, or is nested too deeply; keep the state a shallow tree"
            ) from None
        except ValueError as error:  # An integer of more digits than Python reads back.
            raise NotSerialisable(
                f"{self._unwritable(raw)} cannot be serialised: {error}; keep it smaller"
            ) from None
        return _TAGGED + text.encode()

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

    def _proven(self, model: BaseModel, data: bytes, classes: bool) -> bytes:
        """A stored form that was read back and found the same; raises NotSerialisable, naming the field."""
        problem: NotSerialisable | None = None
        for settled in (False, True):
            stored = self._tagged(model) + _SETTLED if settled else data
            try:
                back = self.decode(stored)
                # If no class is in question, what is written says all about a value.
                found = None if not classes and self._write(back) == data else self._difference(model, back)
            except Exception as error:  # A strict class wants the instance, say, and data holds none.
                problem = problem or self._unreadable(model, error)
            else:
                if found is None:
                    return stored
                problem = found
        assert problem is not None
        raise problem

    def _difference(self, model: BaseModel, back: BaseModel) -> NotSerialisable | None:
        """What is wrong with a model that was read back."""
        before, after = self.fields(model), self.fields(back)
        extra_before, extra_after = model.__pydantic_extra__ or {}, back.__pydantic_extra__ or {}
        for name, value in before.items():
            was = classes_in(model.__dict__.get(name, extra_before.get(name)))
            now = classes_in(back.__dict__.get(name, extra_after.get(name)))
            for kind, other in zip(was, now, strict=False):
                if kind is not other:
                    return NotSerialisable(
                        f"{self.model.__name__}.{name} cannot be serialised: its {kind.__name__} would come back as "
                        f"{other.__name__}; declare the field with the class it holds, or as a discriminated union"
                    )
            if name not in after or tag(value, (name,), _plain) != tag(after[name], (name,), _plain):
                return NotSerialisable(
                    f"{self.model.__name__}.{name} cannot be serialised: it would come back as another value; "
                    "let its validators leave alone what they have returned"
                )
        return None

    def _unreadable(self, model: BaseModel, error: Exception) -> NotSerialisable:
        where: tuple[Any, ...] = ()
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where, error = first["loc"], ValueError(first["msg"])
        else:
            for name, value in self.fields(model).items():
                try:
                    untag(tag(value, (name,), _plain))
                except Exception:
                    where = (name,)
                    break
        return NotSerialisable(
            f"{'.'.join(map(str, (self.model.__name__, *where)))} cannot be serialised: it would not be read back "
            f"({error}); declare the field with the class it holds, and keep models out of sets and keys"
        )

    @staticmethod
    def raw_of(data: bytes) -> Any:
        """What :meth:`encode` wrote, as plain data that no schema has seen. Raises ValueError for data that is not ours."""
        raw = json.loads(data)
        return untag(raw[1]) if data.startswith(_TAGGED) else raw

    def decode(self, data: bytes) -> BaseModel:
        """Read back what :meth:`encode` wrote, validated by this class. Nothing stored names a class.

        Raises pydantic's ValidationError or ValueError for data that is not ours.
        """
        if data.startswith(_TAGGED):
            _, raw, *settled = json.loads(data)
            return (self._settle if settled else self._rebuild)(untag(raw))
        model: BaseModel = (
            self.validator.validate_json(data, by_alias=False, by_name=True)
            if self._by_name
            else self.validator.validate_json(data)
        )
        return model


def told_of(error: Exception) -> tuple[str, Exception | None]:
    """What is wrong with stored data, in a line, and what to name as its cause.

    Without the data. Where pydantic raised, its own text is not asked for, nor handed on to whoever prints causes: it
    makes a picture of all the data first, which takes up to four bytes for each byte of it.
    """
    if not isinstance(error, ValidationError):
        return str(error), error
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    told = [": ".join(filter(None, (".".join(map(str, one["loc"])), one["msg"]))) for one in errors[:_TOLD]]
    return "; ".join(told) + (f"; and {len(errors) - _TOLD} more" if len(errors) > _TOLD else ""), None


_TOLD: Final = 5
_NONE: Final[frozenset[type]] = frozenset()
_NOTHING: Final[Mapping[str, Any]] = {}
_SUBCLASSES: Final = operator.methodcaller("__subclasses__")


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
    found: Schema | None = getattr(model, "__stroma_schema__", None)
    # A class that has none yet finds its parent's. (No __dict__ is asked for here: making one takes longer than the rest.)
    if (
        found is None
        or found.model is not model
        or found.namespace["__pydantic_validator__"] is not found.validator
    ):
        found = Schema(model)
        type.__setattr__(model, "__stroma_schema__", found)
    return found


# ---------------------------------------------------------------------- values


def _finite(value: Any) -> bool:
    return type(value) is not float or math.isfinite(value)


def _is_readable(data: bytes) -> bool:
    """Whether no number in it has too many digits: such a one covers a place that is a multiple of as many."""
    if len(data) < _LONG_INT:
        return True
    for place, byte in zip(range(0, len(data), _LONG_INT), data[::_LONG_INT], strict=True):
        if byte in b"0123456789":
            before = data[max(0, place - _LONG_INT) : place]
            after = data[place : place + _LONG_INT]
            if (
                len(before)
                - len(before.rstrip(b"0123456789"))
                + len(after)
                - len(after.lstrip(b"0123456789"))
                >= _LONG_INT
            ):
                return False
    return True


def _plain(value: Any) -> Any:
    """A copy in which models and dataclasses are dicts of their fields."""
    return walk(value, _apart)


def _apart(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return schema_of(type(value)).raw(value)
    return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}


def _copied(model: BaseModel, update: Mapping[str, Any]) -> BaseModel:
    """A copy with some values changed. Not by model_copy: a class may have one of its own, which changes more."""
    twin, extra = _new(model.__class__), model.__pydantic_extra__
    if extra is None:
        _put_values(twin, {**model.__dict__, **update})
    else:
        _put_values(twin, model.__dict__ | {k: v for k, v in update.items() if k not in extra})
    _put_given(twin, model.__pydantic_fields_set__.copy())
    if not model.__pydantic_root_model__:
        _put_extra(twin, None if extra is None else {k: update.get(k, v) for k, v in extra.items()})
        private = model.__pydantic_private__
        _put_private(twin, None if private is None else private.copy())
    return cast("BaseModel", twin)


def stamped(model: ModelT) -> ModelT:
    """A copy of a model whose values are shared, and that has neither extra nor private ones."""
    return filled(type(model), model.__dict__.copy(), model.__pydantic_fields_set__.copy())


def filled(kind: type[ModelT], values: dict[str, Any], given: set[str]) -> ModelT:
    """A new model of values that nobody validates, without extra and private ones; no root model."""
    made: ModelT = _new(kind)
    _put_values(made, values)  # As become() does, without a call: each run's config is one of these.
    _put_given(made, given)
    _put_extra(made, None)
    _put_private(made, None)
    return made


def become(model: BaseModel, values: dict[str, Any], given: set[str]) -> None:
    """Give a model its values, unvalidated; ``given`` are the fields that were not left to their defaults."""
    _put_values(model, values)
    _put_given(model, given)
    _put_extra(model, None)
    _put_private(model, None)


def _twin(value: Any) -> Any:
    """A copy of a model or dataclass as it is."""
    return schema_of(type(value)).clone(value) if isinstance(value, BaseModel) else isolate(value)


def _renewed(value: Any) -> Any:
    """A model or dataclass validated again from its field values, as one of its own class."""
    if not isinstance(value, BaseModel):
        return renew_dataclass(value, lambda inner: walk(inner, _renewed))
    schema = schema_of(type(value))
    # pydantic itself validates it again, which is once already.
    return _twin(value) if schema._revalidates else schema.cross(value)


def _hand(
    value: Any, declared: frozenset[type], accepted: frozenset[type], renew: Callable[[Any], Any]
) -> Any:
    def record(value: Any) -> Any:
        kinds = type(value).__mro__
        if not accepted.isdisjoint(kinds):
            return renew(value)
        if declared.isdisjoint(kinds):
            return isolate(value)  # Under `Any`: it stays what it is.
        if not isinstance(value, BaseModel):
            return {f.name: walk(getattr(value, f.name), record) for f in dataclasses.fields(value) if f.init}
        schema = schema_of(type(value))
        fields = {k: walk(v, record) for k, v in schema._shallow(value).items()}
        return fields["root"] if schema.root else fields

    return walk(value, record)
