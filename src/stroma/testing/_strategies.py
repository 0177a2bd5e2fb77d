"""Hypothesis strategies for pydantic models: values by the annotations of fields. Needs hypothesis."""

from __future__ import annotations

import datetime as dt
import decimal
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, Union

import pydantic
from annotated_types import GroupedMetadata
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

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
_url = st.sampled_from(["https://example.com/", "http://localhost/a/b", "https://192.0.2.1/?q=1"])
#: Types of which hypothesis knows nothing, or makes values that pydantic refuses.
_KNOWN: Final[dict[Any, Strategy]] = {
    Any: _json,
    pydantic.SecretStr: st.text(),
    pydantic.SecretBytes: st.binary(),
    pydantic.AwareDatetime: st.datetimes(timezones=st.just(dt.UTC)),
    pydantic.NaiveDatetime: st.datetimes(),
    pydantic.PastDatetime: st.datetimes(max_value=_now - _day),
    pydantic.FutureDatetime: st.datetimes(min_value=_now + _day),
    pydantic.PastDate: st.dates(max_value=_now.date() - _day),
    pydantic.FutureDate: st.dates(min_value=_now.date() + _day),
    pydantic.AnyUrl: _url,
    pydantic.HttpUrl: _url,
    dt.datetime: st.datetimes(timezones=st.none() | st.just(dt.UTC)),
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
    """Builder of strategies for the fields of one model and of the models inside it."""

    def __init__(self) -> None:
        self._known: dict[Any, Strategy] = {}
        #: Models under construction, and how often one contained itself.
        self._open: set[Any] = set()
        self._loops = 0

    def of(self, annotation: Any, path: str, metadata: Iterable[Any] = ()) -> Strategy:
        """Return a strategy for the values of an annotation with more metadata."""
        limits = list(metadata)
        while (origin := typing.get_origin(annotation)) is Annotated:
            limits = [*annotation.__metadata__, *limits]
            annotation = typing.get_args(annotation)[0]
        if hasattr(annotation, "__value__"):  # The alias of a type.
            return self.of(annotation.__value__, path, limits)
        if origin is Union or origin is types.UnionType:
            return self._any_of(typing.get_args(annotation), path, limits)
        kind, args = origin or annotation, typing.get_args(annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return self._once(kind, path)
        if kind in (list, set, frozenset):
            return self._items(kind, args, path, limits)
        if kind is tuple and args:
            if args[-1] is Ellipsis:
                return self._items(list, args[:1], path, limits).map(tuple)
            return st.tuples(*(self.of(arg, f"{path}[{i}]") for i, arg in enumerate(args)))
        if kind is dict and args:
            least, most = _sizes(limits, _MORE)
            keys, values = (self.of(arg, f"{path}[]") for arg in args)
            return st.dictionaries(keys, values, min_size=least, max_size=most)
        return _leaf(annotation, path, limits)

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
        is_root = model.__pydantic_root_model__

        def validated(values: dict[str, Any]) -> Any:
            try:
                return run(values["root"]) if is_root else run(values, by_alias=False, by_name=True)
            except ValidationError:
                return _INVALID

        record = st.fixed_dictionaries(required, optional=optional)
        return record.map(validated).filter(lambda value: value is not _INVALID)

    def _once(self, model: type[BaseModel], path: str) -> Strategy:
        """Return the strategy for a model, which may contain itself."""
        if model in self._open:
            self._loops += 1
        elif model not in self._known:
            self._known[model] = st.deferred(lambda: built)
            self._open.add(model)
            built = self.model(model, path, {})
            self._open.remove(model)
        return self._known[model]

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

    def _items(self, kind: Any, args: tuple[Any, ...], path: str, limits: list[Any]) -> Strategy:
        loops = self._loops
        inner = self.of(args[0], f"{path}[]") if args else _json if kind is list else st.integers()
        least, most = _sizes(limits, _MORE if self._loops == loops else 1)  # keeps trees small
        unique = None if kind is list else repr
        return st.lists(inner, min_size=least, max_size=most, unique_by=unique).map(kind)


def _leaf(annotation: Any, path: str, limits: list[Any]) -> Strategy:
    constraints = list(_flattened(limits))
    known = _KNOWN.get(annotation)
    if known is not None:
        return known
    low, high = (max, "ge", "gt"), (min, "le", "lt")
    least, most = (choose(_all(constraints, a, b), default=None) for choose, a, b in (low, high))
    pattern, step = _last(constraints, "pattern"), _last(constraints, "multiple_of")
    if step is not None:
        first, last = least and math.ceil(least / step), most and math.floor(most / step)
        return st.integers(first, last).map(lambda number: number * step)
    if annotation is str and pattern is not None:
        return st.from_regex(pattern, alphabet=st.characters(exclude_categories=["Cs"]))
    if annotation is float:
        return st.floats(least, most, allow_nan=False, allow_infinity=False)
    if annotation is decimal.Decimal:
        places, digits = _last(constraints, "decimal_places") or 2, _last(constraints, "max_digits") or 20
        largest = decimal.Decimal(10) ** (digits - places) - 1
        least, most = (-largest if least is None else least), (largest if most is None else most)
        return st.decimals(least, most, allow_nan=False, allow_infinity=False, places=places)
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


def _flattened(metadata: Iterable[Any]) -> Iterator[Any]:
    """Yield single constraints: those inside ``Field(...)`` and ``StringConstraints(...)`` too."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _flattened(item.metadata)
        elif isinstance(item, GroupedMetadata):
            yield from _flattened(list(item))
        else:
            yield item


def _all(limits: Iterable[Any], *names: str) -> list[Any]:
    values = [getattr(item, name, None) for item in _flattened(limits) for name in names]
    return [value for value in values if value is not None]


def _last(limits: Iterable[Any], name: str) -> Any:
    return next(reversed(_all(limits, name)), None)


def _sizes(limits: Iterable[Any], more: int) -> tuple[int, int]:
    least = _last(limits, "min_length") or 0
    most = _last(limits, "max_length")
    return least, least + more if most is None else most
