"""Types of core schemas, in words, the reasons why one refuses the values of another, and findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Final, Literal

from pydantic import BaseModel

from stroma.contracts.core_schema import FLAT_LEAVES, calls_user_code, core_schema_of, nodes_of

#: What may be wrong, in a word; docs/checks.md explains each of them.
Kind = Literal[
    "missing",
    "type",
    "conversion",
    "constraint",
    "choices",
    "optional",
    "union",
    "extra",
    "unknown",
    "undecidable",
    "items",
    "collision",
    "broken",
    "effect",
]
LEAVES: Final = FLAT_LEAVES - {"complex", "multi-host-url"}
SETS: Final = frozenset({"set", "frozenset"})
LISTS: Final = SETS | {"list", "tuple"}
_EMPTY: Final[dict[str, Any]] = {}
_STRING_SETTINGS: Final = ("strip_whitespace", "to_lower", "to_upper", "min_length", "max_length")
_LIMITS: Final = (
    "ge",
    "gt",
    "le",
    "lt",
    "multiple_of",
    "max_digits",
    "decimal_places",
    "min_length",
    "max_length",
    "pattern",
    "now_op",
    "tz_constraint",
    "version",
    "allowed_schemes",
    "host_required",
)


class Verdict(IntEnum):
    """The verdict on the values of one type as values of another."""

    ALWAYS = 0
    MAYBE = 1
    NEVER = 2


@dataclass(frozen=True, slots=True)
class Side:
    """A place in a core schema: the node, the config of the class around it, and what its references mean."""

    node: dict[str, Any]
    config: dict[str, Any]
    defs: dict[str, Any]

    @classmethod
    def of(cls, model: type[BaseModel]) -> Side:
        core = core_schema_of(model)
        return cls(core, _EMPTY, {n["ref"]: n for n in nodes_of(core) if "ref" in n})

    @classmethod
    def of_model(cls, model: type[BaseModel]) -> Side:
        """Return the side of the class itself, without the validators around it."""
        side = cls.of(model).resolved()
        while side.kind != "model":
            side = side.part("schema").resolved()
        return side

    @classmethod
    def of_root(cls, model: type[BaseModel]) -> Side:
        """Return the side of the value of a root model."""
        return cls.of_model(model).root()

    @property
    def kind(self) -> str:
        return str(self.node["type"])

    @property
    def own_config(self) -> dict[str, Any]:
        """The config of the class that this side is."""
        return self.node.get("config") or _EMPTY

    @property
    def is_strict(self) -> bool:
        return bool(self.node.get("strict", self.config.get("strict")))

    @property
    def is_record(self) -> bool:
        """True for a type with fields that is not a root model."""
        is_model = self.kind == "model" and not self.node.get("root_model")
        return is_model or self.kind in ("dataclass", "typed-dict")

    def to(self, node: dict[str, Any]) -> Side:
        return replace(self, node=node)

    def part(self, key: str) -> Side:
        """Return the type under one key of the node."""
        return self.to(self.node.get(key, UNKNOWN))

    def root(self) -> Side:
        """Return the type of the value of a root model."""
        return replace(self.part("schema"), config=self.own_config)

    def choices(self) -> list[Side]:
        """Return the types of a union."""
        choices = self.node["choices"]
        nodes = choices.values() if isinstance(choices, dict) else choices
        return [self.to(one[0] if isinstance(one, tuple) else one) for one in nodes]

    def items(self) -> list[Side]:
        """Return the types of the items: one for each position of a tuple, else one for all."""
        items = self.node.get("items_schema", UNKNOWN)
        return [self.to(item) for item in items] if isinstance(items, list) else [self.to(items)]

    def resolved(self) -> Side:
        """Return the side without what only names, wraps or configures it."""
        side = self
        while True:
            kind = side.kind
            if kind == "definition-ref":
                side = side.to(side.defs.get(side.node["schema_ref"], UNKNOWN))
            elif kind in (
                "definitions",
                "model-field",
                "typed-dict-field",
                "dataclass-field",
                "custom-error",
            ):
                side = side.part("schema")
            elif kind == "json-or-python":
                side = side.part("python_schema")
            else:
                return side

    def without_default(self) -> Side:
        """Return the side without defaults."""
        side = self.resolved()
        while side.kind == "default":
            side = side.part("schema").resolved()
        return side

    def unwrapped(self) -> Side:
        """Return the side without defaults and None."""
        side = self.resolved()
        while side.kind in ("default", "nullable"):
            side = side.part("schema").resolved()
        return side

    def __str__(self) -> str:
        return _text(self, 0)


UNKNOWN: Final[dict[str, Any]] = {"type": "any"}


# ---------------------------------------------------------------------- verdicts


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a value may be refused, or always is.

    Attributes:
        source, target: both types in words; "" where there is none.
        path: the fields from the outside in, by the target's names where it has them; "[]" for the items of a
            list.
    """

    verdict: Verdict
    kind: Kind
    what: str
    source: str
    target: str
    path: tuple[str, ...] = ()


