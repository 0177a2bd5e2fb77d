"""Plain values between two contracts: which kinds pydantic takes for which, and what constraints promise.

The tables say what ``SchemaValidator`` does in Python mode; the tests hold them against it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Literal, cast

from stroma.contracts.core_schema import FLAT_LEAVES

__all__ = [
    "LEAVES",
    "Kind",
    "Mismatch",
    "Verdict",
    "choices_of",
    "converts_itself",
    "fit_leaf",
    "holds_other",
    "in_words",
    "is_flag",
    "length_mismatch",
    "limits_of",
    "worst",
]

Node = dict[str, Any]
#: What may be wrong, in a word; docs/checks.md says what each of them means.
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
LEAVES: Final = FLAT_LEAVES | {"multi-host-url"}


class Verdict(IntEnum):
    """The verdict on the values of one type as values of another."""

    ALWAYS = 0
    MAYBE = 1
    NEVER = 2


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a plain value may be refused."""

    verdict: Verdict
    kind: Kind
    what: str


#: By the source's kind: what takes all of its values, and what takes some.
_ALL: Final = {
    "str": {"str", "bytes"},
    "int": {"int", "float", "decimal", "complex"},
    "float": {"float", "complex", "decimal"},
    "bytes": {"bytes"},
    "decimal": {"decimal", "float", "complex"},
    "date": {"date", "datetime"},
    "datetime": {"datetime"},
    "time": {"time"},
    "timedelta": {"timedelta"},
    "uuid": {"uuid"},
    "complex": {"complex"},
    "url": {"url"},
    "multi-host-url": {"multi-host-url"},
}
_TIMES: Final = frozenset({"date", "datetime", "time", "timedelta"})
_SOME: Final = {
    "str": _TIMES | {"int", "float", "bool", "decimal", "uuid", "complex", "url", "multi-host-url"},
    "int": _TIMES | {"bool"},
    "float": _TIMES | {"int", "bool"},
    "bytes": _TIMES | {"str", "int", "float", "bool", "decimal", "uuid", "complex", "url", "multi-host-url"},
    "decimal": _TIMES | {"int", "bool"},
    "datetime": {"date"},
    # Nobody has looked closely enough to call these impossible.
    "complex": {"int", "float", "decimal"},
    "url": {"multi-host-url"},
    "multi-host-url": {"url"},
}
#: In strict mode the kind must be the same, but for these.
_STRICT: Final = {"int": {"float"}, "decimal": {"float"}}
_NUMBERS: Final = frozenset({"int", "float", "decimal", "bool", "complex"})
_BOUNDS: Final = ("ge", "gt", "le", "lt")
_DIGITS: Final = ("multiple_of", "max_digits", "decimal_places")
_STRING: Final = {
    "strip_whitespace": "str_strip_whitespace",
    "to_lower": "str_to_lower",
    "to_upper": "str_to_upper",
    "min_length": "str_min_length",
    "max_length": "str_max_length",
}
_SHOWN: Final = (
    *_BOUNDS,
    *_DIGITS,
    "min_length",
    "max_length",
    "pattern",
    "allow_inf_nan",
    "now_op",
    "tz_constraint",
    "version",
)


def worst(verdicts: Iterator[Verdict]) -> Verdict:
    """Return the verdict on a whole all of whose parts must fit."""
    return max(verdicts, default=Verdict.ALWAYS)


def choices_of(node: Node) -> list[Any] | None:
    """Return all values of a type that has only a few."""
    kind = node["type"]
    if kind == "none":
        return [None]
    if kind == "bool":
        return [False, True]
    if kind == "literal":
        return list(node["expected"])
    if kind == "enum" and not is_flag(node):
        return list(node["members"])
    return None


def is_flag(node: Node) -> bool:
    """Return True for an enum that holds more values than its members."""
    return node["type"] == "enum" and issubclass(node["cls"], enum.Flag)


def converts_itself(node: Node) -> bool:
    """Return True for an enum whose own code converts other values to members."""
    missing = getattr(node["cls"], "_missing_", None) if node["type"] == "enum" else None
    return missing is not None and getattr(missing, "__module__", "enum") != "enum"


