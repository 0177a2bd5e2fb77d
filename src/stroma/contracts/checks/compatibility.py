"""Decide if every value of one class crosses the boundary to another, as :meth:`Schema.convert` does.

Both sides are pydantic's core schemas. The source tells which values it holds *after* validation, the target
which ones its validator accepts. No user code is called. There is a reason for each place that may refuse;
where functions decide, the reason names them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, cast

from pydantic import BaseModel
from pydantic_core import SchemaValidator

from stroma.contracts.checks.leaves import choices_of, fit_leaf, fit_lengths, is_odd_enum
from stroma.contracts.checks.records import (
    Record,
    Wanted,
    first_validator,
    function_name,
    look_up,
    loses_fields,
    record_of,
    wanted_of,
)
from stroma.contracts.checks.sources import alternatives_of, is_alike, takes_value
from stroma.contracts.checks.types import (
    FITS,
    LEAVES,
    LISTS,
    SETS,
    Fit,
    Side,
    Verdict,
    at_most_maybe,
    in_words,
    limits_of,
    maybe,
    never,
    under,
    verdict_of,
)
from stroma.contracts.core_schema import calls_user_code, nodes_of
from stroma.contracts.schema import schema_of

#: After so many repeated reasons, each further place of a known pair of types has only one of them.
_MAX_REPEATED: Final = 100
_RECORDS: Final = frozenset({"model", "dataclass", "typed-dict"})
#: Kinds of which it is known what they accept. Of all others, a value is only known to fit the same type.
_KNOWN: Final = LEAVES | LISTS | _RECORDS | {"dict"}


def fit_classes(source: type[BaseModel], target: type[BaseModel], *, apart: bool = False) -> Fit:
    """Return the fit of models of one class as input of another. ``apart``: models inside arrive as dicts."""
    is_tracked = source is target and not apart and schema_of(source).traits.tracks_instances
    if is_tracked and not loses_fields(Side.of_model(source)):
        return FITS  # The engine passes such an instance to its own class unchanged.
    return Fitter(source, target, apart=apart).fit()


def undecided(what: str, source: Side | str, target: Side | str) -> Fit:
    """Return the fit of types of which it is not known if a value fits."""
    return maybe("undecidable", what, source, target)


_UNKNOWN_BEFORE: Final = "it is not known before the run"


class Fitter:
    """One pair of classes."""

    def __init__(
        self, source: type[BaseModel] | None, target: type[BaseModel], *, apart: bool = False
    ) -> None:
        self.source_class, self.target_class = source, target
        self.target_schema = schema_of(target)
        self.target = Side.of(target)
        self.apart = apart
        #: Classes that cross as instances, in the field that is compared.
        self._accepted: frozenset[type] = frozenset()
        self._open: set[tuple[int, int]] = set()
        #: Fits of types that hold others, with the types, so that no others can have their ids.
        self._known: dict[Any, tuple[Fit, Side, Side]] = {}
        self._repeated = 0

    def fit(self) -> Fit:
        """Return the fit of the two classes."""
        assert self.source_class is not None
        if self.target_schema.traits.overrides_validation:
            what = f"{self.target_class.__name__}.model_validate decides"
            return undecided(what, self.source_class.__name__, self.target)
        source, target = Side.of_model(self.source_class), Side.of_model(self.target_class)
        if not schema_of(self.source_class).traits.computed_fields:  # Inside itself it has none.
            self._open.add((id(source.node), id(target.node)))
        if schema_of(self.source_class).is_root:
            self._accepted = self._accepts("root")
            return self.match(source.root(), self.target)
        return self._whole(record_of(source))

    def fit_item(self, item: Side, *, bare: bool = False) -> Fit:
        """Return the fit of the items of a list that ``map_over`` passes to the target as its input.

        ``bare``: through a group, whose nodes get an item that is no record as it is.
        """
        item = item.resolved()
        alternatives = alternatives_of(item, self._stays_instance)
        if alternatives is not None:
            return self._each(item, alternatives, self.target, lambda one, _: self.fit_item(one, bare=bare))
        if item.is_record or item.kind == "dict":
            return self._whole(replace(record_of(item), computed={}))
        if item.kind == "any" or self.target_schema.is_root:
            return self.match(item, self.target)
        required = [n for n, info in self.target_class.model_fields.items() if info.is_required()]
        if len(required) == 1 and not bare:
            return self._whole(Record(str(item), {required[0]: item}))
        name = self.target_class.__name__
        what = f"a group passes an item without fields on as it is, and {name} is not a RootModel"
        if not bare:
            what = (
                "an item without fields becomes the value of the only required field, and "
                f"{name} has {len(required)} required fields"
            )
        return never("items", what, item, self.target)

    def _accepts(self, name: str) -> frozenset[type]:
        return frozenset() if self.apart else self.target_schema.traits.field_classes.get(name, frozenset())

    def _whole(self, record: Record) -> Fit:
        """Return the fit of the fields of a record as the input of the target itself."""
        wanted = set(self.target_schema.field_names)
        more = {k: v for k, v in record.computed.items() if k in wanted and k not in record.fields}
        return self._through(replace(record, fields={**record.fields, **more}), self.target)

    def _through(self, record: Record, target: Side) -> Fit:
        """Return the fit of the outermost record, through the validators around the target."""
        target = target.resolved()
        if target.kind.startswith("function-"):
            return self._past_function(target, record.name, lambda inner: self._through(record, inner))
        if target.kind != "model":
            return self._record_to(record, target)
        deciding = _deciding_code(target)
        if deciding:
            return undecided(f"{deciding} decides", record.name, target)
        if target.node.get("root_model"):
            return self._through(record, target.root())
        wanted = wanted_of(target)
        if self.source_class is self.target_class:
            wanted = wanted.by_name()
        return self._fields(record, wanted, outermost=True)

    # ------------------------------------------------------------------ any two types

    def match(self, source: Side, target: Side) -> Fit:
        """Return the fit of the values of one type as values of another."""
        source, target = source.resolved(), target.resolved()
        key = id(source.node), id(target.node)
        if key in self._open:  # A type inside itself: it fits if all the rest of it does.
            return FITS
        if source.kind in LEAVES or target.kind in LEAVES:
            return self._match(source, target)
        full = (*key, id(source.config), id(target.config), self._accepted)
        if full in self._known:
            fit = self._known[full][0]
            self._repeated += len(fit)
            return fit if self._repeated <= _MAX_REPEATED else fit[:1]
        before = len(self._known)
        self._open.add(key)
        try:
            fit = self._match(source, target)
        finally:
            self._open.discard(key)
        if fit:  # What fits inside of it may do so only if all of it did.
            for other in list(self._known)[before:]:
                if not self._known[other][0]:
                    del self._known[other]
        self._known[full] = fit, source, target
        return fit

    def _match(self, source: Side, target: Side) -> Fit:
        if target.kind == "any" or is_alike(source, target):
            return FITS
        alternatives = alternatives_of(source, self._stays_instance)
        if alternatives is not None:
            return self._each(source, alternatives, target, self.match)
        unwrapped = self._unwrap_target(source, target)
        return self._match_plain(source, target) if unwrapped is None else unwrapped

    def _match_plain(self, source: Side, target: Side) -> Fit:
        kind, wanted = source.kind, target.kind
        if kind == "any":
            return maybe("unknown", "nothing is known of what it holds", source, target)
        if is_odd_enum(source.node) or is_odd_enum(target.node):
            if kind == wanted and source.node["cls"] is target.node["cls"]:
                return FITS
            return undecided("the code of an enum decides", source, target)
        values = choices_of(source.node)
        if values is not None:
            return self._try_choices(source, values, target)
        if kind in LEAVES and wanted in LEAVES:
            return fit_leaf(source, target)
        if kind in _RECORDS:
            return (
                self._instance_to(source, target)
                if self._stays_instance(source)
                else self._record_to(record_of(source), target)
            )
        if kind in LISTS and wanted in LISTS:
            return self._items(source, target)
        if kind == wanted == "dict":
            return self._dict(source, target)
        if kind == "dict" and target.is_record:
            return self._record_to(record_of(source), target)
        if kind in _KNOWN and wanted in _KNOWN:
            return never("type", "no value of the one is a value of the other", source, target)
        return undecided(_UNKNOWN_BEFORE, source, target)

    # ------------------------------------------------------------------ sources of several types

    def _each(
        self, source: Side, alternatives: list[Side], target: Side, match: Callable[[Side, Side], Fit]
    ) -> Fit:
        if len(alternatives) == 1:
            return match(alternatives[0], target)
        fits = [match(alternative, target) for alternative in alternatives]
        if {verdict_of(fit) for fit in fits} == {Verdict.NEVER}:
            return never("type", "none of its types is accepted", source, target)
        reasons = []
        for alternative, fit in zip(alternatives, fits, strict=True):
            text, is_none = str(alternative), choices_of(alternative.resolved().node) == [None]
            for reason in at_most_maybe(fit):
                if is_none:
                    reason = replace(reason, kind="optional", what="it may be None", source=str(source))
                elif verdict_of(fit) is Verdict.NEVER and not reason.path:
                    article = "an" if text[:1].lower() in "aeiou" else "a"
                    what = f"it may be {article} {text}, which is not accepted"
                    reason = replace(reason, kind="union", what=what, source=str(source))
                reasons.append(reason)
        return tuple(dict.fromkeys(reasons))

    def _try_choices(self, source: Side, values: list[Any], target: Side) -> Fit:
        """Return the fit of a source of a few values, each of which is tried."""
        nodes = list(nodes_of(target.node))
        if any((calls_user_code(n) and not takes_value(n)) or is_odd_enum(n) for n in nodes):
            return undecided("a validator decides", source, target)
        schema: Any = target.node
        if any(node["type"] == "definition-ref" for node in nodes):
            definitions = [n for n in target.defs.values() if n is not target.node]
            schema = {"type": "definitions", "schema": target.node, "definitions": definitions}
        try:
            validator = SchemaValidator(schema, cast("Any", target.config))
        except Exception:  # Half of a schema is not always one.
            return undecided(_UNKNOWN_BEFORE, source, target)
        refused = []
        for value in values:
            try:
                validator.validate_python(value)
            except Exception:
                refused.append(value)
        if not refused:
            return FITS
        if len(refused) == len(values):
            what = "None is not accepted" if values == [None] else "none of its values is accepted"
            return never("type", what, source, target)
        return maybe("choices", f"of its values {_shown(refused)} is not accepted", source, target)

    # ------------------------------------------------------------------ targets that wrap other types

    def _unwrap_target(self, source: Side, target: Side) -> Fit | None:
        """Return the fit for a target composed of other types; None for any other."""
        node, kind = target.node, target.kind
        if kind == "default" and node.get("on_error") == "default":
            return FITS
        if kind == "default":
            return self.match(source, target.part("schema"))
        if kind == "nullable":
            values = choices_of(source.node)
            if values is None or None not in values:
                return self.match(source, target.part("schema"))
            others = source.to({"type": "literal", "expected": [v for v in values if v is not None]})
            return at_most_maybe(self.match(others, target.part("schema"))) if len(values) > 1 else FITS
        if kind == "union":
            return self._any_of(source, target)
        if kind == "tagged-union":
            return self._tagged(source, target)
        if kind.startswith("function-"):
            return self._past_function(target, source, lambda inner: self.match(source, inner))
        if kind in ("model", "dataclass") and not self._is_instance(source, node["cls"]):
            deciding = _deciding_code(target)
            if deciding:
                return undecided(f"{deciding} decides", source, target)
            return self.match(source, target.root()) if node.get("root_model") else None
        return None

    def _past_function(self, target: Side, source: Side | str, go_on: Callable[[Side], Fit]) -> Fit:
        """Return the fit for a target with a validator function, which is not called."""
        node, inner = target.node, target.part("schema").resolved()
        what = f"the validator {function_name(node)} decides"
        if target.kind == "function-after":
            fit = go_on(inner)
            if takes_value(node) or verdict_of(fit) is Verdict.NEVER:
                return fit
            return (*fit, *undecided(what, source, target))
        if target.kind == "function-wrap" and not calls_user_code(node):
            if inner.kind in LISTS:  # A Sequence: strict in its items alone.
                return go_on(inner.to({**inner.node, "strict": False}))
            if inner.kind == "url":
                return go_on(inner)
        return undecided(what, source, target)

    def _any_of(self, source: Side, target: Side) -> Fit:
        fits = [self.match(source, choice) for choice in target.choices()]
        if not all(fits):
            return FITS
        likely = [fit for fit in fits if verdict_of(fit) is Verdict.MAYBE]
        if not likely:
            return never("type", "none of the types accepts it", source, target)
        if len(likely) == 1:
            return likely[0]
        is_undecided = any(reason.kind == "undecidable" for fit in likely for reason in fit)
        what = "some of its values may be accepted by none of the types"
        return maybe("undecidable" if is_undecided else "union", what, source, target)

    def _tagged(self, source: Side, target: Side) -> Fit:
        """Return the fit for a union with a discriminator: a known tag fits one of its types only."""
        fit, tag = self._any_of(source, target), target.node["discriminator"]
        record = record_of(source) if source.is_record else Record("", {})
        has_tag = isinstance(tag, str) and tag in record.fields and tag not in record.optional
        if has_tag or verdict_of(fit) is Verdict.NEVER:
            return fit
        return undecided("its tag is not known before the run", source, target)

    # ------------------------------------------------------------------ lists and dicts

    def _items(self, source: Side, target: Side) -> Fit:
        if target.is_strict and source.kind != target.kind:
            return never("type", "strict mode converts nothing", source, target)
        own, wanted = _span(source), _span(target)
        merges = target.kind in SETS and source.kind not in SETS  # What is equal becomes one.
        lengths = fit_lengths(own, wanted, source, target, shrinks=merges)
        if verdict_of(lengths) is Verdict.NEVER or 0 in (own["max_length"], wanted["max_length"]):
            return lengths
        parts, wanted_parts = source.items(), target.items()
        hashed = (parts if source.kind in SETS else []) + (wanted_parts if target.kind in SETS else [])
        if any(part.resolved().kind not in LEAVES for part in hashed):
            return undecided("only what can be hashed is in a set", source, target)
        if source.kind == target.kind == "tuple" and len(parts) == len(wanted_parts) > 1:
            pairs = enumerate(zip(parts, wanted_parts, strict=True))
            fits = [under(self.match(a, b), f"[{i}]") for i, (a, b) in pairs]
        else:
            fits = [under(self.match(a, b), "[]") for a in parts for b in wanted_parts]
        return _all_of([lengths, *fits])

    def _dict(self, source: Side, target: Side) -> Fit:
        lengths = fit_lengths(source.node, target.node, source, target)
        if 0 in (source.node.get("max_length"), target.node.get("max_length")):
            return lengths
        own_keys, keys_wanted = source.part("keys_schema"), target.part("keys_schema")
        keys = self.match(own_keys, keys_wanted)
        if own_keys.resolved().is_record:
            keys = undecided(_UNKNOWN_BEFORE, own_keys, keys_wanted)
        values = self.match(source.part("values_schema"), target.part("values_schema"))
        return _all_of([lengths, under(keys, "[key]"), under(values, "[]")])

    # ------------------------------------------------------------------ instances

    def _stays_instance(self, source: Side) -> bool:
        """Return True if an instance crosses as the instance that it is."""
        cls: Any = source.node.get("cls")
        return source.kind in ("model", "dataclass") and not self._accepted.isdisjoint(cls.__mro__)

    def _is_instance(self, source: Side, cls: type) -> bool:
        return self._stays_instance(source) and issubclass(source.node["cls"], cls)

    def _instance_to(self, source: Side, target: Side) -> Fit:
        cls = source.node["cls"]
        if target.kind in ("model", "dataclass") and issubclass(cls, target.node["cls"]):
            is_renewed = target.own_config.get("revalidate_instances") == "always"
            if loses_fields(source) or (is_renewed and cls is not target.node["cls"]):
                return undecided(_UNKNOWN_BEFORE, source, target)
            return FITS
        # A model can be iterated over: pydantic accepts its pairs of names and values as a list.
        is_read = target.own_config.get("from_attributes") or target.kind in LISTS
        if is_read or target.kind not in _KNOWN:
            return undecided(_UNKNOWN_BEFORE, source, target)
        what = f"a {cls.__name__} comes as the instance that it is, and is not a {target}"
        return never("type", what, source, target)

    # ------------------------------------------------------------------ records that arrive as dicts

    def _record_to(self, record: Record, target: Side) -> Fit:
        target = target.resolved()
        kind, name = target.kind, record.name
        if kind == "any":
            return FITS
        if kind in ("default", "nullable"):
            return self._record_to(record, target.part("schema"))
        if target.is_record:
            deciding = _deciding_code(target)
            if deciding:
                return undecided(f"{deciding} decides", name, target)
            if kind != "typed-dict" and (target.node.get("strict") or target.own_config.get("strict")):
                what = "strict mode accepts only instances, and it comes as a dict of its fields"
                # Some versions of pydantic accept a dict for a strict model.
                return undecided(what, name, target) if kind == "model" else never("type", what, name, target)
            return self._fields(record, wanted_of(target))
        if kind == "dict":
            return self._record_to_dict(record, target)
        if kind in LEAVES | LISTS and not is_odd_enum(target.node):
            return never("type", "it comes as a dict of its fields", name, target)
        if kind == "union":
            best = min((self._record_to(record, choice) for choice in target.choices()), key=verdict_of)
            is_never = verdict_of(best) is Verdict.NEVER
            return never("type", "none of the types accepts it", name, target) if is_never else best
        return undecided(_UNKNOWN_BEFORE, name, target)

    def _record_to_dict(self, record: Record, target: Side) -> Fit:
        keys, values = target.part("keys_schema").resolved(), target.part("values_schema")
        limited = keys.kind not in ("str", "any") or limits_of(keys) or limits_of(target)
        if limited or record.is_open:
            return undecided(_UNKNOWN_BEFORE, record.name, target)
        fits = [
            under(at_most_maybe(fit) if name in record.optional else fit, name)
            for name, side in record.fields.items()
            for fit in [self.match(side, values)]
        ]
        return _all_of(fits)

    def _fields(self, record: Record, wanted: Wanted, *, outermost: bool = False) -> Fit:
        fits: list[Fit] = []
        used: set[str] = set()
        for field in wanted.fields:
            source_field = look_up(field, record, by_name=self.target_schema.traits.has_validation_aliases)
            fit = FITS
            if source_field is not None:
                name, is_inside = source_field
                used.add(name)
                side = record.fields[name]
                if outermost:
                    self._accepted = self._accepts(name)
                fit = undecided("its alias is a path into another field", side, field.side)
                if not is_inside:
                    fit = self.match(side, field.side)
                if name in record.optional:
                    fit = at_most_maybe(fit)
                    if field.required:
                        fit += maybe("missing", "it may be missing", side, field.side)
            elif field.required and record.is_open:
                what = f"{record.name} may have it among its further fields, or may not"
                fit = maybe("missing", what, "", field.side)
            elif field.required:
                fit = never("missing", f"{record.name} has no such field", "", field.side)
            elif record.is_open:
                fit = at_most_maybe(self.match(record.others, field.side))
            fits.append(under(fit, field.name))
        fits.append(self._extras(record, wanted, used))
        if wanted.code:
            fits.append(undecided(f"{wanted.code} decides", record.name, wanted.name))
        return _all_of(fits)

    def _extras(self, record: Record, wanted: Wanted, used: set[str]) -> Fit:
        """Return the fit of the fields that the target does not declare."""
        more = [name for name in record.fields if name not in used]
        if wanted.extra == "allow" and wanted.has_typed_extras and (more or record.is_open):
            return undecided("the type of its further fields decides", record.name, wanted.name)
        if wanted.extra != "forbid":
            return FITS
        what = f"{wanted.name} forbids fields that it does not declare"
        fits: list[Fit] = []
        for name in more:
            build = maybe if name in record.optional else never
            fits.append(under(build("extra", what, record.fields[name], ""), name))
        if record.is_open:
            fits.append(maybe("extra", f"{what}, and {record.name} may hold more", record.name, wanted.name))
        return _all_of(fits)


def _all_of(fits: list[Fit]) -> Fit:
    """Return the fit of parts that must all fit: every reason once."""
    return tuple(dict.fromkeys(reason for fit in fits for reason in fit))


def _deciding_code(target: Side) -> str:
    """Return the name of user code that reads the input of a class before its fields, or ""."""
    if target.node.get("custom_init"):
        return f"{target}.__init__"
    first = first_validator(target)
    return f"the validator {first}" if first else ""


def _shown(values: list[Any]) -> str:
    return ", ".join(map(in_words, values[:3])) + (", ..." if len(values) > 3 else "")


def _span(side: Side) -> dict[str, Any]:
    """Return the least and the greatest number of items."""
    node = side.node
    if side.kind == "tuple" and node.get("variadic_item_index") is None:
        count = len(node["items_schema"])
        return {"min_length": count, "max_length": count}
    least = max(node.get("min_length") or 0, len(node["items_schema"]) - 1 if side.kind == "tuple" else 0)
    return {"min_length": least, "max_length": node.get("max_length")}