#: The reasons why values may be refused; none if every value is accepted.
Fit = tuple[Reason, ...]
FITS: Final[Fit] = ()


def maybe(kind: Kind, what: str, source: Side | str, target: Side | str) -> Fit:
    """Return the fit of two types of which some values may not fit."""
    return (Reason(Verdict.MAYBE, kind, what, str(source), str(target)),)


def never(kind: Kind, what: str, source: Side | str, target: Side | str) -> Fit:
    """Return the fit of two types of which no value fits."""
    return (Reason(Verdict.NEVER, kind, what, str(source), str(target)),)


def verdict_of(fit: Fit) -> Verdict:
    """Return the verdict on a whole: that on its worst part."""
    return max((reason.verdict for reason in fit), default=Verdict.ALWAYS)


def under(fit: Fit, *path: str) -> Fit:
    """Return the fit of a part, for the whole."""
    return tuple(replace(reason, path=(*path, *reason.path)) for reason in fit)


def at_most_maybe(fit: Iterable[Reason]) -> Fit:
    """Return the fit of a part that need not be there."""
    return tuple(replace(reason, verdict=Verdict.MAYBE) for reason in fit)


# ---------------------------------------------------------------------- types as people write them


_NAMES: Final = {
    "none": "None",
    "decimal": "Decimal",
    "uuid": "UUID",
    "any": "Any",
    "callable": "Callable",
    "url": "Url",
}
_MAX_DEPTH: Final = 4  # levels of a type that are shown; deeper ones are abbreviated


def _text(side: Side, depth: int) -> str:
    """Return a type with its constraints in parentheses: ``list[str (max_length=5)] | None``."""
    if depth > _MAX_DEPTH:
        return "..."
    node, kind = side.node, side.kind

    def inner(key: str) -> str:
        return _text(side.part(key), depth + 1)

    if kind in ("model", "dataclass", "typed-dict", "enum"):
        return str(getattr(node.get("cls"), "__name__", node.get("cls_name", "TypedDict")))
    if kind in ("definition-ref", "json-or-python"):
        return _text(side.resolved(), depth + 1)
    if kind == "literal":
        return f"Literal[{', '.join(map(in_words, node['expected']))}]"
    if kind in ("is-instance", "is-subclass"):
        return str(node.get("cls_repr") or getattr(node["cls"], "__name__", node["cls"]))
    if kind == "nullable":
        return f"{inner('schema')} | None"
    if kind in ("union", "tagged-union"):
        return " | ".join(dict.fromkeys(_text(choice, depth + 1) for choice in side.choices()))
    if kind == "dict":
        return f"dict[{inner('keys_schema')}, {inner('values_schema')}]{_limits(side)}"
    if kind in LISTS:
        items = [_text(item, depth + 1) for item in side.items()]
        if node.get("variadic_item_index") is not None:
            items.insert(node["variadic_item_index"] + 1, "...")
        return f"{kind}[{', '.join(items) or '()'}]{_limits(side)}"
    if kind == "json":
        return f"Json[{inner('schema')}]"
    if kind == "chain":
        return _text(side.to(node["steps"][-1]), depth + 1)
    if kind == "lax-or-strict":
        return inner("strict_schema")
    if kind.startswith("function-"):
        if calls_user_code(node):
            return f"{inner('schema')} (with a validator)"
        return _owner(node) or inner("schema")
    if "schema" in node:  # default, definitions, model-field ...
        return inner("schema")
    return str(_NAMES.get(kind, kind)) + _limits(side)


