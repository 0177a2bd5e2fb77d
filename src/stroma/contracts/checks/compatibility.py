"""Decide if every value of one class crosses the boundary to another, as :meth:`Schema.convert` does.

Both sides are pydantic's core schemas. What is read off them is which values the source can hold *after*
validation, and which the target's validator takes. Nothing of the user's is called. There is a reason for
each place that may refuse; where functions decide, the reason names them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import BaseModel

from stroma.contracts.checks.pairs import (
    EMPTY,
    FITS,
    LISTS,
    UNKNOWN,
    Fit,
    Reason,
    Side,
    undecided,
    verdict_on,
)
from stroma.contracts.checks.records import (
    Record,
    by_name,
    first_word,
    is_record,
    loses_fields,
    record_of,
    wanted_of,
)
from stroma.contracts.checks.scalars import (
    LEAVES,
    Mismatch,
    Verdict,
    choices_of,
    fit_leaf,
    holds_other,
    is_flag,
)
from stroma.contracts.checks.sources import alternatives_of, is_alike
from stroma.contracts.checks.targets import Taking
from stroma.contracts.schema import schema_of

__all__ = ["Fitter", "fit_classes"]


def fit_classes(source: type[BaseModel], target: type[BaseModel], *, apart: bool = False) -> Fit:
    """Return the verdict on models of one class as input of another. ``apart``: models inside arrive as dicts."""
    noted = source is target and not apart and schema_of(source).traits.tracks_instances
    if noted and not loses_fields(Side.of_model(source)):
        return FITS  # The engine notes what such a class has validated, which crosses to itself unchanged.
    return Fitter(source, target, apart=apart).fit()


_MAX_REPEATED: Final = 100


@dataclass(frozen=True, slots=True)
class _Known:
    """The verdict on two types, and where it was made. They are held, so that no others can have their ids."""

    fit: Fit
    path: tuple[str, ...]
    source: Side
    target: Side


class Fitter(Taking):
    """One pair of classes."""

    def __init__(
        self, source: type[BaseModel] | None, target: type[BaseModel], *, apart: bool = False
    ) -> None:
        self.target_class = target
        self.target_schema = schema_of(target)
        self.target = Side.of(target)
        self.apart = apart
        self.source_class = source
        self.source = Side(UNKNOWN, EMPTY, {}) if source is None else Side.of(source)
        #: Classes that cross as instances, in the field that is looked at.
        self._accepted: frozenset[type] = frozenset()
        decoded_by_source = frozenset[str]() if source is None else schema_of(source).traits.decoded_fields
        wanted = self.target_schema.traits.decoded_fields
        #: Text that the source has decoded is not decoded again.
        self._decoded = bool(wanted) and wanted <= decoded_by_source
        self._open: set[tuple[int, int]] = set()
        #: What was found of types that hold others, in the order in which that was done.
        self._known: dict[Any, _Known] = {}
        self._repeated = 0

    def fit(self) -> Fit:
        """Return the verdict on the two classes."""
        assert self.source_class is not None
        own = getattr(BaseModel.model_validate, "__func__", None)
        if getattr(self.target_class.model_validate, "__func__", None) is not own:
            return undecided(
                (), self.source, self.target, f"{self.target_class.__name__}.model_validate decides"
            )
        if not schema_of(
            self.source_class
        ).traits.computed_fields:  # Inside of itself it has nothing to add then.
            own, its = Side.of_model(self.source_class), Side.of_model(self.target_class)
            self._open.add((id(own.node), id(its.node)))
        # What wraps the class are validators that have had their say.
        if schema_of(self.source_class).is_root:
            self._accepted = self._accepts("root")
            return self.match(Side.of_root(self.source_class), self.target, ())
        return self._whole(record_of(Side.of_model(self.source_class)))

    def _accepts(self, name: str) -> frozenset[type]:
        return frozenset() if self.apart else self.target_schema.traits.field_classes.get(name, frozenset())

    def fit_item(self, item: Side, *, bare: bool = False) -> Fit:
        """Return the verdict on the items of a list, each of which ``map_over`` passes to the target as its input.

        ``bare``: through a group, whose nodes are given an item that is no record as it is.
        """
        item = item.resolved()
        alternatives = alternatives_of(item, self._stays_instance)
        if alternatives is not None:
            return self._each(
                item, alternatives, self.target, (), lambda one, *_: self.fit_item(one, bare=bare)
            )
        if item.kind == "any":
            return self.match(item, self.target, ())
        if is_record(item) or item.kind == "dict":
            return self._whole(replace(record_of(item), computed={}))
        if self.target_schema.is_root:
            return self.match(item, self.target, ())
        required = [n for n, info in self.target_class.model_fields.items() if info.is_required()]
        if len(required) == 1 and not bare:
            return self._whole(Record(str(item), {required[0]: item}))
        if bare:
            what = f"an item that is no record reaches the nodes of a group as it is, and {self.target_class.__name__} is no RootModel"
            return verdict_on(Mismatch(Verdict.NEVER, "items", what), item, self.target, ())
        what = (
            f"an item that is no record becomes the value of the only required field, and {self.target_class.__name__} "
            f"has {len(required) or 'none'}{' of them' if required else ''}"
        )
        return verdict_on(Mismatch(Verdict.NEVER, "items", what), item, self.target, ())

    def _whole(self, record: Record) -> Fit:
        """Return the verdict on the fields of a record as the input of the target itself."""
        wanted = set(self.target_schema.field_names)
        more = {k: v for k, v in record.computed.items() if k in wanted and k not in record.fields}
        return self._through(replace(record, fields={**record.fields, **more}), self.target)

    def _through(self, record: Record, target: Side) -> Fit:
        target = target.resolved()
        kind = target.kind
        if kind.startswith("function-"):
            return self._past_function(target, (), record.name, lambda inner: self._through(record, inner))
        if kind != "model":
            return self._record_to(record, target, ())
        if target.node.get("custom_init"):
            return undecided((), record.name, target, f"{target}.__init__ decides")
        first = first_word(target)
        if first:
            return undecided((), record.name, target, f"the validator {first} decides")
        if target.node.get("root_model"):
            config = target.node.get("config") or EMPTY
            return self._through(record, replace(target.to(target.node["schema"]), config=config))
        wanted = wanted_of(target)
        if self.source_class is self.target_class:
            wanted = by_name(wanted)
        return self._fields(record, wanted, (), outermost=True)

    # ------------------------------------------------------------------ any two types

    def match(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        """Return the verdict on the values of one type as values of another."""
        source, target = source.resolved(), target.resolved()
        key = id(source.node), id(target.node)
        if key in self._open:  # A type inside itself: it fits if all the rest of it does.
            return FITS
        if source.kind in LEAVES or target.kind in LEAVES:
            return self._match(source, target, path)
        full = (*key, id(source.config), id(target.config), self._accepted, self._as_is)
        if full in self._known:
            return self._again(self._known[full], path)
        before = len(self._known)
        self._open.add(key)
        try:
            fit = self._match(source, target, path)
        finally:
            self._open.discard(key)
        if fit.verdict is not Verdict.ALWAYS:
            # What fits inside of it may do so only if all of it did.
            for other in list(self._known)[before:]:
                if self._known[other].fit.verdict is Verdict.ALWAYS:
                    del self._known[other]
        self._known[full] = _Known(fit, path, source, target)
        return fit

    def _again(self, known: _Known, path: tuple[str, ...]) -> Fit:
        """Return an earlier verdict on two types for another place; after enough places, only its first mismatch."""
        reasons = known.fit.reasons
        self._repeated += len(reasons)
        if self._repeated > _MAX_REPEATED:
            reasons = reasons[:1]
        start = len(known.path)
        moved = tuple(replace(reason, path=(*path, *reason.path[start:])) for reason in reasons)
        return Fit(known.fit.verdict, moved)

    def _match(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        if target.kind == "any" or is_alike(source, target):
            return FITS
        alternatives = alternatives_of(source, self._stays_instance)
        if alternatives is not None:
            return self._each(source, alternatives, target, path)
        unwrapped = self._unwrap_target(source, target, path)
        if unwrapped is not None:
            return unwrapped
        return self._match_plain(source, target, path)

    def _match_plain(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        kind, wanted = source.kind, target.kind
        if kind == "any":
            what = "nothing is known of what it holds"
            return Fit(
                Verdict.MAYBE, (Reason(Verdict.MAYBE, "unknown", path, str(source), str(target), what),)
            )
        values = choices_of(source.node)
        if values is not None:
            return self._choices(source, values, target, path)
        if is_flag(source.node):
            if wanted == "enum" and source.node["cls"] is target.node["cls"]:
                return FITS
            return undecided(path, source, target, "combinations of its members have values of their own")
        if holds_other(target.node):
            mismatch = Mismatch(Verdict.MAYBE, "choices", "only the values of its members are taken")
            return verdict_on(mismatch, source, target, path)
        if kind in LEAVES and wanted in LEAVES:
            return verdict_on(
                fit_leaf(source.node, source.config, target.node, target.config), source, target, path
            )
        if is_record(source) or kind == "model":
            return self._record(source, target, path)
        if wanted == "is-instance":
            return self._instance(source, target, path)
        if kind in LISTS and wanted in LISTS:
            return self._items(source, target, path)
        if kind == "dict":
            if wanted == "dict":
                return self._dict(source, target, path)
            if is_record(target):
                return self._record_to(record_of(source), target, path)
        known = LEAVES | LISTS | {"dict", "model", "dataclass", "typed-dict"}
        if kind in known and wanted in known:
            return verdict_on(
                Mismatch(Verdict.NEVER, "type", "no value of the one is a value of the other"),
                source,
                target,
                path,
            )
        if kind == "is-instance" and wanted == "str" and isinstance(source.node["cls"], type):
            cls = source.node["cls"]
            if not (
                issubclass(str, cls)
                or issubclass(cls, str | bytes | bytearray)
                or hasattr(cls, "__members__")
            ):
                return verdict_on(
                    Mismatch(Verdict.NEVER, "type", f"a {source} is no text"), source, target, path
                )
        return undecided(path, source, target, "it is not known before the run")

    # ------------------------------------------------------------------ what the source can hold

    def _each(
        self,
        source: Side,
        alternatives: list[Side],
        target: Side,
        path: tuple[str, ...],
        match: Callable[[Side, Side, tuple[str, ...]], Fit] | None = None,
    ) -> Fit:
        match = match or self.match
        if len(alternatives) == 1:
            return match(alternatives[0], target, path)
        fits = [match(alternative, target, path) for alternative in alternatives]
        verdicts = {fit.verdict for fit in fits}
        if verdicts == {Verdict.ALWAYS}:
            return FITS
        if verdicts == {Verdict.NEVER}:
            return verdict_on(
                Mismatch(Verdict.NEVER, "type", "none of its types is taken"), source, target, path
            )
        reasons: list[Reason] = []
        for alternative, fit in zip(alternatives, fits, strict=True):
            for reason in fit.reasons:
                kind, what, source_type = reason.kind, reason.what, reason.source
                if alternative.resolved().kind == "none":
                    kind, what, source_type = "optional", "it may be None", str(source)
                elif fit.verdict is Verdict.NEVER and reason.path == path:
                    kind, source_type = "union", str(source)
                    what = f"it may be {_article(alternative)}, which is not taken"
                reasons.append(
                    replace(reason, verdict=Verdict.MAYBE, kind=kind, what=what, source=source_type)
                )
        return Fit(Verdict.MAYBE, tuple(dict.fromkeys(reasons)))


def _article(side: Side) -> str:
    text = str(side)
    return f"{'an' if text[:1].lower() in 'aeiou' else 'a'} {text}"
