"""Values of every kind that a state may hold, for Hypothesis, and their equality."""

import dataclasses
import datetime as dt
import math
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import strategies as st
from pydantic import BaseModel


class Colour(Enum):
    RED = "red"
    BLUE = (1, 2)


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Word(StrEnum):
    YES = "yes"


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, told by type, sign of zero, zone and fold; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, Decimal):
        return a.as_tuple() == b.as_tuple()
    if isinstance(a, dt.datetime):
        # Two zones may show the same wall clock: the zone and the fold count too.
        return (
            a.replace(tzinfo=None) == b.replace(tzinfo=None)
            and a.fold == b.fold
            and a.utcoffset() == b.utcoffset()
            and getattr(a.tzinfo, "key", None) == getattr(b.tzinfo, "key", None)
        )
    if isinstance(a, BaseModel):
        extra_a, extra_b = a.__pydantic_extra__ or {}, b.__pydantic_extra__ or {}
        return same(dict(vars(a)), dict(vars(b))) and same(extra_a, extra_b)
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"]
datetimes = st.one_of(
    st.datetimes(),
    st.datetimes(timezones=st.sampled_from(ZONES).map(ZoneInfo)),
    st.datetimes(timezones=st.integers(-1439, 1439).map(lambda m: dt.timezone(dt.timedelta(minutes=m)))),
    st.datetimes(timezones=st.just(dt.UTC)),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["\0", "e\u0301", "é", "🙂‍↔️", "\u202e", "line\nline", "$c", "\ufeff"]
)
anything: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        texts,
        st.binary(max_size=8),
        st.decimals(allow_nan=False),
        st.uuids(),
        datetimes,
        st.dates(),
        st.timedeltas(),
        st.sampled_from(["$c", "$f", "$d", "$x", "stroma/1"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(texts | st.sampled_from(["$c", "$f", "$d", "$"]), inner, max_size=3),
        st.dictionaries(st.integers() | st.booleans() | texts, inner, max_size=3),
        st.frozensets(st.integers() | texts, max_size=3),
        st.sets(st.integers() | texts, max_size=3),
    ),
    max_leaves=12,
)