def _owner(node: dict[str, Any]) -> str | None:
    """Return the name of the class behind a schema of pydantic's own, such as HttpUrl."""
    function = node["function"].get("function")
    functions = [*(node.get("metadata") or {}).get("pydantic_js_functions", ()), function]
    owners = [function, *(getattr(one, "__self__", None) for one in functions)]
    return next((owner.__name__ for owner in owners if isinstance(owner, type)), None)


def _limits(side: Side) -> str:
    parts = [
        f"{name}={in_words(value, repr if isinstance(value, str) else str)}"
        for name, value in limits_of(side).items()
    ]
    parts += ["strict"] if side.is_strict else []
    return f" ({', '.join(parts)})" if parts else ""


def limits_of(side: Side) -> dict[str, Any]:
    """Return the constraints of a type, those of the class around it included."""
    node, config = side.node, side.config
    limits = {name: node[name] for name in _LIMITS if node.get(name) is not None}
    if side.kind == "str":
        for name in _STRING_SETTINGS:
            value = node.get(name, config.get(f"str_{name}"))
            if value not in (None, False):
                limits[name] = value
    if side.kind == "float" and node.get("allow_inf_nan", config.get("allow_inf_nan")) is False:
        limits["allow_inf_nan"] = False
    return limits


def in_words(value: Any, to_text: Callable[[Any], str] = repr) -> str:
    """Return the repr of a user's value, cut short, or the name of its class if the repr raises."""
    try:
        text = to_text(value)
    except Exception:  # A class of the user's.
        return type(value).__name__
    return text if len(text) <= 40 else text[:39] + "…"


@dataclass(frozen=True, slots=True)
class Giver:
    """A node or group that returned something. ``at``: its position, and its place in groups: "2", "2.0"."""

    node_id: str
    at: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where what a node gives does not, or not always, satisfy what the next one takes.

    Attributes:
        severity: "error": it can never work. "warning": it may fail, or may not be what was meant.
        kind: a word for what is wrong; docs/checks.md has all of them.
        source, target: the ids of the node that gives and of the one that takes; "input" is what the run
            begins with.
        source_at, target_at: where they stand: the position, and the place in groups ("2", "2.0"); "step 0"
            of a step that a flow names.
        path: the field, as the target calls it: "address.street", "items[].price"; "" for the whole.
        source_type, target_type: both types in words; "" where there is none.
        message: what is wrong.
        fix: what to do about it.
    """

    severity: Literal["error", "warning"]
    kind: Kind
    source: str
    target: str
    source_at: str
    target_at: str
    path: str
    source_type: str
    target_type: str
    message: str
    fix: str

    @classmethod
    def between(
        cls,
        by: Giver,
        to: Giver,
        *,
        severity: Literal["error", "warning"] = "warning",
        kind: Kind,
        path: str = "",
        types: tuple[str, str] = ("", ""),
        message: str,
        fix: str,
    ) -> Finding:
        """Return the finding about what one node returns and another takes."""
        return cls(
            severity, kind, by.node_id, to.node_id, by.at, to.at, path, types[0], types[1], message, fix
        )

    def __str__(self) -> str:
        where = f"{self.source!r} -> {self.target!r}" + (f", {self.path}" if self.path else "")
        return f"{self.severity} ({self.kind}): {where}: {self.message}; {self.fix}"


class CheckFailed(ValueError):
    """The nodes of a pipeline cannot work one after the other, by their contracts.

    Attributes:
        findings: all errors, each a Finding with its fix.

    Where: out of ``run()`` with ``RunConfig(check=True)``, before the store is opened and anything is called.
    Cause: a node's output lacks a field that the next node needs, or returns it as a type that the next node
    never accepts.
    Fix: do what each finding says; ``runner.check(nodes)`` and ``stroma check`` give the same list, with the
    warnings.
    """

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__(tuple(findings))
        self.findings = tuple(findings)

    def __str__(self) -> str:
        count = len(self.findings)
        head = "1 thing in this pipeline" if count == 1 else f"{count} things in this pipeline"
        return "\n".join([f"{head} can never work:", *(f"  {finding}" for finding in self.findings)])
