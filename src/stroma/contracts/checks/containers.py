"""Types that hold others, across a boundary: lists, dicts, and records, which cross as instances or as dicts."""

from __future__ import annotations

import datetime as dt
import decimal
import inspect
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from stroma.contracts.checks.pairs import (
    EMPTY,
    FITS,
    LISTS,
    SETS,
    UNKNOWN,
    Fit,
    Reason,
    Side,
    all_of,
    at_most_maybe,
    part_of,
    parts_of,
    span_of,
    undecided,
    verdict_on,
)
from stroma.contracts.checks.records import (
    Record,
    Wanted,
    by_name,
    classes_of,
    is_record,
    look_up,
    loses_fields,
    record_of,
    wanted_of,
)
from stroma.contracts.checks.scalars import LEAVES, Mismatch, Verdict, converts_itself, length_mismatch
from stroma.contracts.schema import Schema

__all__ = ["Inside"]


class Inside(ABC):
    """The part of :class:`stroma.contracts.checks.compatibility.Fitter` that looks into what holds other types.

    ``_accepted``: the classes that cross as instances, in the field that is looked at; ``_as_is``: all do.
    """

    target_schema: Schema
    _accepted: frozenset[type]
    _as_is = False

    @abstractmethod
    def match(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        """Return the verdict on the values of one type as values of another."""

    @abstractmethod
    def _accepts(self, name: str) -> frozenset[type]: ...

    @staticmethod
    def _is_strict(side: Side) -> bool:
        return bool(side.node.get("strict", side.config.get("strict")))

    # ------------------------------------------------------------------ lists and dicts

    def _items(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        if self._is_strict(target) and source.kind != target.kind:
            return verdict_on(
                Mismatch(Verdict.NEVER, "type", "strict mode converts nothing"), source, target, path
            )
        wanted = parts_of(target)
        merges = target.kind in SETS and source.kind not in SETS  # What is equal becomes one.
        mismatch = length_mismatch(span_of(source), span_of(target), shrinks=merges)
        lengths = verdict_on(mismatch, source, target, path)
        if lengths.verdict is Verdict.NEVER or 0 in (
            span_of(source)["max_length"],
            span_of(target)["max_length"],
        ):
            return lengths
        if target.kind in SETS and _is_unhashable(wanted[0]):
            return undecided(path, source, target, "only what can be hashed is taken")
        with self._whole_if(source.kind in SETS):
            return all_of([lengths, *self._parts(source, target, path)])

    def _parts(self, source: Side, target: Side, path: tuple[str, ...]) -> list[Fit]:
        parts, wanted = parts_of(source), parts_of(target)
        if source.kind == "tuple" and target.kind == "tuple" and len(parts) == len(wanted):
            return [
                self.match(a, b, (*path, f"[{i}]" if len(parts) > 1 else "[]"))
                for i, (a, b) in enumerate(zip(parts, wanted, strict=True))
            ]
        return [self.match(a, b, (*path, "[]")) for a in parts for b in wanted]

    @contextmanager
    def _whole_if(self, condition: bool) -> Iterator[None]:
        """Match records as instances if ``condition``: in a set or a key, a dict of their fields is not hashable."""
        was = self._as_is
        self._as_is = was or condition
        try:
            yield
        finally:
            self._as_is = was

    def _dict(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        if 0 in (source.node.get("max_length"), target.node.get("max_length")):
            return verdict_on(length_mismatch(source.node, target.node), source, target, path)
        with self._whole_if(True):
            keys = self.match(
                part_of(source, "keys_schema"), part_of(target, "keys_schema"), (*path, "[key]")
            )
        values = self.match(part_of(source, "values_schema"), part_of(target, "values_schema"), (*path, "[]"))
        lengths = verdict_on(length_mismatch(source.node, target.node), source, target, path)
        return all_of([lengths, keys, values])

    def _instance(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        wanted = target.node["cls"]
        source_class = _CLASSES.get(source.kind)
        if source.kind in ("is-instance", "enum"):
            source_class = source.node["cls"]
        wanted = getattr(wanted, "__origin__", wanted)  # typing.Sequence is no class, and stands for one.
        if not (isinstance(source_class, type) and isinstance(wanted, type)):
            return undecided(path, source, target, "it is not known before the run")
        try:
            # What an abstract class says of hashing, say, its classes need not keep to.
            if wanted in source_class.__mro__ or (
                not inspect.isabstract(source_class) and issubclass(source_class, wanted)
            ):
                return FITS
            related = source.kind == "is-instance" or issubclass(wanted, source_class)
        except TypeError:  # A protocol that cannot be asked.
            return undecided(path, source, target, "it is not known before the run")
        if not related:
            mismatch = Mismatch(Verdict.NEVER, "type", f"it is no {target}")
            return verdict_on(mismatch, source, target, path)
        return undecided(path, source, target, "it is not known before the run")

    # ------------------------------------------------------------------ records: what has fields

    def _stays_instance(self, source: Side) -> bool:
        """Return True if an instance crosses as the instance that it is."""
        cls: Any = source.node.get("cls")
        return source.kind in ("model", "dataclass") and (
            self._as_is or not self._accepted.isdisjoint(cls.__mro__)
        )

    def _is_one(self, source: Side, cls: type) -> bool:
        return self._stays_instance(source) and issubclass(source.node["cls"], cls)

    def _record(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        if self._stays_instance(source):
            return self._kept_to(source, target, path)
        return self._record_to(record_of(source), target, path)

    def _kept_to(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        cls = source.node["cls"]
        if target.kind in ("model", "dataclass", "is-instance"):
            if issubclass(cls, target.node["cls"]):
                renewed = (target.node.get("config") or EMPTY).get("revalidate_instances") == "always"
                if renewed and cls is not target.node["cls"] and is_record(target):
                    return self._fields(record_of(source), wanted_of(target), path)
                return self._copied(source, path)
            if target.kind == "model" and (target.node.get("config") or EMPTY).get("from_attributes"):
                return undecided(path, source, target, "it is read by its attributes")
            what = f"a {cls.__name__} comes as the instance that it is, and is no {target}"
            return verdict_on(Mismatch(Verdict.NEVER, "type", what), source, target, path)
        iterable = hasattr(cls, "__iter__") and target.kind in LISTS and not self._is_strict(target)
        # A model can be iterated over, which gives pairs of names and values: those pydantic takes for a
        # list.
        if target.kind in LEAVES | LISTS | {"dict", "typed-dict"} and not iterable:
            what = f"a {cls.__name__} comes as the instance that it is"
            return verdict_on(Mismatch(Verdict.NEVER, "type", what), source, target, path)
        return undecided(path, source, target, "it is not known before the run")

    def _copied(self, source: Side, path: tuple[str, ...]) -> Fit:
        """Return the verdict on an instance that is copied on its way, by its fields if some are excluded."""
        if self._as_is or not is_record(source) or not loses_fields(source):
            return FITS
        was, self._accepted = self._accepted, self._accepted | classes_of(source)
        try:
            return self._fields(record_of(source), by_name(wanted_of(source)), path)
        finally:
            self._accepted = was

    def _record_to(self, record: Record, target: Side, path: tuple[str, ...]) -> Fit:
        """Return the verdict on a record that arrives as a dict of its fields."""
        target = target.resolved()
        kind = target.kind
        if kind == "any":
            return FITS
        if is_record(target):
            if target.node.get("custom_init"):
                return undecided(path, record.name, target, f"{target}.__init__ decides")
            if kind == "model" and target.node.get(
                "strict"
            ):  # Some versions of pydantic take it all the same.
                return undecided(path, record.name, target, "strict mode takes instances alone")
            if kind == "dataclass" and self._is_strict(
                replace(target, config=target.node.get("config") or target.config)
            ):
                what = "strict mode takes instances alone, and it comes as a dict of its fields"
                return verdict_on(Mismatch(Verdict.NEVER, "type", what), record.name, target, path)
            return self._fields(record, wanted_of(target), path)
        if kind == "dict":
            return self._record_to_dict(record, target, path)
        if converts_itself(target.node):
            return undecided(path, record.name, target, f"{target}._missing_ decides")
        if kind in LEAVES | LISTS:
            reason = Reason(
                Verdict.NEVER, "type", path, record.name, str(target), "it comes as a dict of its fields"
            )
            return Fit(Verdict.NEVER, (reason,))
        if kind in ("default", "nullable"):
            return self._record_to(record, target.to(target.node["schema"]), path)
        if kind == "union":
            fits = [
                self._record_to(record, target.to(c[0] if isinstance(c, tuple) else c), path)
                for c in target.node["choices"]
            ]
            best = min(fits, key=lambda fit: fit.verdict)
            if best.verdict is Verdict.NEVER:
                what = "none of the types takes it"
                return Fit(
                    Verdict.NEVER, (Reason(Verdict.NEVER, "type", path, record.name, str(target), what),)
                )
            return best
        return undecided(path, record.name, target, "it is not known before the run")

    def _record_to_dict(self, record: Record, target: Side, path: tuple[str, ...]) -> Fit:
        keys, values = part_of(target, "keys_schema"), part_of(target, "values_schema")
        names = Side({"type": "literal", "expected": list(record.fields)}, EMPTY, {})
        fits = [self.match(names, keys, (*path, "[key]"))] if record.fields else []
        sure = [name for name in record.fields if name not in record.optional]
        for name, field in record.fields.items():
            fits.append(_if_there(self.match(field, values, (*path, name)), name, record))
        if len(fits) and not sure:
            fits[0] = at_most_maybe(fits[0])
        elif (
            len(fits)
            and not record.optional
            and fits[0].verdict is Verdict.MAYBE
            and fits[0].reasons[0].kind == "choices"
        ):
            fits[0] = Fit(Verdict.NEVER, tuple(replace(r, verdict=Verdict.NEVER) for r in fits[0].reasons))
        count = {
            "min_length": len(sure),
            "max_length": None if record.is_open else len(record.fields),
        }
        fits.append(verdict_on(length_mismatch(count, target.node), Side(_DICT, EMPTY, {}), target, path))
        if record.is_open:
            others = record.others or Side(UNKNOWN, EMPTY, {})
            fits.append(at_most_maybe(self.match(others, values, (*path, "[]"))))
            fits.append(at_most_maybe(self.match(Side(_STR, EMPTY, {}), keys, (*path, "[key]"))))
        return all_of(fits)

    def _fields(
        self, record: Record, wanted: Wanted, path: tuple[str, ...], *, outermost: bool = False
    ) -> Fit:
        fits: list[Fit] = []
        used: set[str] = set()
        for field in wanted.fields:
            source_field = look_up(field, record, by_name=self.target_schema.traits.has_validation_aliases)
            at = (*path, field.name)
            shown = str(field.side)
            if source_field is None:
                if not field.required:
                    if record.is_open:
                        others = record.others or Side(UNKNOWN, EMPTY, {})
                        fits.append(at_most_maybe(self.match(others, field.side, at)))
                    continue
                if record.is_open:
                    what = "it may be among what the other holds beside its fields, or may not"
                    fits.append(Fit(Verdict.MAYBE, (Reason(Verdict.MAYBE, "missing", at, "", shown, what),)))
                else:
                    what = f"{record.name} has no such field"
                    fits.append(Fit(Verdict.NEVER, (Reason(Verdict.NEVER, "missing", at, "", shown, what),)))
                continue
            used.add(source_field.name)
            if source_field.deeper:
                fits.append(
                    undecided(at, source_field.side, field.side, "its alias looks inside of the other field")
                )
                continue
            if outermost:
                self._accepted = self._accepts(source_field.name)
            fits.append(
                _if_there(
                    self.match(source_field.side, field.side, at), source_field.name, record, field.required
                )
            )
            if source_field.name in record.optional and field.required:
                what = "it may be missing"
                fits.append(
                    Fit(
                        Verdict.MAYBE,
                        (Reason(Verdict.MAYBE, "missing", at, str(source_field.side), shown, what),),
                    )
                )
        fits += self._extras(record, wanted, used, path)
        if wanted.code:
            fits.append(undecided(path, record.name, wanted.name, f"{wanted.code} decides"))
        return all_of(fits)

    def _extras(self, record: Record, wanted: Wanted, used: set[str], path: tuple[str, ...]) -> Iterable[Fit]:
        more = [name for name in record.fields if name not in used]
        if wanted.extra == "forbid":
            for name in more:
                verdict = Verdict.MAYBE if name in record.optional else Verdict.NEVER
                what = f"{wanted.name} forbids fields that it does not know"
                type_name = str(record.fields[name])
                yield Fit(verdict, (Reason(verdict, "extra", (*path, name), type_name, "", what),))
            if record.is_open:
                what = f"{wanted.name} forbids fields that it does not know, and {record.name} may hold more"
                yield Fit(
                    Verdict.MAYBE, (Reason(Verdict.MAYBE, "extra", path, record.name, wanted.name, what),)
                )
        elif wanted.extra == "allow" and wanted.extras is not None:
            for name in more:
                yield _if_there(self.match(record.fields[name], wanted.extras, (*path, name)), name, record)
            if record.is_open:
                others = record.others or Side(UNKNOWN, EMPTY, {})
                yield at_most_maybe(self.match(others, wanted.extras, (*path, "[]")))


def _if_there(fit: Fit, name: str, record: Record, required: bool = False) -> Fit:
    """Return the verdict on an optional field, which matters only if the target requires it."""
    return fit if name not in record.optional or required else at_most_maybe(fit)


_DICT: Final[dict[str, Any]] = {"type": "dict"}
_STR: Final[dict[str, Any]] = {"type": "str"}
_CLASSES: Final[dict[str, type]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "bytes": bytes,
    "complex": complex,
    "list": list,
    "set": set,
    "frozenset": frozenset,
    "tuple": tuple,
    "dict": dict,
    "none": type(None),
    "decimal": decimal.Decimal,
    "date": dt.date,
    "datetime": dt.datetime,
    "time": dt.time,
    "timedelta": dt.timedelta,
    "uuid": uuid.UUID,
}


def _is_unhashable(side: Side) -> bool:
    return side.resolved().kind in ("list", "set", "dict", "model", "dataclass", "typed-dict")