def holds_other(node: Node) -> bool:
    """Return True for an enum with a member whose value is neither text nor a number."""
    plain = (str, bytes, int, float, complex, type(None))
    return node["type"] == "enum" and not all(isinstance(member.value, plain) for member in node["members"])


def limits_of(node: Node, config: dict[str, Any]) -> dict[str, Any]:
    """Return the constraints of a plain type, those of the class around it included."""
    limits = {name: node[name] for name in _SHOWN if node.get(name) is not None}
    if node["type"] == "str":
        for name, general in _STRING.items():
            value = node.get(name, config.get(general))
            if value not in (None, False):
                limits[name] = value
    if node["type"] == "float" and node.get("allow_inf_nan", config.get("allow_inf_nan")) is False:
        limits["allow_inf_nan"] = False
    return limits


def fit_leaf(
    source: Node, source_config: dict[str, Any], target: Node, target_config: dict[str, Any]
) -> Mismatch | None:
    """Return the mismatch between the values of one plain type and another; None if all fit.

    The source has more values than can be tried; see ``choices_of``.
    """
    kind, wanted = source["type"], target["type"]
    strict = bool(target.get("strict", target_config.get("strict", False)))
    if wanted in ("literal", "enum"):
        return _to_choices(kind, target, strict)
    coerced = target.get("coerce_numbers_to_str", target_config.get("coerce_numbers_to_str"))
    if wanted == "str" and kind in ("int", "float", "decimal") and coerced and not strict:
        if not limits_of(target, target_config):
            return None
        return _maybe("constraint", "what the number reads like is not known before")
    if strict and not (kind == "str" and wanted in ("url", "multi-host-url")):
        if wanted != kind and wanted not in _STRICT.get(kind, ()):
            return Mismatch(Verdict.NEVER, "type", "strict mode converts nothing")
    elif wanted not in _ALL.get(kind, ()):
        if wanted not in _SOME.get(kind, ()):
            return Mismatch(Verdict.NEVER, "type", "no value of the one is a value of the other")
        beyond = (
            _bounds(source, target) if kind in _NUMBERS and wanted in ("int", "float", "decimal") else None
        )
        if beyond is not None and beyond.verdict is Verdict.NEVER:
            return beyond
        return _maybe("conversion", _conversion(kind, wanted))
    return _constraints(source, source_config, target, target_config)


def _maybe(kind: Kind, what: str) -> Mismatch:
    return Mismatch(Verdict.MAYBE, kind, what)


def _conversion(kind: str, wanted: str) -> str:
    if kind in ("str", "bytes"):
        return "only text that reads as one is taken"
    if (kind, wanted) == ("datetime", "date"):
        return "only midnight is taken for a date"
    return "only some of the values are taken"


def _to_choices(kind: str, target: Node, strict: bool) -> Mismatch | None:
    if target["type"] == "literal":
        values = list(target["expected"])
    else:
        if strict:
            return Mismatch(Verdict.NEVER, "type", "strict mode takes members of the enum alone")
        if is_flag(target):
            return _maybe("choices", "only combinations of its members are taken")
        values = [member.value for member in target["members"]]
    values += [v.value for v in values if isinstance(v, enum.Enum)]
    numbers = any(isinstance(v, (int, float, complex)) for v in values)
    texts = any(isinstance(v, (str, bytes)) for v in values)
    other = any(not isinstance(v, (str, bytes, int, float, complex, type(None))) for v in values)
    # An enum of numbers reads text, too.
    reads = texts or (target["type"] == "enum" and (numbers or other))
    if (kind in _NUMBERS and (numbers or other)) or (kind in ("str", "bytes") and reads) or other:
        return _maybe("choices", "only the values that are listed are taken")
    return Mismatch(Verdict.NEVER, "type", "none of its values is one of those that are listed")


