"""Hypothesis strategies for pydantic models: values by the annotations of fields. Needs hypothesis."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Final, NotRequired, Required, Union

import pydantic
from annotated_types import GroupedMetadata
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from stroma.contracts.core_schema import core_schema_of

Strategy = st.SearchStrategy[Any]
#: Items beyond the minimum, where a type has no maximum.
_MORE: Final = 4
_INVALID: Final = object()

_json = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_now: Final = dt.datetime.now()
_day: Final = dt.timedelta(days=1)
#: pydantic's own types, of which hypothesis knows nothing.
_PYDANTIC: Final[dict[Any, Strategy]] = {
    Any: _json,
    pydantic.Json: _json.map(json.dumps),
    pydantic.SecretStr: st.text(),
    pydantic.SecretBytes: st.binary(),
    pydantic.AwareDatetime: st.datetimes(timezones=st.just(dt.UTC)),
    pydantic.NaiveDatetime: st.datetimes(),
    pydantic.PastDatetime: st.datetimes(max_value=_now - _day),
    pydantic.FutureDatetime: st.datetimes(min_value=_now + _day),
    pydantic.PastDate: st.dates(max_value=_now.date() - _day),
    pydantic.FutureDate: st.dates(min_value=_now.date() + _day),
    pydantic.AnyUrl: st.sampled_from(
        ["https://example.com/", "http://localhost/a/b", "https://192.0.2.1/?q=1"]
    ),
    dt.datetime: st.datetimes(timezones=st.none() | st.just(dt.UTC)),
    complex: st.complex_numbers(allow_nan=False, allow_infinity=False),
}


class _UnknownTypeError(TypeError):
    """No strategy is known for a type."""


def instances(model: type[BaseModel], fields: Mapping[str, Strategy]) -> st.SearchStrategy[BaseModel]:
    """Return a strategy for instances of a model. Raises TypeError that names a field without a strategy."""
    unknown = [name for name in fields if name not in model.model_fields]
    if unknown:
        raise TypeError(
            f"{model.__name__} has no field {unknown[0]!r}; it has {', '.join(model.model_fields)}"
        )
    return _StrategyBuilder().model(model, model.__name__, fields)


class _StrategyBuilder:
    """Builder of strategies for the fields of one model and of the classes inside it."""

    def __init__(self) -> None:
        self._known: dict[Any, Strategy] = {}
        #: Classes under construction, and how often one contained itself.
        self._open: set[Any] = set()
        self._loops = 0

    def of(self, annotation: Any, path: str, metadata: Iterable[Any] = ()) -> Strategy:
        """Return a strategy for the values of an annotation with more metadata."""
        limits = list(metadata)
        while (origin := typing.get_origin(annotation)) in (Annotated, NotRequired, Required):
            limits = [*annotation.__metadata__, *limits] if origin is Annotated else limits
            annotation = typing.get_args(annotation)[0]
        if any(type(item) is pydantic.Json for item in limits):
            return self.of(annotation, path).map(lambda value: json.dumps(value, default=str))
        if hasattr(annotation, "__value__"):  # The alias of a type.
            return self.of(annotation.__value__, path, limits)
        if origin is Union or origin is types.UnionType:
            return self._any_of(typing.get_args(annotation), path, limits)
        kind: Any = origin or annotation
        if isinstance(kind, type) and issubclass(kind, tuple):
            return self._tuple(annotation, path, limits)
        if isinstance(kind, type) and not issubclass(kind, (str, bytes, bytearray, memoryview)):
            if issubclass(kind, BaseModel):
                return self._once(kind, lambda: self.model(kind, path, {}))
            if dataclasses.is_dataclass(kind):
                return self._once(kind, lambda: self._hints(kind, path, TypeAdapter(kind).validate_python))
            if is_typeddict(kind):
                return self._once(kind, lambda: self._hints(kind, path, dict))
            if issubclass(kind, Mapping):
                return self._dict(annotation, path, limits)
            if issubclass(kind, Iterable) and not issubclass(kind, enum.Enum):
                collection = self._items(kind, annotation, path, limits)
                if collection is not None:
                    return collection
        return self._leaf(annotation, path, limits)

    def model(self, model: type[BaseModel], path: str, overrides: Mapping[str, Strategy]) -> Strategy:
        """Return a strategy for instances of a model; ``overrides``: strategies for single fields."""
        core_schema_of(model)  # Resolves its forward references.
        required: dict[str, Strategy] = {}
        optional: dict[str, Strategy] = {}
        for name, info in model.model_fields.items():
            at = path if model.__pydantic_root_model__ else f"{path}.{name}"
            try:
                override = overrides.get(name)
                strategy = self.of(info.annotation, at, info.metadata) if override is None else override
            except _UnknownTypeError:
                if info.is_required():
                    raise
                continue
            (required if info.is_required() or name in overrides else optional)[name] = strategy
        run = model.__pydantic_validator__.validate_python
        record = st.fixed_dictionaries(required, optional=optional)
        if model.__pydantic_root_model__:
            return _valid(record.map(lambda values: values["root"]) if required else record, run)
        return _valid(record, lambda values: run(values, by_alias=False, by_name=True))

    def _once(self, kind: Any, build: Callable[[], Strategy]) -> Strategy:
        """Return the strategy for a class, which may contain itself."""
        if kind in self._open:
            self._loops += 1
        elif kind not in self._known:
            self._known[kind] = st.deferred(lambda: built)
            self._open.add(kind)
            built = build()
            self._open.remove(kind)
        return self._known[kind]

    def _hints(self, kind: Any, path: str, validate: Callable[[Any], Any]) -> Strategy:
        hints = typing.get_type_hints(kind, include_extras=True)
        if dataclasses.is_dataclass(kind):
            wanted = {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}
            needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory}
        else:
            wanted, needed = hints, kind.__required_keys__
        parts = {name: self.of(hint, f"{path}.{name}") for name, hint in wanted.items()}
        optional = {name: part for name, part in parts.items() if name not in needed}
        required = {name: part for name, part in parts.items() if name in needed}
        return _valid(st.fixed_dictionaries(required, optional=optional), validate)

    def _any_of(self, choices: Iterable[Any], path: str, limits: list[Any]) -> Strategy:
        alternatives: list[Strategy] = []
        wrong: _UnknownTypeError | None = None
        for choice in choices:
            try:
                alternatives.append(self.of(choice, path, limits))
            except _UnknownTypeError as error:
                wrong = error
        if wrong is not None and not alternatives:
            raise wrong
        return st.one_of(alternatives)

    # ------------------------------------------------------------------ collections

    def _items(self, kind: type, annotation: Any, path: str, limits: list[Any]) -> Strategy | None:
        """Return a strategy for a collection that pydantic makes of a list; None for other classes."""
        args = typing.get_args(annotation)
        if not args and kind not in (list, set, frozenset):
            return None
        loops = self._loops
        is_set = issubclass(kind, AbstractSet)
        inner = self.of(args[0], f"{path}[]") if args else st.integers() if is_set else _json
        least, most = _sizes(limits, _MORE if self._loops == loops else 1)  # keeps trees small
        strategy = st.lists(inner, min_size=least, max_size=most, unique_by=_key if is_set else None)
        return strategy.map(frozenset if kind is frozenset else set) if is_set else strategy

    def _tuple(self, annotation: Any, path: str, limits: list[Any]) -> Strategy:
        args = typing.get_args(annotation)
        if args and args[-1] is not Ellipsis:
            return st.tuples(*(self.of(arg, f"{path}[{i}]") for i, arg in enumerate(args)))
        least, most = _sizes(limits, _MORE)
        inner = self.of(args[0], f"{path}[]") if args else _json
        return st.lists(inner, min_size=least, max_size=most).map(tuple)

    def _dict(self, annotation: Any, path: str, limits: list[Any]) -> Strategy:
        args = typing.get_args(annotation)
        keys, values = (self.of(arg, f"{path}[]") for arg in args) if args else (st.text(max_size=10), _json)
        least, most = _sizes(limits, _MORE)
        return st.dictionaries(keys, values, min_size=least, max_size=most)

    # ------------------------------------------------------------------ plain values

    def _leaf(self, annotation: Any, path: str, limits: list[Any]) -> Strategy:
        known = _PYDANTIC.get(annotation)
        constraints = list(_flattened(limits))
        low = max(_all(constraints, "ge") + _all(constraints, "gt"), default=None)
        high = min(_all(constraints, "le") + _all(constraints, "lt"), default=None)
        pattern, step = _last(constraints, "pattern"), _last(constraints, "multiple_of")
        if step is not None:
            least = None if low is None else math.ceil(low / step)
            most = None if high is None else math.floor(high / step)
            known = st.integers(least, most).map(lambda number: number * step)
        elif annotation is str and pattern is not None:
            known = st.from_regex(pattern, alphabet=st.characters(exclude_categories=["Cs"]))
        elif annotation is float:
            known = st.floats(low, high, allow_nan=False, allow_infinity=False)
        elif annotation is decimal.Decimal:
            places, digits = _last(constraints, "decimal_places") or 2, _last(constraints, "max_digits") or 20
            largest = decimal.Decimal(10) ** (digits - places) - 1
            low, high = (-largest if low is None else low), (largest if high is None else high)
            known = st.decimals(low, high, allow_nan=False, allow_infinity=False, places=places)
        elif isinstance(annotation, type) and issubclass(annotation, pydantic.AnyUrl):
            known = _PYDANTIC[pydantic.AnyUrl]
        if known is not None:
            return known
        constraints = [item for item in constraints if type(item).__module__ == "annotated_types"]
        constrained: Any = Annotated[annotation, *constraints] if constraints else annotation
        strategy: Strategy = st.from_type(constrained)
        try:
            strategy.validate()
        except Exception as error:
            raise _UnknownTypeError(
                f"cannot generate values for {path} ({annotation!r}); pass a strategy for the field with "
                "fields=, or for the whole input with inputs="
            ) from error
        return strategy


def _valid(raw: Strategy, validate: Callable[[Any], Any]) -> Strategy:
    """Return a strategy for validated values; what validation rejects is filtered out."""

    def validated(value: Any) -> Any:
        try:
            return validate(value)
        except ValidationError:
            return _INVALID

    return raw.map(validated).filter(lambda value: value is not _INVALID)


def _flattened(metadata: Iterable[Any]) -> Iterator[Any]:
    """Yield single constraints: those inside ``Field(...)`` and ``StringConstraints(...)`` too."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _flattened(item.metadata)
        elif isinstance(item, GroupedMetadata):
            yield from _flattened(list(item))
        else:
            yield item


def _all(limits: Iterable[Any], name: str) -> list[Any]:
    values = [getattr(item, name, None) for item in _flattened(limits)]
    return [value for value in values if value is not None]


def _last(limits: Iterable[Any], name: str) -> Any:
    return next(reversed(_all(limits, name)), None)


def _sizes(limits: Iterable[Any], more: int) -> tuple[int, int]:
    least = _last(limits, "min_length") or 0
    most = _last(limits, "max_length")
    return least, least + more if most is None else most


def _key(value: Any) -> Any:
    return type(value).__name__, value
