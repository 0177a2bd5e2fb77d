"""Plain values between two contracts: which kinds pydantic accepts for which, and what constraints guarantee.

The tables say what ``SchemaValidator`` does in Python mode; the tests compare them with it.
"""

from __future__ import annotations

import enum
from typing import Any, Final

from stroma.contracts.checks.types import (
    FITS,
    LEAVES,
    Fit,
    Side,
    Verdict,
    in_words,
    limits_of,
    maybe,
    never,
    verdict_of,
)

_TIMES: Final = frozenset({"date", "datetime", "time", "timedelta"})
_FROM_TEXT: Final = _TIMES | LEAVES - {"str", "bytes", "none", "literal", "enum"}
_NUMBERS: Final = frozenset({"int", "float", "decimal", "bool"})
#: By the source's kind: what accepts all of its values besides the kind itself, and what accepts some.
_ALL: Final = {"str": {"bytes"}, "int": {"float", "decimal"}, "decimal": {"float"}, "date": {"datetime"}}
_SOME: Final = {
    "str": _FROM_TEXT,
    "bytes": _FROM_TEXT | {"str"},
    "int": _TIMES | {"bool"},
    "float": _TIMES | {"int", "bool", "decimal"},
    "decimal": _TIMES | {"int", "bool"},
    "datetime": {"date"},
}
#: In strict mode the kind must be the same, but for these.
_STRICT: Final = {"int": {"float"}, "decimal": {"float"}}
_CHANGES: Final = ("strip_whitespace", "to_lower", "to_upper")
_RANGE: Final = ("ge", "gt", "le", "lt", "min_length", "max_length")


def choices_of(node: dict[str, Any]) -> list[Any] | None:
    """Return all values of a type that has only a few."""
    kind = node["type"]
    if kind in ("none", "bool"):
        return [None] if kind == "none" else [False, True]
    if kind == "literal":
        return list(node["expected"])
    return list(node["members"]) if kind == "enum" and not is_odd_enum(node) else None


def is_odd_enum(node: dict[str, Any]) -> bool:
    """Return True for an enum whose code decides: a flag, ``_missing_``, or members of any type."""
    if node["type"] != "enum":
        return False
    plain = (str, bytes, int, float, complex, type(None))
    converts = getattr(getattr(node["cls"], "_missing_", None), "__module__", "enum") != "enum"
    is_plain = all(isinstance(member.value, plain) for member in node["members"])
    return converts or not is_plain or issubclass(node["cls"], enum.Flag)


def fit_leaf(source: Side, target: Side) -> Fit:
    """Return the fit of two plain types. The source has more values than can be tried; see ``choices_of``."""
    kind, wanted = source.kind, target.kind
    if wanted in ("literal", "enum"):
        return _fit_choices(source, target)
    coerced = target.node.get("coerce_numbers_to_str", target.config.get("coerce_numbers_to_str"))
    if wanted == "str" and kind in _NUMBERS and coerced:
        return maybe("conversion", _SOME_VALUES, source, target)
    if target.is_strict and (kind, wanted) != ("str", "url"):
        if wanted != kind and wanted not in _STRICT.get(kind, ()):
            return never("type", "strict mode converts nothing", source, target)
    elif wanted != kind and wanted not in _ALL.get(kind, ()):
        if wanted not in _SOME.get(kind, ()):
            return never("type", "no value of the one is a value of the other", source, target)
        beyond = _fit_range(source, target) if {kind, wanted} <= _NUMBERS - {"bool"} else FITS
        if verdict_of(beyond) is Verdict.NEVER:
            return beyond
        what = "only text that reads as one is accepted" if kind in ("str", "bytes") else _SOME_VALUES
        return maybe("conversion", what, source, target)
    return _fit_constraints(source, target)


_SOME_VALUES: Final = "only some of the values are accepted"


def _fit_choices(source: Side, target: Side) -> Fit:
    """Return the fit of a plain type and a literal or an enum."""
    if target.kind == "literal":
        values = list(target.node["expected"])
    elif target.is_strict:
        return never("type", "strict mode accepts only members of the enum", source, target)
    else:
        values = [member.value for member in target.node["members"]]
    values += [value.value for value in values if isinstance(value, enum.Enum)]
    has_numbers = any(isinstance(value, (int, float, complex)) for value in values)
    has_texts = any(isinstance(value, (str, bytes)) for value in values)
    # An enum of numbers reads text, too.
    reads_text = has_texts or (target.kind == "enum" and has_numbers)
    if (source.kind in _NUMBERS and has_numbers) or (source.kind in ("str", "bytes") and reads_text):
        return maybe("choices", "only the listed values are accepted", source, target)
    return never("type", "none of its values is one of those that are listed", source, target)


