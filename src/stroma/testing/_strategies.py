"""Hypothesis strategies for pydantic models, built from their core schemas. Needs hypothesis."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final

from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from stroma.contracts.core_schema import core_schema_of

__all__ = ["instances"]

Strategy = st.SearchStrategy[Any]
#: Items beyond the minimum, where a schema has no maximum.
_SOME: Final = 4
_ABSENT: Final = object()

#: All characters but surrogates, which no text may contain.
_letters = st.characters(exclude_categories=["Cs"])
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def instances(model: type[BaseModel], fields: Mapping[str, Strategy]) -> st.SearchStrategy[BaseModel]:
    """Return a strategy for instances of a model. Raises TypeError that names a field without a strategy."""
    unknown = [name for name in fields if name not in model.model_fields]
    if unknown:
        raise TypeError(
            f"{model.__name__} has no field {unknown[0]!r}; it has {', '.join(model.model_fields)}"
        )
    return _StrategyBuilder(dict(fields), model).of(core_schema_of(model), model.__name__)


class _UnknownTypeError(TypeError):
    """No strategy is known for a type."""


class _StrategyBuilder:
    """Builder of strategies for the parts of one core schema."""

    def __init__(self, fields: dict[str, Strategy], model: type[BaseModel]) -> None:
        self._overrides, self._outermost = fields, model
        self._known: dict[str, Any] = {}
        self._deferred: dict[str, Strategy] = {}
        #: Definitions under construction, and how often each contained itself.
        self._making: set[str] = set()
        self._loops = 0

    def of(self, schema: Mapping[str, Any], path: str) -> Strategy:
        kind = schema["type"].replace("-", "_")
        make: Callable[[Mapping[str, Any], str], Strategy] | None = getattr(self, f"_{kind}", None)
        if make is None:
            raise _UnknownTypeError(
                f"cannot generate values for {path} (pydantic type {schema['type']!r}); pass a strategy for the field "
                "with fields=, or for the whole input with inputs="
            )
        return make(schema, path)

    # ------------------------------------------------------------------ what wraps something else

    def _definitions(self, schema: Mapping[str, Any], path: str) -> Strategy:
        self._known.update({one["ref"]: one for one in schema["definitions"]})
        return self.of(schema["schema"], path)

    def _definition_ref(self, schema: Mapping[str, Any], path: str) -> Strategy:
        ref = schema["schema_ref"]
        if ref not in self._deferred:
            # Registered before it is built: it may contain itself.
            self._deferred[ref] = st.deferred(lambda: strategy[0])
            self._making.add(ref)
            strategy = [self.of(self._known[ref], path)]
            self._making.remove(ref)
        elif ref in self._making:
            self._loops += 1
        return self._deferred[ref]

    def _inner(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return self.of(schema["schema"], path)

    _default = _function_after = _function_before = _function_wrap = _custom_error = _inner

    def _nullable(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return st.none() | self._inner(schema, path)

    def _chain(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return self.of(schema["steps"][0], path)

    def _lax_or_strict(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return self.of(schema["strict_schema" if schema.get("strict") else "lax_schema"], path)

    def _json_or_python(self, schema: Mapping[str, Any], path: str) -> Strategy:
        try:
            return self.of(schema["python_schema"], path)
        except _UnknownTypeError:  # An instance of a class may be built from JSON.
            return self.of(schema["json_schema"], path)

    def _json(self, schema: Mapping[str, Any], path: str) -> Strategy:
        inner = self.of(schema["schema"], path) if "schema" in schema else _json
        return inner.map(lambda value: json.dumps(value, default=str))

    def _union(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return self._any_of([one[0] if isinstance(one, tuple) else one for one in schema["choices"]], path)

    def _tagged_union(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return self._any_of([one for one in schema["choices"].values() if isinstance(one, dict)], path)

    def _any_of(self, choices: list[Mapping[str, Any]], path: str) -> Strategy:
        alternatives: list[Strategy] = []
        wrong: _UnknownTypeError | None = None
        for one in choices:
            try:
                alternatives.append(self.of(one, path))
            except _UnknownTypeError as error:
                wrong = error
        if not alternatives:
            assert wrong is not None
            raise wrong
        return st.one_of(alternatives)

    # ------------------------------------------------------------------ records

    def _model(self, schema: Mapping[str, Any], path: str) -> Strategy:
        cls = schema["cls"]
        by_name = _by_name(schema)
        if schema.get("root_model"):
            inner = schema["schema"]
            while (
                inner["type"] != "model-fields" and "schema" in inner and inner["type"].startswith("function")
            ):
                inner = inner["schema"]
            return _instances(cls, self.of(inner, path), cls.model_validate)
        overrides = self._overrides if cls is self._outermost else {}
        classes = {name: field.annotation for name, field in cls.model_fields.items()}
        return _instances(
            cls, self._record(schema["schema"], path, by_name, overrides, classes), cls.model_validate
        )

    def _dataclass(self, schema: Mapping[str, Any], path: str) -> Strategy:
        cls = schema["cls"]
        strategy = self._record(schema["schema"], path, by_name=_by_name(schema))
        return _instances(cls, strategy, TypeAdapter(cls).validate_python)

    def _typed_dict(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return self._record(schema, path, by_name=_by_name(schema))

    def _record(
        self,
        schema: Mapping[str, Any],
        path: str,
        by_name: bool,
        overrides: Mapping[str, Strategy] | None = None,
        classes: Mapping[str, Any] | None = None,
    ) -> Strategy:
        while "fields" not in schema:  # Validators of the whole model wrap its fields.
            schema = schema["schema"]
        fields = schema["fields"]
        if isinstance(fields, list):
            fields = {field["name"]: field for field in fields}
        parts: dict[str, Strategy] = {}
        places: dict[str, tuple[str, ...]] = {}
        for name, field in fields.items():
            inner = field["schema"]
            may_lack = inner["type"] == "default" or field.get("required") is False
            strategy = (overrides or {}).get(name)
            try:
                strategy = self.of(inner, f"{path}.{name}") if strategy is None else strategy
            except _UnknownTypeError:
                strategy = _strategy_for_class((classes or {}).get(name))
                if strategy is None and not may_lack:
                    raise
                strategy = st.just(_ABSENT) if strategy is None else strategy
            parts[name] = (
                st.just(_ABSENT) | strategy if may_lack and name not in (overrides or {}) else strategy
            )
            places[name] = (name,) if by_name else _input_key(field, name, f"{path}.{name}")

        def put_together(values: dict[str, Any]) -> dict[str, Any]:
            record: dict[str, Any] = {}
            for name, value in values.items():
                if value is not _ABSENT:
                    *outer, last = places[name]
                    inside = record
                    for key in outer:
                        inside = inside.setdefault(key, {})
                    inside[last] = value
            return record

        return st.fixed_dictionaries(parts).map(put_together)

    # ------------------------------------------------------------------ collections

    def _list(self, schema: Mapping[str, Any], path: str) -> Strategy:
        loops = self._loops
        inner = self.of(schema["items_schema"], f"{path}[]") if "items_schema" in schema else _json
        least, some = (
            schema.get("min_length", 0),
            _SOME if self._loops == loops else 1,
        )  # keeps trees small
        return st.lists(inner, min_size=least, max_size=schema.get("max_length", least + some))

    _generator = _list

    def _set(self, schema: Mapping[str, Any], path: str) -> Strategy:
        inner = self.of(schema["items_schema"], f"{path}[]") if "items_schema" in schema else st.integers()
        least = schema.get("min_length", 0)
        most = schema.get("max_length", least + _SOME)
        return st.lists(inner, min_size=least, max_size=most, unique_by=_key).map(_as_set)

    def _frozenset(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return self._set(schema, path).map(frozenset)

    def _tuple(self, schema: Mapping[str, Any], path: str) -> Strategy:
        inner, more = schema["items_schema"], schema.get("variadic_item_index")
        strategy = [self.of(one, f"{path}[{i}]") for i, one in enumerate(inner)]
        if more is None:
            return st.tuples(*strategy)
        least = max(0, schema.get("min_length", 0) - len(strategy) + 1)
        most = max(least, schema.get("max_length", least + _SOME + len(strategy) - 1) - len(strategy) + 1)
        rest = st.lists(strategy[more], min_size=least, max_size=most)
        before, after = st.tuples(*strategy[:more]), st.tuples(*strategy[more + 1 :])
        return st.tuples(before, rest, after).map(lambda parts: (*parts[0], *parts[1], *parts[2]))

    def _dict(self, schema: Mapping[str, Any], path: str) -> Strategy:
        keys = (
            self.of(schema["keys_schema"], f"{path}[]") if "keys_schema" in schema else st.text(max_size=10)
        )
        values = self.of(schema["values_schema"], f"{path}[]") if "values_schema" in schema else _json
        least = schema.get("min_length", 0)
        return st.dictionaries(keys, values, min_size=least, max_size=schema.get("max_length", least + _SOME))

    # ------------------------------------------------------------------ plain values

    def _any(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return _json

    def _none(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return st.none()

    def _bool(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return st.booleans()

    def _int(self, schema: Mapping[str, Any], path: str) -> Strategy:
        least = max(_bounds(schema.get("ge"), _plus(schema.get("gt"), 1)), default=None)
        most = min(_bounds(schema.get("le"), _plus(schema.get("lt"), -1)), default=None)
        step = schema.get("multiple_of")
        if step:
            low = None if least is None else math.ceil(least / step)
            high = None if most is None else math.floor(most / step)
            return st.integers(low, high).map(lambda n: n * step)
        low, high = None if least is None else math.ceil(least), None if most is None else math.floor(most)
        return st.integers(low, high)

    def _float(self, schema: Mapping[str, Any], path: str) -> Strategy:
        step = schema.get("multiple_of")
        low, high = (
            max(_bounds(schema.get("ge"), schema.get("gt")), default=None),
            min(_bounds(schema.get("le"), schema.get("lt")), default=None),
        )
        if step:
            return st.integers(-1000, 1000).map(lambda n: n * step).filter(_within(schema))
        strategy = st.floats(_as_float(low), _as_float(high), allow_nan=False, allow_infinity=False)
        return strategy.filter(_within(schema))

    def _decimal(self, schema: Mapping[str, Any], path: str) -> Strategy:
        digits, places = schema.get("max_digits"), schema.get("decimal_places")
        low = max(_bounds(schema.get("ge"), schema.get("gt")), default=None)
        high = min(_bounds(schema.get("le"), schema.get("lt")), default=None)
        if digits is not None:
            places = min(2, digits) if places is None else places
            largest = Decimal(10) ** (digits - places) - Decimal(1).scaleb(-places)
            low = -largest if low is None else max(Decimal(low), -largest)
            high = largest if high is None else min(Decimal(high), largest)
        strategy = st.decimals(
            low, high, allow_nan=False, allow_infinity=False, places=2 if places is None else places
        )
        return strategy.filter(_within(schema))

    def _str(self, schema: Mapping[str, Any], path: str) -> Strategy:
        least, most = schema.get("min_length", 0), schema.get("max_length")
        pattern = schema.get("pattern")
        if pattern is not None:
            strategy = st.from_regex(pattern, alphabet=_letters)
            return strategy.filter(lambda text: least <= len(text) and (most is None or len(text) <= most))
        return st.text(_letters, min_size=least, max_size=most)

    def _bytes(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return st.binary(min_size=schema.get("min_length", 0), max_size=schema.get("max_length"))

    def _literal(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return st.sampled_from(schema["expected"])

    def _enum(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return st.sampled_from(schema["members"])

    def _uuid(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return st.uuids(version=schema.get("version"))

    def _complex(self, schema: Mapping[str, Any], path: str) -> Strategy:
        return st.complex_numbers(allow_nan=False, allow_infinity=False)

    def _url(self, schema: Mapping[str, Any], path: str) -> Strategy:
        schemes = schema.get("allowed_schemes") or ["https"]
        hosts = st.sampled_from(["example.com", "localhost", "a.example.org", "192.0.2.1"])
        paths = st.lists(st.from_regex(r"[a-z0-9]{1,6}", fullmatch=True), max_size=3).map("/".join)
        return st.builds(
            lambda scheme, host, rest: f"{scheme}://{host}/{rest}", st.sampled_from(schemes), hosts, paths
        )

    _multi_host_url = _url

    # ------------------------------------------------------------------ times

    def _date(self, schema: Mapping[str, Any], path: str) -> Strategy:
        today = dt.date.today()
        low, high = _datetime_bounds(schema, dt.timedelta(days=1), dt.date.min, dt.date.max, today)
        return st.dates(low, high)

    def _datetime(self, schema: Mapping[str, Any], path: str) -> Strategy:
        timezone = schema.get("tz_constraint")
        zones: Strategy = st.just(dt.UTC)
        if timezone == "naive":
            zones = st.none()
        elif timezone is None:
            zones = st.none() | zones
        elif isinstance(timezone, int):
            zones = st.just(dt.timezone(dt.timedelta(seconds=timezone)))
        step, now = dt.timedelta(microseconds=1), dt.datetime.now()
        low, high = _datetime_bounds(schema, step, dt.datetime.min, dt.datetime.max, now)
        if schema.get("now_op") is not None:
            # One day of margin for any time zone.
            low, high = (
                (now + dt.timedelta(days=1), high)
                if schema["now_op"] == "future"
                else (low, now - dt.timedelta(days=1))
            )
        strategy = st.datetimes(_naive(low), _naive(high), timezones=zones)
        aware = [bound for bound in (low, high) if bound.tzinfo is not None]
        return strategy.map(
            lambda value: value if value.tzinfo or not aware else value.replace(tzinfo=dt.UTC)
        )

    def _time(self, schema: Mapping[str, Any], path: str) -> Strategy:
        low, high = schema.get("ge", dt.time.min), schema.get("le", dt.time.max)
        zones = st.just(dt.UTC) if schema.get("tz_constraint") == "aware" else st.none()
        return st.times(low.replace(tzinfo=None), high.replace(tzinfo=None), timezones=zones).filter(
            _within(schema)
        )

    def _timedelta(self, schema: Mapping[str, Any], path: str) -> Strategy:
        step = dt.timedelta(microseconds=1)
        low, high = _datetime_bounds(schema, step, -dt.timedelta(days=36500), dt.timedelta(days=36500), None)
        return st.timedeltas(low, high)


def _instances(cls: type, raw: Strategy, validate: Callable[[Any], Any]) -> Strategy:
    """Return a strategy for instances of a class; values that its validators reject are filtered out."""

    def strategy(value: Any) -> Any:
        try:
            return validate(value)
        except ValidationError:
            return _ABSENT

    return raw.map(strategy).filter(lambda value: value is not _ABSENT)


def _strategy_for_class(cls: Any) -> Strategy | None:
    """Return hypothesis's own strategy for a class; None if it has none."""
    if not isinstance(cls, type):
        return None
    strategy: Strategy = st.from_type(cls)
    try:
        strategy.validate()
    except Exception:
        return None
    return strategy