def _constraints(
    source: Node, source_config: dict[str, Any], target: Node, target_config: dict[str, Any]
) -> Mismatch | None:
    kind, wanted = source["type"], target["type"]
    if wanted in ("str", "bytes"):
        return _lengths(limits_of(source, source_config), limits_of(target, target_config))
    if wanted in ("url", "multi-host-url"):
        return _addresses(source, target)
    if wanted == "uuid":
        return _version(source.get("version"), target.get("version"))
    mismatch = _bounds(source, target)
    if mismatch is not None and mismatch.verdict is Verdict.NEVER:
        return mismatch
    return (
        mismatch
        or _digits(source, target)
        or _finite(source, source_config, target, target_config)
        or (_times(source, target) if kind == wanted or kind == "date" else None)
    )


def _version(version: int | None, wanted: int | None) -> Mismatch | None:
    if wanted is None or version == wanted:
        return None
    if version is None:
        return _maybe("constraint", f"it may be no UUID of version {wanted}")
    return Mismatch(
        Verdict.NEVER, "constraint", f"it is of version {version}, and must be of version {wanted}"
    )


def _bounds(source: Node, target: Node) -> Mismatch | None:
    mismatch: Mismatch | None = None
    try:
        low, high = _end(source, "ge", "gt", 1), _end(source, "le", "lt", -1)
        for bound, other, names in ((low, high, ("ge", "gt")), (high, low, ("le", "lt"))):
            wanted = _end(target, *names, 1 if names[0] == "ge" else -1)
            if wanted is None:
                continue
            upper = names[0] == "le"
            if other is not None and _outside(other, wanted, upper):
                return Mismatch(
                    Verdict.NEVER, "constraint", f"no value of it is within {_shown(target, names)}"
                )
            if bound is None or not _within(bound, wanted, upper):
                mismatch = _maybe("constraint", f"it may be outside of {_shown(target, names)}")
    except TypeError:  # A time with a zone and one without.
        return _maybe("constraint", "its limits cannot be compared")
    return mismatch


def _shown(target: Node, names: tuple[str, ...]) -> str:
    return ", ".join(
        f"{name}={in_words(target[name], str)}" for name in names if target.get(name) is not None
    )


def in_words(value: Any, to_text: Callable[[Any], str] = repr) -> str:
    """Return the repr of a user's value, cut short, or the name of its class if the repr raises."""
    try:
        text = to_text(value)
    except Exception:  # A class of the user's.
        return type(value).__name__
    return text if len(text) <= 40 else text[:39] + "…"


def _end(node: Node, closed: str, open_: str, step: int) -> tuple[Any, bool] | None:
    """Return a limit, and True if the limit itself is a valid value."""
    ends = [(node[closed], True)] if node.get(closed) is not None else []
    if node.get(open_) is not None:
        whole = node["type"] == "int" and isinstance(node[open_], int)
        ends.append((node[open_] + step, True) if whole else (node[open_], False))
    if not ends:
        return None
    return (max if step > 0 else min)(ends, key=lambda end: (end[0], end[1] is (step < 0)))


def _within(bound: tuple[Any, bool], wanted: tuple[Any, bool], upper: bool) -> bool:
    if bound[0] == wanted[0]:
        return wanted[1] or not bound[1]
    return bool(bound[0] < wanted[0] if upper else bound[0] > wanted[0])


def _outside(end: tuple[Any, bool], wanted: tuple[Any, bool], upper: bool) -> bool:
    """Return True if the whole source lies beyond a limit of the target. ``end``: the nearest limit of the source."""
    if end[0] == wanted[0]:
        return not (end[1] and wanted[1])
    return bool(end[0] > wanted[0] if upper else end[0] < wanted[0])


def _digits(source: Node, target: Node) -> Mismatch | None:
    step, wanted = source.get("multiple_of"), target.get("multiple_of")
    if wanted is not None and step != wanted:
        whole = isinstance(wanted, int) and (
            isinstance(step, int) or (step is None and source["type"] == "int")
        )
        if not (whole and cast("int", step or 1) % wanted == 0):
            return _maybe("constraint", f"it may be no multiple of {in_words(wanted, str)}")
    for name in ("max_digits", "decimal_places"):
        if target.get(name) is not None and any(source.get(n) != target.get(n) for n in _DIGITS[1:]):
            return _maybe("constraint", f"it may not keep to {name}={target[name]}")
    return None


