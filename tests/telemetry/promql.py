"""PromQL taken apart as far as it takes to see which series, labels and values a query names."""

import dataclasses
import re

_TOKEN = re.compile(
    r"""\s+ | \#[^\n]*
      | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<duration>\[[^\]]*\] | \boffset\s+(?:\$\w+|\w+))
      | (?P<name>[A-Za-z_:][\w:]*)
      | (?P<number>\d[\w.]*)
      | (?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^(){},=<>])""",
    re.VERBOSE,
)
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_OPERATORS = {"and", "or", "unless", "bool", "offset"}


@dataclasses.dataclass
class Query:
    """What a query names.

    Attributes:
        selectors: each series with its matchers: label, operator, value.
        grouping: the labels in `by (...)`, `on (...)` and the like.
        functions: what is called, aggregations too.
    """

    selectors: list[tuple[str, list[tuple[str, str, str]]]] = dataclasses.field(default_factory=list)
    grouping: set[str] = dataclasses.field(default_factory=set)
    functions: set[str] = dataclasses.field(default_factory=set)


def tokens(text: str) -> list[tuple[str, str]]:
    findings, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"not PromQL from {text[at : at + 20]!r} on: {text}")
        if match.lastgroup is not None:
            findings.append((match.lastgroup, match.group()))
        at = match.end()
    return findings


def parse(text: str) -> Query:
    query, stream = Query(), tokens(text)
    stream.append(("end", ""))
    at = 0
    while stream[at][0] != "end":
        kind, token = stream[at]
        at += 1
        if kind != "name" or token in _OPERATORS:
            continue
        if token in _GROUPING:
            while stream[at][1] != ")":
                if stream[at][0] == "name":
                    query.grouping.add(stream[at][1])
                at += 1
        elif stream[at][1] == "(" or stream[at][1] in _GROUPING:
            query.functions.add(token)
        else:
            matchers: list[tuple[str, str, str]] = []
            if stream[at][1] == "{":
                at = _matchers(stream, at + 1, matchers)
            query.selectors.append((token, matchers))
    return query


def _matchers(stream: list[tuple[str, str]], at: int, findings: list[tuple[str, str, str]]) -> int:
    while stream[at][1] != "}":
        (_, label), (_, operator), (kind, value) = stream[at : at + 3]
        if kind != "string":
            raise ValueError(f"{label}{operator} is followed by {value!r}, not by a string")
        findings.append((label, operator, value[1:-1]))
        at += 3
        if stream[at][1] == ",":
            at += 1
    return at + 1