def _by_name(schema: Mapping[str, Any]) -> bool:
    config = schema.get("config") or {}
    return bool(config.get("populate_by_name") or config.get("validate_by_name"))


def _input_key(field: Mapping[str, Any], name: str, path: str) -> tuple[str, ...]:
    """Return the key that a field is read from."""
    alias = field.get("validation_alias", name)
    if isinstance(alias, str):
        return (alias,)
    for way in alias if alias and isinstance(alias[0], list) else [alias]:
        if all(isinstance(key, str) for key in way):
            return tuple(way)
    raise _UnknownTypeError(
        f"cannot place a value for {path} at its alias; pass a strategy for the whole input with inputs="
    )


def _key(value: Any) -> Any:
    return (
        json.dumps(value, default=repr) if isinstance(value, (dict, list)) else (type(value).__name__, value)
    )


def _as_set(values: list[Any]) -> Any:
    return set(values)


def _bounds(*overrides: Any) -> list[Any]:
    return [bound for bound in overrides if bound is not None]


def _plus(bound: Any, step: Any) -> Any:
    return None if bound is None else math.floor(bound) + step if step > 0 else math.ceil(bound) + step


def _as_float(bound: Any) -> float | None:
    return None if bound is None else float(bound)


def _within(schema: Mapping[str, Any]) -> Callable[[Any], bool]:
    def is_within(value: Any) -> bool:
        return not (
            ("gt" in schema and not value > schema["gt"])
            or ("ge" in schema and not value >= schema["ge"])
            or ("lt" in schema and not value < schema["lt"])
            or ("le" in schema and not value <= schema["le"])
        )

    return is_within


def _datetime_bounds(
    schema: Mapping[str, Any], step: dt.timedelta, first: Any, last: Any, now: Any
) -> tuple[Any, Any]:
    """Return the earliest and latest moment that a schema accepts."""
    lows = _bounds(schema.get("ge"), None if "gt" not in schema else schema["gt"] + step)
    highs = _bounds(schema.get("le"), None if "lt" not in schema else schema["lt"] - step)
    if schema.get("now_op") == "past":
        highs.append(now - step)
    elif schema.get("now_op") == "future":
        lows.append(now + step)
    return max(lows, default=first), min(highs, default=last)


def _naive(moment: dt.datetime) -> dt.datetime:
    return moment if moment.tzinfo is None else moment.astimezone(dt.UTC).replace(tzinfo=None)