def _fit_constraints(source: Side, target: Side) -> Fit:
    """Return the fit of two types of kinds that convert without loss, by the limits of the target."""
    promised, wanted = limits_of(source), limits_of(target)
    fit = FITS
    if target.kind in ("str", "bytes"):
        changes = any(wanted.get(name) and not promised.get(name) for name in _CHANGES)
        if changes or source.kind != target.kind:  # The target changes the text, and with it the length.
            promised = {}
        fit = fit_lengths(promised, wanted, source, target)
    elif source.kind in _NUMBERS | _TIMES:
        fit = _fit_range(source, target)
    if fit:
        return fit
    if _may_be_infinite(source) and target.kind in ("float", "decimal") and not _may_be_infinite(target):
        return maybe("constraint", "it may be nan or infinite", source, target)
    for name, limit in wanted.items():
        own = promised.get(name)
        if name in _RANGE or name in _CHANGES or name == "allow_inf_nan" or own == limit:
            continue
        if name == "multiple_of" and isinstance(own, int) and isinstance(limit, int) and own % limit == 0:
            continue
        return maybe("constraint", f"it may not satisfy {name}={in_words(limit, str)}", source, target)
    return FITS


def _may_be_infinite(side: Side) -> bool:
    default = side.kind == "float"
    is_allowed = side.node.get("allow_inf_nan", side.config.get("allow_inf_nan", default))
    return side.kind in ("float", "decimal") and bool(is_allowed)


def _fit_range(source: Side, target: Side) -> Fit:
    """Return the fit of the bounds of two numbers or times."""
    fit = FITS
    try:
        low, high = _bound(source.node, 1), _bound(source.node, -1)
        for sign, near, far in ((1, low, high), (-1, high, low)):
            limit = _bound(target.node, sign)
            if limit is None:
                continue
            names = ("ge", "gt") if sign > 0 else ("le", "lt")
            shown = ", ".join(f"{n}={in_words(target.node[n], str)}" for n in names if n in target.node)
            if far is not None and _is_beyond(far, limit, sign):
                return never("constraint", f"no value of it is within {shown}", source, target)
            if near is None or not _is_inside(near, limit, sign):
                fit = maybe("constraint", f"it may be outside of {shown}", source, target)
    except TypeError:  # A time with a zone and one without.
        return maybe("constraint", "its limits cannot be compared", source, target)
    return fit


def _bound(node: dict[str, Any], sign: int) -> tuple[Any, bool] | None:
    """Return the lower bound (``sign`` 1) or upper one (-1) of a type, and True if it is itself a value."""
    closed, opened = ("ge", "gt") if sign > 0 else ("le", "lt")
    ends = [(node[closed], True)] if node.get(closed) is not None else []
    if node.get(opened) is not None:
        is_whole = node["type"] == "int" and isinstance(node[opened], int)
        ends.append((node[opened] + sign, True) if is_whole else (node[opened], False))
    if len(ends) == 2 and ends[0][0] == ends[1][0]:
        return ends[1]
    return (max if sign > 0 else min)(ends, key=lambda end: end[0], default=None)


def _is_inside(own: tuple[Any, bool], limit: tuple[Any, bool], sign: int) -> bool:
    if own[0] == limit[0]:
        return limit[1] or not own[1]
    return bool(own[0] > limit[0] if sign > 0 else own[0] < limit[0])


def _is_beyond(own: tuple[Any, bool], limit: tuple[Any, bool], sign: int) -> bool:
    """Return True if all values up to the far end of the source are beyond a limit of the target."""
    if own[0] == limit[0]:
        return not (own[1] and limit[1])
    return bool(own[0] < limit[0] if sign > 0 else own[0] > limit[0])


def fit_lengths(
    own: dict[str, Any], wanted: dict[str, Any], source: Side | str, target: Side, *, shrinks: bool = False
) -> Fit:
    """Return the fit of two lengths. ``shrinks``: the target may make the value shorter first."""
    least, most = own.get("min_length") or 0, own.get("max_length")
    low, high = wanted.get("min_length") or 0, wanted.get("max_length")
    if most is not None and most < low:
        return never("constraint", f"it has at most {most}, and needs at least {low}", source, target)
    if high is not None and least > high and not shrinks:
        return never("constraint", f"it has at least {least}, and may have at most {high}", source, target)
    if low and (least < low or shrinks):
        return maybe("constraint", f"it may be shorter than min_length={low}", source, target)
    if high is not None and (most is None or most > high):
        return maybe("constraint", f"it may be longer than max_length={high}", source, target)
    return FITS
