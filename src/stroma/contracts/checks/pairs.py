"""A place in a core schema, and what is found about a pair of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import BaseModel

from stroma.contracts.checks.scalars import Kind, Mismatch, Verdict, worst
from stroma.contracts.checks.type_names import type_text
from stroma.contracts.core_schema import core_schema_of, nodes_of

__all__ = [
    "EMPTY",
    "FITS",
    "LISTS",
    "SETS",
    "UNKNOWN",
    "Fit",
    "Reason",
    "Side",
    "all_of",
    "at_most_maybe",
    "one_of",
    "part_of",
    "parts_of",
    "span_of",
    "undecided",
    "verdict_on",
]

EMPTY: Final[dict[str, Any]] = {}
UNKNOWN: Final[dict[str, Any]] = {"type": "any"}
SETS: Final = frozenset({"set", "frozenset"})
LISTS: Final = SETS | {"list", "tuple"}


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a value may be refused, or always is.

    Attributes:
        path: the fields from the outside in, by the target's names where it has them; "[]" for the items of a
            list.
        source, target: both types in words; "" where there is none.
    """

    verdict: Verdict
    kind: Kind
    path: tuple[str, ...]
    source: str
    target: str
    what: str


@dataclass(frozen=True, slots=True)
class Fit:
    """The verdict on a pair, and the reasons for it if it is not ALWAYS."""

    verdict: Verdict
    reasons: tuple[Reason, ...] = ()


FITS: Final = Fit(Verdict.ALWAYS)


@dataclass(frozen=True, slots=True)
class Side:
    """A place in a core schema: the node, the config of the class around it, and what its references mean."""

    node: dict[str, Any]
    config: dict[str, Any]
    defs: dict[str, Any]

    @classmethod
    def of(cls, model: type[BaseModel]) -> Side:
        core = core_schema_of(model)
        return cls(core, EMPTY, {n["ref"]: n for n in nodes_of(core) if "ref" in n})

    @classmethod
    def of_model(cls, model: type[BaseModel]) -> Side:
        """Return the side of the class itself, without the validators around it."""
        side = cls.of(model).resolved()
        while side.kind != "model":
            side = side.to(side.node.get("schema", UNKNOWN)).resolved()
        return side

    @classmethod
    def of_root(cls, model: type[BaseModel]) -> Side:
        """Return the side of the value of a root model."""
        side = cls.of_model(model)
        return cls(side.node["schema"], side.node.get("config") or EMPTY, side.defs)

    def to(self, node: dict[str, Any]) -> Side:
        return replace(self, node=node)

    @property
    def kind(self) -> str:
        return str(self.node["type"])

    def __str__(self) -> str:
        return type_text(self.node, self.config, self.defs)

    def resolved(self) -> Side:
        """Without what only names, wraps or configures."""
        side = self
        while True:
            node, kind = side.node, side.kind
            if kind == "definition-ref":
                definition = side.defs.get(node["schema_ref"])
                side = side.to(UNKNOWN if definition is None else definition)
            elif kind in ("definitions", "model-field", "typed-dict-field", "dataclass-field"):
                side = side.to(node["schema"])
            elif kind == "json-or-python":
                side = side.to(node["python_schema"])
            elif kind == "custom-error":
                side = side.to(node["schema"])
            else:
                return side


def verdict_on(
    mismatch: Mismatch | None, source: Side | str, target: Side | str, path: tuple[str, ...]
) -> Fit:
    """Return the fit for a mismatch of two types."""
    if mismatch is None:
        return FITS
    reason = Reason(mismatch.verdict, mismatch.kind, path, str(source), str(target), mismatch.what)
    return Fit(mismatch.verdict, (reason,))


def undecided(path: tuple[str, ...], source: Side | str, target: Side | str, what: str) -> Fit:
    """Return a fit that may or may not hold, with the type that cannot be decided."""
    return verdict_on(Mismatch(Verdict.MAYBE, "undecidable", what), source, target, path)


def all_of(fits: Iterable[Fit]) -> Fit:
    """Return the fit of parts that must all fit: the worst verdict, and every reason once."""
    fits = list(fits)
    verdict = worst(fit.verdict for fit in fits)
    return Fit(verdict, tuple(dict.fromkeys(reason for fit in fits for reason in fit.reasons)))


def at_most_maybe(fit: Fit) -> Fit:
    """Return the fit, with MAYBE in place of FITS."""
    if fit.verdict is not Verdict.NEVER:
        return fit
    return Fit(Verdict.MAYBE, tuple(replace(reason, verdict=Verdict.MAYBE) for reason in fit.reasons))


def one_of(fits: list[Fit]) -> Fit:
    """Return the fit of a value that takes one of several types."""
    combined = all_of(fits)
    if combined.verdict is not Verdict.NEVER or all(fit.verdict is Verdict.NEVER for fit in fits):
        return combined
    return at_most_maybe(combined)


def part_of(side: Side, key: str) -> Side:
    """Return the type under one key of a schema node."""
    return side.to(side.node.get(key, UNKNOWN))


def parts_of(side: Side) -> list[Side]:
    """Return the types of the items: one for each position of a tuple, else one for all."""
    items = side.node.get("items_schema", UNKNOWN)
    return [side.to(item) for item in items] if isinstance(items, list) else [side.to(items)]


def span_of(side: Side) -> dict[str, Any]:
    """Return the least and the greatest number of items."""
    node = side.node
    if side.kind == "tuple" and node.get("variadic_item_index") is None:
        count = len(node["items_schema"])
        return {"min_length": count, "max_length": count}
    least = max(node.get("min_length") or 0, len(node["items_schema"]) - 1 if side.kind == "tuple" else 0)
    return {"min_length": least, "max_length": node.get("max_length")}