def _finite(
    source: Node, source_config: dict[str, Any], target: Node, target_config: dict[str, Any]
) -> Mismatch | None:
    wanted = target.get("allow_inf_nan", target_config.get("allow_inf_nan", target["type"] != "decimal"))
    if wanted or source["type"] not in ("float", "decimal") or target["type"] not in ("float", "decimal"):
        return None
    may_be_infinite = source.get(
        "allow_inf_nan", source_config.get("allow_inf_nan", source["type"] != "decimal")
    )
    low, high = _end(source, "ge", "gt", 1), _end(source, "le", "lt", -1)
    # No limit lets nan through.
    bounded = low is not None and high is not None and math.isfinite(low[0]) and math.isfinite(high[0])
    if not may_be_infinite or bounded:
        return None
    return _maybe("constraint", "it may be nan or infinite")


def _times(source: Node, target: Node) -> Mismatch | None:
    # A date comes as a time without a zone.
    zone = "naive" if source["type"] == "date" else source.get("tz_constraint")
    wanted = target.get("tz_constraint")
    if wanted is not None and zone != wanted:
        if {zone, wanted} == {"aware", "naive"}:
            return Mismatch(Verdict.NEVER, "constraint", f"it is {zone}, and must be {wanted}")
        return _maybe("constraint", f"it may be other than {wanted}")
    now = target.get("now_op")
    if now is not None and source.get("now_op") != now:
        return _maybe("constraint", f"it may not be in the {now}")
    return None


def _lengths(source: dict[str, Any], target: dict[str, Any]) -> Mismatch | None:
    # What the target does to the text may change its length.
    changes = any(
        target.get(name) and not source.get(name) for name in ("strip_whitespace", "to_lower", "to_upper")
    )
    mismatch = length_mismatch(source, target, shrinks=changes, grows=changes)
    if mismatch is not None:
        return mismatch
    pattern = target.get("pattern")
    if pattern is not None and (changes or source.get("pattern") != pattern):
        return _maybe("constraint", f"it may not match the pattern {pattern!r}")
    return None


def length_mismatch(
    source: dict[str, Any], target: dict[str, Any], *, shrinks: bool = False, grows: bool = False
) -> Mismatch | None:
    """Return the mismatch of two lengths. ``shrinks``, ``grows``: how the target may change the length first."""
    least, most = source.get("min_length") or 0, source.get("max_length")
    wanted, limit = target.get("min_length") or 0, target.get("max_length")
    if most is not None and most < wanted and not grows:
        return Mismatch(
            Verdict.NEVER, "constraint", f"it is at most {most} long, and must be at least {wanted}"
        )
    if limit is not None and least > limit and not shrinks:
        return Mismatch(
            Verdict.NEVER, "constraint", f"it is at least {least} long, and must be at most {limit}"
        )
    if wanted and (least < wanted or shrinks):
        return _maybe("constraint", f"it may be shorter than min_length={wanted}")
    if limit is not None and (most is None or most > limit or grows):
        return _maybe("constraint", f"it may be longer than max_length={limit}")
    return None


def _addresses(source: Node, target: Node) -> Mismatch | None:
    wanted, schemes = target.get("allowed_schemes"), source.get("allowed_schemes")
    if wanted is not None and not (schemes is not None and set(schemes) <= set(wanted)):
        if schemes is not None and not set(schemes) & set(wanted):
            return Mismatch(Verdict.NEVER, "constraint", f"its scheme is none of {', '.join(wanted)}")
        return _maybe("constraint", f"its scheme may be none of {', '.join(wanted)}")
    for name in ("host_required", "default_host", "default_port", "default_path"):
        if target.get(name) and not source.get(name) and name == "host_required":
            return _maybe("constraint", "it may have no host")
    return length_mismatch({"max_length": source.get("max_length")}, {"max_length": target.get("max_length")})
